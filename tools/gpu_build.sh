#!/usr/bin/env bash
# Build the kernels that the GPU tests call: `fi-ffi build` of what tools/gpu_kernels.py lists.
#
#   tools/gpu_build.sh [core | options | gdn | rest | moe]
#   RELEASE=0.7.2.post1 ARCH=10.0a tools/gpu_build.sh core
#
# Needs nvcc and, for FlashInfer's sources, pip and its index.  The wheel is written to $OUT, and its
# path printed.  Run it again where a time limit ended it: it goes on.  $JOBS compilers run at once
# (the machine's cores), for $ARCH (9.0a); modules that the folder $HAVE has are left out.  $RELEASE
# is FlashInfer's (the lock's default); what it does not have is left out, and said.
set -eu
cd "$(dirname "$0")/.."
out=${OUT:-.out}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
release=${RELEASE:-$(python3 -c 'from fi_ffi.loader.lock import default_release; print(default_release())')}
mapfile -t names < <(python3 tools/gpu_kernels.py --release "$release" "$@" | grep -v -x -F -f <(ls "${HAVE:-/dev/null}"))
[ ${#names[@]} -gt 0 ] || { echo "nothing to build of FlashInfer $release: $*" >&2; exit 0; }
python3 -c 'from fi_ffi.cli import main; main()' build --release "$release" --arch "${ARCH:-9.0a}" \
  --jobs "${JOBS:-$(nproc)}" --output "$out" "${names[@]}"
