"""libcute_dsl_runtime: loads and launches kernels written in CuTe DSL.

A module made by CuTe DSL needs this library by name and has no search path for it. NVIDIA
distributes it together with CuTe DSL's compiler. fi_ffi loads it globally, only for such a module,
and only one copy in the process, since each copy would keep its own record of the code loaded on
each GPU.
"""

from __future__ import annotations

import functools

from fi_ffi.abi import library
from fi_ffi.loader import tvm_ffi
from fi_ffi.loader.machine import CUDA_MAJORS

FILE = "libcute_dsl_runtime.so"
# Tested: 4.7.1 and 4.8.1, between which functions were only added.
ACCEPTED = ">=4.7"

# Newest first: a driver also serves the runtime of an older CUDA.
_MEMBERS = {
    f"nvidia-cutlass-dsl-libs-cu{major}": f"nvidia_cutlass_dsl/cu{major}/lib/{FILE}"
    for major in CUDA_MAJORS
}
_MISSING = f"the module was made by CuTe DSL and needs {FILE}, which is not installed"
_INSTALL = f"`pip install --no-deps '{next(iter(_MEMBERS))}{ACCEPTED}'` (or fi-ffi[cute])"


@functools.cache
def load() -> tvm_ffi.Found:
    """Load the runtime globally, once; `LoaderError` if there is none or more than one.

    One thread at a time may call it.
    """
    found = tvm_ffi.in_process(FILE)
    if found is not None and library.in_process(FILE) is not None:
        library.open_module(FILE, globally=True)
        return found
    found = installed()
    found.load(functools.partial(library.open_module, globally=True))
    return found


def installed() -> tvm_ffi.Found:
    """Find the installed distribution's copy through its metadata alone."""
    return tvm_ffi.of_distribution(_MEMBERS, ACCEPTED, _MISSING, _INSTALL, prereleases=True)
