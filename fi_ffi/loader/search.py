"""The search for a module: each place in order, until one has it for the device.

  explicit    the place named by `use_kernels` or FI_FFI_KERNELS; no other is searched then
  installed   a flashinfer-jit-cache distribution, monolithic or one provider per SM
  jit         FlashInfer's own cache of compiled modules, of the same release
  local       wheels in FI_FFI_WHEELS, or in `wheels/` of the fi_ffi cache
  remote      the pinned wheel: the cache if fetched before, else HTTP

A library of another distribution is in the explicit place, or in the installed or pinned wheel.

FI_FFI_SOURCES selects places and their order. FI_FFI_RELEASE and FI_FFI_CUDA ("cu130") override the
choice made from the machine. Nothing is ever compiled.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fi_ffi.abi import library
from fi_ffi.errors import (
    ArchitectureError,
    ArgumentError,
    FiFfiError,
    KernelNotFoundError,
    LoaderError,
    let_through,
)
from fi_ffi.loader import cache, distributions, generation, machine, services, trust
from fi_ffi.loader.distributions import Distribution, hex_of, split
from fi_ffi.loader.kernels import (
    Facts,
    KernelDirectory,
    KernelSource,
    KernelWheel,
    ModuleFile,
    cuda_of,
    facts_of,
    open_source,
    release_of,
)
from fi_ffi.loader.lock import default_release, lock_path
from fi_ffi.loader.machine import sass_named, unfit
from fi_ffi.loader.permission import FetchNotAllowed, fetching, is_withheld

KERNELS, SOURCES, WHEELS = "FI_FFI_KERNELS", "FI_FFI_SOURCES", "FI_FFI_WHEELS"
CUDA, RELEASE = "FI_FFI_CUDA", "FI_FFI_RELEASE"
_VERSION = r"\d+(\.\d+){1,3}((a|b|rc)\d+)?(\.(post|dev)\d+)?"
_CUDA_TAG = r"\bcu(\d{2})\d\b"  # in a version's local part: cu130.sm90a
_LOOKED_AT = 3  # modules to examine if the source's version does not name its CUDA
# Suffixes of the file names of wheels for other processors.
_OTHERS = tuple(f"_{cpu}" for cpu in machine.CPUS if cpu != platform.machine())


# A distribution or wheel for one SM, and a wheel that was built for one.
_PROVIDER = r"flashinfer_jit_cache_(sm\d+[af]?)-"
BUILT = r"[^-]+-[^-]+\+cu\d+\.(sm\d+[af]?)-"


@dataclass(frozen=True)
class Candidate:
    """A place that was searched: a source, or the reason why it has none."""

    kind: str
    source: KernelSource | None
    note: str = ""
    # The only architecture it has code for, if its name says so.
    sm: str | None = None
    # The release whose modules' names are the only ones it has, if that is known.
    names_of: str | None = None
    # Whether there is nothing at all, as opposed to kernels that are not used.
    is_empty: bool = False


def named_release() -> str | None:
    """Return the FlashInfer release that FI_FFI_RELEASE names; `ArgumentError` if it is invalid."""
    chosen = os.environ.get(RELEASE)
    return parse_release(chosen, RELEASE) if chosen else None


def wanted_release() -> str:
    """Return the release to use without kernels: FI_FFI_RELEASE, or the lock's default."""
    return named_release() or default_release()


def parse_release(text: str, argument: str = "release") -> str:
    """Check and return a release such as 0.6.13 or 0.7.2.post1."""
    if not re.fullmatch(_VERSION, text):
        expected = f"a version such as {default_release()}"
        raise ArgumentError("kernels", argument, got=repr(text), expected=expected)
    return text


