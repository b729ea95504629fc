"""The checks of the gated delta rule's stress can fail, and a hang ends the session."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi
from fi_ffi.reference.arrays import as_array

from tests.helpers.children import done
from tests.stress.gdn import Cpu, Lane, Spec, alone, check, check_chain

STEPS = 4


class Faulty(Cpu):
    """A machine whose kernel does something wrong before or after the call, by its number."""

    def __init__(self, before=None, after=None) -> None:
        self.before, self.after, self.launches = before, after, 0

    def call(self, **arguments):
        tensors = {
            name: as_array(value)
            for name, value in arguments.items()
            if isinstance(value, fi_ffi.TensorDesc)
        }
        if self.before:
            self.before(self.launches, tensors, arguments)
        super().call(**arguments)
        if self.after:
            self.after(self.launches, tensors, arguments)
        self.launches += 1


def past_the_end(number, tensors, arguments):
    output = arguments["output"]
    as_array(fi_ffi.TensorDesc(output.ptr, (tensors["output"].size + 1,), "uint16", device="cpu"))[
        -1
    ] = 0


def scaled(number, tensors, arguments):
    tensors["output"][...] = tensors["output"].astype(np.float64) * 1.05


def moving(number, tensors, arguments):
    if number == STEPS + 2:  # not the one alone, but the same launch together
        tensors["output"].view(np.uint16)[-1, -1, -1] ^= 1


def other_checkpoints(number, tensors, arguments):
    tensors["state_checkpoints"][...] = tensors["state_checkpoints"][::-1].copy()


def no_checkpoint(number, tensors, arguments):
    tensors["state_checkpoints"][1] = np.nan


def damaged_input(number, tensors, arguments):
    if number == 3 * STEPS - 1:  # the last, so that nothing else is wrong
        tensors["q"][0, 0, 0] = 0


def forgotten_state(number, tensors, arguments):
    tensors["input_state"][...] = 0


FAULTS = {
    "past the end": ({"after": past_the_end}, "output: bytes beside it were written"),
    "5 % off": ({"after": scaled}, "launch 0, output: .* bound; "),
    "a bit that moves": ({"after": moving}, "together, every_call=True, launch 2, output: 1 of"),
    "checkpoints in another order": ({"after": other_checkpoints}, "state_checkpoints: .* bound"),
    "a checkpoint not written": ({"after": no_checkpoint}, "state_checkpoints: inf away"),
    "an input written": ({"after": damaged_input}, "q has changed"),
    "a state not handed on": ({"before": forgotten_state}, "output.*: .* of its bound"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault, rng):
    kind, words = FAULTS[fault]
    machine = Faulty(**kind)
    spec = Spec((70, 65), 1, 1, "bfloat16", every=64, chained=True)
    lane = Lane(machine, spec, rng, STEPS)
    with pytest.raises(AssertionError, match=words):
        check(machine, [lane])


def test_a_chain_that_loses_its_state_is_seen(rng):
    """By the check that carries float64, too."""

    def forget(number, tensors, arguments):
        if number == 2:
            tensors["input_state"][...] = 0

    for fault in (None, forget):
        machine = Faulty(fault)
        lane = Lane(machine, Spec((3, 5), dtype="bfloat16", chained=True), rng, STEPS)
        found = alone(lane)
        if fault is None:
            assert check_chain(lane, found) <= 1
        else:
            with pytest.raises(AssertionError, match="step 2, output: .* of its norm's bound"):
                check_chain(lane, found)


HANGING = """
import atexit, sys
import pytest
import fi_ffi
from tests.stress.gdn import Cpu

class Stuck(Cpu):
    def settle(self):
        raise fi_ffi.HangError("gdn_prefill", "cu_seqlens and all the rest")

try:
    with Stuck().watched():
        atexit.register(print, "the last")
except pytest.exit.Exception as error:
    print(error.msg, error.returncode, flush=True)
"""


def test_a_hang_ends_the_session():
    """And nothing is taken down, which would wait for the GPU."""
    told = "HANG: cu_seqlens and all the rest 1\n"
    assert done("import atexit; atexit.register(print, 'taken down')\n" + HANGING) == (1, told, "")
