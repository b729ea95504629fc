"""What is done to the gated delta rule: each of these is given a machine and played on it.

Those that return a number return the largest error as a fraction of its bound.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

import fi_ffi

from tests.gdn_stress.lanes import HEAD_SIZE, Lane, Spec
from tests.gdn_stress.machines import OP, Cpu
from tests.gdn_stress.plays import alone, check, check_chain, check_exact, check_same, together

# Below, at and above the tile.
AROUND_TILES = (1, 2, 31, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257)
LENGTHS = (*AROUND_TILES, 1000, 1024)
GQA = ((4, 1), (6, 2), (8, 2), (8, 4), (16, 4))
GVA = ((1, 2), (2, 4), (4, 8), (16, 32))
OPTIONAL = ("input_state", "alpha", "beta")
EVERY = (0, 64, 128, 192, 1024)


def mixed(dtype: str, **more: bool) -> Spec:
    return Spec((65, 1, 130, 64, 31, 2), dtype=dtype, **more)


def need_checkpoints(every: int) -> None:
    """Skip where the kernels' release has none."""
    if every and all(arg.name != "state_checkpoints" for arg in OP.row.tensors):
        pytest.skip(f"kernels of releases {OP.row.releases} keep no checkpoints")


# Lengths and heads.


def check_singly(machine: Cpu, rng: np.random.Generator, dtype: str) -> float:
    """Calls of one sequence, of every length."""
    heads = itertools.cycle(((2, 2), (4, 2), (2, 4)))
    specs = [Spec((length,), *next(heads), dtype) for length in LENGTHS]
    return check(machine, [Lane(machine, spec, rng) for spec in specs])


def check_lengths_mixed(machine: Cpu, rng: np.random.Generator, dtype: str) -> float:
    """Sequences of every length in a call, in several orders."""
    lanes = []
    for heads in ((2, 2), (4, 2), (2, 4)):
        lengths = tuple(int(n) for n in rng.permutation([*LENGTHS, *AROUND_TILES]))
        lanes.append(Lane(machine, Spec(lengths, *heads, dtype), rng, steps=2, inputs=2))
    return check(machine, lanes)


def check_single_tokens(machine: Cpu, rng: np.random.Generator, dtype: str, count: int) -> float:
    heads = (1, 2) if count < 512 else (1, 1)
    return check(machine, [Lane(machine, Spec((1,) * count, *heads, dtype), rng, steps=2)])


def check_long_among_single_tokens(machine: Cpu, rng: np.random.Generator, dtype: str) -> float:
    lengths = (*(1,) * 32, 1024, *(1,) * 32)
    return check(machine, [Lane(machine, Spec(lengths, 2, 4, dtype), rng, steps=2, inputs=2)])


def check_heads(
    machine: Cpu, rng: np.random.Generator, dtype: str, heads: tuple[int, int]
) -> float:
    spec = Spec((130, 1, 64, 70), *heads, dtype)
    return check(machine, [Lane(machine, spec, rng, machine.rounds(10), inputs=2)])


# Options.


