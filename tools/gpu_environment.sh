# Read by the tools that run on a GPU machine: $out and PYTHONPATH.  What figures are of is printed,
# and left in $out/run.txt: the GPUs, the driver and the commit.
#
# They need what `pip install -e '.[test]'` installs.  Kernels are those that a user's own calls find
# (docs/loading.md): of FI_FFI_KERNELS, of an installed flashinfer-jit-cache, or of `fi-ffi build`.
out=${OUT:-.out}
mkdir -p "$out"
{
  nvidia-smi --query-gpu=name,driver_version,clocks.sm --format=csv,noheader
  git describe --always --dirty --abbrev=12 2>/dev/null || true
} | tee "$out/run.txt"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
