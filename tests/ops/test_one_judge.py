"""What `supports` answers, the search of a call finds: of every op, in each state of a machine."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import fi_ffi
from fi_ffi.capability.judgement import Query
from fi_ffi.capability.matrix import lines
from fi_ffi.catalogue.ahead_of_time import published
from fi_ffi.catalogue.modules import members
from fi_ffi.errors import FetchError, LoaderError
from fi_ffi.loader import machine, runtime, search
from fi_ffi.loader.fetch import wheels_lock
from fi_ffi.loader.permission import fetching, is_withheld
from fi_ffi.module_names import parse
from fi_ffi.ops.call.support import REFUSED, UNKNOWN, Support
from fi_ffi.ops.functions import OPS

from tests.helpers import children, installed
from tests.loader.conftest import remote_kernels, root
from tests.loader.server import kernel_members

__all__ = ["remote_kernels", "root"]

SM = (9, 0)
NAMES = Path(__file__).parents[1] / "loader" / "data" / "uris.json"


@pytest.fixture(scope="module")
def site(built_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installed provider of 0.7.2.post1 that has norm."""
    wheels = tmp_path_factory.mktemp("wheels")
    norm = {"norm": installed.library_of(built_wheel, "norm")}
    made = installed.provider(wheels, "sm90a", norm)
    return installed.install(
        tmp_path_factory.mktemp("site"), installed.shim(wheels, ("sm90a",)), made
    )


STATES = ("empty", "one wheel", "offline", "no remote", "a provider", "FI_FFI_KERNELS")


@pytest.fixture(params=STATES)
def state(
    request: pytest.FixtureRequest, root: Path, built_wheel: Path, site: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[str]:  # fmt: skip
    """A machine with one H100, an empty cache and the package's lock; nothing is fetched."""
    for name in ("KERNELS", "SOURCES", "WHEELS", "RELEASE", "CUDA", "LOCK", "VERIFY"):
        monkeypatch.delenv(f"FI_FFI_{name}", raising=False)
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path / "nobody"))
    if request.param in ("one wheel", "offline", "no remote"):
        (root / "wheels").mkdir(parents=True, mode=0o755)
        shutil.copy(built_wheel, root / "wheels")
        root.chmod(0o755)
    if request.param == "offline":
        monkeypatch.setenv("FI_FFI_OFFLINE", "1")
    if request.param == "no remote":
        monkeypatch.setenv(search.SOURCES, "local")
    if request.param == "a provider":
        monkeypatch.syspath_prepend(str(site))
    if request.param == "FI_FFI_KERNELS":
        monkeypatch.setenv(search.KERNELS, str(built_wheel))
    monkeypatch.setattr(machine, "device_count", lambda: 1)
    monkeypatch.setattr(machine, "capability", lambda device: SM)
    wheels_lock.the_lock.cache_clear()
    runtime.use_source(None)
    yield request.param
    monkeypatch.undo()
    wheels_lock.the_lock.cache_clear()
    runtime.use_source(None)


def called(module: str) -> tuple[str, str]:
    """What a call on the GPU comes to: the kind of place and "here", the error, or "asked"."""
    try:
        with fetching(False):
            source, file, facts = search.find_module(module, 0)
    except LoaderError as error:
        return ("remote", "asked") if is_withheld(error) else ("", str(error))
    assert file.path.is_file() and any(code.runs_on(SM) for code in facts.codes)
    (kind,) = (place.kind for place in search.places() if place.source is source)
    return kind, "here"


def answers() -> Iterator[Support]:
    """The answer of every op, and of every other function and class that is asked."""
    for name in fi_ffi.__all__:
        supports = getattr(getattr(fi_ffi, name), "supports", None)
        if supports is not None:
            yield supports()
    for line in lines():  # every option of them, too
        yield line.ask(Query.of(None))


def modules_of(answer: Support) -> list[str]:
    """The modules that the answer is about: one, or those here of a family."""
    found = []
    for place in search.places():
        if place.source is not None:
            with fetching(False):
                try:
                    found += members(place.source, answer.module)
                except LoaderError:
                    continue
    return [*dict.fromkeys(found)] or family(answer.module, answer.release) or [answer.module]


@functools.cache
def family(name: str, release: str) -> list[str]:
    """A module that a release lists of a family, where the name is one."""
    listed = json.loads(NAMES.read_text())["listed"]
    names = [n for key, of in listed.items() if release in key.split() for n in of]
    return [n for n in names if (found := parse(n, release)) and found.family == name][:1]


