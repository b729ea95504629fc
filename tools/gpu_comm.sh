#!/usr/bin/env bash
# Groups of ranks: tests/gpu/test_comm.py, and benchmarks/comm.py beside NCCL.
#
#   [FI_FFI_KERNELS=WHEEL or FOLDER] [RANKS='2 4'] tools/gpu_comm.sh [the benchmark's arguments]
#
# Kernels: vllm_comm, trtllm_comm and norm.  For NCCL: nccl4py with cuda-core and nvidia-nccl
# (the extra nccl), or torch.  FI_FFI_STRESS=1 runs the tests at full length.  The tests' record,
# tables and JSON are left under $OUT.  The benchmark needs a GPU for each rank.  In the tests
# processes share GPUs where there are too few: RANKS=' ' runs the tests alone, and with CUDA's
# multi-process service (nvidia-cuda-mps-control -d) their kernels run at once.
# Needs what gpu_environment.sh needs.
set -u
cd "$(dirname "$0")/.."
. tools/gpu_environment.sh
nvidia-smi topo -m
status=0
set -o pipefail
if [ -z "${NO_TESTS:-}" ]; then
  FI_FFI_RUN_GPU_TESTS=1 python3 -m pytest -q -rs --all --junitxml "$out/comm.xml" tests/gpu/test_comm.py 2>&1 |
    tee "$out/comm-tests.txt" || status=1
fi
for ranks in ${RANKS:-2}; do
  python3 benchmarks/comm.py --ranks "$ranks" --output "$out" "$@" 2>&1 | tee "$out/comm-$ranks.txt" || status=1
done
exit $status
