"""What FlashInfer's kernel does that its callers would not expect; the reference does not.

Each asserts what the kernel does today, so that a release that changes it is seen.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import fi_ffi

from tests.gdn_stress.lanes import HEAD_SIZE, TILE, Lane, Spec, make_case
from tests.gdn_stress.machines import Cpu
from tests.gdn_stress.plays import alone, bits
from tests.gdn_stress.scenarios import need_checkpoints

# Tensors whose NaN reaches the sequence before: values and keys are multiplied by zero where
# the tile goes on past the sequence, gates are masked, and queries are of their own row only.
LEAKS = {"v": True, "k": True, "q": False, "alpha": False, "beta": False}


def check_flashinfers_count(
    machine: Cpu, rng: np.random.Generator, dtype: str, length: int
) -> None:
    """With room for `length // every` checkpoints the kernel writes one past the end."""
    need_checkpoints(TILE)
    lane = Lane(machine, Spec((length,), 1, 1, dtype, every=TILE), rng)
    count = length // TILE
    # Room for the one too many, which is not told of.
    room = machine.place(np.full((count + 1, 1, HEAD_SIZE, HEAD_SIZE), np.nan, np.float32))
    starts = machine.place(np.array([0, count]))
    told = fi_ffi.TensorDesc(
        room.desc().ptr, (count, 1, HEAD_SIZE, HEAD_SIZE), "float32", device=machine.device
    )
    theirs = {"state_checkpoints": told, "checkpoint_cu_starts": starts.desc()}
    lane.reset()

    def launch() -> None:
        with machine.watched():
            descs, scalars = lane.descs(0) | theirs, lane.drawn_of(0)[1]
            machine.call(**descs, **scalars, stream=lane.stream)

    if not machine.is_gpu:
        with pytest.raises(fi_ffi.KernelError, match="out of bounds"):
            launch()
        assert np.isnan(room.get()[count]).all()
        return
    launch()
    after, state = room.get(), lane.read(0)["output_state"]
    assert room.intact()
    assert after[count].tobytes() == state[0].tobytes(), "not the last state past the end"


def check_nan_of_a_neighbour(machine: Cpu, rng: np.random.Generator, dtype: str, name: str) -> None:
    """NaN in a token reaches the last tile of a sequence before, where that tile goes on to it;
    it reaches nothing further away, no other head, and from a value no other element."""
    lane = Lane(machine, Spec((70, 1, 1, 130, 64, 1, 70, 3), dtype=dtype), rng)
    clean, sound = alone(lane)[0], lane.drawn_of(0)[0]
    starts = sound["cu_seqlens"]
    for token in (min(starts[3] + 5, starts[-1] - 1), starts[4], starts[-2]):
        wrong = sound[name].copy()
        wrong[token, 0, ...] = np.nan
        where: object = slice(None)
        if name == "v":
            wrong[token] = sound[name][token]
            wrong[token, 0, 5] = np.nan
            where = 5
        machine.write(lane.placed(0, name), wrong)
        got = alone(lane)[0]
        may, reached = _reach(starts, token, got, where)
        for tensor, allowed in may.items():
            differs = bits(got[tensor]) != bits(clean[tensor])
            assert not (differs & ~allowed).any(), f"{name} of token {token} in {tensor}"
        for sequence, rows in reached.items():
            seen = np.isnan(got["output"][rows, 0].astype(float)).any()
            seen |= np.isnan(got["output_state"][sequence, 0]).any()
            known = LEAKS[name] and machine.is_gpu
            assert seen == known, f"{name} of token {token}: sequence {sequence} has NaN: {seen}"
    machine.write(lane.placed(0, name), sound[name])


def _reach(
    starts: np.ndarray, token: int, got: dict[str, np.ndarray], where: object
) -> tuple[dict[str, np.ndarray], dict[int, slice]]:
    """Where a token's NaN may be seen, in head 0; the sequences before that it reaches, with
    the rows of their last tile."""
    may = {tensor: np.zeros(got[tensor].shape, bool) for tensor in ("output", "output_state")}
    reached = {}
    for sequence, (start, end) in enumerate(itertools.pairwise(starts)):
        if start <= token < end:
            rows = slice(token - (token - start) % TILE, end)
        else:
            last = start + (end - start - 1) // TILE * TILE
            if not end <= token < last + TILE:
                continue
            rows = reached[sequence] = slice(last, end)
        may["output"][rows, 0, where] = True
        may["output_state"][sequence, 0, where] = True
    return may, reached


def check_tokens_after_the_end(machine: Cpu, rng: np.random.Generator, dtype: str) -> None:
    """Tokens past the last sequence: what would be read of them is written over, as far as
    the last sequence's last tile goes."""
    lane = Lane(machine, Spec((3, 70), dtype=dtype, spare=100), rng)
    got, (arrays, scalars) = alone(lane)[0], lane.drawn_of(0)
    case = make_case(machine, arrays, scalars)
    end = int(arrays["cu_seqlens"][-1])
    value, size = case.expected["output"]
    case.expected["output"] = value[:end], size[:end]
    assert case.error("output", got["output"][:end])[1] <= 1
    assert case.error("output_state", got["output_state"])[1] <= 1
    is_poison = np.isnan(got["output"].astype(float)).all(axis=(1, 2))
    past = int(arrays["cu_seqlens"][-2]) + 2 * TILE
    assert is_poison[past:].all()
    assert is_poison[end:past].all() == (not machine.is_gpu)
    lane.check_intact()
