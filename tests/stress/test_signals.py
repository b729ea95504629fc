"""Ctrl-C at any moment: nothing is left half done, no process stays, and the next start works."""

from __future__ import annotations

import contextlib
import os
import random
import re
import select
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import pytest

import fi_ffi
from fi_ffi.cli import upkeep
from fi_ffi.loader import cache
from fi_ffi.loader.wheel import Wheel

from tests.helpers.children import done, start
from tests.helpers.compiler import compiled, why_not_build
from tests.helpers.stress_strength import LONG, scaled
from tests.loader.conftest import LOCK
from tests.loader.server import INFO, NORM, File, Server, kernel_members, make_wheel, record
from tests.stress.gauges import counted

HERE = Path(__file__).parent
PATH = "/flashinfer_jit_cache-0.6.13+cu130-cp39-abi3-linux_x86_64.whl"
# A process that was started in the background ignores it.
HEARS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FI_FFI_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def interrupted(child: subprocess.Popen[str]) -> str:
    """Ctrl-C; it has to end as programs do that it ends.  What it said on stderr."""
    for _ in range(7):
        child.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that a destructor met is lost
            _, err = child.communicate(timeout=3)
            break
    assert child.returncode == -signal.SIGINT, (child.returncode, err)
    # Not always at the end: a ZipFile that it met in the making complains of itself after it.
    assert "KeyboardInterrupt" in err.splitlines(), err
    return err


def check_nothing_is_left(root: Path) -> None:
    assert not [*root.glob("tmp/*")], "a temporary"
    assert not [*root.glob("locks/*")], "a lock"
    assert all(verdict.problem == "" for verdict in upkeep.verify(root))


FETCH = """
import sys
from fi_ffi.loader.fetch.remote import RemoteWheel
print("ready", flush=True)
print(RemoteWheel(sys.argv[1], verify="record").extract(sys.argv[2]))
"""


def test_during_a_fetch(root: Path) -> None:
    """From a server that sends a module for minutes."""
    wheel = make_wheel(kernel_members(4, 400_000))
    with Server({PATH: File(wheel, etag='"one"')}) as web:
        for _ in range(scaled(20, 1)):
            web.bandwidth, web.seen[:] = 150_000, []
            child = start(HEARS + FETCH, web.url(PATH), NORM)
            assert child.stdout.readline() == "ready\n"
            enough = random.uniform(66_000, 200_000)
            while web.sent < enough and child.poll() is None:
                time.sleep(0.005)
            interrupted(child)
            check_nothing_is_left(root)
            assert not [*root.glob("objects/*/*/norm.so")]
        web.bandwidth = None
        child = start(HEARS + FETCH, web.url(PATH), NORM)
        out, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (0, "")
    assert Path(out.split()[-1]).read_bytes() == kernel_members(4, 400_000)[NORM]


EXTRACT = """
import sys
from pathlib import Path
from fi_ffi.loader.wheel import Wheel
print("ready", flush=True)
while True:
    Wheel(Path(sys.argv[1])).extract(sys.argv[2]).unlink()
"""


def test_during_an_extraction(root: Path, tmp_path: Path) -> None:
    members = {NORM: random.Random(7).randbytes(4_000_000)}
    path = tmp_path / PATH[1:]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr(f"{INFO}/RECORD", record(members))
    for _ in range(scaled(100, 3)):
        child = start(HEARS + EXTRACT, str(path), NORM)
        assert child.stdout.readline() == "ready\n"
        time.sleep(random.uniform(0.1, 0.4))
        interrupted(child)
        check_nothing_is_left(root)
    with Wheel(path).extract(NORM).open("rb") as file:
        assert cache.hash_of(file) == Wheel(path).record[NORM].sha256


def descendants(pid: int) -> set[int]:
    """The processes that this one started, and those that they did."""
    parents = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rpartition(")")[2].split()[1]
            )
    found, more = set(), {pid}
    while more:
        more = {child for child, parent in parents.items() if parent in more} - found
        found |= more
    return found


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX"
    return False


def names(pids: set[int]) -> set[str]:
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            found.add(Path(f"/proc/{pid}/comm").read_text().strip())
    return found


BUILD = """
import sys
from fi_ffi.cli import main
main(sys.argv[1:])
"""


