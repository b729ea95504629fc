#!/usr/bin/env bash
# Every GPU test, the demo and the doctor on this machine, results under $OUT.
#
#   FI_FFI_KERNELS=wheel-or-directory tools/gpu_run.sh [pytest arguments]
#
# Needs a GPU, Python 3.10 or later, and fi_ffi's dependencies; wheels lying in
# .wheels/ are used for those that are missing (for machines without a network).
set -u
cd "$(dirname "$0")/.."
out=${OUT:-.out}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if compgen -G '.wheels/*.whl' >/dev/null; then
  site=$(mktemp -d)
  python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" .wheels/*.whl || exit
  export PYTHONPATH=$PYTHONPATH:$site
fi
if [ -z "${FI_FFI_KERNELS:-}" ]; then
  FI_FFI_KERNELS=$(ls -t .kernels/*sm90a*.whl 2>/dev/null | head -1)
  export FI_FFI_KERNELS
fi
fi_ffi() { python3 -c 'from fi_ffi.cli import main; main()' "$@"; }
status=0
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
fi_ffi doctor | tee "$out/doctor.txt" || status=1
fi_ffi demo | tee "$out/demo.txt" || status=1
FI_FFI_RUN_GPU_TESTS=1 python3 -m pytest tests/gpu -q -p no:cacheprovider \
  --junitxml="$out/gpu.xml" "$@" 2>&1 | tee "$out/gpu.txt"
[ "${PIPESTATUS[0]}" -eq 0 ] || status=1
exit $status
