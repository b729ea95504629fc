"""libcute_dsl_runtime: loads and launches kernels written in CuTe DSL.

A module made by CuTe DSL needs this library by name and has no search path for it. NVIDIA
distributes it together with CuTe DSL's compiler. fi_ffi loads it globally, only for such a module,
and only one copy in the process, since each copy would keep its own record of the code loaded on
each GPU.
"""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from fi_ffi.abi import library
from fi_ffi.errors import LoaderError
from fi_ffi.loader import held, libraries, tvm_ffi
from fi_ffi.loader.machine import CUDA_MAJORS

if TYPE_CHECKING:
    from importlib.metadata import Distribution

FILE = "libcute_dsl_runtime.so"
# Tested: 4.7.1 and 4.8.1, between which functions were only added.
ACCEPTED = ">=4.7"

_PROJECT = "nvidia-cutlass-dsl-libs-cu{}"
_MEMBER = "nvidia_cutlass_dsl/cu{}/lib/" + FILE
_INSTALL = (
    f"`pip install --no-deps '{_PROJECT.format(CUDA_MAJORS[0])}{ACCEPTED}'` (or fi-ffi[cute])"
)
_lock = threading.RLock()
library.renew_after_fork(globals(), "_lock", threading.RLock)


def load() -> tvm_ffi.Found:
    """Load the runtime globally, once; `LoaderError` if there is none or more than one."""
    with _lock:
        return _load()


@functools.cache
def _load() -> tvm_ffi.Found:
    found = tvm_ffi.in_process(FILE)
    if found is not None and libraries.in_process(FILE) is not None:
        return found
    found = installed()
    if found.sha256 is None:
        library.open_global(found.path)
        return found
    with held.checked(Path(found.path), found.sha256, found.state) as opened:
        try:
            library.open_global(found.path, opened.name)
        finally:
            opened.keep()
    return found


def installed() -> tvm_ffi.Found:
    """Find the installed distribution's copy through its metadata alone."""
    # Imported here: it imports the email package, and is not needed if a copy is loaded.
    import importlib.metadata

    from packaging.specifiers import SpecifierSet

    refused = "is not installed"
    for major in CUDA_MAJORS:  # newest first: a driver also serves the runtime of an older CUDA
        name, member = _PROJECT.format(major), _MEMBER.format(major)
        try:
            distribution: Distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        version = distribution.version
        if not SpecifierSet(ACCEPTED).contains(version, prereleases=True):
            refused = f"of {name} {version} is too old"
        elif not Path(str(distribution.locate_file(member))).is_file():
            refused = f"is missing from the installed {name} {version}"
        else:
            return tvm_ffi.recorded(distribution, member, f"installed {name} {version}")
    raise LoaderError(
        f"the module was made by CuTe DSL and needs {FILE}, which {refused}: {_INSTALL}"
    )
