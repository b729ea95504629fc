"""What is known of a kernel file by the hash of its content.

Reading an ELF takes pyelftools, and a function's own account of its signature takes
an exception with a C++ backtrace; together they cost more than all the rest of a
start.  Neither can change while the content does not, so the cache keeps them.
FI_FFI_PARANOID=1 asks the file again.
"""

from __future__ import annotations

import contextlib
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fi_ffi.errors import AbiError, ArchitectureError, ArtifactError, LoaderError
from fi_ffi.loader import cache, held
from fi_ffi.loader.fatbin import CudaCode
from fi_ffi.loader.kernels import ModuleFile

_FORMAT = 3  # of the stored facts; another one is not read


@dataclass
class Facts:
    """A kernel file's own account of itself.

    `signatures` holds those that were asked for so far, as the functions print them.
    """

    needed: list[str]
    functions: list[str]
    codes: list[CudaCode]
    # Where it has other libraries looked for; $ORIGIN in it is the folder that it lies in.
    runpath: str | None = None
    signatures: dict[str, str] = field(default_factory=dict)

    def is_sound(self) -> bool:
        """Whether everything is of its type: they may be read from a damaged file."""
        words = [*self.needed, *self.functions, *self.signatures, *self.signatures.values()]
        words.append(self.runpath or "")
        return all(isinstance(word, str) and word.isascii() for word in words) and all(
            code.kind in ("sass", "ptx") and type(code.sm) is int and code.suffix in ("", "a", "f")
            for code in self.codes
        )


def _path(sha256: str) -> Path:
    return cache.cache_root() / "facts" / sha256[:2] / f"{sha256}.json"


def facts_of(file: ModuleFile) -> Facts:
    """The facts of a file, remembered or read from it now."""
    if not cache.is_paranoid():
        with contextlib.suppress(TypeError, KeyError, AttributeError, LoaderError):
            data = cache.read_note(_path(file.sha256), _FORMAT)
            found = Facts(**data | {"codes": [CudaCode(**code) for code in data["codes"]]})
            if found.is_sound():
                return found
    # Only here: importing pyelftools takes longer than reading a file with it.
    from fi_ffi.loader.elf import inspect_elf
    from fi_ffi.loader.fatbin import architectures

    # Else those of a file that is there for a moment would be remembered for this one.
    with held.checked(file.path, file.sha256, file.state) as opened:
        try:
            info, codes = inspect_elf(opened.name), architectures(opened.name)
        except ArtifactError as error:
            raise ArtifactError(str(error).replace(opened.name, str(file.path))) from error
    found = Facts(list(info.needed), list(info.functions), list(codes), info.runpath)
    remember(file, found)
    return found


def remember(file: ModuleFile, facts: Facts) -> None:
    """Keep the facts; a cache that cannot be written is no reason to fail."""
    with contextlib.suppress(LoaderError):
        cache.write_note(_path(file.sha256), _FORMAT, asdict(facts))


def check_needed(file: ModuleFile, facts: Facts, cudart: str) -> None:
    """Refuse a file made for another CUDA than the one this process has."""
    others = [name for name in facts.needed if name.startswith("libcudart.so.") and name != cudart]
    if others:
        raise AbiError(
            f"{file.path} needs {others[0]}, and fi_ffi runs on {cudart}: it was compiled with "
            "another CUDA. Use a wheel of the cu13x series"
        )


def check_processor(path: Path, machine: str) -> None:
    """Refuse a file whose host code is another processor's."""
    if machine != platform.machine():
        raise ArchitectureError(
            f"{path} is for {machine} processors, and this one is {platform.machine()}: build it "
            "here, or take the wheel of this platform"
        )