@pytest.mark.timeout(1800)
@pytest.mark.skipif(not LONG, reason="compiles kernels: FI_FFI_STRESS=long")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_during_a_build(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = why_not_build()
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.delenv("FI_FFI_CACHE_DIR")  # the compilers' environment may be there
    command = ["build", "page", "--build-dir", str(tmp_path / "b"), "--output", str(tmp_path)]
    child = start(HEARS + BUILD, *command)
    started: set[int] = set()
    while child.poll() is None and "cicc" not in names(started):
        started = descendants(child.pid)
        time.sleep(0.02)
    assert child.poll() is None, child.communicate()
    started |= descendants(child.pid)
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert err.rstrip().endswith("Stopped. The same command continues from here."), err
    assert "Traceback" not in err
    end = time.monotonic() + 5
    while any(map(is_alive, started)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not names({pid for pid in started if is_alive(pid)})
    assert not [*tmp_path.glob("*.whl")] and not [*tmp_path.glob("b/**/page.so")]
    child = start(HEARS + BUILD, *command)
    _, err = child.communicate(timeout=1200)
    assert child.returncode == 0, err
    (wheel,) = tmp_path.glob("*.whl")
    assert [name for name in Wheel(wheel).members if name.endswith("/page.so")]


COMMAND = """
import sys
from fi_ffi.cli import main
print("ready", flush=True)
main(sys.argv[1:])
"""


def test_during_a_command(root: Path, tmp_path: Path) -> None:
    """Which waits for a server: the exit status is that of a program that Ctrl-C ended."""
    with Server({PATH: File(make_wheel(kernel_members(4, 400_000)))}) as web:
        web.bandwidth = 3000
        lock = tmp_path / "mine.lock"
        lock.write_text(LOCK.format(url=web.url(PATH), platform="any", sha256="0" * 64))
        command = ["lock", "verify", "--all", "--full", "--lock", str(lock), "--quiet"]
        child = start(HEARS + COMMAND, *command)
        assert child.stdout.readline() == "ready\n"
        while not web.sent and child.poll() is None:
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=20)
    assert (child.returncode, err.strip()) == (130, "Interrupted.")
    check_nothing_is_left(root)


CALLS = (HERE / "interrupting.py").read_text()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("what", ["calls", "plans", "blocks"])
def test_during_many(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FI_FFI_CACHE_DIR")
    child = start(CALLS, counted(), what)
    for _ in range(scaled(2000, 15)):
        assert child.stdout.readline() == "go\n", child.communicate()
        time.sleep(random.uniform(0.0005, 0.02))
        child.send_signal(signal.SIGINT)
        while not select.select([child.stdout], [], [], 3)[0]:
            child.send_signal(signal.SIGINT)  # one that a destructor met is lost
        assert child.stdout.readline() == "interrupted\n", child.communicate()
        child.stdin.write("\n")
        child.stdin.flush()
    assert child.stdout.readline() == "go\n"
    time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    child.stdin.close()
    while not select.select([child.stdout], [], [], 3)[0]:
        child.send_signal(signal.SIGINT)
    err = child.stderr.read()
    assert child.wait(30) == -signal.SIGINT, err
    assert err.rstrip().endswith("KeyboardInterrupt"), err


@pytest.mark.timeout(3600)
def test_exceptions_of_handlers_arrive_as_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in adapters, in callbacks, and in the deleters of tensors; destructors lose none."""
    monkeypatch.delenv("FI_FFI_CACHE_DIR")
    source, seed = HERE.parent / "modules" / "every_kind.cc", str(random.random())
    program = (HERE / "deadlines.py").read_text()
    words = str(compiled(source)), seed, str(scaled(20_000, 500))
    assert done(program, *words, seconds=scaled(3000, 100)) == (0, "ended\n", ""), seed


@pytest.mark.timeout(3600)
def test_destructors_lose_no_exception() -> None:
    """Of objects with CUDA's resources, which are given back: at exit too, but not by a child."""
    program, seed = (HERE / "endings.py").read_text(), str(random.random())
    words = str(compiled(HERE / "runtime.c")), seed, str(scaled(20_000, 300))
    told = "1 before\n1 live\n"
    assert done(program, *words, seconds=scaled(3000, 100)) == (0, told, ""), seed


def test_no_destructor_is_of_python() -> None:
    """Nor are the callbacks that the standard library gives to weak references."""
    of_python = re.compile(r"def __del__|weakref\.(finalize|Weak(Set|KeyDict|ValueDict)\w*)")
    assert of_python.search("weakref.WeakSet()")
    package = Path(fi_ffi.__file__).parent
    found = [f"{path}: {each[0]}" for path in package.rglob("*.py")
             for each in of_python.finditer(path.read_text())]  # fmt: skip
    assert not found


def test_this_module_is_heard() -> None:
    """The children do hear the signal: else every test here would wait for nothing."""
    status, _, err = done(HEARS + "import os; os.kill(os.getpid(), 2)", seconds=60)
    assert status == -signal.SIGINT
    assert os.path.basename(err.strip().splitlines()[-1]) == "KeyboardInterrupt"
