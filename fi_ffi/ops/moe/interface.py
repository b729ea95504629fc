"""The functions of `fused_moe_90` in each FlashInfer release, and the methods of what `init` makes.

Blackwell's modules are the same sources compiled for other GPUs. The binding is
`csrc/fused_moe/cutlass_backend/flashinfer_cutlass_fused_moe_binding.cu`: `init` makes an object
whose methods are the kernels. `tests/releases/test_moe.py` compares every interface with the
sources; a binary's own signatures are compared when it is loaded.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fi_ffi.abi.signature import Signature
from fi_ffi.errors import KernelNotFoundError
from fi_ffi.ops.call import releases
from fi_ffi.ops.call.row import Absent

MODULE = "fused_moe_90"
# The modules of other GPUs, by compute capability.
MODULES = {
    (10, 0): "fused_moe_100",
    (10, 3): "fused_moe_103",
    (11, 0): "fused_moe_100",
    (12, 0): "fused_moe_120",
    (12, 1): "fused_moe_120",
}
SOURCE = "csrc/fused_moe/cutlass_backend/flashinfer_cutlass_fused_moe_binding.cu"
# Parameters that callers of these kernels cannot choose.
_DEFAULTS = {"use_fused_finalize": 1, "swizzled_input_sf": 1, "cluster_size": 1}

_TYPES = {
    "dtype": "DataType",
    "tensor": "DLTensor*",
    "tensor?": "Optional<DLTensor*>",
    "tensors?": "Optional<Array<ffi.Tensor>>",
    "ints?": "Optional<Array<int>>",
}


@dataclass(frozen=True)
class NamedSignature:
    """A function or method: its signature, and the names of its parameters."""

    signature: Signature
    names: tuple[str, ...]

    def values(self, arguments: dict[str, Any]) -> list[Any]:
        """Return the arguments in order, from values by name."""
        named = zip(self.names, self.signature.params, strict=True)
        values = ((arguments.get(name, _DEFAULTS.get(name, 0)), kind) for name, kind in named)
        return [bool(value) if kind == "bool" else value for value, kind in values]

    def absent(self, name: str) -> Absent:
        """Make a parameter that the op lacks."""
        kind = self.signature.params[self.names.index(name)]
        return Absent(name, kind, _DEFAULTS.get(name, 0))

    @classmethod
    def read(cls, name: str, text: str, result: str = "void") -> NamedSignature:
        """Parse text such as "tensor output, int tp_size tp_rank"."""
        pairs = [pair for part in text.split(",") for pair in _named(part)]
        types = tuple(_TYPES.get(kind, kind) for kind, _ in pairs)
        return cls(Signature(name, types, result), tuple(name for _, name in pairs))


def _named(part: str) -> Iterator[tuple[str, str]]:
    words = part.split()
    return ((words[0], name) for name in words[1:])


@dataclass(frozen=True, eq=False)
class Interface:
    """The interface of a range of releases."""

    releases: str
    init: NamedSignature
    methods: dict[str, NamedSignature]
    # Whether GEMM2's tactics in `profile_ids` are numbered after GEMM1's; otherwise from 0.
    absolute_ids: bool
    name: str = MODULE


_INIT = """dtype activation_dtype weight_dtype output_dtype, bool use_deepseek_fp8_block_scale
    use_w4_group_scaling use_mxfp8_act_scaling use_packed_weights"""
# The flags of `init` that select a quantisation.
FLAGS = NamedSignature.read("init", _INIT).names[3:]
_FUSED_FINALIZE = _INIT + " use_fused_finalize"
_HUMMING = _FUSED_FINALIZE + " use_wfp4afp8_humming"

_RUN = """tensor output input token_selected_experts, tensor? token_final_scales,
    tensor fc1_expert_weights, tensor? fc1_expert_biases, tensor fc2_expert_weights,
    tensor? fc2_expert_biases, tensors? quant_scales, tensor? input_sf swiglu_alpha swiglu_beta
    swiglu_limit SITU, bool swizzled_input_sf, int tp_size tp_rank ep_size ep_rank cluster_size
    cluster_rank, bool enable_alltoall min_latency_mode, ints? profile_ids, bool enable_pdl,
    int base_activation_type, tensor? workspace_buffer"""
_SITU = "clamped_relu2_limit situ_beta situ_linear_beta"

_PROFILE = """tensor input fc1_expert_weights, tensor? fc1_expert_biases,
    tensor fc2_expert_weights, tensor? fc2_expert_biases, int top_k tp_size tp_rank ep_size
    ep_rank cluster_size cluster_rank, bool enable_alltoall min_latency_mode,
    int gemm_idx profile_id, bool do_preparation enable_pdl, int activation_type"""
_SIZE = """int num_rows hidden_size inter_size num_experts_total experts_per_token tp_size tp_rank
    ep_size ep_rank, bool min_latency_mode, int base_activation_type"""

_COUNTS = ("get_gemm1_tactic_count", "get_gemm2_tactic_count")
_OCCUPANCY = {"get_tactic_occupancy": ("int tactic_id", "int")}
_WORKSPACE = _OCCUPANCY | {"get_workspace_size": (_SIZE, "int")}
_FOR_SHAPE = "get_valid_tactics_for_shape"
_SHAPES = _WORKSPACE | {_FOR_SHAPE: ("int stage gemm_n gemm_k", "Array<int>")}


def _interface(
    releases: str,
    init: str,
    lacking: str,
    more: dict[str, tuple[str, str]],
    absolute_ids: bool = False,
) -> Interface:
    """Make an interface; `lacking` names the parameters of `_RUN` that these releases lack."""
    run = re.sub(r"\bSITU\b", _SITU, _RUN)
    for name in lacking.split():
        run = re.sub(rf"\b{name}\b", "", run)
    signatures = {"run_moe": (run, "void"), "run_gemm_profile": (_PROFILE, "void")}
    signatures |= dict.fromkeys(_COUNTS, ("", "int")) | more
    methods = {name: NamedSignature.read(name, *about) for name, about in signatures.items()}
    return Interface(
        releases, NamedSignature.read("init", init, "ffi.Module"), methods, absolute_ids
    )


_NEITHER = f"{_SITU} workspace_buffer"

# The default release's first.
INTERFACES = (
    _interface(">=0.6.9,<0.6.15", _INIT, _NEITHER, _OCCUPANCY),
    _interface(">=0.6.8,<0.6.9", _INIT, _NEITHER, {}),
    _interface(">=0.6.3,<0.6.8", _INIT, f"{_NEITHER} swizzled_input_sf", {}),
    _interface(">=0.6.15,<0.6.16", _FUSED_FINALIZE, _NEITHER, _OCCUPANCY, True),
    _interface(">=0.6.16,<0.6.16.post3", _HUMMING, _SITU, _SHAPES, True),
    _interface(">=0.6.16.post3,<0.6.18", _FUSED_FINALIZE, _SITU, _WORKSPACE, True),
    _interface(">=0.6.18,<0.7", _HUMMING, _SITU, _SHAPES, True),
    _interface(">=0.7,<0.7.2", _HUMMING, "clamped_relu2_limit", _SHAPES, True),
    _interface(">=0.7.2", _HUMMING, "", _SHAPES, True),
)

# Releases that interleave the scales of 4-bit weights in a row, and releases that fold the scales
# of 64 rows and 128 columns into a block. The order of MXFP4 weights differs as well.
W4_RELEASES = ">=0.6.10,!=0.6.16,!=0.6.16.post1,!=0.6.16.post2,<0.6.18"
FOLDED_RELEASES = ">=0.6.16,!=0.6.16.post3,!=0.6.16.post4,!=0.6.17.*"
INTERLEAVE = NamedSignature.read(
    "interleave_moe_weights_for_sm90_mixed_gemm", "tensor weight weight_interleaved, int quant_type"
)
SET_INCLUDE_DIRS = NamedSignature(
    Signature("set_deepgemm_jit_include_dirs", ("Array<str>",)), ("include_dirs",)
)


@functools.cache
def of_release(release: str | None) -> Interface:
    """Return the interface of a release; the default release's if the release is unknown (None)."""
    interface = INTERFACES[0] if release is None else releases.of_release(INTERFACES, release)
    if interface is None:
        known = "; ".join(one.releases for one in INTERFACES)
        raise KernelNotFoundError(
            f"{MODULE} of FlashInfer {release} has an unknown interface; {known} are supported"
        )
    return interface
