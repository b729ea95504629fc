"""FlashInfer's prebuilt CUDA kernels for programs with device pointers and a stream.

    import fi_ffi
    x = fi_ffi.TensorDesc(ptr, (tokens, hidden), "bfloat16", device="cuda:0")
    fi_ffi.rmsnorm(out, x, weight, eps=1e-6, stream=stream)

Tensors are `TensorDesc`s or anything with a tensor protocol; on `device="cpu"`
the same calls run numpy reference kernels.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.library import import_whole
from fi_ffi.abi.signature import Signature, parse_signature
from fi_ffi.abi.streams import stream
from fi_ffi.abi.tensor import DTYPES, Device, DType, TensorDesc, parse_device
from fi_ffi.errors import (
    AbiError,
    ArchitectureError,
    ArgumentError,
    ArgumentTypeError,
    ArtifactError,
    BuildError,
    DeviceError,
    FetchError,
    FiFfiError,
    HangError,
    KernelError,
    KernelNotFoundError,
    LoaderError,
)
from fi_ffi.loader import services
from fi_ffi.ops.call import support
from fi_ffi.ops.functions import *  # noqa: F403
from fi_ffi.ops.functions import OPS

if TYPE_CHECKING:
    from fi_ffi.graphs import Graph as Graph
    from fi_ffi.graphs import capture as capture
    from fi_ffi.modules import function as function
    from fi_ffi.modules import functions as functions
    from fi_ffi.modules import object_type as object_type
    from fi_ffi.modules import object_types as object_types
    from fi_ffi.modules.files import file_signatures as file_signatures
    from fi_ffi.modules.module import module as module
    from fi_ffi.ops.attention import *  # noqa: F403
    from fi_ffi.ops.matmul import *  # noqa: F403
    from fi_ffi.ops.moe import *  # noqa: F403
    from fi_ffi.ops.on_host import batch_indices_positions as batch_indices_positions
    from fi_ffi.ops.on_host import checkpoint_cu_starts as checkpoint_cu_starts
    from fi_ffi.ops.on_host import cu_seqlens as cu_seqlens
    from fi_ffi.ops.on_host import (
        fused_topk_topp_workspace_size as fused_topk_topp_workspace_size,
    )
    from fi_ffi.ops.on_host import gdn_prefill_workspace_size as gdn_prefill_workspace_size
    from fi_ffi.ops.on_host import packed_indptr as packed_indptr
    from fi_ffi.ops.on_host import seq_lens as seq_lens
    from fi_ffi.ops.on_host import split_paged_kv_cache as split_paged_kv_cache
    from fi_ffi.ops.on_host import top_p_renorm_workspace_size as top_p_renorm_workspace_size
    from fi_ffi.ops.philox import Philox as Philox
    from fi_ffi.ops.plans import *  # noqa: F403
    from fi_ffi.ops.prepare import prepare as prepare
    from fi_ffi.ops.states.gdn import gdn_decode as gdn_decode
    from fi_ffi.ops.states.kda import recurrent_kda as recurrent_kda
    from fi_ffi.ops.states.mamba import selective_state_update as selective_state_update
    from fi_ffi.watch.call_log import call_log as call_log
    from fi_ffi.watch.watchdog import watchdog as watchdog

__version__ = "0.1.0"

# Names imported on first use, and the modules that define them.
_ATTENTION = (
    "BatchDecodePlan",
    "BatchMlaPlan",
    "BatchPrefillPlan",
    "Workspace",
    "WorkspaceSize",
)
_PLANS = (
    "BatchAttentionPlan",
    "BatchPodPlan",
    "BlockSparseAttentionPlan",
    "MultiLevelCascadePlan",
    "PodPlan",
    "SharedPrefixPlan",
    "VariableBlockSparseAttentionPlan",
    "alibi_slopes",
    "pack_block_mask",
    "pack_custom_mask",
    "single_decode",
    "single_decode_workspace_size",
    "single_prefill",
    "single_prefill_workspace_size",
    "xqa",
    "xqa_mla",
)
_MOE = (
    "FusedMoe",
    "bgmv_moe",
    "cutlass_fused_moe",
    "interleave_moe_scales_for_sm90_mixed_gemm",
    "interleave_moe_weights_for_sm90_mixed_gemm",
    "set_deepgemm_jit_include_dirs",
)
_MATMUL = (
    "bmm_fp8_get_algos",
    "bmm_fp8_run_with_algo",
    "fp8_blockscale_gemm_sm90",
    "fp8_blockscale_gemm_workspace_size",
    "gemm_fp8_nt_groupwise",
    "group_gemm_fp8_nt_groupwise",
    "segment_gemm",
    "tinygemm_bf16",
)
_ON_HOST = (
    "batch_indices_positions",
    "checkpoint_cu_starts",
    "cu_seqlens",
    "fused_topk_topp_workspace_size",
    "gdn_prefill_workspace_size",
    "packed_indptr",
    "seq_lens",
    "split_paged_kv_cache",
    "top_p_renorm_workspace_size",
)
_LATER = {
    **dict.fromkeys(_ATTENTION, "fi_ffi.ops.attention"),
    **dict.fromkeys(_PLANS, "fi_ffi.ops.plans"),
    **dict.fromkeys(_MOE, "fi_ffi.ops.moe"),
    **dict.fromkeys(_MATMUL, "fi_ffi.ops.matmul"),
    **dict.fromkeys(_ON_HOST, "fi_ffi.ops.on_host"),
    "Graph": "fi_ffi.graphs",
    "Philox": "fi_ffi.ops.philox",
    "call_log": "fi_ffi.watch.call_log",
    "capture": "fi_ffi.graphs",
    "file_signatures": "fi_ffi.modules.files",
    "function": "fi_ffi.modules",
    "functions": "fi_ffi.modules",
    "gdn_decode": "fi_ffi.ops.states.gdn",
    "module": "fi_ffi.modules",
    "object_type": "fi_ffi.modules",
    "object_types": "fi_ffi.modules",
    "prepare": "fi_ffi.ops.prepare",
    "recurrent_kda": "fi_ffi.ops.states.kda",
    "selective_state_update": "fi_ffi.ops.states.mamba",
    "watchdog": "fi_ffi.watch.watchdog",
}
# Subpackages that are imported by their names.
_ROOMS = (
    "capability",
    "catalogue",
    "cli",
    "comm",
    "families",
    "loader",
    "modules",
    "reference",
    "watch",
)


def _later(name: str) -> object:
    if name not in _LATER:
        text = f"module {__name__!r} has no attribute {name!r}"
        # Python itself asks for names such as __path__, and for subpackages before it imports them.
        if not name.startswith("_") and name not in _ROOMS:
            api_map = _optional("fi_ffi.catalogue.api_map")
            text += api_map.hint(name, __all__) if api_map else ""
        # With `name` and `obj`, Python's traceback suggests the nearest name.
        raise AttributeError(text, name=name, obj=sys.modules[__name__])
    module = import_whole(_LATER[name])
    for known, where in _LATER.items():
        if where == _LATER[name]:
            globals()[known] = getattr(module, known)
    return globals()[name]


if not TYPE_CHECKING:  # a type checker would accept any misspelt name otherwise
    __getattr__ = _later


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def _optional(name: str) -> Any:
    """Import a module above the core; None in a copy without its package."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (name, name.rpartition(".")[0]):
            raise
        return None


