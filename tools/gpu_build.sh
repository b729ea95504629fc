#!/usr/bin/env bash
# Build the kernels of the GPU tests on a machine that has a CUDA toolkit and torch but
# no network, from the wheels in .wheels/ (flashinfer-python and apache-tvm-ffi among them).
#
#   tools/gpu_build.sh [core | options | gdn | rest | moe]
#   RELEASE=0.7.2.post1 tools/gpu_build.sh core
#
# The wheel is written to $OUT, in pieces of 15 MB: `cat kernels.part.* > NAME`, where
# NAME is in kernels.name.  Run it again where a time limit ended it: it goes on.  $JOBS compilers
# run at once (the machine's cores); modules that the folder $HAVE has are left out.  $RELEASE is
# FlashInfer's (the lock's default); what it does not have is left out, and said.
set -eu
cd "$(dirname "$0")/.."
out=${OUT:-.out}
mkdir -p "$out"
export FI_FFI_CACHE_DIR=${FI_FFI_CACHE_DIR:-/tmp/fi-ffi-build}
site=$FI_FFI_CACHE_DIR/site
export PYTHONPATH=$PWD:$site PIP_NO_INDEX=1 PIP_FIND_LINKS=$PWD/.wheels
[ -d "$site" ] || python3 -m pip install -q --no-deps --no-compile --target "$site" .wheels/*.whl
release=${RELEASE:-$(python3 -c 'from fi_ffi.loader.lock import the_lock; print(the_lock().default_release)')}
environment=$FI_FFI_CACHE_DIR/build/env-$release
if [ ! -e "$environment/created" ]; then
  # This machine's torch and generators' needs serve the build environment too.
  python3 -m venv "$environment"
  python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    >"$(ls -d "$environment"/lib/python3*/site-packages)/machine.pth"
  touch "$environment/created"
fi
mapfile -t names < <(python3 tools/gpu_kernels.py --release "$release" "$@" | grep -v -x -F -f <(ls "${HAVE:-/dev/null}"))
[ ${#names[@]} -gt 0 ] || { echo "nothing to build of FlashInfer $release: $*" >&2; exit 0; }
wheel=$(python3 -c 'from fi_ffi.cli import main; main()' build --release "$release" --torch torch \
  --jobs "${JOBS:-$(nproc)}" --output "$FI_FFI_CACHE_DIR/wheels" "${names[@]}")
basename "$wheel" >"$out/kernels.name"
split -b 15000000 "$wheel" "$out/kernels.part."
