"""Which kernels serve what is asked of attention: modules, backends, and the rows of a release."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fi_ffi.abi.tensor import Device, DType, parse_dtype
from fi_ffi.errors import ArgumentError, printed
from fi_ffi.loader import machine
from fi_ffi.ops.attention.rows import DECODE_GROUPS, F16, FP4, FP8, of_release
from fi_ffi.ops.attention.sizes import BY_QUERY, Geometry
from fi_ffi.ops.call.arguments import check_choice, check_number
from fi_ffi.ops.providers import release_in_use
from fi_ffi.ops.releases import is_in
from fi_ffi.ops.row import Row

# flashinfer/utils.py: PosEncodingMode and MaskMode
POS_ENCODING_MODES = {"NONE": 0, "ROPE_LLAMA": 1, "ALIBI": 2}
NON_CAUSAL, CAUSAL, CUSTOM, MULTI_ITEM_SCORING = range(4)
BACKENDS = ("auto", "fa2", "fa3")

# csrc/*_sm90_kernel_inst.jinja and the static_asserts of hopper/prefill_sm90.cuh
_FA3_HEAD_DIMS = ((64, 64), (128, 128), (256, 256), (192, 128))
_FA3_FP8_HEAD_DIMS = ((64, 64), (128, 128), (256, 256))


@dataclass(frozen=True)
class Kernel:
    """What a module is compiled for: what its name is made of."""

    family: str
    q_data_type: str
    kv_data_type: str
    o_data_type: str
    head_dim_qk: int
    head_dim_vo: int
    pos_encoding_mode: str = "NONE"
    use_sliding_window: bool = False
    use_logits_soft_cap: bool = False
    use_fp16_qk_reduction: bool = False

    @property
    def dtypes(self) -> dict[str, str]:
        """By the names that the rows have for them."""
        return {"Q": self.q_data_type, "KV": self.kv_data_type, "O": self.o_data_type}

    def kind(self, backend: str) -> str:
        """The rows of a backend for these dtypes: their place in a family's."""
        if self.q_data_type in FP8:
            return f"{backend}_fp8"
        return f"{backend}_fp4" if self.kv_data_type in FP4 else backend

    def module(self, backend: str, of: str | None = None) -> str:
        """The module's name in a release, or in that of the kernels in use."""
        kv, of = self.kv_data_type, of or release()
        if kv in FP4:  # called after the tensor's dtype, and from 0.6.18 on after the kernel's
            kv = "fp4"
        parameters: dict[str, Any] = {
            "dtype_q": self.q_data_type,
            "dtype_kv": kv,
            "dtype_o": self.o_data_type,
        }
        if self.family == "batch_mla":
            parameters |= {"head_dim_ckv": self.head_dim_qk, "head_dim_kpe": self.head_dim_vo}
            return module_name(self.family, of, backend=backend, **parameters)
        parameters |= {"head_dim_qk": self.head_dim_qk, "head_dim_vo": self.head_dim_vo}
        if self.family != "batch_attention":
            parameters["use_sliding_window"] = self.use_sliding_window
            if "decode" not in self.family:
                parameters["backend"] = backend
        if "sink" not in self.family:
            parameters["pos_encoding_mode"] = POS_ENCODING_MODES[self.pos_encoding_mode]
            parameters["use_logits_soft_cap"] = self.use_logits_soft_cap
            if "prefill" in self.family:
                parameters["use_fp16_qk_reduction"] = self.use_fp16_qk_reduction
        return module_name(self.family, of, **parameters)


def module_name(family: str, of: str | None = None, **parameters: Any) -> str:
    """A module's name in a release, or in that of the kernels in use, by what it is compiled
    for."""
    return _module_name(family, of or release(), **parameters)


@functools.lru_cache(256)
def _module_name(family: str, of: str, **parameters: Any) -> str:
    from fi_ffi.loader.uris import uri  # as late as can be: it has a large table

    return uri(family, release=of, **parameters)


