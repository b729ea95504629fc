#!/usr/bin/env bash
# What calls, plans, imports and starts cost beside FlashInfer's own: benchmarks/host.py.
#
#   [FI_FFI_KERNELS=wheel] tools/gpu_bench.sh [its arguments]
#
# `--rows lengths-memory` calls a million shapes, for minutes; no other choice of rows includes it.
#
# The table, JSON, CSV and plot are left under $OUT.  The kernel wheel (the newest in
# .kernels/core/ where none is named) is installed in a folder of its own, with what lies in
# .wheels/, so that fi_ffi and flashinfer-python load the same files.  Needs a GPU, torch, a C++
# compiler, and what gpu_environment.sh needs.
set -u
cd "$(dirname "$0")/.."
kernels=${FI_FFI_KERNELS:-$(ls -t .kernels/core/*.whl 2>/dev/null | head -1)}
site=
. tools/gpu_environment.sh
unset FI_FFI_KERNELS
if [ -z "$site" ]; then
  site=$(mktemp -d)
  export PYTHONPATH=$PYTHONPATH:$site
fi
if [ -n "$kernels" ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" "$kernels" || exit
fi
set -o pipefail
python3 benchmarks/host.py --output "$out" "$@" | tee "$out/host.txt"
