#!/usr/bin/env bash
# Everything that a change to packing, rows, plans or streams owes a GPU, in one command: kernels
# are built, the suite runs on all GPUs, and beside them memcheck, the long leak runs, benchmarks.
#
#   tools/gpu_everything.sh [wheel...]
#
# The wheels have what was built before: what is in them is not built again, and their modules are
# benchmarked, checked for leaks and run under memcheck while the others are built.  Needs what
# gpu_build.sh and gpu_environment.sh needs.  It ends after $DEADLINE seconds (590), $BUILD
# (400) of them for building $PARTS ("core options rest moe gdn"); $JOBS compilers run at once (the
# machine's cores).  All that was printed is in $OUT/everything.tar.gz, a table on the screen.
set -u
cd "$(dirname "$0")/.."
back=${OUT:-.out}
work=$(mktemp -d)
start=$(date +%s)
deadline=${DEADLINE:-590}
gpus=$(nvidia-smi --list-gpus | wc -l)
jobs=${JOBS:-$(nproc)}
mkdir -p "$back" "$work/cache" "$work/kernels"
export FI_FFI_RUN_GPU_TESTS=1 work start deadline gpus
# Seconds until $1 of them have passed since the start.
left() { n=$(($1 - $(date +%s) + start)); [ "$n" -gt 1 ] && echo "$n" || echo 1; }
export -f left
keep() { tar -C "$work" --exclude=cache --exclude=kernels --exclude=built -czf "$back/everything.tar.gz" . 2>/dev/null; }
(while sleep 30; do keep; done) &
trap 'kill $(jobs -p) 2>/dev/null; keep' EXIT
OUT=$work/first
. tools/gpu_environment.sh
unset OUT
if [ $# -gt 0 ]; then
  python3 tools/unpack_kernels.py "$work/kernels" "$@"
fi

# Each part in a folder of its own, so that one does not wait for the others.
build_part() {
  OUT=$work/built/$1 HAVE=$work/kernels FI_FFI_CACHE_DIR=$work/cache/$1 timeout "$(left "${BUILD:-400}")" \
    tools/gpu_build.sh "$1" >"$work/build-$1.txt" 2>&1
  echo "built $1: $? after $(($(date +%s) - start)) s"
}
for part in ${PARTS:-core options rest moe gdn}; do
  JOBS=$((jobs / 3)) build_part "$part" &
  building="${building:-} $!"
done

# Beside the builds, on the last GPU, and on the one before it where there are several.
if [ $# -gt 0 ]; then
  (
    export FI_FFI_KERNELS=$work/kernels FI_FFI_CACHE_DIR=$work/cache/leaks
    export CUDA_VISIBLE_DEVICES=$((gpus - 1))
    FI_FFI_STRESS=long timeout "$(left "$deadline")" python3 -m pytest -s -v -p no:cacheprovider \
      tests/gpu/test_leaks.py >"$work/leaks.txt" 2>&1
    echo "leaks: $(tail -n 1 "$work/leaks.txt")"
  ) &
  (
    export FI_FFI_KERNELS=$work/kernels FI_FFI_CACHE_DIR=$work/cache/memcheck OUT=$work/memcheck
    export CUDA_VISIBLE_DEVICES=$((gpus > 1 ? gpus - 2 : 0))
    timeout "$(left "$deadline")" tools/gpu_memcheck.sh \
      tests/gpu/test_{attention_plans,prepared_plans,calls,prepared,bad_input,graphs,page}.py \
      >"$work/memcheck.txt" 2>&1
    echo "memcheck: $?"
  ) &
  (
    export FI_FFI_KERNELS=$1 FI_FFI_CACHE_DIR=$work/cache/bench OUT=$work/bench
    timeout "$(left 200)" tools/gpu_bench.sh --quick \
      --rows prepared,pointers,typed,lengths,lengths-torch,decode,decode-plan,decode-step \
      >"$work/bench.txt" 2>&1
    echo "benchmarks: $?"
    FI_FFI_KERNELS=$work/kernels timeout 60 python3 benchmarks/replan_parts.py >"$work/parts.txt" 2>&1
  ) &
fi
wait $building
python3 tools/unpack_kernels.py "$work/kernels" "$@" "$work"/built/*/*.whl

# The suite: a process for each file, the longest first.  Each sees all GPUs, the first of which
# differs from file to file.
export FI_FFI_KERNELS=$work/kernels FI_FFI_CACHE_DIR=$work/cache/suite
test_file() {
  name=$(basename "$1" .py)
  began=$(date +%s)
  first=$(($(cksum <<<"$name" | cut -d' ' -f1) % gpus))
  CUDA_VISIBLE_DEVICES=$(for i in $(seq 0 $((gpus - 1))); do echo $(((first + i) % gpus)); done | paste -sd,)
  export CUDA_VISIBLE_DEVICES
  timeout --kill-after=5 "$(left $((deadline - 10)))" \
    python3 -m pytest "$1" -q -p no:cacheprovider >"$work/$name.txt" 2>&1
  printf '%-24s %3s %4s s  %s\n' "$name" "$?" "$(($(date +%s) - began))" "$(tail -n 1 "$work/$name.txt")"
}
export -f test_file
long="bodies sampling rope norm moe in_place topk gemm attention every_op interop blocks llm page untyped calls"
for name in $long; do echo "tests/gpu/test_$name.py"; done >"$work/files"
ls tests/gpu/test_*.py tests/stress/test_gdn.py | grep -v -F -f "$work/files" -e test_leaks >>"$work/files"
xargs -P $((10 * gpus)) -I{} bash -c 'test_file {}' <"$work/files" | tee "$work/table.txt"
