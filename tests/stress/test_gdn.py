"""The gated delta rule's prefill under stress, on every machine.

Every scenario plays its launches alone, each waited for, and then twice together; what is not
held against float64 must be the same bits.  `-m sanitizer` is a small one of each kind.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

import fi_ffi

from tests.helpers import children
from tests.helpers.sampling import NEEDS_GPU, ON_GPU
from tests.stress.gdn import (
    HEAD_SIZE,
    OP,
    TILE,
    Cpu,
    Gpu,
    Lane,
    Spec,
    alone,
    bits,
    check,
    check_chain,
    check_exact,
    check_same,
    make_case,
    together,
)

# Below, at and above the tile.
AROUND_TILES = (1, 2, 31, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257)
LENGTHS = (*AROUND_TILES, 1000, 1024)
HEADS = ((2, 2), (4, 2), (2, 4))
GQA = ((4, 1), (6, 2), (8, 2), (8, 4), (16, 4))
GVA = ((1, 2), (2, 4), (4, 8), (16, 32))
OPTIONAL = ("input_state", "alpha", "beta")
EVERY = (0, 64, 128, 192, 1024)
DTYPES = pytest.mark.parametrize("dtype", OP.row.dtypes["T"])
MACHINES = ["gpu"] if ON_GPU else ["cpu", pytest.param("gpu", marks=pytest.mark.skip(NEEDS_GPU))]
PLACES = pytest.mark.parametrize("in_place", [False, True], ids=["two places", "in place"])


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest) -> Iterator[Cpu]:
    made = Gpu() if request.param == "gpu" else Cpu()
    yield made
    made.close()


def mixed(dtype: str, **more: bool) -> Spec:
    return Spec((65, 1, 130, 64, 31, 2), dtype=dtype, **more)


def need_checkpoints(every: int) -> None:
    """Skip where the kernels' release has none."""
    if every and all(arg.name != "state_checkpoints" for arg in OP.row.tensors):
        pytest.skip(f"kernels of releases {OP.row.releases} keep no checkpoints")


def is_in_cute_dsl() -> bool:
    """Whether the kernels in use are those of Python sources (from 0.6.14 on)."""
    return OP.row.is_in_python


# Lengths and heads, and launches that none waits for.


def singly(rng, dtype):
    heads = itertools.cycle(HEADS)
    return [(Spec((length,), *next(heads), dtype), 1, 1) for length in LENGTHS]


def several(rng, dtype):
    """Sequences of every length in a call, in several orders."""
    orders = [rng.permutation([*LENGTHS, *AROUND_TILES]) for _ in HEADS]
    return [
        (Spec(tuple(map(int, order)), *heads, dtype), 2, 2)
        for order, heads in zip(orders, HEADS, strict=True)
    ]


# What makes the configurations of lanes, each with how many launches of how many different tensors.
LAUNCHES = {
    "lengths singly": singly,
    "lengths mixed": several,
    **{f"{n} single tokens": lambda rng, dtype, n=n:
       [(Spec((1,) * n, 1, 2 if n < 512 else 1, dtype), 2, 1)] for n in (64, 128, 256, 512, 1024)},
    "a long one among single tokens": lambda rng, dtype:
        [(Spec((*(1,) * 32, 1024, *(1,) * 32), 2, 4, dtype), 2, 2)],
    **{f"{heads[0]} to {heads[1]} heads": lambda rng, dtype, heads=heads:
       [(Spec((130, 1, 64, 70), *heads, dtype), 10, 2)] for heads in GQA + GVA},
    # None waits for another, and each has outputs of its own.
    **{f"{n} back to back": lambda rng, dtype, n=n: [(mixed(dtype), n, 5)] for n in (50, 500)},
}  # fmt: skip


@DTYPES
@pytest.mark.parametrize("kind", LAUNCHES)
def test_launches(machine, rng, kind, dtype):
    check(machine, [
        Lane(machine, spec, rng, steps if steps < 10 else machine.rounds(steps), inputs)
        for spec, steps, inputs in LAUNCHES[kind](rng, dtype)
    ])  # fmt: skip


# Options.


