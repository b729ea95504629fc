"""`selective_state_update`: advances Mamba's states by one token or several.

A module is compiled for dtypes, for the sizes of a head and its state, and for a number of tokens.
Some of the rows' requirements go beyond the binding's checks and follow the kernels in
`include/flashinfer/mamba/`. Kernels for several tokens find a group's B and C, and a head's x, from
sizes alone, and are compiled for powers of 2 of heads per group. Kernels for one token read the
scale of a state even if its index means no request, and keep a row of int16 states in registers
counted by the size of the state.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.abi.tensor import Device, TensorDesc, viewed
from fi_ffi.errors import ArgumentError
from fi_ffi.loader import machine
from fi_ffi.ops.attention.backends import module_name
from fi_ffi.ops.call.arguments import INT32_MAX, Refusal, check_choice, check_flag, check_int
from fi_ffi.ops.call.row import Absent, Arg, Row, Rule, Scalar, Tensor, Vector
from fi_ffi.ops.call.values import Values, compiled_row
from fi_ffi.ops.steps.keyword_call import KeywordCall

_OP = FAMILY = "selective_state_update"
_refuse = Refusal(_OP)
_FLOATS = ("float32", "bfloat16", "float16")
_INTS = ("int32", "int64")
# Kinds of states: int16 with scales, and float16 with stochastic rounding.
INT16, RANDOM = "int16", "random"
ALGORITHMS = {"auto": 0, "simple": 1, "vertical": 2, "horizontal": 3, "async_horizontal": 1}
# Heads per group that the kernels for several tokens are compiled for.
RATIOS = (1, 2, 4, 8, 16, 32, 64)
# The first axes of x, B and C: one token per request, several tokens per request, or sequences one
# after another.
_TOKENS = {"one": "b", "steps": "b t", "sequences": "tokens"}


def _rule(argument: str, axis: str, least: str, what: str) -> Rule:
    return Rule(argument, f"not {argument} or {axis} >= {least}", f"{what}, or more")


def _scale_rules(kind: str) -> Iterator[str | Rule]:
    """Rules of the kernels for int16 states."""
    if kind == "one":
        yield "dstate % 64 == 0"
        yield Rule(
            "state",
            "dstate <= 256 or dstate % 256 == 0",
            "a dstate of at most 256, or a multiple of it, with int16",
        )
        return
    of = "intermediate_state_scales"
    yield Rule(
        of,
        f"not {of} or intermediate_state_indices or not state_batch_indices",
        "intermediate_state_indices: it has b entries, not one for each state",
    )


def _rules(kind: str, read: int, written: int) -> Iterator[Rule]:
    """Rules for optional tensors."""
    state, states = "state_batch_indices", "intermediate_states_buffer"
    yield _rule(state, "indices", "b", "an index for each request")
    yield _rule(f"dst_{state}", "targets", "b", "an index for each request")
    if kind == "one":
        return
    most = "t" if kind == "steps" else "cache_steps"
    if read == 2:
        yield _rule(state, "width", most, "an index for each token")
    if written == 2:
        yield _rule(f"dst_{state}", "depth", most, "an index for each token")
    yield _rule("num_accepted_tokens", "accepted", "b", "a number for each request")
    yield Rule(
        "B",
        f"ngroups and nheads // ngroups in {RATIOS}",
        f"groups of {', '.join(map(str, RATIOS))} heads each",
    )
    yield Rule(
        "cache_steps", f"not {states} or cache_steps == steps", f"the second size of {states}"
    )
    if kind == "steps":
        yield Rule(
            "cache_steps",
            f"not {states} or cache_steps >= t",
            "as many as x has tokens for each request, or more",
        )
    # Without those indices, states are kept at their slots of `state`.
    yield Rule(
        states,
        f"not {states} or intermediate_state_indices or entries >= slots",
        "an entry for each state, without intermediate_state_indices",
    )


@functools.cache
def row_of(kind: str, read: int, written: int, states: str = "") -> Row:
    """Return the row for these ranks of `state_batch_indices` and `dst_state_batch_indices`, and
    for states of kind `INT16`, `RANDOM` or ""."""
    of_states = {"": _FLOATS, INT16: ("int16",), RANDOM: ("float16",)}[states]
    buffers = ("intermediate_states_buffer", "intermediate_state_scales")
    return Row(
        _OP,
        FAMILY,
        _OP,
        "csrc/flashinfer_mamba_binding.cu",
        "",
        _arguments(kind, read, written, states),
        dict.fromkeys("STWA", _FLOATS) | dict.fromkeys("ILN", _INTS) | {"S": of_states},
        ">=0.6.12" if states else ">=0.6.7",
        vector=Vector(("dim", "dstate")),
        offset_limit=2**63,
        together=buffers if states == INT16 and kind != "one" else (),
        requires=(
            *("nheads >= 1", "nheads <= 65535", "dim >= 16", "dim % 16 == 0"),
            *("dstate >= 32", "dstate % 8 == 0", "nheads % ngroups == 0"),
            *(f"slots <= {INT32_MAX}", f"b <= {INT32_MAX}", "slots >= b"),
            f"nheads * dim * dstate <= {INT32_MAX}",
            *_rules(kind, read, written),
            *(_scale_rules(kind) if states == INT16 else ()),
        ),
        nothing_axis="tokens" if kind == "sequences" else "b",
    )


def _arguments(kind: str, read: int, written: int, states: str) -> tuple[Arg, ...]:
    tokens = _TOKENS[kind]
    of_heads, of_groups = f"{tokens} nheads dim", f"{tokens} ngroups dstate"
    reads = " ".join(("indices", "width")[:read])
    writes = " ".join(("targets", "depth")[:written])
    of_token: dict[str, Any] = {"packed": 2, "offset_limit": 2**63}
    out: dict[str, Any] = {**of_token, "writes": True, "reads": False, "contiguous": kind == "one"}
    numbers: dict[str, Any] = {"writes": True, "no_index": "numbers, if they are of int16"}
    of_state: dict[str, Any] = {"offset_limit": 2**63, **numbers}
    maybe: dict[str, Any] = {"doc": "", "optional": True}
    kept: dict[str, Any] = {"contiguous": True, **maybe, **numbers}
    # Which slot a call reads depends on more than a condition can say: see `check_slot`.
    slot: dict[str, Any] = {"dtype": "I", "no_index": "judged as each request is", **maybe}
    # The number of sequences is on no other tensor.
    starts: dict[str, Any] = {"optional": True, "entry_optional": True, "no_index": "not given"}
    if kind == "sequences":
        index = ("0 <= cu_seqlens <= tokens", "steps(cu_seqlens) <= cache_steps")
        starts |= {"optional": False, "index": index, "no_index": ""}
    accepted: dict[str, Any] = {"no_index": "of requests with one slot each"}
    if read == 2:
        accepted = {"index": ("num_accepted_tokens[:b] <= width",)}
    scale: Arg = Absent("state_scale", "Optional<DLTensor*>")
    scales: Arg = Absent("intermediate_state_scales", "Optional<DLTensor*>")
    seed: Arg = Absent("rand_seed", "Optional<DLTensor*>")
    if states == INT16:
        of_scale = {**of_state, "packed": 2, "entry_optional": True}
        scale = Tensor("state_scale", "slots nheads dim", "float32", "", **of_scale)
        scales = Tensor("intermediate_state_scales", "b steps nheads dim", "float32", **kept)
    elif states == RANDOM:
        seed = Tensor("rand_seed", "1", "int64", "", entry_optional=True, no_index="a seed")
    return (
        Tensor("state", "slots nheads dim dstate", "S", "", packed=3, **of_state),
        Tensor("x", of_heads, "T", "", **of_token),
        Tensor("dt", of_heads, "W", "", broadcast=1),
        Tensor("A", "nheads dim dstate", "A", "", broadcast=2),
        Tensor("B", of_groups, "T", "", **of_token),
        Tensor("C", of_groups, "T", "", **of_token),
        Tensor("D", "nheads dim", "W", "", broadcast=1),
        Tensor("z", of_heads, "T", **maybe, **of_token),
        Tensor("dt_bias", "nheads dim", "W", broadcast=1, **maybe),
        Scalar("dt_softplus", bool, False, ""),
        Tensor("state_batch_indices", reads, **slot),
        Tensor("dst_state_batch_indices", writes, **slot),
        Scalar("pad_slot_id", int, -1, "", low=-INT32_MAX - 1, high=INT32_MAX),
        scale,
        Tensor("out", of_heads, "T", "", **out),
        Scalar("disable_state_update", bool, False, ""),
        Tensor("intermediate_states_buffer", "entries steps nheads dim dstate", "S", **kept),
        Tensor("intermediate_state_indices", "b", contiguous=True, **slot),
        scales,
        seed,
        Scalar("cache_steps", int, 0, "", low=0, high=INT32_MAX),
        Tensor("cu_seqlens", "b+1", "L", "", contiguous=True, **starts),
        Tensor("num_accepted_tokens", "accepted", "N", contiguous=True, **accepted, **maybe),
        Scalar("algorithm", int, 0, ""),
    )


def module_of(device: Device | None, release: str | None = None, **compiled: Any) -> str:
    """Return the module compiled for these, named as FlashInfer's generator names it."""
    major = machine.capability(device.index)[0] if device is not None and device.is_cuda else 9
    return module_for(major, release, **DEFAULTS | compiled)