def _installed() -> Iterator[Candidate]:
    """Yield installed kernels; of distributions for one SM each, the latest SM first.

    Those of another version than the `flashinfer-jit-cache` that names them are left over from an
    upgrade; FlashInfer ignores them as well.
    """
    found = distributions.installed("flashinfer_jit_cache")
    shims = {each.version for each in found if not re.match(_PROVIDER, each.info.name)}
    is_empty = True
    for each in sorted(found, key=lambda each: nearness_named(each.info), reverse=True):
        provider = re.match(_PROVIDER, each.info.name)
        sm = provider[1] if provider else None
        if provider and shims and each.version not in shims:
            named = " and ".join(sorted(shims))
            note = f"{each.info} is of {each.version}, and flashinfer-jit-cache of {named}"
            yield Candidate("installed", None, note)
            is_empty = False
            continue
        for root, known in _hashes_in(each).items():
            source = KernelDirectory(root, each.version, known)
            yield Candidate("installed", source, sm=sm)
            is_empty = False
    if is_empty:
        note = "no flashinfer-jit-cache distribution is installed"
        if shims:
            note = f"flashinfer-jit-cache {' and '.join(sorted(shims))} has no kernels of its own, "
            note += "and no distribution of a GPU's kernels is installed beside it"
        yield Candidate("installed", None, note, is_empty=True)


def _hashes_in(distribution: Distribution) -> dict[Path, dict[Path, str]]:
    """Return the recorded hashes of a distribution's modules, by the folder of modules.

    The `flashinfer-jit-cache` of releases with a distribution for each SM has none.
    """
    hashes: dict[Path, dict[Path, str]] = {}
    for member, path, digest in distribution.record():
        if path.name.endswith(".so") and path.parent.parent.name == "jit_cache":
            known = hashes.setdefault(path.parent.parent, {})
            # not every installer records it
            if digest.startswith("sha256="):
                known[path] = hex_of(digest, member)
    return hashes


def flashinfer_folder() -> Path:
    """Return the folder where FlashInfer keeps compiled and fetched files."""
    base = Path(os.environ.get("FLASHINFER_WORKSPACE_BASE") or cache.expanded("~", "HOME"))
    return base / ".cache" / "flashinfer"


def _jit() -> Iterator[Candidate]:
    root = flashinfer_folder()
    folders = sorted(root.glob("*/*/cached_ops")) if root.is_dir() else []
    for folder in folders:
        source = KernelDirectory(folder, folder.parent.parent.name)
        if source.modules():
            yield Candidate("jit", source)
    if not folders:
        note = f"FlashInfer has compiled nothing in {root}"
        yield Candidate("jit", None, note, is_empty=True)


def _local() -> Iterator[Candidate]:
    named = os.environ.get(WHEELS)
    folders = named.split(os.pathsep) if named else [str(cache.cache_root() / "wheels")]
    if not named and Path(folders[0]).is_dir():
        trust.check_root(cache.cache_root())
        trust.check_owner(Path(folders[0]))
    wheels: list[Path] = []
    for folder in folders:
        found = sorted(Path(folder).glob("flashinfer_jit_cache*.whl"))
        wheels += sorted(found, key=nearness_named, reverse=True)
    for wheel in wheels:
        from fi_ffi.loader.wheel import Wheel  # imported late: many processes read no wheel

        trust.check_user_path(wheel)
        if not named:
            trust.check_plain(wheel, os.stat(wheel))
        if wheel.stem.endswith(_OTHERS):
            yield Candidate("local", None, f"{wheel} is not for {platform.machine()}")
            continue
        source = KernelWheel(str(wheel), Wheel(wheel))
        provider = re.match(_PROVIDER, wheel.name)
        yield Candidate("local", source, sm=provider[1] if provider else None)
    if not wheels:
        note = f"no flashinfer_jit_cache wheel in {' or '.join(folders)}"
        yield Candidate("local", None, note, is_empty=True)


# The places of this machine: what finds them, and how they are called.
_HERE: dict[str, tuple[Callable[[], Iterator[Candidate]], str]] = {
    "installed": (_installed, "an installed flashinfer-jit-cache"),
    "jit": (_jit, "FlashInfer's own compiled modules"),
    "local": (_local, "a wheel"),
}
_KINDS = [*_HERE, "remote"]


