"""Lanes: launches of the gated delta rule one after another on a stream, and their tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import fi_ffi
from fi_ffi.abi.tensor import DTYPES
from fi_ffi.cli.cases import Case
from fi_ffi.ops.on_host import gdn_prefill_workspace_size

from tests.attention import machines
from tests.gdn_stress.machines import GUARD, OP, Cpu
from tests.helpers.inputs.gdn import make as ragged_sequences

HEAD_SIZE, TILE = 128, 64
CHECKPOINTS = ("state_checkpoints", "checkpoint_cu_starts")
WORKSPACE = "workspace_buffer"
Arrays = dict[str, np.ndarray]


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
    starts = np.cumsum([0, *spec.lengths])
    sizes = {
        "total_seq_len": int(starts[-1]) + spec.spare, "num_seqs": len(spec.lengths),
        "num_q_heads": spec.q_heads, "num_v_heads": spec.v_heads, "head_size": HEAD_SIZE,
    }  # fmt: skip
    scalars: dict[str, Any] = {"scale": spec.scale}
    if spec.every:
        scalars["checkpoint_every_n_tokens"] = spec.every
    made, sizes, scalars = ragged_sequences(
        row, {"cu_seqlens": starts}, sizes, scalars, without, rng
    )
    rows = (sizes["total_seq_len"], spec.v_heads)
    # Tokens of different sizes, so that one taken for another is seen.
    spread = np.exp(rng.uniform(-2, 2, (*rows, 1)))
    made["v"] = rng.standard_normal((*rows, HEAD_SIZE)) * spread
    arrays = {}
    for arg in row.tensors:
        if arg.name in without:
            continue
        dtype = DTYPES[spec.dtype if arg.dtype == "T" else arg.dtype].numpy
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
        self.workspace: fi_ffi.TensorDesc | None = None
        if spec.workspace:
            size = gdn_prefill_workspace_size(machine.device)
            self._room = machine.place(np.full(size + GUARD, machines.POISON, np.uint8))
            address = -(-self._room.desc().ptr // GUARD) * GUARD
            self.workspace = fi_ffi.TensorDesc(address, (size,), "uint8", device=machine.device)

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
        return found if self.workspace is None else found | {WORKSPACE: self.workspace}

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
        for group in every:
            for name, placed in group.items():
                assert placed.intact(), f"{name}: bytes beside it were written"
        self._check_workspace()
        for (arrays, _), placed_ones in zip(self.drawn, self._inputs, strict=True):
            for name, placed in placed_ones.items():
                assert placed.get().tobytes() == arrays[name].tobytes(), f"{name} has changed"

    def _check_workspace(self) -> None:
        if self.workspace is None:
            return
        start = self.workspace.ptr - self._room.desc().ptr
        outside = np.ones(self._room.desc().shape, bool)
        outside[start : start + self.workspace.shape[0]] = False
        beside = (self._room.get()[outside] != machines.POISON).any()
        assert not beside and self._room.intact(), "bytes beside the workspace were written"
