#!/usr/bin/env bash
# The server of examples/llm under load: benchmarks/serve_load.py, all at once and by arrivals.
#
#   [FI_FFI_KERNELS=WHEEL] [MODELS='qwen3-0.6b llama-3-8b'] [RATES='0 4 16'] tools/gpu_serve.sh [its arguments]
#
# Tables and JSON are left under $OUT.  Needs a GPU, nvmath-python, what examples/llm
# needs, and what gpu_environment.sh needs.
set -u
cd "$(dirname "$0")/.."
. tools/gpu_environment.sh
status=0
set -o pipefail
for model in ${MODELS:-qwen3-0.6b}; do
  for rate in ${RATES:-0 4 16}; do
    python3 benchmarks/serve_load.py --model "$model" --rate "$rate" --output "$out" "$@" 2>&1 |
      tee "$out/serve-$model-$rate.txt" || status=1
  done
done
exit $status
