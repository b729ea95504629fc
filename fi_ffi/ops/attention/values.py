"""The arguments of attention's entries, by name."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.abi.tensor import Device
from fi_ffi.errors import ArgumentError, ArgumentTypeError
from fi_ffi.ops.attention.rows import BLOCK_SCALES, FP4, FP8, MULTI_ITEM, SHARED
from fi_ffi.ops.call import values as values_
from fi_ffi.ops.call.arguments import Refusal, check_number, shown
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.call.row import Row, Scalar

# The caller's names of an entry's arguments.
CALLER_NAMES = {
    **{name: name.removeprefix("maybe_") for name in SHARED if name.startswith("maybe_")},
    **{f"maybe_scale_{of}": f"{of}_scale" for of in "qkv"},
    "rope_rcp_scale": "rope_scale",
    "rope_rcp_theta": "rope_theta",
}
# Values that an entry gets for options that were left out.
_NEUTRAL = {arg.name: arg.default for arg in SHARED.values() if isinstance(arg, Scalar)}
# Arguments that runs pass only if an option of their plan is one of these values.
_WITH_OPTIONS: Sequence[tuple[str, Collection[object], str]] = (
    ("pos_encoding_mode", ("ALIBI",), "maybe_alibi_slopes"),
    ("pos_encoding_mode", ("ROPE_LLAMA",), "rope_rcp_scale rope_rcp_theta"),
    ("use_custom_mask", (True,), "maybe_custom_mask"),
    ("use_multi_item_scoring", (True,), f"{MULTI_ITEM} token_pos_in_items_len"),
    ("kv_data_type", FP4, BLOCK_SCALES),
    ("kv_data_type", FP8, "ckv_scale kpe_scale maybe_ckv_scale_arr"),
)
_OF_KIND = {"": "", "fp8": " with fp8 queries", "fp4": " with keys of 4 bits"}


def compiled_row(
    row: Row, module: str, dtypes: Mapping[str, str], op: str, *device: Device, **how: Any
) -> CompiledRow:
    """Compile a row for a module of these dtypes: see `fi_ffi.ops.call.values`."""
    types = {name: FP4 if dtype in FP4 else (dtype,) for name, dtype in dtypes.items()}
    return values_.compiled_row(row, module, types, op, *device, **{"names": CALLER_NAMES, **how})


def without_options(options: object) -> dict[str, object]:
    """Return the arguments that no run of a plan with these options passes, as entries get them."""
    return {
        name: _NEUTRAL.get(name)
        for option, values, names in _WITH_OPTIONS
        if getattr(options, option, None) not in values
        for name in names.split()
    }


class Values(values_.Values):
    """The arguments of an entry of attention; `others` are the rows of the other backends."""

    __slots__ = ("backend", "others")

    def __init__(
        self, op: str, compiled: CompiledRow, backend: str, others: Mapping[str, Row]
    ) -> None:
        super().__init__(op, compiled, _NEUTRAL)
        self.backend, self.others = backend, others

    def of(self, values: list[Any]) -> Values:
        copy = super().of(values)
        copy.backend, copy.others = self.backend, self.others
        return copy

    def option(self, name: str, value: object) -> None:
        """Set an option that the caller passed; raise `ArgumentError` if this backend lacks it."""
        if value is None:
            return
        names = f"maybe_{name}", name
        index = next((self.index[of] for of in names if of in self.index), None)
        if index is None:
            raise self.lacks(name, value, *names)
        self.values[index] = value

    def lacks(self, name: str, value: object, *abi_names: str) -> ArgumentError:
        """Make the error for an option that this row lacks, naming the backends that have it."""
        having = sorted(
            backend
            for backend, row in self.others.items()
            if {*abi_names} & {arg.name for arg in row.args} and backend != self.backend
        )
        who = "none of these kernels has it"
        if having:
            backend, _, of = having[0].partition("_")
            who = f"backend={backend!r}{_OF_KIND[of]} has it"
        return Refusal(self.op)(name, shown(value), f"None: {self.backend} lacks it ({who})")

    def scales(self, head_dim: int, sm_scale: object = None, *scales: object) -> None:
        """Set the scale of the softmax, and those of q, k and v."""
        scale = softmax_scale(self.op, sm_scale, head_dim)
        for of, value in zip("qkv", scales, strict=False):
            scale = self._scale(of, value, scale)
        self.put(sm_scale=scale)

    def _scale(self, of: str, value: object, sm_scale: float) -> float:
        """Set a scale of q, k or v, a number or one for each head; return the new `sm_scale`.

        For kernels without an argument for the scale of q or k, multiply `sm_scale` by it.
        """
        if value is None:
            return sm_scale
        name, scalar, tensor = f"{of}_scale", f"scale_{of}_scalar", f"maybe_scale_{of}"
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            try:
                desc = as_desc(value, self.op, name)
            except ArgumentTypeError:
                expected = "a number, or a tensor of one for each head"
                raise Refusal(self.op).type(name, value, expected) from None
            if tensor not in self.index:
                raise self.lacks(name, value, tensor)
            self.values[self.index[tensor]] = desc
            return sm_scale
        plain = check_number(self.op, name, value, -math.inf if of == "v" else 0.0)
        if scalar in self.index:
            self.values[self.index[scalar]] = plain
        elif of != "v":
            return sm_scale * plain
        elif plain != 1.0:
            raise self.lacks("v_scale", value, scalar)
        return sm_scale

    def positions(
        self, mode: str, rope_scale: float | None, rope_theta: float | None, alibi_slopes: object
    ) -> None:
        """Set the arguments of the position encoding that the kernel was compiled with."""
        refuse = Refusal(self.op)
        for name, value in (("rope_scale", rope_scale), ("rope_theta", rope_theta)):
            if value is None:
                continue
            if mode != "ROPE_LLAMA":
                raise refuse(name, value, "None without pos_encoding_mode='ROPE_LLAMA'")
            # The kernels take the reciprocal, as a float32.
            reciprocal = 1.0 / check_number(self.op, name, value, 1e-30)
            self.put(**{name.replace("rope_", "rope_rcp_"): reciprocal})
        if (alibi_slopes is not None) != (mode == "ALIBI"):
            what = "slopes" if mode == "ALIBI" else "None"
            expected = f"{what} with pos_encoding_mode={mode!r}"
            raise refuse("alibi_slopes", shown(alibi_slopes), expected)
        self.option("alibi_slopes", alibi_slopes)


# Releases whose kernels address the scales of pages by the scales' own strides.
OWN_STRIDES = ">=0.6.15"


def block_scales(
    values: Values,
    kv_data_type: str,
    tensors: Mapping[str, TensorLike],
    k_cache_sf: TensorLike | None,
    v_cache_sf: TensorLike | None,
    have_own_strides: bool = False,
) -> None:
    """Set `k_cache_sf` and `v_cache_sf`, the block scales of NVFP4 keys and values (`tensors`).

    The kernels load four scales at a time. They address scales by an eighth of the strides of the
    keys, unless they take the scales' own strides (`have_own_strides`).
    """
    is_fp4 = kv_data_type in FP4
    if not is_fp4 and k_cache_sf is v_cache_sf is None:
        return
    refuse, scales = Refusal(values.op), {"k_cache_sf": k_cache_sf, "v_cache_sf": v_cache_sf}
    for (name, scale), (of, tensor) in zip(scales.items(), tensors.items(), strict=True):
        if (scale is not None) != is_fp4:
            expected = "scales, for keys and values of 4 bits"
            if not is_fp4:
                expected = f"None: {of} is of {kv_data_type}, not of 4 bits"
            raise refuse(name, shown(scale), expected)
        if scale is None:
            continue
        desc, like = as_desc(scale, refuse.op, name), as_desc(tensor, refuse.op, of)
        pairs = zip(like.shape[:-1], like.strides[:-1], desc.strides[:-1], strict=False)
        if len(desc.shape) == len(like.shape) and any(
            size > 1 and ((ours != 8 * theirs and not have_own_strides) or theirs % 4)
            for size, ours, theirs in pairs
        ):
            expected = "strides that are multiples of 4"
            if not have_own_strides:
                expected = f"an eighth of `{of}`'s strides, in multiples of 4"
            raise refuse(name, f"strides {desc.strides} beside {like.strides}", expected)
        values.option(name, desc)


def softmax_scale(op: str, sm_scale: object, head_dim: int) -> float:
    """Return `sm_scale`, by default 1 / sqrt(head_dim).

    0 and negative numbers are refused: the kernels also scale the logit that stands for a hidden
    key.
    """
    if sm_scale is None:
        return 1.0 / math.sqrt(head_dim)
    return check_number(op, "sm_scale", sm_scale, 0.0)