def _service(module: str, name: str = "") -> Callable[[], Any]:
    """Return what loads a service of the core: a module above it, or a name of one."""

    def load() -> Any:
        found = _optional(module)
        return getattr(found, name) if found and name else found

    return load


support.judge.fill(_service("fi_ffi.capability.answer", "judge_asked"))
support.docstring.fill(_service("fi_ffi.catalogue.docs", "docstring"))
services.adviser.fill(_service("fi_ffi.catalogue.advice"))
services.published.fill(_service("fi_ffi.loader.fetch.pinned_wheels", "published"))
services.libraries.fill(_service("fi_ffi.loader.fetch.published", "places_of"))
services.device_code.fill(_service("fi_ffi.loader.fetch.cubins", "serve"))
_optional("fi_ffi.export")  # by which other libraries read a TensorDesc


def use_kernels(location: str | os.PathLike[str]) -> None:
    """Take FlashInfer's kernels from `location` from now on, and from nowhere else.

    `location` is a `flashinfer_jit_cache` wheel, or a directory in the jit-cache layout
    (`<module>/<module>.so`, or an installed `flashinfer_jit_cache`).  `FI_FFI_KERNELS` does the
    same for the whole process.  A library of another distribution comes from `location` if it has
    one of that name, and otherwise from the installed or pinned distribution.

    Raises `KernelNotFoundError` if nothing is there, and `ArtifactError` if the file is not such a
    wheel.
    """
    from fi_ffi.loader import runtime

    runtime.use_source(location)


if os.environ.get("FI_FFI_LOG_LEVEL", "0") not in ("", "0") or os.environ.get("FI_FFI_DUMP_DIR"):
    importlib.import_module("fi_ffi.watch.call_log").open_by_environment()

__all__ = [
    "DTYPES",
    "AbiError",
    "ArchitectureError",
    "ArgumentError",
    "ArgumentTypeError",
    "ArtifactError",
    "BuildError",
    "DType",
    "Device",
    "DeviceError",
    "FetchError",
    "FiFfiError",
    "HangError",
    "KernelError",
    "KernelNotFoundError",
    "LoaderError",
    "Signature",
    "TensorDesc",
    "as_desc",
    "parse_device",
    "parse_signature",
    "stream",
    "use_kernels",
    *OPS,
    *_LATER,
]