def release() -> str:
    """The release of the kernels in use, or the one that is wanted where there are none."""
    found = release_in_use()
    if found is None:
        from fi_ffi.loader.lock import wanted_release

        found = wanted_release()
    return found


def multiprocessors(device: Device) -> int:
    """Multiprocessors of a GPU; the CPU's reference has no need of them."""
    return machine.multiprocessors(device.index) if device.is_cuda else 1


def in_use(rows: Sequence[Row], device: Device) -> tuple[Row, ...]:
    """Rows in the forms of the kernels in use; on the CPU the first ones, as the reference has.

    Raises `KernelNotFoundError` where that release has none.
    """
    if not device.is_cuda:
        return tuple(rows)
    return tuple(of_release(row, release()) for row in rows)


def data_type(op: str, argument: str, value: object, allowed: tuple[str, ...]) -> str:
    """A dtype's name, one of those allowed."""
    dtype = value if isinstance(value, DType) else parse_dtype(value, op=op, argument=argument)
    if dtype.name not in allowed:
        raise ArgumentError(op, argument, got=dtype, expected=" or ".join(allowed))
    return dtype.name


def output_type(op: str, argument: str, value: object, q: str, is_decode: bool) -> str:
    """The output's dtype, for queries of one: the same, 16 bits for fp8 queries, or, of the
    kernels without tensor cores, fp8."""
    allowed = (F16 if q in FP8 else (q,)) + (FP8 if is_decode else ())
    dtype = value if isinstance(value, DType) else parse_dtype(value, op=op, argument=argument)
    if dtype.name in FP8 and not is_decode:
        expected = f"{' or '.join(allowed)}: prefill kernels write 16-bit elements; {_HAVE_FP8}"
        raise ArgumentError(op, argument, got=dtype, expected=expected)
    return data_type(op, argument, dtype, allowed)


_HAVE_FP8 = "BatchDecodePlan, single_decode and xqa have fp8 outputs"


def check_soft_cap(op: str, argument: str, value: object) -> float:
    """`logits_soft_cap`: 0 for none."""
    cap = check_number(op, argument, value)
    if cap < 0:
        raise ArgumentError(op, argument, got=value, expected="0 or more")
    return cap


def decode_groups(of: str | None) -> list[int]:
    """Query heads for each key head that decode kernels of a release are for; of any, for None."""
    return [
        group for group, since in DECODE_GROUPS.items() if not (since and of) or is_in(of, since)
    ]


def release_for(device: Device) -> str | None:
    """The release of the kernels that a device runs; None for the CPU, whose reference has all
    that any release has."""
    return release() if device.is_cuda else None


def geometry_on(device: Device, geometry: Geometry) -> Geometry:
    """The geometry as the kernels that a device runs count it: in tiles, or in queries."""
    of = release_for(device)
    return replace(geometry, by_query=of is not None and is_in(of, BY_QUERY))


def check_encoding(op: str, mode: str, logits_soft_cap: float) -> None:
    """`ArgumentError` for what the kernels get wrong: they scale twice."""
    if mode == "ALIBI" and logits_soft_cap > 0:
        expected = (
            "0 with pos_encoding_mode='ALIBI': the kernels apply sm_scale twice (docs/attention.md)"
        )
        raise ArgumentError(op, "logits_soft_cap", got=logits_soft_cap, expected=expected)


# Before, fa3's main loop for fp8 ended at the first tile that a window hides a part of.
FP8_WINDOWS = ">=0.6.15"


