#!/usr/bin/env bash
# What calls, plans, imports and starts cost beside FlashInfer's own: benchmarks/host.py.
#
#   [FI_FFI_KERNELS=wheel] tools/gpu_bench.sh [its arguments]
#
# `--rows lengths-memory` calls a million shapes, for minutes; no other choice of rows includes it.
#
# The table, JSON, CSV and plot are left under $OUT.  A wheel that is named is installed in a folder
# of its own, so that fi_ffi and flashinfer-python load the same files; without one, both take the
# installed flashinfer-jit-cache.  Needs a GPU, torch, a C++ compiler, and what gpu_environment.sh
# needs.
set -u
cd "$(dirname "$0")/.."
. tools/gpu_environment.sh
if [ -n "${FI_FFI_KERNELS:-}" ]; then
  site=$(mktemp -d)
  export PYTHONPATH=$PYTHONPATH:$site
  python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" "$FI_FFI_KERNELS" || exit
  unset FI_FFI_KERNELS
fi
set -o pipefail
python3 benchmarks/host.py --output "$out" "$@" | tee "$out/host.txt"