@DTYPES
@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("heads", [(4, 2), (2, 4)], ids=["GQA", "GVA"])
def test_options(machine, rng, heads, every, dtype):
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
    check(machine, lanes)


@DTYPES
@pytest.mark.parametrize("every", [n for n in EVERY if n])
def test_checkpoints(machine, rng, every, dtype):
    """Every checkpoint is written, where `checkpoint_cu_starts` says, and none beside them."""
    need_checkpoints(every)
    lengths = tuple(int(n) for n in rng.permutation([n for n in LENGTHS if n >= every - 64]))
    orders = (((*AROUND_TILES, 1000), (1, 2)), (lengths, (2, 1)))
    specs = [Spec(order, *heads, dtype, every=every) for order, heads in orders]
    check(machine, [Lane(machine, spec, rng, steps=2) for spec in specs])


# Chains, and launches at the same time.


@DTYPES
@PLACES
@pytest.mark.parametrize(("steps", "exact"), [(20, 20), (200, 3)], ids=["20", "200"])
def test_chain(machine, rng, steps, exact, in_place, dtype):
    """A state handed on; so many steps against float64, which also carries one of its own."""
    spec = replace(mixed(dtype, chained=True, in_place=in_place), q_heads=2, v_heads=4)
    lane = Lane(machine, spec, rng, machine.rounds(steps), inputs=5)
    check(machine, [lane], exact_steps=exact)
    check_chain(lane, alone(lane)[:exact])


@DTYPES
def test_the_state_in_place_or_apart(machine, rng, dtype):
    """In one place, in two, and with a workspace of the caller's: the same bits."""
    spec, steps = mixed(dtype, chained=True), machine.rounds(20)
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


@pytest.mark.parametrize("threads", [False, True], ids=["one thread", "a thread each"])
@pytest.mark.parametrize("count", [4, 16])
def test_streams(machine, rng, count, threads):
    """Chains and repeated launches of mixed configurations, each on a stream of its own."""
    streams, steps = machine.streams(machine.rounds(count)), machine.rounds(12)
    lanes = [
        Lane(machine, spec, rng, steps, inputs=3, stream=stream)
        for spec, stream in zip(mixed_specs(len(streams)), streams, strict=True)
    ]
    check(machine, lanes, threads, exact_steps=3)


def check_graph(machine, rng, dtype: str, in_place: bool, steps: int) -> None:
    """A chain captured once and replayed."""
    spec = mixed(dtype, chained=True, in_place=in_place)
    lane = Lane(machine, spec, rng, machine.rounds(steps), inputs=3)
    expected = alone(lane)
    lane.reset()
    replay = machine.capture(lambda: [lane.launch(step) for step in range(lane.steps)])
    for turn in range(3):
        lane.reset()
        with machine.watched():
            replay()
        found = [lane.read(step) for step in range(lane.steps)]
        check_same(lane, found, expected, f"replay {turn}")
    lane.check_intact()
    check_exact(lane, expected, steps=3)


@DTYPES
@PLACES
def test_graph(machine, rng, in_place, dtype):
    check_graph(machine, rng, dtype, in_place, 20)


# Findings: what FlashInfer's kernel does that its callers would not expect, and the reference does
# not.  Each asserts what the kernel does today, so that a release that changes it is seen.


@DTYPES
@pytest.mark.parametrize("length", [1, 65])
def test_checkpoints_as_flashinfer_counts_them(machine, rng, length, dtype):
    """With room for `length // every` checkpoints the compiled kernel writes one past the end."""
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
        refused = r"`checkpoint_cu_starts`: got .* = 0 in element 0, expected .* = -1 or less"
        with pytest.raises(fi_ffi.ArgumentError, match=refused):
            launch()
        assert np.isnan(room.get()[count]).all()
        return
    launch()
    after, state = room.get(), lane.read(0)["output_state"]
    assert room.intact()
    if is_in_cute_dsl():
        assert np.isnan(after[count]).all(), "it writes past the end, too"
        return
    assert after[count].tobytes() == state[0].tobytes(), "not the last state past the end"


# Tensors whose NaN reaches the sequence before: values and keys are multiplied by zero where
# the tile goes on past the sequence, gates are masked, and queries are of their own row only.
LEAKS = {"v": True, "k": True, "q": False, "alpha": False, "beta": False}