def fa3_lacks(
    kernel: Kernel, use_custom_mask: bool, is_paged: bool = False, of: str | None = None
) -> str:
    """Why fa3 cannot serve this; "" where it can.  As `is_fa3_backend_supported` has it,
    and the head sizes that its kernels are written for.  `of` is a release."""
    fp8 = kernel.q_data_type in FP8
    if use_custom_mask:
        return "fa3 has no custom masks"
    if kernel.pos_encoding_mode != "NONE":
        return f"fa3 has no pos_encoding_mode {kernel.pos_encoding_mode!r}"
    if kernel.use_fp16_qk_reduction:
        return "fa3 has no use_fp16_qk_reduction"
    if kernel.kv_data_type != kernel.q_data_type:
        return f"fa3 takes {kernel.q_data_type} queries with keys of that dtype only"
    if fp8 and kernel.use_logits_soft_cap:
        return "fa3 has no logits_soft_cap for fp8 queries"
    if fp8 and kernel.use_sliding_window and of is not None and not is_in(of, FP8_WINDOWS):
        return f"fa3 has window_left for fp8 queries in FlashInfer {FP8_WINDOWS}, not in {of}"
    dims = kernel.head_dim_qk, kernel.head_dim_vo
    known = _FA3_FP8_HEAD_DIMS if fp8 else _FA3_HEAD_DIMS
    if dims not in known and kernel.family != "batch_mla":
        sizes = ", ".join("/".join(map(str, pair)) for pair in known)
        return f"fa3 has head_dim_qk/head_dim_vo {sizes}, not {dims[0]}/{dims[1]}"
    if is_paged and dims[0] != dims[1] and kernel.family != "batch_mla":
        return "fa3 has no paged keys with a head_dim_qk other than head_dim_vo"
    return ""


def fa2_lacks(kernel: Kernel) -> str:
    """Why fa2 cannot serve this; "" where it can."""
    if kernel.q_data_type in FP8:
        return f"fa2 has no {kernel.q_data_type} queries"
    if kernel.use_fp16_qk_reduction and kernel.q_data_type != "float16":
        return f"fa2 has use_fp16_qk_reduction for float16 queries, not {kernel.q_data_type}"
    if kernel.pos_encoding_mode == "ROPE_LLAMA" and kernel.kv_data_type not in F16:
        return "fa2 has no pos_encoding_mode 'ROPE_LLAMA' for keys of 8 or 4 bits"
    if kernel.family in ("batch_mla", "batch_prefill_with_attention_sink"):
        return ""
    same_width = kernel.kv_data_type in F16 and kernel.kv_data_type != kernel.q_data_type
    return "fa2 has no f16 queries with bf16 keys, nor the reverse" if same_width else ""


def choose_backend(
    op: str,
    backend: object,
    kernel: Kernel,
    device: Device,
    use_custom_mask: bool = False,
    is_paged: bool = False,
) -> tuple[str, str]:
    """The backend on a device, and why."""
    capability = machine.capability(device.index) if device.is_cuda else None
    return backend_for(
        op, backend, kernel, capability, use_custom_mask, is_paged, str(device), release_for(device)
    )


def backend_for(
    op: str,
    backend: object,
    kernel: Kernel,
    capability: tuple[int, int] | None,
    use_custom_mask: bool = False,
    is_paged: bool = False,
    where: str = "the GPU",
    of: str | None = None,
) -> tuple[str, str]:
    """The backend on GPUs of a compute capability, with kernels of a release, and why: as asked,
    or with "auto" as FlashInfer's `determine_attention_backend` has it.  Without a capability it
    is the CPU's reference."""
    asked = check_choice(op, "backend", backend, BACKENDS)
    lacks = {"fa2": fa2_lacks(kernel), "fa3": fa3_lacks(kernel, use_custom_mask, is_paged, of)}
    if capability is not None and capability != (9, 0):
        lacks["fa3"] = "fa3 is for SM90, and {} is SM{}{}".format(where, *capability)
    chosen, why = asked, "it was asked for"
    if asked == "auto":
        is_reference = capability is None and not lacks["fa2"]
        chosen = "fa2" if lacks["fa3"] or is_reference else "fa3"
        why = lacks["fa3"] or "SM90, and fa3 has all that was asked for"
        why = "the CPU's reference is the same for both" if is_reference else why
    if lacks[chosen]:
        other = "fa2" if chosen == "fa3" else "fa3"
        expected = f"{other!r}: {lacks[chosen]}"
        if lacks[other]:
            expected = f"what a backend has: {lacks['fa2']}; {lacks['fa3']}"
        raise ArgumentError(op, "backend", got=printed(asked), expected=expected)
    return chosen, why
