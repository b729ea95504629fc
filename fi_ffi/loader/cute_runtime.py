"""libcute_dsl_runtime: what kernels written in CuTe DSL are loaded and launched through.

A module made by CuTe DSL needs it by name and looks for no path.  It is NVIDIA's, with the
compiler of CuTe DSL in the same distribution, and is brought here only for such a module:
globally, and one copy in the process, whoever brought it.  Two would each keep their own
account of what is loaded on which GPU.
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
# Functions were only added to it from the first of these releases to the second.
ACCEPTED = ">=4.7"
TRIED = "4.7.1 and 4.8.1"

_PROJECT = "nvidia-cutlass-dsl-libs-cu{}"
_MEMBER = "nvidia_cutlass_dsl/cu{}/lib/" + FILE
_INSTALL = (
    f"`pip install --no-deps '{_PROJECT.format(CUDA_MAJORS[0])}{ACCEPTED}'` (or fi-ffi[cute])"
)
_lock = threading.RLock()
library.renew_after_fork(globals(), "_lock", threading.RLock)


def load() -> tvm_ffi.Found:
    """Load the runtime, globally, once; `LoaderError` where there is none, or there are two."""
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
    """The installed distribution's copy, located through its metadata alone."""
    # Only here: it brings the email package with it, and a copy may be here already.
    import importlib.metadata

    from packaging.specifiers import SpecifierSet

    refused = "is not installed"
    for major in CUDA_MAJORS:  # a driver serves a runtime of an older CUDA as well
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