def kinds_asked() -> list[str]:
    """Return the kinds of places to search, in order."""
    named = os.environ.get(SOURCES)
    if named is None:
        return [*_KINDS]
    kinds = [kind.strip() for kind in named.split(",") if kind.strip()]
    unknown = [kind for kind in kinds if kind not in _KINDS]
    if unknown:
        raise ArgumentError("sources", SOURCES, got=unknown, expected=f"some of {_KINDS}")
    return kinds


def candidates(
    explicit: str | os.PathLike[str] | None = None, but: str = ""
) -> Iterator[Candidate]:
    """Yield every place to search for kernels, in order, on demand.

    Unless FI_FFI_RELEASE is set, the first source determines the release. Places with kernels of
    another release are skipped, with a note. A directory of unknown release is taken to be of that
    one. `but` is a kind that is left out.
    """
    chosen = explicit or os.environ.get(KERNELS)
    if chosen:
        source, wanted = open_source(chosen), named_release()
        note = "use_kernels" if explicit else KERNELS
        if isinstance(source, KernelDirectory) and source.version is None:
            source.version, note = wanted, RELEASE if wanted else note
        yield Candidate("explicit", source, note)
        return
    release = named_release()
    for kind in kinds_asked():
        if kind == but:
            continue
        try:
            places = _HERE[kind][0]() if kind in _HERE else services.published.get()(release)
            for candidate in places:
                if candidate.source is not None:
                    found = release_of(candidate.source)
                    if release is not None and found is not None and found != release:
                        note = f"{candidate.source.location} is of {found}, wanted is {release}"
                        candidate = Candidate(kind, None, note)
                    release = release or found
                yield candidate
        except (FiFfiError, OSError) as error:  # report a broken wheel and continue
            let_through(error)
            yield Candidate(kind, None, str(error))


def nearness(sm: str | None) -> tuple[int, int]:
    """Return a sort key: the latest architecture is the nearest, and a specific one is nearer."""
    code = sass_named(sm) if sm else None
    return (code.sm, ("", "f", "a").index(code.suffix)) if code else (0, 0)


def nearness_named(path: Path) -> tuple[int, int]:
    """Return the same key for a wheel or distribution whose name has one architecture."""
    found = re.match(_PROVIDER, path.name) or re.match(BUILT, path.name)
    return nearness(found[1] if found else None)


def cuda_version(tag: str) -> tuple[int, int]:
    """Parse a tag: `cu134` is CUDA 13.4."""
    match = re.fullmatch(r"cu(\d{2})(\d)", tag)
    if match is None:
        raise ArgumentError("sources", CUDA, got=tag, expected="a tag such as cu130")
    return int(match[1]), int(match[2])


_lock = threading.RLock()
library.renew_after_fork(globals(), "_lock", threading.RLock)


# Places searched so far, in order, and an iterator of the next ones.
_places: tuple[list[Candidate], Iterator[Candidate]] = ([], candidates())
_location: str | None = None  # as `use_source` was told
_named = os.environ.get(RELEASE)  # when it was last read


def use_source(location: str | os.PathLike[str] | None) -> None:
    """Use only kernels from `location` from now on, or (None) search for them again."""
    global _places, _location
    if location is None:
        _location, _places = None, ([], candidates())
    else:
        chosen = os.fspath(location)
        found = [*candidates(chosen)]  # raises for a wrong location, and changes nothing then
        _location, _places = chosen, (found, iter(()))
    generation.advance()


def _follow_release() -> None:
    """Search again if FI_FFI_RELEASE has changed since the search."""
    global _named
    named = os.environ.get(RELEASE)
    if named != _named:
        _named = named
        use_source(_location)


