#!/usr/bin/env bash
# Every GPU test, the demo and the doctor on this machine, results under $OUT.
#
#   [FI_FFI_KERNELS=wheel-or-directory] tools/gpu_run.sh [pytest arguments]
#
# Needs a GPU, and what gpu_environment.sh needs.  Tests of modules that the kernels lack are skipped
# and say how to get them.
set -u
cd "$(dirname "$0")/.."
. tools/gpu_environment.sh
fi_ffi() { python3 -c 'from fi_ffi.cli import main; main()' "$@"; }
status=0
fi_ffi doctor | tee "$out/doctor.txt" || status=1
fi_ffi demo | tee "$out/demo.txt" || status=1
FI_FFI_RUN_GPU_TESTS=1 python3 -m pytest tests/gpu tests/stress/test_gdn.py -q -p no:cacheprovider \
  --junitxml="$out/gpu.xml" "$@" 2>&1 | tee "$out/gpu.txt"
[ "${PIPESTATUS[0]}" -eq 0 ] || status=1
exit $status
