"""The kernels that serve an attention call: modules, backends, and the rows of a release."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fi_ffi.abi.tensor import Device, parse_dtype
from fi_ffi.errors import printed
from fi_ffi.loader import machine
from fi_ffi.loader.distributions import is_in
from fi_ffi.ops.attention.rows import DECODE_GROUPS, F16, FP4, FP8, MLA_FP8
from fi_ffi.ops.call.arguments import Refusal, check_choice, check_number
from fi_ffi.ops.call.releases import release_in_force

# flashinfer/utils.py: PosEncodingMode and MaskMode
POS_ENCODING_MODES = {"NONE": 0, "ROPE_LLAMA": 1, "ALIBI": 2}
NON_CAUSAL, CAUSAL, CUSTOM, MULTI_ITEM_SCORING = range(4)
BACKENDS = ("auto", "fa2", "fa3")

# csrc/*_sm90_kernel_inst.jinja and the static_asserts of hopper/prefill_sm90.cuh
_FA3_HEAD_DIMS = ((64, 64), (128, 128), (256, 256), (192, 128))
_FA3_FP8_HEAD_DIMS = ((64, 64), (128, 128), (256, 256))


@dataclass(frozen=True)
class Kernel:
    """The parameters that a module is compiled for; they determine its name."""

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
        """The dtypes, by the rows' names for them."""
        return {"Q": self.q_data_type, "KV": self.kv_data_type, "O": self.o_data_type}

    @property
    def is_mla_of_fp8(self) -> bool:
        return self.family == "batch_mla" and self.kv_data_type in FP8

    def kind(self, backend: str) -> str:
        """Return the key of a family's rows for a backend and these dtypes."""
        if self.q_data_type in FP8 or self.is_mla_of_fp8:
            return f"{backend}_fp8"
        return f"{backend}_fp4" if self.kv_data_type in FP4 else backend

    def module(self, backend: str, of: str | None = None) -> str:
        """Return the module's name in a release, by default that of the kernels in use."""
        parameters = vars(self) | {
            "backend": backend,
            "dtype_q": self.q_data_type,
            # Named after the tensor's dtype, from 0.6.18 on after the kernel's.
            "dtype_kv": "fp4" if self.kv_data_type in FP4 else self.kv_data_type,
            "dtype_o": self.o_data_type,
            # MLA's names of the head sizes.
            "head_dim_ckv": self.head_dim_qk,
            "head_dim_kpe": self.head_dim_vo,
            "pos_encoding_mode": POS_ENCODING_MODES[self.pos_encoding_mode],
        }
        return module_name(of=of, **parameters)


def module_name(family: str, of: str | None = None, **parameters: Any) -> str:
    """Return a module's name from what it is compiled for, in a release (by default that of the
    kernels in use). Parameters that the family's names lack are ignored."""
    return _module_name(family, of or release_in_force(), **parameters)


@functools.lru_cache(256)
def _module_name(family: str, of: str, **parameters: Any) -> str:
    from fi_ffi.loader.uris import family_row  # imported late: it has a large table

    row = family_row(family, of)
    known = {name: value for name, value in parameters.items() if name in row.kinds}
    return row.render(row.complete(known))


def multiprocessors(device: Device) -> int:
    """Return the multiprocessors of a GPU; 1 on the CPU, whose reference does not use them."""
    return machine.multiprocessors(device.index) if device.is_cuda else 1


def data_type(op: str, argument: str, value: object, allowed: tuple[str, ...]) -> str:
    """Return a dtype's name; refuse one that is not allowed."""
    dtype = parse_dtype(value, op=op, argument=argument)
    if dtype.name not in allowed:
        raise Refusal(op)(argument, dtype, " or ".join(allowed))
    return dtype.name


def output_type(op: str, argument: str, value: object, q: str, is_decode: bool) -> str:
    """The output's dtype, for queries of one: the same, 16 bits for fp8 queries, or, of the
    kernels without tensor cores, fp8."""
    allowed = (F16 if q in FP8 else (q,)) + (FP8 if is_decode else ())
    dtype = parse_dtype(value, op=op, argument=argument)
    if dtype.name in FP8 and not is_decode:
        expected = f"{' or '.join(allowed)}: prefill kernels write 16-bit elements; "
        expected += "BatchDecodePlan, single_decode and xqa have fp8 outputs"
        raise Refusal(op)(argument, dtype, expected)
    return data_type(op, argument, dtype, allowed)


def check_soft_cap(op: str, argument: str, value: object) -> float:
    """`logits_soft_cap`: 0 for none."""
    cap = check_number(op, argument, value)
    if cap < 0:
        raise Refusal(op)(argument, value, "0 or more")
    return cap


def decode_groups(of: str | None) -> list[int]:
    """Query heads for each key head that decode kernels of a release are for; of any, for None."""
    return [
        group for group, since in DECODE_GROUPS.items() if not (since and of) or is_in(of, since)
    ]


def release_for(device: Device) -> str | None:
    """Return the release of the kernels that a device runs; None on the CPU, whose reference
    supports what any release does."""
    return release_in_force() if device.is_cuda else None


def check_encoding(op: str, mode: str, logits_soft_cap: float) -> None:
    """Raise `ArgumentError` for ALiBi with a soft cap: the kernels apply `sm_scale` twice."""
    if mode == "ALIBI" and logits_soft_cap > 0:
        expected = "0 with pos_encoding_mode='ALIBI': the kernels apply sm_scale twice "
        expected += "(docs/attention.md)"
        raise Refusal(op)("logits_soft_cap", logits_soft_cap, expected)


