"""Any argument of anything replaced by any wrong thing: `bad_input` has what is replaced and why.

    FI_FFI_STRESS=long python3 -X faulthandler -m pytest -s tests/stress/test_bad_input.py

A failure tells its call, and a crash has its seed before it, which repeats the run:

    FI_FFI_STRESS=1 python3 -c "from tests.stress.test_bad_input import run; run('gdn', 15000, 7)"
"""

from __future__ import annotations

import collections
import random
import resource
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi.tensor import Device
from fi_ffi.families import FAMILIES
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.call.refuse import Refusals
from fi_ffi.ops.functions import OPS

from tests.helpers.stress_strength import LONG, scaled
from tests.stress.bad_input import rows
from tests.stress.bad_input.guard import guarded
from tests.stress.bad_input.memory import Room

# Of some calls a descriptor cannot even be made.
FULL, SHORT = 15_000, 50
MOST_MEMORY = 12 << 30


class Family:
    """Wrong calls of a family's rows, of the default release where it is short; a right call of
    each serves many times."""

    def __init__(self, family: str, number: int) -> None:
        self.rows, self.number = rows.rows_of(family, not LONG), number
        # Right calls of each row, of other dtypes and variants.
        self.kinds = scaled(6, 1)
        self._calls: dict[tuple[int, int], rows.Call] = {}

    def __call__(self, rng: random.Random, tell: Callable[[str], None]) -> str:
        """One wrong call, told of before; what became of it."""
        at = rng.randrange(len(self.rows)), rng.randrange(self.kinds)
        if at not in self._calls:
            self._calls[at] = rows.Call(self.rows[at[0]], random.Random(f"{self.number} {at}"))
        # Taken out while it is used: after a failure there may be anything in its room.
        call = self._calls.pop(at)
        outcome = rows.one_call(call, rng, tell)
        self._calls[at] = call
        return outcome


def run(name: str, count: int, number: int) -> collections.Counter[str]:
    """So many calls, of a seed; how many came to what.  Raises for the first that is wrong."""
    subject = Family(name, number)
    outcomes, told = collections.Counter[str](), [""]
    numbers = random.Random(number)
    with guarded():
        for draw in (numbers.getrandbits(64) for _ in range(count)):
            try:
                rng = random.Random(draw)
                outcomes[subject(rng, lambda text: told.__setitem__(0, text))] += 1
            except Exception as error:
                raise AssertionError(f"{told[0]}\n{type(error).__name__}: {error}") from error
    return outcomes


@pytest.fixture
def bounded():
    """What asks for all memory gets a MemoryError, and the machine stays usable."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    if LONG:
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", FAMILIES)
# Numpy's, of values that are no numbers.
@pytest.mark.filterwarnings("ignore")
def test_is_refused_or_right(name, bounded):
    number = random.SystemRandom().randrange(2**32)
    print(f"seed {number}", flush=True)  # also before a crash
    found = run(name, scaled(FULL, SHORT), number)
    assert found.total() and found["refused"]
    print(f"{name}: {found.total()} calls: {dict(found.most_common())}")


# Each kind of abuse, let through: the machinery must see it.


def nothing(*_: object) -> None:
    pass


def devices_alone(self: CompiledRow, present: Any, layout: str) -> Device:
    return self._device_of(present)


def first_device(_: CompiledRow, present: Any) -> Device:
    device: Device = present[0][1].kind.device
    return device


LET_THROUGH = {
    "dtypes": [(CompiledRow, "_check_kinds", devices_alone), (Refusals, "block", nothing)],
    "strides": [(Refusals, "strides", nothing)],
    "devices": [(CompiledRow, "_device_of", first_device)],
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
        run("norm", 400, 1)


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