def check_options(
    machine: Cpu, rng: np.random.Generator, dtype: str, heads: tuple[int, int], every: int
) -> float:
    """Every combination of what may be left out, with scales and workspaces in turn."""
    need_checkpoints(every)
    turns = list(itertools.product((0.0, 0.3), (False, True)))
    lengths = (1000, 65, 1) if every == 1024 else (65, 330, 1, 128, 64)
    lanes, combinations = [], list(itertools.product((False, True), repeat=len(OPTIONAL)))
    for i in rng.permutation(len(combinations))[: machine.rounds(len(combinations))]:
        given = combinations[i]
        without = tuple(name for name, there in zip(OPTIONAL, given, strict=True) if not there)
        # Another one for each `every`, and after half of the combinations.
        turn = turns[(i + i // 4 + EVERY.index(every)) % 4]
        lanes.append(Lane(machine, Spec(lengths, *heads, dtype, without, every, *turn), rng))
    return check(machine, lanes)


def check_checkpoints(machine: Cpu, rng: np.random.Generator, dtype: str, every: int) -> float:
    """Every checkpoint is written, where `checkpoint_cu_starts` says, and none beside them."""
    need_checkpoints(every)
    lengths = tuple(int(n) for n in rng.permutation([n for n in LENGTHS if n >= every - 64]))
    lanes = [
        Lane(machine, Spec(order, *heads, dtype, every=every), rng, steps=2)
        for order, heads in (((*AROUND_TILES, 1000), (1, 2)), (lengths, (2, 1)))
    ]
    return check(machine, lanes)


# Launches one after another, and at the same time.


def check_back_to_back(machine: Cpu, rng: np.random.Generator, dtype: str, count: int) -> float:
    """Launches that none waits for, each with outputs of its own."""
    return check(machine, [Lane(machine, mixed(dtype), rng, machine.rounds(count), inputs=5)])


def check_long_chain(
    machine: Cpu, rng: np.random.Generator, dtype: str, steps: int, in_place: bool, exact: int
) -> tuple[float, float]:
    """A state handed on; so many steps against float64, which also carries one of its own."""
    spec = replace(mixed(dtype, chained=True, in_place=in_place), q_heads=2, v_heads=4)
    lane = Lane(machine, spec, rng, machine.rounds(steps), inputs=5)
    worst = check(machine, [lane], exact_steps=exact)
    return worst, check_chain(lane, alone(lane)[:exact])


def check_in_place(machine: Cpu, rng: np.random.Generator, dtype: str) -> None:
    """A state in one place, in two, and with a workspace of the caller's: the same bits."""
    spec = mixed(dtype, chained=True)
    steps = machine.rounds(20)
    apart = Lane(machine, spec, rng, steps, inputs=3)
    expected = alone(apart)
    for more in ({"in_place": True}, {"workspace": True}):
        lane = Lane(machine, replace(spec, **more), rng, steps, drawn=apart.drawn)
        check_same(lane, alone(lane), expected, f"{more}, alone")
        for every_call in (True, False):
            (found,) = together(machine, [lane], every_call=every_call)
            check_same(lane, found, expected, f"{more}, {every_call=}")
        lane.check_intact()


def mixed_specs(count: int) -> list[Spec]:
    """Heads, dtypes, options and lengths that differ from one to the next."""
    heads = itertools.cycle([pair for pairs in zip(GVA, GQA, strict=False) for pair in pairs])
    lengths = ((65, 1, 130), (1, 1, 1, 1), (200,), (64, 3), (31, 257, 64))
    can_checkpoint = any(arg.name == "state_checkpoints" for arg in OP.row.tensors)
    specs = []
    for i in range(count):
        chained = i % 3 != 2
        # Half of them have all gates.
        without = [name for bit, name in enumerate(OPTIONAL) if i % 2 and i >> 1 >> bit & 1]
        specs.append(
            Spec(
                lengths[i % len(lengths)], *next(heads), ("bfloat16", "float16")[i // 2 % 2],
                tuple(name for name in without if not (chained and name == "input_state")),
                EVERY[i % 4] if can_checkpoint else 0, (0.0, 0.3)[i // 3 % 2],
                workspace=i % 4 == 1, chained=chained, in_place=chained and i % 5 > 2,
            )
        )  # fmt: skip
    return specs


def check_streams(
    machine: Cpu, rng: np.random.Generator, count: int, threads: bool, steps: int = 12
) -> float:
    """Chains and repeated launches of mixed configurations, each on a stream of its own."""
    streams = machine.streams(machine.rounds(count))
    specs = mixed_specs(len(streams))
    lanes = [
        Lane(machine, spec, rng, machine.rounds(steps), inputs=3, stream=stream)
        for spec, stream in zip(specs, streams, strict=True)
    ]
    return check(machine, lanes, threads, exact_steps=3)


def check_production(machine: Cpu, rng: np.random.Generator, dtype: str) -> float:
    """Chains of a model's layer on four streams."""
    lengths = ((1, 64, 100, 1, 257, 30), (512,), (1,) * 8, (129, 300))
    streams = machine.streams(machine.rounds(4))
    lanes = [
        Lane(
            machine, Spec(each, 16, 32, dtype, chained=True, in_place=bool(i % 2)), rng,
            machine.rounds(20), inputs=2, stream=stream,
        )
        for i, (each, stream) in enumerate(zip(lengths, streams, strict=False))
    ]  # fmt: skip
    return check(machine, lanes, exact_steps=2)


def check_graph(
    machine: Cpu, rng: np.random.Generator, dtype: str, in_place: bool, steps: int = 20
) -> float:
    """A chain captured once and replayed."""
    spec = mixed(dtype, chained=True, in_place=in_place)
    lane = Lane(machine, spec, rng, machine.rounds(steps), inputs=3)
    expected = alone(lane)

    def launch() -> None:
        for step in range(lane.steps):
            lane.launch(step)

    lane.reset()
    replay = machine.capture(launch)
    for turn in range(3):
        lane.reset()
        with machine.watched():
            replay()
        found = [lane.read(step) for step in range(lane.steps)]
        check_same(lane, found, expected, f"replay {turn}")
    lane.check_intact()
    return check_exact(lane, expected, steps=3)


# Refusals.


def check_overlaps(machine: Cpu, rng: np.random.Generator, dtype: str) -> None:
    """A state that is only partly the same memory is refused, and nothing is written."""
    lane = Lane(machine, mixed(dtype), rng)
    lane.reset()
    before = lane.read(0)
    count, heads, *_ = before["output_state"].shape
    room = machine.place(np.full((count + 1, heads, HEAD_SIZE, HEAD_SIZE), np.nan, np.float32))
    base, shape = room.desc(), (count, heads, HEAD_SIZE, HEAD_SIZE)

    def state(offset: int) -> fi_ffi.TensorDesc:
        return fi_ffi.TensorDesc(base.ptr + offset, shape, "float32", device=machine.device)

    scalars, descs = lane.drawn_of(0)[1], lane.descs(0)
    for offset in (4 * HEAD_SIZE**2 * heads, 4 * HEAD_SIZE**2, 64):
        for first, second in ((0, offset), (offset, 0)):
            wrong = {"input_state": state(first), "output_state": state(second)}
            with pytest.raises(fi_ffi.ArgumentError, match="the very same memory, or memory apart"):
                machine.call(**descs | wrong, **scalars, stream=lane.stream)
    with pytest.raises(fi_ffi.ArgumentError, match="expected memory apart"):
        machine.call(**descs | {"output": descs["q"]}, **scalars, stream=lane.stream)
    machine.settle()
    assert np.isnan(room.get()).all() and room.intact()
    assert {name: x.tobytes() for name, x in lane.read(0).items()} == {
        name: x.tobytes() for name, x in before.items()
    }
