# Read by the tools that run on a GPU machine: $out, PYTHONPATH and FI_FFI_KERNELS.  What figures are
# of is printed, and left in $out/run.txt: the GPUs, the driver and the commit.
#
# Wheels lying in .wheels/ are used for dependencies that are missing (for machines without
# a network), and the newest wheel in .kernels/ where FI_FFI_KERNELS is not set.
out=${OUT:-.out}
mkdir -p "$out"
{
  nvidia-smi --query-gpu=name,driver_version,clocks.sm --format=csv,noheader
  git describe --always --dirty --abbrev=12 2>/dev/null || true
} | tee "$out/run.txt"
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