# In earlier releases, fa3's fp8 main loop ended at the first tile that a window hides in part.
FP8_WINDOWS = ">=0.6.15"


def fa3_lacks(
    kernel: Kernel, use_custom_mask: bool, is_paged: bool = False, of: str | None = None
) -> str:
    """Say why fa3 cannot serve a call, or return "". `of` is a release.

    The conditions are those of `is_fa3_backend_supported`, and the head sizes that fa3 is compiled
    for.
    """
    if kernel.family == "batch_mla":
        return _mla_lacks("fa3", kernel, of)
    q, mode = kernel.q_data_type, kernel.pos_encoding_mode
    dims = (kernel.head_dim_qk, kernel.head_dim_vo)
    fp8 = q in FP8
    known = _FA3_FP8_HEAD_DIMS if fp8 else _FA3_HEAD_DIMS
    sizes = ", ".join("/".join(map(str, pair)) for pair in known)
    has_windows = not fp8 or of is None or is_in(of, FP8_WINDOWS)
    return _first_lack(
        {
            "fa3 has no custom masks": use_custom_mask,
            f"fa3 has no pos_encoding_mode {mode!r}": mode != "NONE",
            "fa3 has no use_fp16_qk_reduction": kernel.use_fp16_qk_reduction,
            f"fa3 takes {q} queries with keys of that dtype only": kernel.kv_data_type != q,
            "fa3 has no logits_soft_cap for fp8 queries": fp8 and kernel.use_logits_soft_cap,
            f"fa3 has window_left for fp8 queries in FlashInfer {FP8_WINDOWS}, not in {of}": (
                kernel.use_sliding_window and not has_windows
            ),
            f"fa3 has head_dim_qk/head_dim_vo {sizes}, not {dims[0]}/{dims[1]}": dims not in known,
            "fa3 has no paged keys with a head_dim_qk other than head_dim_vo": (
                is_paged and dims[0] != dims[1]
            ),
        }
    )


def fa2_lacks(kernel: Kernel, of: str | None = None) -> str:
    """Say why fa2 cannot serve a call, or return "". `of` is a release."""
    if kernel.family == "batch_mla":
        return _mla_lacks("fa2", kernel, of)
    q, kv = kernel.q_data_type, kernel.kv_data_type
    return _first_lack(
        {
            f"fa2 has no {q} queries": q in FP8,
            f"fa2 has use_fp16_qk_reduction for float16 queries, not {q}": (
                kernel.use_fp16_qk_reduction and q != "float16"
            ),
            "fa2 has no pos_encoding_mode 'ROPE_LLAMA' for keys of 8 or 4 bits": (
                kernel.pos_encoding_mode == "ROPE_LLAMA" and kv not in F16
            ),
            "fa2 has no f16 queries with bf16 keys, nor the reverse": kv in F16 and kv != q,
        }
    )


def _first_lack(lacks: Mapping[str, bool]) -> str:
    """Return the first reason whose condition holds, or ""."""
    return next((reason for reason, holds in lacks.items() if holds), "")


def _mla_lacks(backend: str, kernel: Kernel, of: str | None) -> str:
    since = MLA_FP8[backend]
    if not kernel.is_mla_of_fp8 or of is None or is_in(of, since):
        return ""
    return f"{backend} has MLA with a float8_e4m3fn cache in FlashInfer {since}, not in {of}"


class Target(NamedTuple):
    """What kernels are chosen for: an op, a compute capability and a release.

    A capability of None means the CPU's reference; a release of None, any.
    """

    op: str
    capability: tuple[int, int] | None
    release: str | None
    device: str = "the GPU"

    @classmethod
    def of(cls, op: str, device: Device) -> Target:
        """Return the target of an op that runs on a device."""
        capability = machine.capability(device.index) if device.is_cuda else None
        return cls(op, capability, release_for(device), str(device))


def choose_backend(
    target: Target,
    backend: object,
    kernel: Kernel,
    use_custom_mask: bool = False,
    is_paged: bool = False,
) -> tuple[str, str]:
    """Choose the backend for a target; return it and the reason.

    "auto" decides as FlashInfer's `determine_attention_backend`.
    """
    op, capability, release, device = target
    asked = check_choice(op, "backend", backend, BACKENDS)
    fa3 = fa3_lacks(kernel, use_custom_mask, is_paged, release)
    lacks = {"fa2": fa2_lacks(kernel, release), "fa3": fa3}
    if capability is not None and capability != (9, 0):
        where = "for SM90, and {} is SM{}{}".format(device, *capability)
        lacks["fa3"] = f"fa3 is {where}"
        if kernel.is_mla_of_fp8:
            lacks["fa2"] = f"FlashInfer has MLA with a float8_e4m3fn cache {where}"
    chosen, reason = asked, "it was asked for"
    if asked == "auto":
        is_reference = capability is None and not lacks["fa2"]
        chosen = "fa2" if lacks["fa3"] or is_reference else "fa3"
        reason = lacks["fa3"] or "SM90, and fa3 has all that was asked for"
        reason = "the CPU's reference is the same for both" if is_reference else reason
    if lacks[chosen]:
        other = "fa2" if chosen == "fa3" else "fa3"
        expected = f"{other!r}: {lacks[chosen]}"
        if lacks[other]:
            expected = f"what a backend has: {lacks['fa2']}; {lacks['fa3']}"
        raise Refusal(op)("backend", printed(asked), expected)
    return chosen, reason
