"""From a run's keyword options to a row's arguments."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

from fi_ffi.abi.interop import as_desc
from fi_ffi.errors import ArgumentError, ArgumentTypeError
from fi_ffi.ops.attention.options import number, shown
from fi_ffi.ops.form import Form
from fi_ffi.ops.row import Row, Scalar

# What options are called in the binding, where that is something else.
_ABI_NAMES = {
    name: f"maybe_{name}"
    for name in (
        "lse", "custom_mask", "alibi_slopes", "prefix_len_ptr", "token_pos_in_items_ptr",
        "max_item_len_ptr", "k_cache_sf", "v_cache_sf",
    )
}  # fmt: skip
# What callers know an entry's arguments as.
_OPTIONS = {abi_name: name for name, abi_name in _ABI_NAMES.items()} | {
    "rope_rcp_scale": "rope_scale", "rope_rcp_theta": "rope_theta",
    **{f"maybe_scale_{of}": f"{of}_scale" for of in "qkv"},
    # Of xqa, whose callers know them by FlashInfer's names in Python.
    "qScaleTensor": "q_scale", "qScale": "q_scale", "kvScaleTensor": "kv_scale",
    "kvCacheScale": "kv_scale", "attentionSinks": "sinks", "kCacheVLLM": "k_cache",
    "vCacheVLLM": "v_cache", "kvCachePageList": "page_table", "seqLen": "seq_lens",
    "slidingWinSize": "sliding_win_size", "rcpOutScale": "rcp_out_scale",
    "multiProcessorCount": "sm_count", "scratch": "workspace_buffer",
}  # fmt: skip
# What an entry is given for an option that is left out.
NEUTRAL = {
    "logits_soft_cap": 0.0, "rope_rcp_scale": 1.0, "rope_rcp_theta": 1e-4, "enable_pdl": False,
    "token_pos_in_items_len": 0, "scale_q_scalar": 1.0, "scale_k_scalar": 1.0,
    "scale_v_scalar": 1.0, "uniform_q_len": 0, "ckv_scale": 1.0, "kpe_scale": 1.0,
}  # fmt: skip


def option_of(name: str) -> str:
    """What callers know an entry's argument as."""
    return _OPTIONS.get(name, name)


def call(op: str, form: Form, values: list[Any], stream: object) -> Any:
    """Call an entry; its row's refusals name what the caller called, as the caller knows it."""
    with as_called(op):
        return form.again(values, stream)


class as_called:  # a context manager
    """Refusals of a row inside the block name the op and the argument as the caller does."""

    __slots__ = ("_op",)

    def __init__(self, op: str) -> None:
        self._op = op

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, tb: object) -> None:
        if isinstance(error, ArgumentError):
            argument, got, expected = option_of(error.argument), error.got, error.expected
            named = type(error)(self._op, argument, got=got, expected=expected)
            raise named from error.__cause__