def module_for(major: int, release: str | None, **compiled: Any) -> str:
    """Return the module for GPUs of this major compute capability."""
    return module_name(FAMILY, release, ssu_arch=_arch(major), **compiled)


def _arch(major: int) -> str:
    return "sm100" if major >= 10 else "sm90" if major == 9 else ""


# What FlashInfer compiles for if a call lacks the tensor, or `supports` the option.
DEFAULTS: dict[str, Any] = {
    "stateIndex_dtype": "int32",
    "cu_seqlens_dtype": "int32",
    "num_accepted_tokens_dtype": "int32",
    "ntokens_mtp": 1,
    "state_scale_dtype": None,
    "philox_rounds": 0,
}


def _spread(desc: TensorDesc, sizes: tuple[int, ...]) -> TensorDesc:
    """View the same value along more axes, of these sizes."""
    return viewed(desc, (*desc.shape, *sizes), (*desc.strides, *[0] * len(sizes)))


def _with_steps(desc: TensorDesc) -> TensorDesc:
    """View one token of each request as a row of one."""
    (b, *shape), (step, *strides) = desc.shape, desc.strides
    return viewed(desc, (b, 1, *shape), (step, step, *strides))


@KeywordCall
def selective_state_update(
    state: TensorLike,
    x: TensorLike,
    dt: TensorLike,
    A: TensorLike,
    B: TensorLike,
    C: TensorLike,
    D: TensorLike,
    z: TensorLike | None = None,
    dt_bias: TensorLike | None = None,
    dt_softplus: bool = False,
    state_batch_indices: TensorLike | None = None,
    pad_slot_id: int = -1,
    state_scale: TensorLike | None = None,
    *,
    out: TensorLike,
    disable_state_update: bool = False,
    intermediate_states_buffer: TensorLike | None = None,
    intermediate_state_indices: TensorLike | None = None,
    intermediate_state_scales: TensorLike | None = None,
    rand_seed: TensorLike | None = None,
    philox_rounds: int = 10,
    cache_steps: int = 0,
    algorithm: str = "auto",
    dst_state_batch_indices: TensorLike | None = None,
    cu_seqlens: TensorLike | None = None,
    num_accepted_tokens: TensorLike | None = None,
    stream: object = None,
) -> Values:
    """Advance Mamba's states by one token or several, and read them.

    For each head: `state = state * exp(A * dt) + dt * x * B`, `out = state @ C + D * x`, with `dt =
    dt + dt_bias`, passed through softplus if `dt_softplus`. With `z`, `out` is multiplied by
    `silu(z)`.

    Args:
        state: [slots, nheads, dim, dstate] float32, bfloat16 or float16: the states of all
            requests, updated in place. Slots may have a stride. Or int16, scaled by `state_scale`.
        x: [b, nheads, dim], one token of each request; or [b, t, nheads, dim], t tokens of each; or
            with `cu_seqlens` [tokens, nheads, dim], the requests one after another.
        dt: as x without dim, or as x with stride 0 along dim.
        A: [nheads], or as in FlashInfer [nheads, dim, dstate] with strides of 0.
        D, dt_bias: [nheads], or as in FlashInfer [nheads, dim] with strides of 0.
        B, C: as x, with [..., ngroups, dstate]; nheads is a multiple of ngroups.
        z: as x.
        out: as x, of x's dtype, written.
        dt_softplus: apply softplus to dt.
        state_batch_indices: [b] or [b, width] int32 or int64: each request's slot; by default slot
            i for request i. An index of `pad_slot_id` means no request: its state is 0 and not
            written.
        dst_state_batch_indices: the slot to write, if it is another: [b], or [b, width] with one
            for each token. For one token per request, it has `pad_slot_id` where
            `state_batch_indices` has. No request may write a slot that another reads, because their
            order is undefined.
        pad_slot_id: the index that means no request.
        state_scale: [slots, nheads, dim] float32, for int16 states, updated with them: a row's
            largest magnitude / 32767.
        disable_state_update: do not update `state`.
        intermediate_states_buffer: [entries, cache_steps, nheads, dim, dstate], for several tokens:
            receives the state after each; `state` is then not updated.
        intermediate_state_indices: [b]: each request's entry in that buffer.
        intermediate_state_scales: [b, cache_steps, nheads, dim] float32, for int16 states: receives
            the scales of the buffer's states, whose entries must be less than b.
        rand_seed: [1] int64 on the GPU: round float16 states stochastically, with random bits of
            Philox4x32.
        philox_rounds: the rounds of Philox4x32.
        cache_steps: for sequences, the most tokens of one; with `intermediate_states_buffer` its
            second size. With it, one token per request is handled as several.
        algorithm: "auto", "simple", "vertical" or "horizontal".
        cu_seqlens: [b + 1]: where each request's tokens start, and the end; none has more than
            `cache_steps`.
        num_accepted_tokens: [b]: how many of its last tokens each request accepted; it continues
            from `state_batch_indices[i, accepted - 1]`.

    Indices are on the GPU and not checked. int16 states with `state_batch_indices` use the kernels
    for several tokens, unless `algorithm` names another: the kernels for one token would read a
    scale at `pad_slot_id`.

    Raises `ArgumentError` and `ArgumentTypeError` before anything is launched, and
    `KernelNotFoundError` if the kernels in use lack the module.
    Upstream: flashinfer/mamba/selective_state_update.py, csrc/selective_state_update.cu.
    """
    check_choice(_OP, "algorithm", algorithm, tuple(ALGORITHMS))
    tensors = _described(state, x, dt, A, B, C, D, z, dt_bias, out)
    states = _kind_of_states(tensors, state_scale, rand_seed, algorithm)
    is_padded = states == INT16 and algorithm == "auto" and state_batch_indices is not None
    call = _Call(tensors, cu_seqlens, cache_steps, states, is_padded)
    if is_padded and call.is_one and check_flag(_OP, "disable_state_update", disable_state_update):
        dst_state_batch_indices = None  # otherwise those kernels would still write there
    call.optional(
        state_batch_indices=state_batch_indices,
        dst_state_batch_indices=dst_state_batch_indices,
        intermediate_states_buffer=intermediate_states_buffer,
        intermediate_state_indices=intermediate_state_indices,
        num_accepted_tokens=num_accepted_tokens,
        intermediate_state_scales=intermediate_state_scales,
    )
    values = call.values(check_int(_OP, "philox_rounds", philox_rounds, 1, _MAX_ROUNDS))
    values.put(
        dt_softplus=dt_softplus,
        pad_slot_id=pad_slot_id,
        cache_steps=call.cache_steps,
        disable_state_update=disable_state_update,
        algorithm=ALGORITHMS[algorithm],
    )
    return values


