"""`gdn_decode`: advances states of the gated delta rule by one token or several.

The kernels are written in CuTe DSL (`flashinfer/gdn_kernels/`). A module's name has what it is
compiled for: numbers of heads and tokens, the scale, and more. Which kernel serves a call depends
also on the number of states. `GdnKernel` chooses and names modules as FlashInfer does. The rows'
requirements follow the kernels: the alignment of loads, and the bits of counters.
"""

from __future__ import annotations

import functools
import hashlib
import operator
import re
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.abi.tensor import Device, TensorDesc, remember
from fi_ffi.loader import generation, machine
from fi_ffi.ops.call.arguments import (
    INT32_MAX,
    Refusal,
    check_choice,
    check_flag,
    check_number,
)
from fi_ffi.ops.call.row import Absent, Arg, Row, Scalar, Tensor, Vector
from fi_ffi.ops.call.values import Values, compiled_row
from fi_ffi.ops.steps import memory
from fi_ffi.ops.steps.keyword_call import KeywordCall

_OP = FAMILY = "gdn_decode"
_refuse = Refusal(_OP)
_RELEASES = ">=0.7.2"
_SIZE = 128  # of a head's keys, and of its values
LAYOUTS = ("VK", "KV")
# The GPU for which calls are judged on a machine without one: a Hopper.
CAPABILITY, MULTIPROCESSORS = (9, 0), 132