class Values:
    """A row's arguments as a list in the ABI's order, filled by name."""

    __slots__ = ("backend", "index", "op", "others", "room", "row", "values")

    def __init__(self, op: str, row: Row, backend: str, others: Mapping[str, Row]) -> None:
        self.op, self.row, self.backend, self.others = op, row, backend, others
        # How much the run was given of what later batches may need more of.
        self.room: dict[str, int] = {}
        self.index = {arg.name: i for i, arg in enumerate(row.args)}
        self.values: list[Any] = [
            NEUTRAL.get(arg.name) if isinstance(arg, Scalar) else None for arg in row.args
        ]

    def fresh(self) -> Values:
        """A copy to fill for one call."""
        copy = object.__new__(Values)
        copy.op, copy.row, copy.backend, copy.others = self.op, self.row, self.backend, self.others
        copy.index, copy.values, copy.room = self.index, self.values.copy(), {}
        return copy

    def put(self, **values: object) -> None:
        """Set arguments by the binding's names; those the row lacks are left out."""
        for name, value in values.items():
            if name in self.index:
                self.values[self.index[name]] = value

    def has(self, name: str) -> bool:
        """Whether the row has an argument, by the binding's name."""
        return name in self.index

    def get(self, name: str) -> Any:
        return self.values[self.index[name]]

    def option(self, name: str, value: object) -> None:
        """Set what the caller asked for; `ArgumentError` where this backend lacks it."""
        if value is None:
            return
        abi_name = _ABI_NAMES.get(name, name)
        if abi_name not in self.index:
            raise self.lacks(name, value, (abi_name,))
        self.values[self.index[abi_name]] = value

    def lacks(self, name: str, value: object, abi_names: Iterable[str]) -> ArgumentError:
        """An error for an option this row lacks, naming the backends that have it."""
        wanted = set(abi_names)
        having = sorted(
            backend
            for backend, row in self.others.items()
            if wanted & {arg.name for arg in row.args} and backend != self.backend
        )
        who = "none of these kernels has it"
        if having:
            backend, _, fp8 = having[0].partition("_")
            who = f"backend={backend!r}{' with fp8 queries' if fp8 else ''} has it"
        expected = f"None: {self.backend} lacks it ({who})"
        return ArgumentError(self.op, name, got=shown(value), expected=expected)

    def scale(self, of: str, value: object, sm_scale: float) -> float:
        """Set a scale of q, k or v: a number, or one for each head; returns `sm_scale`.

        Kernels without an argument for a scale of q or k are given it in sm_scale.
        """
        if value is None:
            return sm_scale
        name, scalar, tensor = f"{of}_scale", f"scale_{of}_scalar", f"maybe_scale_{of}"
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            try:
                desc = as_desc(value, self.op, name)
            except ArgumentTypeError:
                expected = "a number, or a tensor of one for each head"
                got = shown(value)
                raise ArgumentTypeError(self.op, name, got=got, expected=expected) from None
            if tensor not in self.index:
                raise self.lacks(name, value, (tensor,))
            self.values[self.index[tensor]] = desc
            return sm_scale
        plain = number(self.op, name, value, -math.inf if of == "v" else 0.0)
        if scalar in self.index:
            self.values[self.index[scalar]] = plain
        elif of == "v":
            if plain != 1.0:
                raise self.lacks("v_scale", value, (scalar,))
        else:
            return sm_scale * plain
        return sm_scale

    def positions(
        self, mode: str, rope_scale: float | None, rope_theta: float | None, alibi_slopes: object
    ) -> None:
        """Set what the position encoding that the kernel was compiled with takes."""
        if mode != "ROPE_LLAMA":
            for name, value in (("rope_scale", rope_scale), ("rope_theta", rope_theta)):
                if value is not None:
                    expected = "None without pos_encoding_mode='ROPE_LLAMA'"
                    raise ArgumentError(self.op, name, got=value, expected=expected)
        if (alibi_slopes is not None) != (mode == "ALIBI"):
            what = "slopes" if mode == "ALIBI" else "None"
            got, expected = shown(alibi_slopes), f"{what} with pos_encoding_mode={mode!r}"
            raise ArgumentError(self.op, "alibi_slopes", got=got, expected=expected)
        self.option("alibi_slopes", alibi_slopes)
        for name, value in (("rope_scale", rope_scale), ("rope_theta", rope_theta)):
            if value is not None:
                # The kernels get its reciprocal, as a float32.
                given = number(self.op, name, value, 1e-30)
                self.put(**{name.replace("rope_", "rope_rcp_"): 1.0 / given})


def only_with(
    op: str, name: str, value: object, option: str, is_planned: bool, what: str = "a tensor"
) -> None:
    """`ArgumentError` unless an argument comes with the plan's option, and not without."""
    if (value is not None) != is_planned:
        expected = what if is_planned else "None"
        expected = f"{expected}: this was planned with {option}={is_planned}"
        raise ArgumentError(op, name, got=shown(value), expected=expected)


def softmax_scale(op: str, sm_scale: object, head_dim: int) -> float:
    """`sm_scale`, or 1 / sqrt(head_dim).

    Not 0 or less: the kernels scale what stands for a hidden key's logit too.
    """
    if sm_scale is None:
        return 1.0 / math.sqrt(head_dim)
    return number(op, "sm_scale", sm_scale, 0.0)
