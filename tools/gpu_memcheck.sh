#!/usr/bin/env bash
# The GPU tests under compute-sanitizer's memcheck, each file in a process of its own, a table at
# the end; what each found is under $OUT.
#
#   [FI_FFI_KERNELS=wheel-or-directory] tools/gpu_memcheck.sh [file...]
#
# $JOBS run at a time (4), each for $LIMIT seconds at most (540).  Ends with an error where memcheck
# or a test found one.  Needs what tools/gpu_run.sh needs.
set -u
cd "$(dirname "$0")/.."
. tools/gpu_environment.sh
export FI_FFI_RUN_GPU_TESTS=1 FI_FFI_SANITIZER=1 out LIMIT=${LIMIT:-540}
table=$out/memcheck.txt
: >"$table"

# A failing call of the CUDA API is told by whoever made it.
check_file() {
  name=$(basename "$1" .py)
  start=$SECONDS
  OUT='' timeout --kill-after=10 "$LIMIT" \
    compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 99 \
    --print-limit 20 --log-file "$out/memcheck-$name.log" \
    python3 -m pytest "$1" -q -p no:cacheprovider >"$out/memcheck-$name.txt" 2>&1
  code=$?
  printf '%-28s %3s  %4s s  %s | %s\n' "$name" "$code" "$((SECONDS - start))" \
    "$(tail -n 1 "$out/memcheck-$name.txt")" "$(tail -n 1 "$out/memcheck-$name.log")"
  return "$code"
}
export -f check_file
[ $# -gt 0 ] || set -- tests/gpu/test_*.py
printf '%s\n' "$@" | xargs -P "${JOBS:-4}" -I{} bash -c 'check_file {}' | tee -a "$table"
exit "$((PIPESTATUS[1] != 0))"
