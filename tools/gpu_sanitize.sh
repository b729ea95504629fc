#!/usr/bin/env bash
# The small stress tests (`-m sanitizer`) under compute-sanitizer, results under $OUT.
#
#   [FI_FFI_KERNELS=wheel] tools/gpu_sanitize.sh memcheck|racecheck|synccheck|initcheck [pytest arguments]
#
# Ends with an error where the tool or a test found one, and after $LIMIT seconds (540).
# Needs what tools/gpu_run.sh needs.
set -u
cd "$(dirname "$0")/.."
. tools/gpu_environment.sh
tool=${1:?memcheck, racecheck, synccheck or initcheck}
shift
# A failing call of the CUDA API is told by whoever made it; asking how far a stream is fails
# on purpose.
FI_FFI_RUN_GPU_TESTS=1 FI_FFI_SANITIZER=1 timeout --kill-after=10 "${LIMIT:-540}" \
  compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 99 \
  --print-limit 100 --log-file "$out/sanitize-$tool.log" \
  python3 -m pytest tests/stress/test_gdn.py -q -m sanitizer -p no:cacheprovider \
  --junitxml="$out/sanitize-$tool.xml" "$@" 2>&1 | tee "$out/sanitize-$tool.txt"
status=${PIPESTATUS[0]}
tail -n 40 "$out/sanitize-$tool.log"
exit "$status"
