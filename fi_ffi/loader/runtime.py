"""Libraries that this process has loaded: libtvm_ffi, the CUDA runtime, kernel modules.

Everything is loaded once, on demand, under its own lock, and never unloaded. A call whose entry is
already here takes no lock. Only the lock of a module may be held while fetching.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import Entry, probe
from fi_ffi.abi.objects import Object
from fi_ffi.abi.signature import Signature, parse_signature
from fi_ffi.errors import (
    AbiError,
    ArchitectureError,
    ArtifactError,
    KernelNotFoundError,
    LoaderError,
)
from fi_ffi.loader import (
    cache,
    cuda_errors,
    cute_runtime,
    generation,
    imports,
    kernels,
    machine,
    per_device,
    search,
    services,
    trust,
    tvm_ffi,
)
from fi_ffi.loader.distributions import is_in, split
from fi_ffi.loader.elf import FUNCTION_PREFIX, RUNTIME, inspect_elf, undefined
from fi_ffi.loader.kernels import (
    Facts,
    KernelSource,
    ModuleFile,
    VerifiedFile,
    cuda_of,
    remember,
)
from fi_ffi.loader.machine import CudaCode
from fi_ffi.loader.tvm_ffi import ensure_tvm_ffi

# An export of modules that copy a number from the current GPU while they are loaded and throw if
# that fails (`configureKernel` of csrc/xqa/mla_sm120.cu); nothing catches the exception.
GPU_AT_LOAD_EXPORT = "xqa_wrapper_mla"
# The linker's message about a symbol.
SYMBOL = r"undefined symbol: (?P<symbol>\w+)(, version (?P<version>\S+))?"
_FLASHINFER = r"_Z\w*10flashinfer"
# An export of modules that can compile DeepGEMM's kernels.
DEEPGEMM_EXPORT = "set_deepgemm_jit_include_dirs"
DEEPGEMM_FOLDER = "TRTLLM_DG_CACHE_DIR"


@dataclass(frozen=True)
class Loaded:
    """A module in this process: its source, file and dlopen handle."""

    source: KernelSource
    file: ModuleFile
    facts: Facts
    handle: Any
    # The module object that libtvm_ffi created for a library with embedded modules.
    root: Object | None = None
    # Answers a library that has no device code of its own.
    server: services.DeviceCodeServer | None = None


_locks: dict[str | Path, threading.RLock] = {}  # by module name, or by path
library.renew_after_fork(globals(), "_locks", dict)
# By module, device and the generation of kernels.
_modules: dict[tuple[str, int | None, int], Loaded] = {}
_entries: dict[tuple[str, Signature, int | None, int], Entry] = {}


def use_source(location: str | os.PathLike[str] | None) -> None:
    """Use only kernels from `location` from now on, or (None) search for them again.

    Loaded modules stay mapped, but are looked up again.
    """
    search.use_source(location)


def lock_of(what: str | Path) -> threading.RLock:
    """Return the lock of a module, or of the file at a path."""
    return _locks.setdefault(what, threading.RLock())


def load(module: str, device: int | None = None) -> Loaded:
    """Find and load a module, once for each device."""
    with lock_of(module):
        key = module, device, generation.number
        if key not in _modules:
            source, file, facts = search.find_module(module, device)
            if cuda_of(facts) is None:
                machine.load_cudart()
            _modules[key] = prepare_and_load(source, file, facts, device)
        return _modules[key]


def prepare_and_load(
    source: KernelSource, file: ModuleFile, facts: Facts, device: int | None
) -> Loaded:
    """Load a file after what it needs; refuse it before anything is loaded if that is missing."""
    cuda, path = cuda_of(facts), str(file.path)
    if cuda is not None:
        machine.check_cuda(cuda, path)
        if device is not None:
            machine.check_driver(cuda, path)
        machine.use_cuda(cuda, path)
    if GPU_AT_LOAD_EXPORT in facts.functions:
        _check_gpu(facts.codes)
    if DEEPGEMM_EXPORT in facts.functions:
        check_deepgemm_folder()
    machine.load_needed(facts.needed)
    if cute_runtime.FILE in facts.needed:
        with tvm_ffi.linking:
            cute_runtime.load()
    return _opened(source, file, facts)


def _check_gpu(codes: Sequence[CudaCode]) -> None:
    """Raise `LoaderError` if a module that uses its GPU while it is loaded would fail.

    The process would end otherwise.
    """
    why = "this process sees none"
    if machine.device_count():
        device = machine.current_device()
        reason = machine.unfit(codes, machine.capability(device))
        if not reason:
            return
        why = f"cuda:{device}, which is current, is another: it {reason}"
    raise LoaderError(
        f"the module asks its GPU when it is loaded, and would end the process: {why}. "
        "`fi-ffi inspect --no-load` reads the file alone"
    )


def deepgemm_folder() -> Path:
    """Return the folder in which a module with DeepGEMM's compiler keeps its results."""
    if DEEPGEMM_FOLDER in os.environ:
        return Path(os.environ[DEEPGEMM_FOLDER])
    if "HOME" in os.environ:
        return Path(os.environ["HOME"], ".tensorrt_llm")
    import tempfile  # imported late: most modules have no such compiler

    return Path(tempfile.gettempdir(), "tensorrt_llm")