def test_every_answer_is_what_a_call_comes_to(state):
    seen: set[tuple[str, bool]] = set()
    of_others: set[str] = set()
    number = 0
    for answer in answers():
        number += 1
        if answer.status == REFUSED and not answer.module:
            continue  # no release has it
        ends = [called(module) for module in modules_of(answer)]
        if answer.is_here:
            assert (answer.place, "here") in ends, (answer, ends)
        elif answer:
            assert answer.place == "remote" and ("remote", "asked") in ends, (answer, ends)
            assert "it is fetched when it is first called, from the pinned wheel" in answer.reason
        elif answer.status != REFUSED:
            # No place has it. Where the pinned wheel would be asked, its record says no.
            assert not [end for end in ends if end[1] == "here"], (answer, ends)
            if ("remote", "asked") in ends:
                assert published(answer.release, "cu130", "x86_64")
                assert (
                    answer.status == UNKNOWN
                    or "does not build" in answer.reason
                    or ("wheels" in answer.reason)
                ), answer
        if "/" in answer.module:  # of another distribution, whatever FlashInfer's kernels are
            of_others.add(answer.place)
        else:
            seen.add((answer.place, answer.is_here))
    assert number > len(OPS)
    assert of_others == {"" if state in ("offline", "no remote") else "remote"}
    assert (
        seen
        == {
            "empty": {("", False), ("remote", False)},
            "one wheel": {("", False), ("remote", False), ("local", True)},
            "offline": {("", False), ("local", True)},
            "no remote": {("", False), ("local", True)},
            "a provider": {("", False), ("installed", True)},
            "FI_FFI_KERNELS": {("", False), ("explicit", True)},
        }[state]
    )


SAYS = {
    "empty": "rope is in FlashInfer 0.6.13's cu130 wheels, and nothing is here yet: it is fetched "
    "when it is first called, from the pinned wheel flashinfer_jit_cache-0.6.13+cu130",
    "offline": "FI_FFI_OFFLINE=1",
    "no remote": "FI_FFI_SOURCES leaves out `remote`",
    "a provider": "pins no kernels of FlashInfer 0.7.2.post1",
    "FI_FFI_KERNELS": "has no module rope",
}
SAYS["one wheel"] = SAYS["empty"]


def test_the_reason_names_the_place(state):
    """Of an op whose module no wheel here has: after one wheel was built, too."""
    answer = fi_ffi.apply_rope.supports()
    assert SAYS[state] in answer.reason
    assert bool(answer) == (state in ("empty", "one wheel"))
    if not answer:
        assert answer.build == f"fi-ffi build --release {answer.release} --arch 9.0a rope"
    norm = fi_ffi.rmsnorm.supports()
    assert norm.is_here == (state != "empty")
    if norm.is_here:
        entry = runtime.kernel_entry("norm", fi_ffi.rmsnorm.row.signature, ">=0.6.3")
        assert entry.name == "norm.rmsnorm"


def test_a_question_keeps_no_call_from_fetching(remote_kernels):
    """What was refused inside `fetching(False)` was asked of nobody."""
    (source,) = search.sources()
    with fetching(False), pytest.raises(FetchError, match="nothing is fetched unasked"):
        source.modules()
    assert not remote_kernels.seen
    assert source.modules() == sorted(name.split("/")[2] for name in kernel_members())


def test_an_unknown_name_is_refused_at_once(state):
    """By the release's names, without a network; the nearest are named."""
    before = time.monotonic()
    with pytest.raises(fi_ffi.KernelNotFoundError) as caught:
        fi_ffi.module("nrom")
    assert time.monotonic() - before < 3
    text = str(caught.value)
    assert "the nearest: norm" in text or "it has norm" in text or "the nearest it has" in text
    assert "FlashInfer" in text and "nothing is fetched unasked" not in text


def test_names_that_are_unknown_are_asked_for(remote_kernels):
    """Release 1.2.3 has no record, so its wheel may have any name."""
    with pytest.raises(fi_ffi.KernelNotFoundError, match="has no module nrom"):
        search.find_module("nrom")
    assert remote_kernels.seen


def test_a_fetch_of_an_unknown_name_asks_nobody(tmp_path):
    program = "from fi_ffi.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "fetch", "nrom"], capture_output=True, text=True,
        timeout=60, env=children.environment(FI_FFI_CACHE_DIR=str(tmp_path / "cache")),
    )  # fmt: skip
    assert done.returncode == 2 and "no op, module or entry 'nrom'; the nearest: " in done.stderr
    assert not (tmp_path / "cache" / "downloads").exists()