def _described(*tensors: TensorLike | None) -> dict[str, TensorDesc | None]:
    names = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "out")
    both = zip(names, tensors, strict=True)
    optional = ("z", "dt_bias")
    return {
        name: None if tensor is None and name in optional else as_desc(tensor, _OP, name)
        for name, tensor in both
    }


def _kind_of_states(
    tensors: dict[str, TensorDesc | None], scale: Any, seed: Any, algorithm: str
) -> str:
    """Return the kind of the states; add their scales and the seed to the tensors."""
    state = tensors["state"]
    assert state is not None
    is_int16, dtype = state.dtype.name == "int16", state.dtype.name
    if is_int16 and scale is None:
        raise _refuse("state_scale", None, "scales, with int16 states")
    if is_int16 and algorithm == "horizontal":
        raise _refuse("algorithm", algorithm, "another algorithm: these kernels take no scales")
    for name, tensor, required in (("state_scale", scale, "int16"), ("rand_seed", seed, "float16")):
        if tensor is not None:
            tensors[name] = desc = as_desc(tensor, _OP, name)
            if dtype != required:
                raise _refuse(name, desc.layout, f"None: only states of {required} have it")
    wide = tensors.get("state_scale")
    if wide is not None and len(wide.shape) == 4 and wide.shape[3] == 1:
        tensors["state_scale"] = viewed(wide, wide.shape[:3], wide.strides[:3])
    return INT16 if is_int16 else RANDOM if seed is not None else ""


