"""Right calls of the functions that have no row, to be made wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

import fi_ffi

from .functions import Known
from tests.helpers import moe_layers, pod_calls, xqa_calls

_F16 = np.float16
# A tensor on a GPU that this machine has not, before the others are looked at.
_ABSENT = (fi_ffi.LoaderError,)
_MOE_OPS = ("cutlass_fused_moe", "FusedMoe")


def _drawn(*shape: int, dtype: Any = _F16) -> np.ndarray:
    return np.random.default_rng().standard_normal(shape).astype(dtype)


def _singles() -> list[Callable[[], Known]]:
    def single(name: str, rows: tuple[int, ...]) -> Known:
        arrays = {"q": _drawn(*rows, 4, 64), "k": _drawn(5, 2, 64), "v": _drawn(5, 2, 64)}
        arrays |= {"tmp": np.zeros(64, np.uint8), "o": np.full_like(arrays["q"], np.nan)}
        arrays |= {"lse": np.full((*rows, 4), np.nan, np.float32)}
        return Known(getattr(fi_ffi, name), arrays, {}, ("tmp", "o", "lse"), also=_ABSENT)

    return [lambda: single("single_prefill", (3,)), lambda: single("single_decode", ())]


def _xqa() -> Known:
    batch = xqa_calls.Batch(xqa_calls.Spec(lengths=(1, 17)), np.random.default_rng())
    names = ("output", "workspace_buffer", "semaphores")
    return Known(fi_ffi.xqa, batch.arrays, {}, names, also=_ABSENT)


def _segment_gemm() -> Known:
    arrays = {
        "x": _drawn(5, 64),
        "weights": _drawn(2, 40, 64),
        "out": np.full((5, 40), np.nan, _F16),
    }
    others = {"batch_size": 2, "weight_column_major": True, "seg_lens": [2, 3]}
    return Known(fi_ffi.segment_gemm, arrays, others, ("out",))


def _tinygemm() -> Known:
    bf16 = ml_dtypes.bfloat16
    arrays = {"input": _drawn(3, 64, dtype=bf16), "weight": _drawn(16, 64, dtype=bf16)}
    arrays |= {"out": np.full((3, 16), np.nan, bf16), "bias": _drawn(16, dtype=bf16)}
    return Known(
        fi_ffi.tinygemm_bf16,
        arrays,
        {},
        ("out",),
        ops=("tinygemm_bf16", "tinygemm2", "tinygemm2_nobias"),
    )


def _blockscale() -> Known:
    bf16 = ml_dtypes.bfloat16
    arrays = {"input": _drawn(3, 128, dtype=bf16), "weight": _drawn(64, 128, dtype=bf16)}
    arrays |= {"out": np.full((3, 64), np.nan, bf16)}
    return Known(fi_ffi.fp8_blockscale_gemm_sm90, arrays, {}, ("out", "workspace_buffer"))


def _algos(name: str) -> Known:
    """Only a GPU has these kernels."""
    fp8, f32 = ml_dtypes.float8_e4m3fn, np.float32
    arrays = {"A": _drawn(2, 16, 32, dtype=fp8), "B": _drawn(2, 32, 16, dtype=fp8)}
    arrays |= {
        "D": np.zeros((2, 16, 16), _F16),
        "A_scale": np.ones(1, f32),
        "B_scale": np.ones(1, f32),
    }
    arrays |= {"algo_buffer": np.zeros(6400, np.uint8)}
    others = {"algo_idx": 0} if name.endswith("algo") else {}
    return Known(getattr(fi_ffi, name), arrays, others, ("D", "algo_buffer"), runs=False,
                 also=(fi_ffi.KernelNotFoundError,))  # fmt: skip


def _groupwise(name: str) -> Known:
    fp8, f32 = ml_dtypes.float8_e4m3fn, np.float32
    b = (2, 128, 128) if name.startswith("group") else (128, 128)
    arrays = {"a": _drawn(128, 128, dtype=fp8), "b": _drawn(*b, dtype=fp8)}
    arrays |= {"a_scale": np.ones((1, 128), f32), "b_scale": np.ones((*b[:-2], 1, 1), f32)}
    arrays |= {"out": np.zeros((128, 128), ml_dtypes.bfloat16)}
    others: dict[str, Any] = {"scale_major_mode": "MN"}
    if name.startswith("group"):
        arrays["m_indptr"] = np.array([0, 64, 128], np.int32)
    return Known(getattr(fi_ffi, name), arrays, others, ("out",), runs=False,
                 also=(fi_ffi.KernelNotFoundError,))  # fmt: skip


def _interleaved(name: str) -> Known:
    if "weights" in name:
        arrays = {"weight": np.zeros((2, 64, 64), np.uint8)}
        arrays["weight_interleaved"] = np.zeros((2, 64, 64), np.uint8)
        return Known(getattr(fi_ffi, name), arrays, {}, ("weight_interleaved",))
    arrays = {"scales": np.zeros((2, 64, 8), np.uint8)}
    arrays["scales_interleaved"] = np.zeros((2, 2, 256), np.uint8)
    return Known(getattr(fi_ffi, name), arrays, {}, ("scales_interleaved",))


def _moe(mode: str) -> Known:
    made = moe_layers.a(mode, biases=mode == "half")
    others = {"quant_scales": made.scales or None, **made.more}
    return Known(fi_ffi.cutlass_fused_moe, made.tensors, others, ("output",),
                 ops=_MOE_OPS, also=(fi_ffi.ArchitectureError,))  # fmt: skip


def _fused_moe() -> Known:
    others = {"activation_dtype": "float16", "device": "cpu"}
    return Known(fi_ffi.FusedMoe, {}, others, runs=False, also=(fi_ffi.LoaderError,))


def _pod() -> Known:
    batch = pod_calls.Batch(
        pod_calls.Spec(lengths=(1, 17), qo_len=3, kv_len=5), np.random.default_rng()
    )
    plan = batch.plan(device="cpu")
    names = [f"{name}_{of}" for name in ("o", "lse") for of in "pd"]
    return Known(plan.run, batch.arrays(1 << 20), {}, ("tmp_p", *names), ops=("PodPlan",))


def _on_host() -> list[Callable[[], Known]]:
    def known(function: Callable[..., Any], also: Any = (), **others: Any) -> Callable[[], Known]:
        return lambda: Known(function, {}, others, also=also)

    def split() -> Known:
        whole = {"paged_kv_cache": _drawn(3, 2, 4, 2, 64)}
        return Known(fi_ffi.split_paged_kv_cache, whole)

    def size(function: Callable[..., Any], **others: int) -> Known:
        others |= {"num_qo_heads": 4, "num_kv_heads": 2}
        return Known(function, {}, others, runs=False, also=_ABSENT)

    return [
        split,
        known(fi_ffi.batch_indices_positions, append_indptr=[0, 2, 3], seq_lens=[4, 1]),
        known(fi_ffi.seq_lens, kv_indptr=[0, 2, 3], kv_last_page_len=[4, 1], page_size=4),
        known(fi_ffi.cu_seqlens, seq_lens=[2, 3]),
        known(fi_ffi.checkpoint_cu_starts, cu_seqlens=[0, 70], checkpoint_every_n_tokens=64),
        known(fi_ffi.packed_indptr, indptr=[0, 9]),
        known(fi_ffi.top_p_renorm_workspace_size, batch_size=2, vocab_size=3),
        known(fi_ffi.fp8_blockscale_gemm_workspace_size, m=2, n=64, k=128),
        known(fi_ffi.alibi_slopes, num_heads=4),
        known(fi_ffi.pack_custom_mask, masks=[np.ones((2, 3), bool)]),
        known(fi_ffi.gdn_prefill_workspace_size, _ABSENT, device="cpu"),
        lambda: size(fi_ffi.single_decode_workspace_size, kv_len=2, head_dim=64),
        lambda: size(fi_ffi.single_prefill_workspace_size, qo_len=2, kv_len=2, head_dim_vo=64),
    ]


MATMUL = [
    _segment_gemm, _tinygemm, _blockscale,
    *(lambda name=name: _algos(name) for name in ("bmm_fp8_get_algos", "bmm_fp8_run_with_algo")),
    *(lambda name=name: _groupwise(name)
      for name in ("gemm_fp8_nt_groupwise", "group_gemm_fp8_nt_groupwise")),
]  # fmt: skip
MOE = [
    *(lambda mode=mode: _moe(mode) for mode in ("half", "fp8", "fp8_block_scale", "mxfp4", "int4")),
    *(lambda of=of: _interleaved(f"interleave_moe_{of}_for_sm90_mixed_gemm")
      for of in ("weights", "scales")),
    _fused_moe,
]  # fmt: skip
SINGLE = [*_singles(), _xqa, _pod]
HOST = _on_host()