@dataclass(frozen=True)
class GdnKernel:
    """The parameters that a module is compiled for."""

    h: int  # heads of q and k
    hv: int  # heads of v, and of states
    t: int = 1  # tokens of each request
    # The least number of states, over all requests, that the same kernels serve.
    states: int = 1
    state_dtype: str = "bfloat16"
    dt_bias_dtype: str = "float32"
    gate_dtypes: tuple[str, str] = ("bfloat16", "bfloat16")  # of `a` and `b`
    index_dtype: str = "int32"
    state_layout: str = "VK"
    is_indexed: bool = True
    # Whether states are written where they are read.
    is_same_pool: bool = True
    keeps_each: bool = False
    disable_state_update: bool = False
    use_qk_l2norm: bool = True
    scale: float = _SIZE**-0.5
    # Of a bfloat16 pool whose slots lie apart: their number, and the elements from one to the next.
    # Slots one after another are 0, 0: their number is free.
    slots: int = 0
    slot_stride: int = 0

    @property
    def kind(self) -> str:
        """Which arguments the kernel takes."""
        if self.state_dtype == "bfloat16":
            return "bfloat16" if self.t == 1 else "bfloat16_tokens"
        if self.state_layout == "KV":
            return "float32_keys"
        return "float32" if self.t == 1 else "float32_tokens"

    def names(self, capability: tuple[int, int], multiprocessors: int) -> tuple[str, str]:
        """Return the names of the module for this GPU, and of its function."""
        major, minor = capability
        arch = f"{major}{minor}{'a' if major >= 9 else ''}"
        make = self._of_bfloat16 if self.state_dtype == "bfloat16" else self._of_float32
        group, parts = make(f"sm_{arch}", major >= 10, multiprocessors)
        name = _kernel_name(*parts)
        return f"{group}_sm{arch}_cute_dsl_{name}", f"{group}_{name}"

    def _of_bfloat16(self, arch: str, is_packed: bool, sms: int) -> tuple[str, Sequence[object]]:
        wide, tile = self._tile(sms)
        is_off = self.disable_state_update or (wide and self.keeps_each)
        pool: tuple[object, ...] = (-1, (-1,))
        if self.slot_stride:
            pool = (self.slots, (self.slot_stride, _SIZE * _SIZE, _SIZE, 1))
        before = (self.t, self.h, self.hv, _SIZE, _SIZE, *pool, tile)
        updates = (is_off, self.keeps_each, self.use_qk_l2norm)
        after = (*updates, self.scale, 1.0, 20.0, is_packed, self.is_same_pool)
        dtypes = ("float32", self.dt_bias_dtype, self.index_dtype)
        if not wide:
            parts: tuple[object, ...] = ("mtp_ilp4", arch, "mtp_bf16_dynB", *before, 4, *after)
            parts += (False, False, False, False, dtypes)
        elif self.t == 1:
            parts = ("wide_vec_t1", arch, "v3_mtp_bf16_tiled_dynB", *before, *after, dtypes)
        else:
            parts = ("wide_vec", arch, "v3_mtp_bf16_tiled_dynB", *before, *after)
            parts += (False, 0, False, False, False, dtypes)
        return "gdn_decode_bf16_state", parts

    def _tile(self, multiprocessors: int) -> tuple[bool, int]:
        """Return whether the kernel with 16-byte loads serves the call, and the rows of a block."""
        states = self.states
        if states >= (512 if self.t == 1 else 128):
            return True, 128 if states >= 1024 else 64 if states >= 512 else 32
        if states <= 128:
            return False, 16
        full = (tile for tile in (128, 64) if states * (_SIZE // tile) >= 4 * multiprocessors)
        return False, next(full, 32)

    @property
    def is_wide(self) -> bool:
        """Whether the kernel with 16-byte loads serves the call; for a single token it takes fewer
        arguments."""
        return self._tile(MULTIPROCESSORS)[0]

    def _of_float32(self, arch: str, is_packed: bool, _: int) -> tuple[str, Sequence[object]]:
        sizes = (self.t, self.h, self.hv, _SIZE, _SIZE)
        a, b = self.gate_dtypes
        parts: tuple[object, ...]
        dtypes: tuple[str, ...]
        if self.state_layout == "KV":
            of_input = ("bfloat16",) * 3
            dtypes = ("float32", "float32", a, self.dt_bias_dtype, *of_input, b, "bfloat16")
            size = "small" if self.states < _SMALL * self.hv else "big"
            parts = (arch, size, *sizes, dtypes, self.scale, self.use_qk_l2norm)
            return "gdn_decode_nontranspose", parts
        if self.t == 1:
            dtypes = ("float32", "float32", a, self.dt_bias_dtype, b, "bfloat16")
            strides = (_SIZE * _SIZE, _SIZE, 1) if self.is_indexed else (0, 0, 0)
            more = (dtypes, self.scale, self.use_qk_l2norm, self.is_indexed, *strides)
            return "gdn_decode_pretranspose", ("decode", arch, *sizes, *more)
        tile, rows, is_shared = self._rows()
        layouts = tuple((axis,) for axis in (0, 2, 0, 3, 3, 3, 2, 3, 0, 0))
        dtypes_of = ("float32", self.dt_bias_dtype, self.index_dtype, layouts)
        kernel = "inline" if self.states <= 128 else "warp"
        before = (kernel, arch, *sizes, self.t, self.disable_state_update, False, None)
        compiled = (self.scale, self.use_qk_l2norm, tile, 4, dtypes_of)
        parts = (*before, *compiled, rows, is_shared, is_packed, False, False)
        return "gdn_decode_mtp", parts

    def _rows(self) -> tuple[int, int, bool]:
        """For float32 states and several tokens: return the rows of a block, the rows that a warp
        takes at once, and whether values are in shared memory."""
        states, is_short = self.states, self.t <= 2
        if states <= 128:
            return (8, 2, False) if states <= 64 else (16, 4, False)
        if states <= 1024:
            return (16, 2, False) if states <= 448 and is_short else (32, 4, False)
        return (64, 8, False) if is_short and not self.disable_state_update else (64, 4, True)


# The most requests that the smaller kernel for [key, value] states serves.
_SMALL = 32


def least_states(b: int, hv: int, multiprocessors: int, state_layout: str = "VK") -> int:
    """Return the least number of states that the same kernel serves as those of `b` requests."""
    steps = _steps(hv, multiprocessors, state_layout)
    return steps[bisect(steps, max(b * hv, 1)) - 1]


def _steps(hv: int, multiprocessors: int, state_layout: str) -> list[int]:
    """Return the numbers of states from which another kernel serves."""
    if state_layout == "KV":
        return [1, _SMALL * hv]
    return sorted({1, 65, 128, 129, 2 * multiprocessors, 449, 512, 1024, 1025})


_LONGEST = 180


def _kernel_name(*parts: object) -> str:
    """Join a kernel's name from what it is compiled for, as FlashInfer does."""
    name = "_".join(map(_part, parts))
    if len(name) <= _LONGEST:
        return name
    return f"{name[:_LONGEST]}_h{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _part(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, tuple):
        return "t" + "x".join(map(_part, value))
    if isinstance(value, float):
        return str(value).replace(".", "_").replace("-", "m").replace("+", "p")
    if isinstance(value, int):
        return str(value).replace("-", "m")
    return re.sub(r"\W", "_", str(value))


_FLOATS = ("bfloat16", "float16", "float32")
# What is compiled into modules, and the CPU's reference takes as arguments.
_CONSTANTS = (
    Scalar("scale", float, None, ""),
    Scalar("use_qk_l2norm", bool, None, ""),
    Scalar("disable_state_update", bool, None, ""),
)
_ALL = "fi_ffi's own: the requests' numbers"
_SOURCES = {
    "bfloat16": "gdn_decode_bf16_state",
    "bfloat16_tokens": "gdn_decode_bf16_state",
    "float32": "gdn_decode_pretranspose",
    "float32_tokens": "gdn_decode_mtp",
    "float32_keys": "gdn_decode_nontranspose",
}


def row_of(kernel: GdnKernel, symbol: str = "") -> Row:
    """Return the row of a kernel's function; without a `symbol`, that of the CPU's reference, which
    takes the compiled-in values as arguments."""
    kind = kernel.kind
    # FlashInfer accepts int64 with bfloat16 states too, but its kernel then fails to compile.
    indices = ("int32", "int64") if kind == "float32_tokens" else ("int32",)
    gates = _FLOATS if kind in ("float32", "float32_keys") else ("bfloat16",)
    args = _order(kernel, _arguments(kernel, bool(symbol)))
    return Row(
        _OP,
        FAMILY,
        symbol or _OP,
        f"flashinfer/gdn_kernels/{_SOURCES[kind]}.py",
        "",
        args if symbol else (*args, *_CONSTANTS),
        {"GA": gates, "GB": gates, "D": ("float32", "bfloat16"), "I": indices},
        _RELEASES,
        variant="" if kernel.state_dtype == "bfloat16" else f"_{kind}",
        vector=Vector(("size",)),
        offset_limit=2**63,
        requires=("size in (128,)", "H >= 1", "HV % H == 0", f"b <= {INT32_MAX}"),
        nothing_axis="b",
        capabilities=(9, 10, 12),
    )


def _arguments(kernel: GdnKernel, is_native: bool) -> dict[str, Arg]:
    """Return the arguments by name; `is_native`: those of a kernel, not of the CPU's reference."""
    kind, t = kernel.kind, "1" if kernel.t == 1 else "t"
    is_bf16 = kernel.state_dtype == "bfloat16"
    has_slots = kernel.is_indexed and kind != "float32_keys"
    # numpy aligns CPU memory to 16 bytes only.
    at: dict[str, Any] = {"alignment": 32 if is_bf16 and is_native else 16, "in_vectors": False}
    flat: dict[str, Any] = {"doc": "", "contiguous": True, **at}
    of_state: dict[str, Any] = {"dtype": kernel.state_dtype, "writes": True, **flat}
    if kernel.slot_stride or (kind == "float32" and has_slots):  # slots may have a stride
        # Modules for bfloat16 slots that lie apart are compiled for how far, and load accordingly.
        of_state |= {"contiguous": False, "packed": 3, "in_vectors": not is_bf16}
    elif not is_bf16:
        of_state["view"] = ((0, 1), (2,), (3,))
    if kind == "float32_tokens":
        of_state["offset_limit"] = 2**31
    of_each: dict[str, Any] = {**flat, "writes": True, "reads": False, "offset_limit": 2**31}
    slots = "slots" if has_slots else "b"
    args: dict[str, Arg] = {
        "state": Tensor("state", f"{slots} HV 128 size", **of_state),
        "A_log": Tensor("A_log", "HV", "float32", **flat),
        "a": Tensor("a", f"b {t} HV", "GA", "", in_vectors=False),
        "dt_bias": Tensor("dt_bias", "HV", "D", **flat),
        "q": Tensor("q", f"b {t} H 128", "bfloat16", "", **at),
        "k": Tensor("k", f"b {t} H 128", "bfloat16", "", **at),
        "v": Tensor("v", f"b {t} HV 128", "bfloat16", "", **at),
        "b": Tensor("b", f"b {t} HV", "GB", "", in_vectors=False),
        "output": Tensor("output", f"b {t} HV 128", "bfloat16", "", writes=True, reads=False, **at),
    }
    # Below 0 is no slot, or slot 0.
    read = "" if is_bf16 else " where initial_state_indices >= 0"
    for name, where in (("initial_state_indices", ""), ("output_state_indices", read)):
        if kind == "float32" and not has_slots:
            args[name] = Absent(name, dtype="int32")
        else:
            places = {"index": (f"{name} < slots{where}",)} if has_slots else {"no_index": _ALL}
            args[name] = Tensor(name, "b", "I", **places, **flat)
    name, dtype = "intermediate_states_buffer", kernel.state_dtype
    shape = (1, 1, 1, _SIZE) if is_bf16 else (0, _SIZE, _SIZE)
    args["each"] = Absent(name, dtype=dtype, shape=shape)
    if kernel.keeps_each:
        view = ((0, 1, 2), (3,), (4,))
        args["each"] = Tensor(name, f"b {t} HV 128 128", dtype, view=view, **of_each)
    return args


def _order(kernel: GdnKernel, args: dict[str, Arg]) -> tuple[Arg, ...]:
    """Return the arguments in the order of the kernel's function."""
    indices = (args["initial_state_indices"], args["output_state_indices"])
    gated = tuple(args[name] for name in ("A_log", "a", "dt_bias", "q", "k", "v", "b", "output"))
    starts = Absent("cu_seqlens", dtype="int32")
    if kernel.kind == "float32_keys":
        first = ("q", "k", "v", "a", "b", "A_log", "dt_bias")
        names = (*first, "state", "initial_state_indices", "output")
        return starts, *(args[name] for name in names)
    if kernel.kind == "float32":
        return args["state"], *gated, *indices, starts
    both = (args["state"], args["each"], *gated, *indices)
    places = Absent("ssm_state_indices", dtype="int32", shape=(0, kernel.t))
    if kernel.kind == "float32_tokens":
        window = (0, 0, 0, 0)
        return (
            *(*both, starts, places),
            Absent("replayssm_rawv", dtype="bfloat16", shape=window),
            Absent("replayssm_rawk", dtype="bfloat16", shape=window),
            Absent("replayssm_g", dtype="float32", shape=(kernel.hv,)),
            Absent("replayssm_beta", dtype="float32", shape=(kernel.hv,)),
            Scalar("cache_intermediate_states", bool, None, ""),
        )
    if kernel.t == 1 and kernel.is_wide:
        return both
    return *both, Absent("accepted_steps", dtype="int32"), places


def _multiprocessors(device: Device) -> int:
    return machine.multiprocessors(device.index) if device.is_cuda else MULTIPROCESSORS


@generation.cached
def _values_of(kernel: GdnKernel, device: Device) -> Values:
    """Return the values that all calls of a kernel share."""
    module, symbol = FAMILY, ""
    if device.is_cuda:
        capability = machine.capability(device.index)
        module, symbol = kernel.names(capability, _multiprocessors(device))
    found = compiled_row(_row_of(kernel, symbol), module, {}, _OP, device)
    values = Values(_OP, found)
    values.put(
        cache_intermediate_states=kernel.keeps_each,
        scale=kernel.scale,
        use_qk_l2norm=kernel.use_qk_l2norm,
        disable_state_update=kernel.disable_state_update,
    )
    return values


_row_of = functools.lru_cache(4096)(row_of)


@KeywordCall
def gdn_decode(
    q: TensorLike,
    k: TensorLike,
    v: TensorLike,
    state: TensorLike,
    A_log: TensorLike,
    a: TensorLike,
    dt_bias: TensorLike,
    b: TensorLike,
    scale: float | None = None,
    *,
    output: TensorLike,
    use_qk_l2norm: bool = True,
    initial_state_indices: TensorLike | None = None,
    output_state_indices: TensorLike | None = None,
    intermediate_states_buffer: TensorLike | None = None,
    disable_state_update: bool = False,
    state_layout: str = "VK",
    stream: object = None,
) -> Values:
    """Advance states of the gated delta rule by one token or several, and read them.

    For each head of v, with the head of q and k that it shares: `state *= g`,
    `state += beta * outer(v - state @ k, k)`, `output = scale * state @ q`, where
    `g = exp(-exp(A_log) * softplus(a + dt_bias))` and `beta = sigmoid(b)`. With `use_qk_l2norm`,
    q and k are first normalised: `x / sqrt(sum(x * x) + 1e-6)`.

    Args:
        q, k: [b, t, H, 128] bfloat16, t tokens of each request.
        v: [b, t, HV, 128] bfloat16; HV is a multiple of H.
        state: [slots, HV, 128, 128] bfloat16 or float32 as [value, key], updated in place. Without
            `initial_state_indices`, [b, HV, 128, 128]. Slots may lie apart: bfloat16 slots, whose
            number and distance are then compiled into the module, and for one token float32
            slots, by multiples of 16 bytes.
        A_log: [HV] float32.
        a, b: [b, t, HV] bfloat16; for float32 states and one token also float16 and float32.
        dt_bias: [HV] float32 or bfloat16.
        scale: factor of the output; None for 1 / sqrt(128).
        output: [b, t, HV, 128] bfloat16, written.
        initial_state_indices: [b] int32 (int64 too for float32 states and several tokens) on the
            GPU: each request's slot. No request may write a slot that another reads or writes,
            because their order is undefined. A negative index means no request. bfloat16 states
            then read and write slot 0, with undefined results. float32 states are not written, and
            for one token `output` is 0, for several unchanged.
        output_state_indices: [b] of the same dtype: the slot to write, if it is another. A negative
            index is slot 0; for float32 states and several tokens it is none.
        intermediate_states_buffer: [b, t, HV, 128, 128] of the states' dtype, for several tokens:
            receives the state after each. bfloat16 states are then not updated.
        disable_state_update: do not update `state`; for several tokens.
        use_qk_l2norm: normalise q and k.
        state_layout: "VK", or "KV" for float32 states as [key, value], with one token and no
            indices.

    H, HV, t, dtypes, `scale` and the options are compiled into modules, which
    `gdn_decode.supports(...)` names. Indices are on the GPU and not checked. On a GPU tensors are
    aligned to 32 bytes (16 with float32 states).

    Raises `ArgumentError` and `ArgumentTypeError` before anything is launched, and
    `KernelNotFoundError` if the kernels in use lack the module.
    Upstream: flashinfer/gdn_decode.py, flashinfer/gdn_kernels/.
    """
    for name, value in (
        ("use_qk_l2norm", use_qk_l2norm),
        ("disable_state_update", disable_state_update),
    ):
        if type(value) is not bool:
            check_flag(_OP, name, value)
    q, v, state = as_desc(q, _OP, "q"), as_desc(v, _OP, "v"), as_desc(state, _OP, "state")
    dt_bias, a, b = as_desc(dt_bias, _OP, "dt_bias"), as_desc(a, _OP, "a"), as_desc(b, _OP, "b")
    index, of_index = initial_state_indices, None
    if index is not None:
        index = as_desc(index, _OP, "initial_state_indices")
        of_index = index.kind
    buffer = intermediate_states_buffer
    options = (disable_state_update, use_qk_l2norm, state_layout, scale)
    target = index if output_state_indices is None else output_state_indices
    tensors = (q, k, v, state, A_log, a, dt_bias, b, output, index, target, buffer)
    key: object = (
        (q.kind, state.kind, dt_bias.kind, a.kind, b.kind, of_index),
        (q.shape[1:], v.shape[1:], output_state_indices is None, buffer is None),
        (options, type(scale), _apart(state), generation.number),
    )
    try:
        kernels = _kernels.get(key)
    except TypeError:  # an option without a hash
        key = kernels = None
    if kernels is None:
        kernels = _kernels_of(tensors, output_state_indices, *options)
        if key is not None:
            remember(_kernels, key, kernels, 4096)
    return kernels.values(tensors)


def _apart(state: TensorDesc) -> tuple[int, int]:
    """Return the number of slots and the elements from one to the next, for bfloat16 slots that lie
    apart; otherwise 0, 0."""
    shape = state.shape
    if len(shape) != 4 or shape[0] < 2:
        return 0, 0
    stride = state.strides[0]
    if stride == shape[1] * shape[2] * shape[3] or state.dtype.name != "bfloat16":
        return 0, 0
    return shape[0], stride


class _Kernels:
    """The kernels of calls that differ only in the number of requests, and their common values."""

    __slots__ = ("_device", "_found", "_hv", "_kernel", "_steps")

    def __init__(self, kernel: GdnKernel, device: Device) -> None:
        self._kernel, self._device, self._hv = kernel, device, kernel.hv
        self._steps = _steps(kernel.hv, _multiprocessors(device), kernel.state_layout)
        self._found: list[_Found | None] = [None] * len(self._steps)

    def values(self, tensors: tuple[Any, ...]) -> Values:
        """Return a call's values, from the arguments in the order of `_TENSORS`."""
        q, state, index, buffer = tensors[0], tensors[3], tensors[9], tensors[11]
        requests = q.shape[0]
        if index is None:
            _check_first("state", state, requests)
        if buffer is not None:
            name = "intermediate_states_buffer"
            _check_first(name, as_desc(buffer, _OP, name), requests, self._kernel.t)
        i = bisect(self._steps, requests * self._hv) - 1 if requests else 0
        cached = self._found[i]
        if cached is None:
            kernel = replace(self._kernel, states=self._steps[i])
            alike = _values_of(kernel, self._device)
            places = {name: n for n, name in enumerate((*alike.index, *_TENSORS))}
            cached = alike, operator.itemgetter(*(places[name] for name in alike.index))
            self._found[i] = cached
        alike, pick = cached
        if index is None and "initial_state_indices" in alike.index:
            index = memory.counting(self._device, requests)
            tensors = (*tensors[:9], index, index, buffer)
        return alike.of(list(pick((*alike.values, *tensors))))


# A call's tensors, by the binding's names.
_TENSORS = (
    *("q", "k", "v", "state", "A_log", "a", "dt_bias", "b", "output"),
    *("initial_state_indices", "output_state_indices", "intermediate_states_buffer"),
)
_Found = tuple[Values, Callable[[tuple[object, ...]], tuple[object, ...]]]
_kernels: dict[object, _Kernels] = {}


def _kernels_of(
    tensors: tuple[Any, ...],
    output_state_indices: TensorLike | None,
    disable_state_update: bool,
    use_qk_l2norm: bool,
    state_layout: str,
    scale: float | None,
) -> _Kernels:
    """Check that a call's options are compatible, and return its kernels."""
    q, _, v, state, _, a, dt_bias, b, _, index, _, buffer = tensors
    if len(q.shape) != 4 or len(v.shape) != 4:
        name, desc = ("v", v) if len(q.shape) == 4 else ("q", q)
        raise _refuse(name, desc.layout, "rank 4 (b t heads 128)")
    state_dtype, is_one, is_indexed = state.dtype.name, q.shape[1] == 1, index is not None
    if state_dtype not in ("bfloat16", "float32"):
        raise _refuse("state", state.dtype, "bfloat16 or float32")
    if state_layout != "VK":
        check_choice(_OP, "state_layout", state_layout, LAYOUTS)
        if state_dtype != "float32" or not is_one or is_indexed:
            expected = "'VK', or float32 states, one token and no initial_state_indices"
            raise _refuse("state_layout", state_layout, expected)
    if is_one:
        _check_one_token(disable_state_update, buffer)
    if not is_indexed:
        _check_unindexed(output_state_indices, is_one or state_dtype == "bfloat16")
    slots, slot_stride = _apart(state)
    kernel = GdnKernel(
        h=q.shape[2],
        hv=v.shape[2],
        t=q.shape[1],
        state_dtype=state_dtype,
        dt_bias_dtype=dt_bias.dtype.name,
        gate_dtypes=(a.dtype.name, b.dtype.name),
        index_dtype=index.dtype.name if is_indexed else "int32",
        state_layout=state_layout,
        is_indexed=is_indexed,
        is_same_pool=output_state_indices is None,
        keeps_each=buffer is not None,
        disable_state_update=disable_state_update,
        use_qk_l2norm=use_qk_l2norm,
        scale=_SIZE**-0.5 if scale is None else check_number(_OP, "scale", scale),
        slots=slots,
        slot_stride=slot_stride,
    )
    return _Kernels(kernel, q.device)


def _check_first(name: str, desc: TensorDesc, *sizes: int) -> None:
    """Check that a tensor's first axes are those of `q`: requests, and tokens of each."""
    if desc.shape[: len(sizes)] != sizes:
        expected = f"[{', '.join(map(str, sizes))}, ...], as q has requests and tokens"
        raise _refuse(name, desc.layout, expected)


def _check_one_token(disable_state_update: bool, buffer: object) -> None:
    """Refuse what only calls with several tokens of each request have."""
    expected = "with several tokens: q is of one"
    if disable_state_update:
        raise _refuse("disable_state_update", True, f"True {expected}")
    if buffer is not None:
        got = as_desc(buffer, _OP, "intermediate_states_buffer").layout
        raise _refuse("intermediate_states_buffer", got, f"None but {expected}")


def _check_unindexed(output_state_indices: object, may_lack_indices: bool) -> None:
    """Check a call without `initial_state_indices`."""
    if output_state_indices is not None:
        got = as_desc(output_state_indices, _OP, "output_state_indices").layout
        raise _refuse("output_state_indices", got, "None without initial_state_indices")
    if not may_lack_indices:
        expected = "indices, with float32 states and several tokens"
        raise _refuse("initial_state_indices", None, expected)