@DTYPES
@pytest.mark.parametrize("name", LEAKS)
def test_nan_of_a_neighbour(machine, rng, name, dtype):
    """NaN in a token reaches the last tile of a sequence before, where that tile goes on to it;
    it reaches nothing further away, no other head, and from a value no other element."""
    lane = Lane(machine, Spec((70, 1, 1, 130, 64, 1, 70, 3), dtype=dtype), rng)
    clean, sound = alone(lane)[0], lane.drawn_of(0)[0]
    starts = sound["cu_seqlens"]
    for token in (min(starts[3] + 5, starts[-1] - 1), starts[4], starts[-2]):
        wrong, where = sound[name].copy(), 5 if name == "v" else slice(None)
        wrong[(token, 0, where) if name == "v" else (token, 0)] = np.nan
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


def _reach(starts, token, got, where):
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


@DTYPES
def test_tokens_after_the_end(machine, rng, dtype):
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


# Launches on a sequence without tokens, or with a token, under a watchdog that ends the process.
HANGING = """
import sys
import numpy as np
import fi_ffi
from tests.stress.gdn import Cpu, Gpu, Lane, Spec

machine = Gpu() if sys.argv[1] == "gpu" else Cpu()
lane = Lane(machine, Spec((50, 1, 50)), np.random.default_rng())
if sys.argv[2] == "empty":
    starts = lane.drawn_of(0)[0]["cu_seqlens"].copy()
    starts[2] = starts[1]
    machine.write(lane.placed(0, "cu_seqlens"), starts)
lane.reset()
print("launching", flush=True)
with fi_ffi.watchdog(5.0, abort=True):
    lane.launch(0)
print("finished", flush=True)
machine.close()
"""


def test_a_sequence_without_tokens(machine, rng):
    """The compiled kernel never ends; a watchdog tells of it, and the GPU serves others."""
    kind = "gpu" if machine.is_gpu else "cpu"
    status, out, err = children.done(HANGING, kind, "full")
    assert (status, out.split()) == (0, ["launching", "finished"]), err
    status, out, err = children.done(HANGING, kind, "empty", seconds=65)
    if machine.is_gpu and is_in_cute_dsl():
        assert (status, out.split()) == (0, ["launching", "finished"]), err
        return
    assert out.split() == ["launching"], err
    if machine.is_gpu:
        assert status == 124, f"{status}, not ended by its watchdog: {err}"
        assert "gdn_prefill has not finished" in err
        assert "cu_seqlens: int64[4]" in err
        assert "stream 0x" in err
    else:
        assert status == 1
        assert "`cu_seqlens`: got steps(cu_seqlens) = 0 in element 1, expected 1 or more" in err
    check(machine, [Lane(machine, Spec((50, 1, 50)), rng)])


# A small one of each kind, for compute-sanitizer.

SMALL = {
    "options GQA": [Spec((65, 1, 3), 2, 1, "bfloat16", every=64, scale=0.3, workspace=True)],
    "options GVA": [Spec((65, 1, 3), 1, 2, "float16", every=64)],
    "no options": [Spec((1, 66), 1, 2, "bfloat16", ("input_state", "alpha", "beta"))],
    "chain": [Spec((2, 65), 1, 2, "bfloat16", chained=True)],
    "chain in place": [Spec((2, 65), 2, 1, "float16", chained=True, in_place=True)],
    "streams": [Spec((65, 1), 1, 2, "bfloat16"), Spec((3, 64), 2, 1, "float16", chained=True)],
    "single tokens": [Spec((1,) * 9, 1, 1, "bfloat16")],
}


@pytest.mark.sanitizer
@pytest.mark.parametrize("kind", SMALL)
def test_small(machine, rng, kind):
    specs = SMALL[kind]
    for spec in specs:
        need_checkpoints(spec.every)
    streams = machine.streams(len(specs))
    check(machine, [
        Lane(machine, spec, rng, steps=2, stream=stream)
        for spec, stream in zip(specs, streams, strict=True)
    ])  # fmt: skip


@pytest.mark.sanitizer
def test_small_graph(machine, rng):
    check_graph(machine, rng, "bfloat16", in_place=False, steps=2)