def places_of(module: str, given: Iterable[Candidate] | None = None) -> Iterator[Candidate]:
    """Yield every place to search for a module, in order.

    The libraries of another distribution are where it is installed or pinned, unless the place that
    was named has one of this name. `given` are FlashInfer's places, by default those of calls.
    """
    distribution, name = split(module)
    given = places() if given is None else given
    if not distribution:
        yield from given
        return
    first = next(iter(given), None)
    source = first.source if first is not None and first.kind == "explicit" else None
    if first is not None and source is not None and name in source.modules():
        yield first
        return
    for place in services.libraries.get()(distribution):
        if place.kind in kinds_asked():
            yield place
        else:
            note = f"{SOURCES} leaves out `{place.kind}`, where {distribution} is"
            yield Candidate(place.kind, None, note)


def places() -> Iterator[Candidate]:
    """Yield every place to search for FlashInfer's kernels, in order, each once for a release."""
    _follow_release()
    # Bound once, so that a concurrent `use_source` does not mix two choices.
    (found, following), done = _places, 0
    while True:
        with _lock:
            if done == len(found):
                found += itertools.islice(following, 1)
            if done == len(found):
                return
        yield found[done]
        done += 1


def sources() -> Iterator[KernelSource]:
    """Yield the places that have kernels."""
    return (place.source for place in places() if place.source is not None)


def release() -> str | None:
    """Return the FlashInfer release of the kernels in use, or None if unknown."""
    first = next(sources(), None)
    return None if first is None else release_of(first)


def cuda_of_kernels() -> int | None:
    """Return the CUDA major version of the kernels in use, or None if unknown.

    It is taken from the first source's version, or from what its modules need. Nothing is fetched.
    """
    forced = os.environ.get(CUDA)
    if forced:
        return cuda_version(forced)[0]
    try:
        source = next(sources(), None)
        if source is None:
            return None
        tag = re.search(_CUDA_TAG, (source.version or "").partition("+")[2])
        if tag:
            return int(tag[1])
        found = (cuda_of(facts_of(source.file(module))) for module in source.modules()[:_LOOKED_AT])
        return next(filter(None, found), None)
    except (FiFfiError, OSError) as error:  # reported to callers that need a module
        let_through(error)
        return None


machine.ask_kernels = cuda_of_kernels


# What a place says about a module: it has it; a call would fetch it; it lacks it; it has no code
# for the GPU; it cannot be read; there are no kernels.
HERE, LATER, LACKS, OTHER_GPU, FAILS, NONE = "here", "later", "lacks", "other", "fails", "none"


@dataclass(frozen=True)
class Answer:
    """What a place says about a module. `file` and `facts` are set for HERE and OTHER_GPU, except
    that a place for another SM opens no file. `reason` is set for everything but HERE."""

    place: Candidate
    status: str
    reason: str = ""
    file: ModuleFile | None = None
    facts: Facts | None = None


def ask(
    place: Candidate,
    module: str,
    capability: tuple[int, int] | None = None,
    members: Callable[[KernelSource, str], Sequence[str]] | None = None,
) -> Answer:
    """Ask a place for a module with code for a GPU; without `capability`, for any code.

    `members` returns the modules that would do, by default those of this very name. Inside
    `fetching(False)` nothing is fetched, and the answer may be LATER.
    """
    source, (_, module) = place.source, split(module)
    if source is None:
        return Answer(place, NONE, place.note)
    if place.sm and capability is not None:
        reason = unfit([sass_named(place.sm)], capability)
        if reason:
            return Answer(place, OTHER_GPU, f"{source.location}: {reason}")
    other: Answer | None = None
    try:
        if members is not None:
            names = members(source, module)
        elif place.names_of and not services.adviser.get().may_have(place.names_of, module):
            names = _listed_here(source, module)
        else:
            names = [module] if module in source.modules() else []
    except LoaderError as error:
        return Answer(place, LATER if is_withheld(error) else FAILS, str(error))
    for name in names:
        try:
            file = source.file(name)
        except LoaderError as error:
            return Answer(place, LATER if is_withheld(error) else FAILS, str(error))
        facts = facts_of(file)
        reason = "" if capability is None else unfit(facts.codes, capability)
        if not reason:
            return Answer(place, HERE, "", file, facts)
        reason = f"{source.location}: {name} {reason}"
        other = Answer(place, OTHER_GPU, reason, file, facts)
    return other or Answer(place, LACKS, f"{source.location} has no module {module}")


