"""Any argument of anything replaced by any wrong thing: `bad_input` has what is replaced and why.

    FI_FFI_STRESS=long python3 -m pytest -s tests/stress/test_bad_input.py

At full length each family runs in a process of its own, so that a crash is told with its seed and
the call it was in.  The seed repeats a run:

    python3 -m tests.stress.bad_input.run FAMILY COUNT SEED FILE
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi.families import FAMILIES
from fi_ffi.ops.call.refuse import Refusals
from fi_ffi.ops.functions import OPS

from tests.helpers import children
from tests.helpers.children import environment
from tests.helpers.stress_strength import LONG, scaled
from tests.stress.bad_input import rows
from tests.stress.bad_input.guard import guarded
from tests.stress.bad_input.memory import Room
from tests.stress.bad_input.run import run, subjects

# More than the 10,000 of docs/reliability.md: of some a descriptor cannot even be made.
FULL, SHORT = 15_000, 50
MORE = {"plans": 1000, "single": 300}  # of which there is no other test of anything anywhere
NAMES = list(subjects())


def in_a_child(name: str, count: int, number: int, journal: Path) -> str:
    """What a run in another process says; fails with the last call where it crashed."""
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.stress.bad_input.run"]
    command += [name, str(count), str(number), str(journal)]
    done = subprocess.run(
        command, env=environment(), cwd=children.ROOT, capture_output=True, text=True, timeout=1800
    )
    last = journal.read_text() if journal.exists() else "none"
    told = f"{name} of seed {number}: exit {done.returncode}, the last call {last}"
    assert done.returncode == 0, told + done.stderr[-6000:]
    return done.stdout


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
# Numpy's, of values that are no numbers.
@pytest.mark.filterwarnings("ignore")
def test_is_refused_or_right(name, tmp_path):
    number = random.SystemRandom().randrange(2**32)
    print(f"seed {number}")
    count, started = scaled(FULL, MORE.get(name, SHORT)), time.monotonic()
    if LONG:
        print(in_a_child(name, count, number, tmp_path / "journal"), end="")
        print(f"{time.monotonic() - started:.0f} s")
        return
    run(name, count, number, first_only=True)


def test_every_family_is_there():
    assert set(FAMILIES) < set(NAMES)


def test_a_crash_is_told_with_its_seed_and_call(tmp_path, monkeypatch):
    """A program that journals a call and dies in it."""
    journal = tmp_path / "journal"
    folder = tmp_path / "tests" / "stress" / "bad_input"
    folder.mkdir(parents=True)
    dying = "import os, sys; open(sys.argv[4], 'w').write('the call'); os.kill(os.getpid(), 11)"
    (folder / "run.py").write_text(dying)
    monkeypatch.setattr(children, "ROOT", tmp_path)
    with pytest.raises(AssertionError, match=r"norm of seed 7: exit -11, the last call the call"):
        in_a_child("norm", 1, 7, journal)


# Each kind of abuse, let through: the machinery must see it.


def nothing(*_: object) -> None:
    pass


LET_THROUGH = {
    "dtypes": [(Refusals, "_dtypes", nothing), (Refusals, "block", nothing)],
    "strides": [(Refusals, "strides", nothing)],
    "devices": [(Refusals, "devices", nothing)],
    "addresses": [(Refusals, "address", nothing)],
    "numbers": [(Refusals, "number", lambda self, name, _: self._scalars[name].type(1))],
    "texts": [(fi_ffi.errors, "_text", lambda value: "")],
}


@pytest.mark.parametrize("what", LET_THROUGH)
@pytest.mark.filterwarnings("ignore")
def test_what_gets_through_is_seen(what, monkeypatch):
    for of, name, loose in LET_THROUGH[what]:
        monkeypatch.setattr(of, name, loose)
    with pytest.raises(AssertionError):
        run("norm", 400, 1, first_only=True)


def _call() -> rows.Call:
    with guarded():
        return rows.Call(OPS["rmsnorm"].row, random.Random())


def test_a_byte_beside_a_result_and_a_wrong_result_are_seen():
    for words in ("1 bytes were written", "of its bound off"):
        call = _call()
        call.op(**call.values)
        if "written" in words:
            call.room.whole[0] ^= 1
        else:
            call.room.arrays["out"][0, 0] *= 1.1
        with pytest.raises(AssertionError, match=words):
            call.check(call.values)


def test_a_refusal_that_wrote_is_seen(monkeypatch):
    call = _call()
    full = Refusals.number

    def writes(*args: Any) -> Any:
        call.room.whole[-1] ^= 1
        return full(*args)

    monkeypatch.setattr(Refusals, "number", writes)
    with guarded(), pytest.raises(AssertionError, match="something was written"):
        rows._call(call, {"eps": "1"}, True, False)


def test_a_room_holds_what_is_its_own():
    room = Room({"x": np.zeros((4, 8), np.float16)})
    desc = room.descs()["x"]
    assert room.holds(desc)
    for shape, strides in (((4, 2**20), None), ((4, 8), (2**20, 1)), ((4, 8), (-(2**20), 1))):
        other = fi_ffi.TensorDesc(desc.ptr, shape, "float16", strides=strides, device="cpu")
        assert not room.holds(other)