def check_deepgemm_folder() -> None:
    """Raise `LoaderError` if a module with DeepGEMM's compiler could not create its folders.

    The module creates them while it is loaded, even if it never compiles. If that fails it throws
    an exception that nothing catches, and the process ends.
    """
    folder = deepgemm_folder()
    try:
        if os.environ.get(DEEPGEMM_FOLDER) == "":
            raise FileNotFoundError(f"{DEEPGEMM_FOLDER} is empty")
        for name in ("tmp", "cache"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            trust.check_owner(folder / name)
            trust.check_user_path(folder / name)
    except (OSError, ArtifactError) as error:
        raise LoaderError(
            f"the module makes {folder} when it is loaded, which fails here ({error}); "
            f"{DEEPGEMM_FOLDER} may name another folder"
        ) from error


def _opened(source: KernelSource, file: ModuleFile, facts: Facts) -> Loaded:
    """Load the very file that was hashed, and fill in its variables."""
    found = ensure_tvm_ffi()
    # One at a time: the descriptor that a library was first opened by must stay open.
    with tvm_ffi.linking, kernels.checked(file.path, file.sha256, file.state) as opened:
        tvm_ffi.check(file.path, facts.requires, facts.needed, found, opened.name)
        # A library that searches its own folder must be opened there; in the cache it is alone.
        in_place = file.state is not None and "$ORIGIN" in (facts.runpath or "")
        failed: LoaderError | None = None
        try:
            through = None if in_place else opened.name
            handle = _linked(file.path, through, opened)
        except LoaderError as error:
            failed = error
        if failed is not None:
            # For another processor's library, the dynamic linker says that there is no such file.
            built_for = inspect_elf(opened.name).machine
            if built_for != platform.machine():
                raise ArchitectureError(
                    f"{file.path} is for {built_for} processors, and this one is "
                    f"{platform.machine()}: build it here, or take the wheel of this platform"
                ) from failed
            raise _explained(failed, file.path, found)
        opened.keep(in_place=in_place)
        server = None
        if all(library.find_symbol(handle, name) for name in services.CUBIN_EXPORTS):
            server = services.device_code.get()(handle, str(file.path))
        name = str(file.path) if in_place else opened.name
        root = imports.fill_in(handle, str(file.path), name, facts.context)
    return Loaded(source, file, facts, handle, root, server)


def _linked(path: Path, through: str | None, opened: VerifiedFile) -> Any:
    """Load the library at `path` by the name `through`; `opened` is its open file.

    From 0.7 on, FlashInfer's dispatchers name template instances that no planner chooses and that
    are not compiled; FlashInfer's own loader binds lazily. So undefined functions of FlashInfer are
    accepted, and all others refused.
    """
    try:
        return library.open_module(str(path), through)
    except LoaderError as error:
        left_out = re.search(SYMBOL, str(error))
        if left_out is None or not re.match(_FLASHINFER, left_out["symbol"]):
            raise
    handle = library.open_module(str(path), through, lazily=True)
    missing = [
        name
        for name in undefined(opened.name)
        if not re.match(_FLASHINFER, name)
        and library.find_symbol(ffi.NULL, name) is None
        and library.find_symbol(handle, name) is None
    ]
    if missing:
        opened.keep()  # it stays loaded under this name
        raise LoaderError(f"{path} does not load: undefined symbol: {missing[0]}")
    return handle


def _explained(error: LoaderError, path: Path, found: tvm_ffi.Found) -> LoaderError:
    """Return the dynamic linker's error about the library at `path`, extended with advice."""
    symbol = re.search(SYMBOL, str(error))
    if symbol and re.match(RUNTIME, symbol["symbol"]):
        return tvm_ffi.lacking(path, [symbol["symbol"]], found)
    advice = services.adviser.get().linking_advice(str(error))
    return LoaderError(f"{error}. {advice}") if advice else error


def kernel_entry(
    module: str, declared: Signature, releases: str, device: int | None = None
) -> Entry:
    """Return an attested entry of a module: its own signature equals the declared one.

    Raises `AbiError` with both signatures if they differ; the entry is not called.
    """
    key = module, declared, device, generation.number
    entry = _entries.get(key)
    if entry is None:
        with lock_of(module):
            entry = _entries.get(key)  # another thread may have been faster
            if entry is None:
                loaded = load(module, device)
                check_version(module, loaded.source, releases)
                entry = exported(loaded, declared.name)
                entry.name = f"{module}.{declared.name}"
                found = signature_of(loaded, entry, declared.name)
                version = loaded.source.version or "of unknown release"
                binary = f"binary ({loaded.source.distribution or 'FlashInfer'} {version})"
                attest(entry, found, declared, releases, binary, str(loaded.file.path))
                _entries[key] = entry
    return entry


def check_version(module: str, source: KernelSource, releases: str) -> None:
    """Raise `KernelNotFoundError` if a distribution's library is of none of these versions."""
    distribution, version = split(module)[0], source.version
    if source.distribution and distribution and version and not is_in(version, releases):
        raise KernelNotFoundError(
            f"{module} is typed for {distribution} {releases}, and {source.location} is of "
            f"{version}: `pip install --no-deps '{distribution}{releases}'` installs another"
        )


def attest(
    entry: Entry, own: Signature | None, declared: Signature, releases: str, binary: str, path: str
) -> Entry:
    """Return an entry whose own signature is the declared one.

    Raises `AbiError` with both signatures for another; `own` is None if it takes any arguments.
    """
    if own is None or not own.same_types(declared):
        raise AbiError(
            f"{entry.name}: the binary does not have the declared interface\n"
            f"  declared ({split(entry.name)[0] or 'FlashInfer'} {releases}): {declared}\n"
            f"  {binary}: {own or 'takes any arguments'}\n"
            f"  file: {path}"
        )
    return entry


def signature_of(loaded: Loaded, entry: Entry, symbol: str) -> Signature | None:
    """Return an entry's own signature, stored or asked now; None if it has none.

    Asking for the first time runs a function that has no signature (see `probe`).
    """
    known = loaded.facts.signatures.get(symbol)
    if known == "":
        return None
    if known is not None and not cache.is_paranoid():
        with contextlib.suppress(AbiError):  # a damaged note: ask again
            return parse_signature(known)
    try:
        found = probe(entry)
    except AbiError:
        found = None
    loaded.facts.signatures[symbol] = "" if found is None else str(found)
    remember(loaded.file, loaded.facts)
    return found


def exported(loaded: Loaded, symbol: str) -> Entry:
    """Return a function that a library exports."""
    address = library.find_symbol(loaded.handle, FUNCTION_PREFIX + symbol)
    if address is None:
        names = ", ".join(loaded.facts.functions)
        raise KernelNotFoundError(
            f"{loaded.file.path} exports no {symbol!r}; it exports: {names or 'none'}"
        )
    entry = Entry(symbol, address, owner=loaded.handle)
    call = per_device.on_each_gpu(loaded.file, loaded.handle, symbol, entry.address)
    if loaded.server is not None:
        call = loaded.server.raising_failures(f"{loaded.file.module}.{symbol}", call)
    entry.address = cuda_errors.guard_abort(symbol, call, lambda: machine.load_cudart()[0])
    return entry
