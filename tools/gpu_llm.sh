#!/usr/bin/env bash
# examples/llm beside the same loop in torch and flashinfer-python: benchmarks/llm.py.
#
#   [FI_FFI_KERNELS='WHEEL...'] [MODELS='qwen3-0.6b llama-3-8b'] tools/gpu_llm.sh [its arguments]
#   MODELS=llama-3-8b TP='1 2 4' tools/gpu_llm.sh --batch 1,64   # over several GPUs
#   MODELS=llama-3-70b TP=4 tools/gpu_llm.sh --batch 1,64 --no-peer
#
# Tables and JSON are left under $OUT.  Kernel wheels that are named (tar archives of what is in
# them do as well) are unpacked into one folder, so that fi_ffi and flashinfer-python load the same
# files; without them, both take the installed flashinfer-jit-cache.  Each model has a process of its
# own.  Needs a GPU with 48 GB, torch, flashinfer-python,
# nvmath-python, what examples/llm needs, and what gpu_environment.sh needs.
set -u
cd "$(dirname "$0")/.."
. tools/gpu_environment.sh
if [ -n "${FI_FFI_KERNELS:-}" ]; then
  modules=$(mktemp -d)
  for file in $FI_FFI_KERNELS; do
    case $file in
      *.whl) python3 -m zipfile -e "$file" "$modules" || exit ;;
      *) tar -xf "$file" -C "$modules" || exit ;;
    esac
  done
  export PYTHONPATH=$PYTHONPATH:$modules FI_FFI_KERNELS=$modules/flashinfer_jit_cache/jit_cache
fi
status=0
set -o pipefail
for model in ${MODELS:-qwen3-0.6b llama-3-8b}; do
  for tp in ${TP:-1}; do
    python3 benchmarks/llm.py --model "$model" --tp "$tp" --output "$out" "$@" 2>&1 |
      tee "$out/llm-$model-tp$tp.txt" || status=1
  done
done
exit $status
