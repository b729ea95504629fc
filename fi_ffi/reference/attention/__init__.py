"""FlashInfer's attention entries in numpy.

Their names are those of `fi_ffi.ops.attention.rows`: the symbol, and a suffix if it has several
interfaces.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from fi_ffi.reference.attention import fp4, plan, runs, variant
from fi_ffi.reference.attention.variant import Compiled

_Kernels = dict[str, Callable[..., Any]]


def _batch(suffix: str, kind: int, parse: Callable[..., variant.Variant]) -> _Kernels:
    return {
        f"plan{suffix}": functools.partial(plan.prefill, kind),
        f"ragged_run{suffix}": functools.partial(runs.ragged_run, kind, parse),
        f"paged_run{suffix}": functools.partial(runs.paged_run, kind, parse),
    }


# The kernels take what a module was compiled for as `compiled`: see `reference_kernel`.
KERNELS: dict[str, _Kernels] = {
    "single_decode": {"run": runs.single_decode},
    "single_prefill": {
        "run": functools.partial(runs.single_prefill, variant.fa2_single),
        "run_fa3": functools.partial(runs.single_prefill, variant.fa3_single),
        "run_fa3_fp8": functools.partial(runs.single_prefill, variant.fa3_fp8),
        "run_fp4": fp4.single_prefill,
    },
    "batch_attention": {
        "plan": plan.attention,
        "run": runs.attention_run,
        "run_fp4": fp4.attention_run,
    },
    "batch_decode": {"plan": plan.decode, "run": runs.batch_decode},
    "batch_prefill": {
        **_batch("", plan.FA2, variant.fa2),
        **_batch("_fa3", plan.FA3, variant.fa3),
        **_batch("_fa3_fp8", plan.FA3, variant.fa3_fp8),
        "ragged_run_fp4": fp4.ragged_run,
        "paged_run_fp4": fp4.paged_run,
    },
    "batch_prefill_with_attention_sink": {
        **_batch("_sink", plan.FA2, variant.sink_fa2),
        **_batch("_sink_fa3", plan.FA3, variant.sink_fa3),
    },
    "batch_mla": {
        **dict.fromkeys(("plan", "plan_fa3"), plan.mla),
        **dict.fromkeys(("run", "run_fa3"), runs.mla_run),
        **dict.fromkeys(("run_fa2_fp8", "run_fa3_fp8"), runs.mla_run_fp8),
    },
    "xqa": dict.fromkeys(("xqa_wrapper", "xqa_wrapper_spec_dec"), runs.xqa_wrapper),
    "xqa_mla": {"xqa_wrapper_mla": runs.xqa_wrapper_mla},
    "batch_pod": {"batch_pod_with_kv_cache_tensor": runs.batch_pod_with_kv_cache_tensor},
    "pod": {"pod_with_kv_cache_tensor": runs.pod_with_kv_cache_tensor},
}


def reference_kernel(family: str, name: str, **compiled: Any) -> Callable[..., Any]:
    """Return a family's kernel as in a module that was compiled for `compiled`.

    The keys are those of module names: `pos_encoding_mode` (0 none, 1 Llama's RoPE, 2 ALiBi),
    `use_sliding_window` and `use_logits_soft_cap`.
    """
    kernel, values = KERNELS[family][name], Compiled(**compiled)

    def call(*args: Any) -> Any:
        found = kernel(*args, compiled=values)
        if not isinstance(found, runs.Writes):
            return found  # a plan
        for write in found:
            write()
        return None

    return call