def _listed_here(source: KernelSource, module: str) -> Sequence[str]:
    """Return the module if the source has it all the same: it may have more than its release lists.

    It is not asked if that is not known here.
    """
    with fetching(False), contextlib.suppress(LoaderError):
        return [module] if module in source.modules() else []
    return []


def decided() -> tuple[str, str]:
    """Return the release in force, or "", and what determines it.

    That is FI_FFI_RELEASE, the kernels that `use_kernels` or FI_FFI_KERNELS name, the first kernels
    on this machine, or the lock's default: the one that would be fetched. The driver is not asked,
    so that calls on the CPU use no GPU.
    """
    _follow_release()
    return _decided()


@generation.cached
def _decided() -> tuple[str, str]:
    """Decide for this generation."""
    named = named_release()
    here = candidates(_location, but="remote")
    place = next((place for place in here if place.source is not None), None)
    source = place.source if place is not None else None
    if place is not None and source is not None and (place.kind == "explicit" or not named):
        what = _HERE[place.kind][1] if place.kind in _HERE else place.note
        by = RELEASE if what == RELEASE else f"{what}: {source.location}"
        return release_of(source) or "", by
    if named is not None:
        return named, RELEASE
    return default_release(), f"the default of {lock_path()}"


def find_module(module: str, device: int | None = None) -> tuple[KernelSource, ModuleFile, Facts]:
    """Find a module: the first source's file that the device, if one is given, can run.

    Raises `ArchitectureError` if only the device code did not fit, and otherwise
    `KernelNotFoundError`, with the reason of every place.
    """
    capability = None if device is None else machine.capability(device)
    reasons, wrong_code = [], False
    withheld: FetchNotAllowed | None = None
    for place in places_of(module):
        said = ask(place, module, capability)
        if said.status == HERE:
            assert place.source is not None
            assert said.file is not None
            assert said.facts is not None
            return place.source, said.file, said.facts
        wrong_code |= said.status == OTHER_GPU
        if said.status == LATER:
            withheld = FetchNotAllowed(said.reason)
        lacks = said.status == LACKS and place.source is not None
        reason = said.reason
        if lacks and place.source:
            name = split(module)[1]
            reason = services.adviser.get().missing_module_message(place.source, name)
        reasons.append(f"{place.kind}: {reason}")
    kind = ArchitectureError if wrong_code else KernelNotFoundError
    where = "" if device is None else f" for cuda:{device}"
    text = "\n".join(f"  {line}" for line in reasons)
    message = f"no kernels of module {module!r}{where}:\n{text}\n{_advice(module, device)}"
    raise kind(message) from withheld


def _advice(module: str, device: int | None) -> str:
    if distribution := split(module)[0]:
        return installing(distribution)
    arch = None
    if device is not None:
        major, minor = machine.capability(device)
        # From SM90 on, FlashInfer's kernels use features specific to the exact architecture.
        arch = f"{major}.{minor}" + ("a" if major >= 9 else "")
    build = services.adviser.get().build_advice(module, release() or wanted_release(), arch)
    return f"{build} FI_FFI_KERNELS names a wheel.".lstrip()


def installing(distribution: str) -> str:
    """Return how to get a distribution's libraries, of which nothing is imported."""
    return (
        f"`pip install --no-deps {distribution}` installs its libraries; FI_FFI_KERNELS names its "
        "wheel, or a folder of them."
    )