class _Call:
    """A call's tensors as the kernels take them, and what its module is compiled for."""

    def __init__(
        self,
        tensors: dict[str, TensorDesc | None],
        cu_seqlens: Any,
        cache_steps: Any,
        states: str = "",
        is_padded: bool = False,
    ) -> None:
        self.tensors, self.states = tensors, states
        self.cache_steps = check_int(_OP, "cache_steps", cache_steps, 0, INT32_MAX)
        state, x = self._required("state"), self._required("x")
        if len(state.shape) != 4:
            raise _refuse("state", state.layout, "rank 4 (slots nheads dim dstate)")
        self.device, (_, _, self.dim, self.dstate) = x.device, state.shape
        self.kind, rank = "steps", len(x.shape)
        if cu_seqlens is not None:
            self.kind = "sequences"
            tensors["cu_seqlens"] = as_desc(cu_seqlens, _OP, "cu_seqlens")
            if not self.cache_steps:
                raise _refuse("cache_steps", 0, "the most tokens of a sequence, with cu_seqlens")
        self.is_one = rank == 3 and not self.cache_steps
        if self.is_one and not is_padded:
            self.kind = "one"
        self._widen(rank)

    def _widen(self, rank: int) -> None:
        """View tensors with the axes that the kernels expect; `rank` is that of x."""
        tensors, head = self.tensors, (self.dim,)
        wide = (("dt", rank, head), ("A", 3, (self.dim, self.dstate)), ("D", 2, head))
        for name, rank_of, sizes in (*wide, ("dt_bias", 2, head)):
            desc = tensors[name]
            if desc is not None and len(desc.shape) == rank_of - len(sizes):
                tensors[name] = _spread(desc, sizes)
        if self.kind == "steps" and rank == 3:  # the kernels of several tokens, with one
            for name in ("x", "dt", "B", "C", "z", "out"):
                desc = tensors[name]
                if desc is not None and len(desc.shape) == 3:
                    tensors[name] = _with_steps(desc)

    def _required(self, name: str) -> TensorDesc:
        desc = self.tensors[name]
        assert desc is not None
        return desc

    def optional(self, **optional: TensorLike | None) -> None:
        """Add the optional tensors, and check their combinations."""
        tensors = self.tensors
        for name, tensor in optional.items():
            tensors[name] = None if tensor is None else as_desc(tensor, _OP, name)
            if self.is_one and tensor is not None and name not in _OF_ONE:
                raise self._not_none(name, "with one token for each request and no cache_steps")
        if tensors["intermediate_state_scales"] and self.states != INT16:
            raise self._not_none("intermediate_state_scales", "only states of int16 have it")
        if tensors["intermediate_states_buffer"] and tensors["dst_state_batch_indices"]:
            raise self._not_none("dst_state_batch_indices", "with intermediate_states_buffer")
        if tensors["num_accepted_tokens"] and not tensors["state_batch_indices"]:
            raise _refuse("state_batch_indices", None, "indices, with num_accepted_tokens")

    def _not_none(self, name: str, why: str) -> ArgumentError:
        return _refuse(name, self._required(name).layout, f"None: {why}")

    def _rank(self, name: str) -> int:
        """Return the rank of an optional tensor of one or two axes."""
        desc = self.tensors[name]
        if desc is None:
            return 1
        if len(desc.shape) not in (1, 2):
            raise _refuse(name, desc.layout, "rank 1 (b) or 2 (b tokens)")
        return len(desc.shape)

    def values(self, philox_rounds: int) -> Values:
        """Return the row's values, tensors included."""
        read, written = (self._rank(name) for name in _OF_ONE)
        row = row_of(self.kind, read, written, self.states)
        dtypes: dict[str, str] = {}
        compiled: dict[str, Any] = {"ntokens_mtp": 1, "dim": self.dim, "dstate": self.dstate}
        if self.states == INT16:
            compiled["state_scale_dtype"] = "float32"
        elif self.states == RANDOM:
            compiled["philox_rounds"] = philox_rounds
        for arg in row.tensors:
            desc = self.tensors.get(arg.name)
            if desc is None or arg.dtype in dtypes or arg.dtype not in row.dtypes:
                continue
            name, allowed = desc.dtype.name, row.dtypes[arg.dtype]
            if name not in allowed:
                raise _refuse(arg.name, name, " or ".join(allowed))
            dtypes[arg.dtype] = compiled[_COMPILED[arg.dtype]] = name
        if self.kind == "sequences":
            compiled["ntokens_mtp"] = self.cache_steps
        elif self.kind == "steps":
            x = self._required("x")
            if len(x.shape) == 4:
                compiled["ntokens_mtp"] = x.shape[1]
        types = {name: (dtypes.get(name, allowed[0]),) for name, allowed in row.dtypes.items()}
        module = FAMILY
        if all(type(size) is str or 0 < size < _MAX_SIZE for size in compiled.values()):
            module = module_of(self.device, **compiled)
        # The row's checks refuse sizes that no module has.
        values = Values(_OP, compiled_row(row, module, types, _OP, self.device))
        values.put(**self.tensors)
        return values


_OF_ONE = ("state_batch_indices", "dst_state_batch_indices")
_MAX_SIZE, _MAX_ROUNDS = 10**9, 1000
# The module's dtype parameter for each variable.
_COMPILED = {
    "S": "state_dtype",
    "T": "input_dtype",
    "W": "weight_dtype",
    "A": "matrixA_dtype",
    "I": "stateIndex_dtype",
    "L": "cu_seqlens_dtype",
    "N": "num_accepted_tokens_dtype",
}
