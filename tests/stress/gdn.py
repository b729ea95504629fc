"""What test_gdn.py plays: launches of the gated delta rule, by the reference kernel or on a GPU.

A lane is launches one after another on a stream, with their tensors; lanes are played alone and
together, and what comes out is compared: with float64, and bit for bit.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi.tensor import DTYPES
from fi_ffi.cli.cases import Case
from fi_ffi.loader import machine as of_loader
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.on_host import gdn_prefill_workspace_size
from fi_ffi.reference import EXACT

from tests.attention import machines
from tests.helpers.calls import HostArray
from tests.helpers.inputs.family import Call
from tests.helpers.inputs.gdn import make as fill_in
from tests.helpers.stress_strength import IS_SANITIZED

OP = OPS["gdn_prefill"]
# Seconds that a stream may stand still; under compute-sanitizer kernels are 10 to 100 times slower.
LIMIT = 400.0 if IS_SANITIZED else 20.0
GUARD = 256
HEAD_SIZE, TILE = 128, 64
CHECKPOINTS = ("state_checkpoints", "checkpoint_cu_starts")
WORKSPACE = "workspace_buffer"
Arrays = dict[str, np.ndarray]


class Cpu(machines.Cpu):
    """The reference kernel, on small versions of the same work."""

    # Of a call: heads times tokens, and sequences.
    most_heads_tokens, most_sequences = 200, 16
    is_hung = False

    def rounds(self, count: int) -> int:
        return min(count, max(count // 50, 3))

    def lengths(self, lengths: Sequence[int], heads: int) -> tuple[int, ...]:
        """As many of the sequences, and of the first one's tokens, as the machine is for."""
        most = max(self.most_heads_tokens // heads, 2)
        kept = [min(lengths[0], most)]
        for length in lengths[1:]:
            if sum(kept) + length <= most and len(kept) < self.most_sequences:
                kept.append(length)
        return tuple(kept)

    def place(self, host: np.ndarray, guard: int = GUARD) -> Any:
        return self._copy(host, guard) if host.size else machines.Nothing(host, self.device)

    def _copy(self, host: np.ndarray, guard: int) -> Any:
        return HostArray(host, guard=guard)

    def write(self, placed: Any, host: np.ndarray) -> None:
        """Put a host array's elements where another of its shape lies."""
        placed.array[...] = host

    def poison(self, placed: Any, stream: object) -> None:
        if not isinstance(placed, machines.Nothing):
            super().poison(placed, stream)

    def call(self, **arguments: Any) -> None:
        """One launch."""
        OP(**arguments)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """What is launched inside is done at the end of the block; a hang ends the session.

        After one nothing that asks the GPU comes back: the process ends without taking it down.
        """
        try:
            with fi_ffi.watchdog(LIMIT):
                yield
            self.settle()
        except fi_ffi.HangError as error:
            self.is_hung = True
            atexit.register(os._exit, 1)
            pytest.exit(f"HANG: {error}", 1)

    def settle(self) -> None:
        """Wait for all streams, for `LIMIT` seconds at most, without blocking in the driver."""

    def gate(self, streams: Sequence[Any]) -> None:
        """Let the streams' further work begin together, when all of it may be queued."""

    def exact(self, inputs: dict[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """What a call must write, in float64, with the magnitude of each element."""
        return EXACT[OP.row.formula](inputs)  # type: ignore[return-value]

    def need_for(self, arrays: Arrays) -> None:
        """Skip where no module is compiled for these tensors."""

    def close(self) -> None: ...


class Gpu(Cpu, machines.Gpu):
    """The first GPU, with the kernels in use."""

    def __init__(self) -> None:
        if of_loader.capability(0)[0] != 9:
            pytest.skip(f"gdn_prefill is for SM90 GPUs, and this one is {of_loader.capability(0)}")
        self.need(OP.row.module_on(of_loader.capability(0)))
        self._arrays: list[Any] = []
        machines.Gpu.__init__(self, self._copy, 0)
        (self.stream,) = self.streams(1)
        self._held: list[Any] = []

    def _copy(self, host: np.ndarray, guard: int) -> Any:
        from fi_ffi.cli.cuda import DeviceArray

        # A sanitizer sees what is written past an allocation's end by itself.
        self._arrays.append(DeviceArray(host, guard=0 if IS_SANITIZED else guard))
        return self._arrays[-1]

    def rounds(self, count: int) -> int:
        return count

    def lengths(self, lengths: Sequence[int], heads: int) -> tuple[int, ...]:
        return tuple(lengths)

    def write(self, placed: Any, host: np.ndarray) -> None:
        placed._copy_to(host)

    def settle(self) -> None:
        from cuda.bindings import runtime

        from fi_ffi.cli.cuda import check

        deadline = time.monotonic() + LIMIT
        busy = runtime.cudaError_t.cudaErrorNotReady
        for stream in self._made:
            while (answer := runtime.cudaStreamQuery(stream))[0] == busy:
                if time.monotonic() > deadline:
                    report = f"stream {stream:#x} has not done its work in {LIMIT:g} s"
                    raise fi_ffi.HangError(OP.row.name, report)
                time.sleep(1e-4)
            check(answer)

    def gate(self, streams: Sequence[Any]) -> None:
        if IS_SANITIZED:
            return
        from cuda.bindings import runtime

        from fi_ffi.cli.cuda import check

        if not self._held:
            self._held = self.streams(1)
        self.delay(self._held[0])
        event = check(runtime.cudaEventCreateWithFlags(runtime.cudaEventDisableTiming))
        check(runtime.cudaEventRecord(event, self._held[0]))
        for stream in streams:
            check(runtime.cudaStreamWaitEvent(stream, event, 0))
        check(runtime.cudaEventDestroy(event))  # when it has happened

    def exact(self, inputs: dict[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        # Many short sequences are so little work that numpy is done before it is launched.
        cupy = None if IS_SANITIZED or np.diff(inputs["cu_seqlens"]).max() < 64 else _cupy()
        exact: Any = EXACT[OP.row.formula]
        found = exact(inputs) if cupy is None else exact(inputs, cupy)
        if cupy is None:
            return dict(found)
        return {name: (cupy.asnumpy(x), cupy.asnumpy(size)) for name, (x, size) in found.items()}

    def need_for(self, arrays: Arrays) -> None:
        if OP.row.compiled_for is not None:
            dtypes = {name: fi_ffi.as_desc(array).dtype.name for name, array in arrays.items()}
            self.need(OP.row.compiled_for(OP.row, dtypes).module)

    def close(self) -> None:
        """Give everything back; nothing where a kernel hangs, for that would never end."""
        if self.is_hung:
            return
        self.settle()
        machines.Gpu.close(self)
        for array in self._arrays:
            array.free()


def _cupy() -> Any:
    try:
        import cupy
    except ImportError:
        return None
    return cupy


@dataclass(frozen=True)
class Spec:
    """A configuration: what a lane's launches have in common."""

    lengths: tuple[int, ...]
    q_heads: int = 2
    v_heads: int = 2
    dtype: str = "float16"
    without: tuple[str, ...] = ()
    every: int = 0
    scale: float = 0.0
    # The caller's own workspace, and not the stream's.
    workspace: bool = False
    # Each launch starts with the state that the one before it left.
    chained: bool = False
    # In a chain: always the same memory for the state, and not two in turn.
    in_place: bool = False
    # Tokens after the last sequence.
    spare: int = 0

    @property
    def heads(self) -> int:
        return max(self.q_heads, self.v_heads)


def draw(spec: Spec, rng: np.random.Generator) -> tuple[Arrays, dict[str, Any]]:
    """Fresh tensors of one launch on the host, what is written poisoned, and its scalars."""
    row, without = OP.row, {*spec.without, WORKSPACE, *(() if spec.every else CHECKPOINTS)}
    without.add("state_indices")
    starts = np.cumsum([0, *spec.lengths])
    sizes = {
        "total_seq_len": int(starts[-1]) + spec.spare, "num_seqs": len(spec.lengths),
        "num_q_heads": spec.q_heads, "num_v_heads": spec.v_heads, "head_size": HEAD_SIZE,
        "slots": len(spec.lengths),
    }  # fmt: skip
    scalars: dict[str, Any] = {"scale": spec.scale}
    if spec.every:
        scalars["checkpoint_every_n_tokens"] = spec.every
    call = Call(row, {"cu_seqlens": starts}, sizes, scalars, without, rng)
    fill_in(call)
    made = call.tables
    rows = (sizes["total_seq_len"], spec.v_heads)
    # Tokens of different sizes, so that one taken for another is seen.
    spread = np.exp(rng.uniform(-2, 2, (*rows, 1)))
    made["v"] = rng.standard_normal((*rows, HEAD_SIZE)) * spread
    arrays = {}
    for arg in row.tensors:
        if arg.name in without:
            continue
        usual = row.dtypes.get(arg.dtype, (arg.dtype,))[0]
        dtype = DTYPES[spec.dtype if arg.dtype == "T" else usual].numpy
        if arg.reads:
            arrays[arg.name] = np.ascontiguousarray(made[arg.name].astype(dtype))
        else:
            arrays[arg.name] = np.full([sizes[axis] for axis in arg.axis_names], np.nan, dtype)
    return arrays, scalars


def make_case(machine: Cpu, arrays: Arrays, scalars: dict[str, Any]) -> Case:
    """What these arguments must give; in float64, where the machine is fast at it."""
    written = {arg.name for arg in OP.row.tensors if arg.writes}
    inputs: dict[str, Any] = {
        name: array if name in written or array.dtype.kind == "i" else array.astype(np.float64)
        for name, array in arrays.items()
    }
    return Case(OP.row, arrays, scalars, machine.exact(inputs | scalars))


class Lane:
    """`steps` launches on one stream, with `inputs` different tensors in turn.

    Each launch has outputs of its own; only the state of a chain is handed on.
    """

    def __init__(
        self, machine: Cpu, spec: Spec, rng: np.random.Generator, steps: int = 1, inputs: int = 1,
        stream: Any = None, drawn: list[tuple[Arrays, dict[str, Any]]] | None = None,
    ) -> None:  # fmt: skip
        spec = replace(spec, lengths=machine.lengths(spec.lengths, spec.heads))
        self.machine, self.spec, self.steps = machine, spec, steps
        self.stream = machine.stream if stream is None else stream
        # As many sequences and tokens in all, in another order.
        orders = [spec.lengths[i:] + spec.lengths[:i] for i in range(min(inputs, steps))]
        self.drawn = drawn or [draw(replace(spec, lengths=order), rng) for order in orders]
        machine.need_for(self.drawn[0][0])
        written = [arg.name for arg in OP.row.tensors if arg.writes and arg.name != WORKSPACE]
        if spec.chained:
            written.remove("output_state")
        self.written = [name for name in written if name in self.drawn[0][0]]
        self._inputs = [
            {
                name: machine.place(array)
                for name, array in arrays.items()
                if name not in (*written, "output_state")
                and not (spec.chained and name == "input_state")
            }
            for arrays, _ in self.drawn
        ]
        self._outputs = [
            {name: self._place_output(self.drawn_of(i)[0][name]) for name in self.written}
            for i in range(steps)
        ]
        self._states = []
        if spec.chained:
            first = self.drawn[0][0]["input_state"]
            self._states = [self._place_output(first) for _ in range(1 if spec.in_place else 2)]
        self.workspace: Any = None
        if spec.workspace:
            size = gdn_prefill_workspace_size(machine.device)
            self.workspace = machine.place(np.full(size, machines.POISON, np.uint8))

    def drawn_of(self, step: int) -> tuple[Arrays, dict[str, Any]]:
        return self.drawn[step % len(self.drawn)]

    def _place_output(self, host: np.ndarray) -> Any:
        """With room on both sides for what a tile too many, or a state, would write."""
        room = host[:TILE].nbytes if host.ndim == 3 else host[:1].nbytes
        return self.machine.place(host, guard=-(-max(room, 1) // GUARD) * GUARD)

    def placed(self, step: int, name: str) -> Any:
        """Where a tensor of a launch lies."""
        if self.spec.chained and name in ("input_state", "output_state"):
            return self._states[(step + (name == "output_state")) % len(self._states)]
        outputs = self._outputs[step]
        if name in outputs:
            return outputs[name]
        return self._inputs[step % len(self._inputs)][name]

    def descs(self, step: int) -> dict[str, Any]:
        """A launch's tensors, by name."""
        names = self.drawn_of(step)[0]
        found = {name: self.placed(step, name).desc() for name in names}
        return found | ({WORKSPACE: self.workspace.desc()} if self.workspace else {})

    def launch(self, step: int) -> None:
        self.machine.call(**self.descs(step), **self.drawn_of(step)[1], stream=self.stream)

    def reset(self) -> None:
        """Poison what is written, and start the chain anew; nothing may be running."""
        for outputs in self._outputs:
            for placed in outputs.values():
                self.machine.poison(placed, self.stream)
        for state in self._states[1:]:
            self.machine.poison(state, self.stream)
        if self._states:
            self.machine.write(self._states[0], self.drawn[0][0]["input_state"])
        # Copies to a GPU may go on after their call, and streams here wait for no other.
        self.machine.synchronize()

    def read(self, step: int) -> Arrays:
        """What a launch wrote that is still there; a chain's state when it is the last one's."""
        found = {name: self._outputs[step][name].get() for name in self.written}
        return found | (self.read_state(step) if step == self.steps - 1 else {})

    def read_state(self, step: int) -> Arrays:
        """A chain's state after a launch, when no later one has been made."""
        return {"output_state": self.placed(step, "output_state").get()} if self._states else {}

    def check_intact(self) -> None:
        """Nothing beside any tensor was written, and the inputs are what they were."""
        every = [*self._inputs, *self._outputs, dict(enumerate(self._states))]
        every += [{WORKSPACE: self.workspace}] if self.workspace else []
        for group in every:
            for name, placed in group.items():
                assert placed.intact(), f"{name}: bytes beside it were written"
        for (arrays, _), placed_ones in zip(self.drawn, self._inputs, strict=True):
            for name, placed in placed_ones.items():
                assert placed.get().tobytes() == arrays[name].tobytes(), f"{name} has changed"


# How far what a head of a sequence reads, and its state, may be from float64, as norms: steps
# of the dtype, of its own norm.  The bound of each element is for the worst of roundings,
# which hardly ever come together: a scale that is 5 % off would be within it.  Of a chain that
# float64 follows from its first state on, what the steps add fades as the state does.
ONE_STEPS, CHAIN_STEPS = 2, 2
# Of the magnitude: what is smaller is not held to its own norm.
FLOOR = 2.0**-9


def alone(lane: Lane) -> list[Arrays]:
    """What each launch writes when it is waited for before the next one is made."""
    lane.reset()
    found = []
    with lane.machine.watched():
        for step in range(lane.steps):
            lane.launch(step)
            lane.machine.settle()
            found.append(lane.read(step) | lane.read_state(step))
    return found


def together(
    machine: Cpu, lanes: Sequence[Lane], threads: bool = False, every_call: bool = True
) -> list[list[Arrays]]:
    """What the launches write when none is waited for: one of each lane in turn, or a thread
    for each lane.

    A watched call has its stream write a mark after it; without `every_call` only the last
    launch of each lane is watched, and nothing lies between the others.
    """
    for lane in lanes:
        lane.reset()
    with contextlib.ExitStack() as stack:
        if every_call:
            stack.enter_context(machine.watched())
        machine.gate([*{lane.stream: None for lane in lanes}])
        _launch(lanes, threads)
        if not every_call:
            stack.enter_context(machine.watched())
        for lane in lanes:
            lane.launch(lane.steps - 1)
    return [[lane.read(step) for step in range(lane.steps)] for lane in lanes]


def _launch(lanes: Sequence[Lane], threads: bool) -> None:
    """All but the last launch of each lane."""

    def run(lane: Lane) -> None:
        for step in range(lane.steps - 1):
            lane.launch(step)

    if threads:
        with ThreadPoolExecutor(len(lanes)) as pool:
            list(pool.map(run, lanes))
        return
    for step in range(max(lane.steps for lane in lanes)):
        for lane in lanes:
            if step < lane.steps - 1:
                lane.launch(step)


def check_same(lane: Lane, found: Sequence[Arrays], expected: Sequence[Arrays], how: str) -> None:
    """Bit for bit, all that is still there."""
    for step, (got, wanted) in enumerate(zip(found, expected, strict=True)):
        for name, array in got.items():
            wrong = np.argwhere(bits(array) != bits(wanted[name]))
            if len(wrong):
                told = f"{len(wrong)} of {array.size} elements differ, the first at {wrong[0]}"
                raise AssertionError(f"{how}, launch {step}, {name}: {told}; {lane.spec}")


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


def check_exact(lane: Lane, found: Sequence[Arrays], steps: int | None = None) -> float:
    """The largest error as a fraction of its bound, of the first so many launches (all).

    A chain's are held against float64 from the state that the launch really was given.
    """
    worst, cases = 0.0, {}
    for step, got in enumerate(found[:steps]):
        arrays, scalars = lane.drawn_of(step)
        case = cases.get(step % len(lane.drawn))
        if case is None or (lane.spec.chained and step):
            if lane.spec.chained and step:
                arrays = arrays | {"input_state": found[step - 1]["output_state"]}
            case = cases[step % len(lane.drawn)] = make_case(lane.machine, arrays, scalars)
        starts = arrays["cu_seqlens"][:-1]
        for name, exact in case.expected.items():
            absolute, relative = case.error(name, got[name])
            told = f"launch {step}, {name}: {absolute:.3g} away, {relative:.3g} of its bound"
            assert relative <= 1, f"{told}; {lane.spec}"
            part = _away(lane, got[name], exact, starts if name == "output" else None) / ONE_STEPS
            assert part <= 1, f"launch {step}, {name}: {part:.3g} of its norm's bound; {lane.spec}"
            worst = max(worst, relative, part)
    return worst


def check_chain(lane: Lane, found: Sequence[Arrays]) -> float:
    """A whole chain against float64, which carries a state of its own.

    The largest distance, as a fraction of what is allowed.
    """
    state, worst = lane.drawn[0][0]["input_state"].astype(np.float64), 0.0
    for step, got in enumerate(found):
        arrays, scalars = lane.drawn_of(step)
        exact = make_case(lane.machine, arrays | {"input_state": state}, scalars).expected
        state = exact["output_state"][0]
        for name, starts in (("output", arrays["cu_seqlens"][:-1]), ("output_state", None)):
            part = _away(lane, got[name], exact[name], starts) / CHAIN_STEPS
            assert part <= 1, f"step {step}, {name}: {part:.3g} of its norm's bound; {lane.spec}"
            worst = max(worst, part)
    return worst


def _away(
    lane: Lane,
    got: np.ndarray,
    exact: tuple[np.ndarray, np.ndarray | None],
    starts: np.ndarray | None,
) -> float:
    """The largest norm of a difference as a fraction of what it should be, in steps of the dtype.

    For each row's heads, or for those of the rows from each start to the next.
    """
    value, magnitude = exact
    assert magnitude is not None
    if not got.size:
        return 0.0
    squares = [
        np.square(x).reshape(*x.shape[:2], -1).sum(axis=2)
        for x in (got.astype(np.float64) - value, value, FLOOR * magnitude)
    ]
    if starts is not None:
        squares = [np.add.reduceat(x, starts) for x in squares]
    difference, whole, floor = squares
    step = float(ml_dtypes.finfo(lane.drawn[0][0]["q"].dtype).eps)
    return float(np.sqrt(difference / (whole + floor)).max()) / step


def check(
    machine: Cpu, lanes: Sequence[Lane], threads: bool = False, exact_steps: int | None = None
) -> None:
    """Lanes alone against float64, then twice together, bit for bit as they were alone.

    Prints the largest error as a fraction of its bound.
    """
    expected = [alone(lane) for lane in lanes]
    both = zip(lanes, expected, strict=True)
    print("error of bound", max(check_exact(lane, found, exact_steps) for lane, found in both))
    for every_call in (True, False):
        found_ones = together(machine, lanes, threads, every_call)
        for lane, found, wanted in zip(lanes, found_ones, expected, strict=True):
            check_same(lane, found, wanted, f"together, {every_call=}")
    for lane in lanes:
        lane.check_intact()
