"""All-reduce across ranks: the entries of FlashInfer's `vllm_comm`, `trtllm_comm`, `pcie_ipc_comm`
and `pcie_ipc_ag_rs`.

Every rank calls an entry at the same time, with memory that the ranks see of each other;
`fi_ffi.comm.Group` makes the memory and calls the entries. The rows refuse what the kernels accept
and get wrong (`include/flashinfer/comm/{vllm_custom_all_reduce,trtllm_allreduce_fusion,
trtllm_moe_allreduce_fusion}.cuh`): messages that are not whole vectors of 16 bytes, missing or
useless tensors for a pattern, scales in an order that no kernel writes, sizes that exceed 32-bit
counters, and 4-bit floats on GPUs whose kernels do not quantise to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fi_ffi.abi.signature import Signature
from fi_ffi.ops.call.arguments import INT32_MAX
from fi_ffi.ops.call.releases import forms_of
from fi_ffi.ops.call.row import Absent, Arg, Row, Rule, Scalar, Tensor, Vector

_F16 = ("float16", "bfloat16")
_FLOATS = ("float32", *_F16)
_ANY: dict[str, Any] = {"offset_limit": 2**63, "vector": Vector(())}
_IN: dict[str, Any] = {"contiguous": True, "alignment": 16, "in_vectors": False}
_OUT: dict[str, Any] = {"writes": True, "reads": False, **_IN}
MAX_CTAS = 36

# FlashInfer's `AllReduceFusionPattern`: the patterns of each op, and those that write the norm.
PATTERNS: Mapping[str, tuple[int, ...]] = {
    "": (0, 1, 2, 4),
    "_fp4": (3, 5),
    "_block_fp8": (8, 9),
    "_dynamic_fp8": (10, 11),
}
_TOKENS, _NO_TENSOR = "token_num hidden_size", "Optional<DLTensor*>"
_RANKS = (2, 4, 8, 16)
# FlashInfer lists the module with those for SM100; its kernels run on SM90 as well.
_GPUS: dict[str, Any] = {"capabilities": (9, 10)}


def _whole_vectors(argument: str, size: str) -> Rule:
    return Rule(argument, f"{size} % (4 if T == 'float32' else 8) == 0", "a multiple of 16 bytes")


def _size(name: str) -> Scalar:
    return Scalar(name, int, None, "same as in the tensors", low=0, size_of=name)


_WORLD_SIZE = Scalar("world_size", int, None, "number of ranks", low=2, high=16)
_WORLD_RANK = Scalar("world_rank", int, None, "this rank", low=0, high=15)
_WORKSPACE = Tensor(
    "workspace_ptrs",
    "pointers",
    "int64",
    "addresses of all ranks' buffers, flags and Lamport buffers, then of this rank's five numbers",
    contiguous=True,
    no_index="addresses",
)
_PDL_DOC = "programmatic dependent launch: start while the previous kernel finishes"
_PDL = Scalar("launch_with_pdl", bool, False, _PDL_DOC)
_EPS = Scalar("rms_eps", float, 1e-6, "added to the mean square before the root", low=0.0)
_BIAS_DOC = "added to each scale of the norm; 1.0 for Gemma"
_BIAS = Scalar("weight_bias", float, 0.0, _BIAS_DOC, entry_optional=True, since="0.6.12")
_RESIDUAL_IN = Tensor("residual_in", _TOKENS, "T", "added to the sum", **_IN)
_RESIDUAL_OUT = Tensor("residual_out", _TOKENS, "T", "both together", **_OUT)
_NORM_OUT = Tensor("norm_out", _TOKENS, "T", "that RMS-normalised", **_OUT)
_GAMMA = Tensor("rms_gamma", "hidden_size", "T", "scales of the norm", **_IN)
_QUANT_OUT = Tensor("quant_out", _TOKENS, "Q", "the norm quantised", **_OUT)


def _optional(arg: Tensor) -> Tensor:
    return replace(arg, optional=True)


def _required(arg: Tensor) -> Tensor:
    """Require a tensor that the entry takes as optional, or whose absence it does not check."""
    return replace(arg, entry_optional=True)


def _ranks(workspace: str) -> tuple[Rule, ...]:
    return (
        Rule("world_size", f"world_size in {_RANKS}", "2, 4, 8 or 16"),
        Rule("world_rank", "world_rank < world_size", "less than world_size"),
        Rule(workspace, "pointers == 3 * world_size + 1", "3 * world_size + 1 pointers"),
    )


_SCALE_FACTOR_DOC = "value of the norm that is 1.0 in `quant_out`"
_ARGS: tuple[Arg, ...] = (
    Tensor("allreduce_in", _TOKENS, "T", "this rank's addends", **_IN),
    _WORLD_SIZE,
    _WORLD_RANK,
    _size("token_num"),
    _size("hidden_size"),
    _WORKSPACE,
    replace(_PDL, doc=f"{_PDL.doc}, which up to 0.7.0 may not be what writes `residual_in`"),
    Scalar(
        "use_oneshot",
        bool,
        True,
        "True: every rank adds up everything, through the Lamport buffers; False: each rank "
        "adds up its own tokens",
    ),
    Scalar(
        "trigger_completion_at_end",
        bool,
        True,
        "let the next kernel start only when this one ends",
    ),
    Scalar("fp32_acc", bool, True, "add in float32 and round once"),
    Scalar("pattern_code", int, None, "FlashInfer's AllReduceFusionPattern", low=0),
    _optional(Tensor("allreduce_out", _TOKENS, "T", "the sum", **_OUT)),
    *map(_optional, (_RESIDUAL_IN, _RESIDUAL_OUT, _NORM_OUT, _QUANT_OUT)),
    Absent("scale_out", _NO_TENSOR),
    _optional(_GAMMA),
    replace(_EPS, entry_optional=True),
    Tensor("scale_factor", "1", "float32", _SCALE_FACTOR_DOC, optional=True),
    Absent("layout_code", "Optional<int>"),
    Absent("block_quant_group_size", "Optional<int>", since="0.6.11"),
    _BIAS,
)
_QUANTISED: tuple[Arg, ...] = (
    Absent("allreduce_out", _NO_TENSOR),
    *map(_required, (_RESIDUAL_IN, _RESIDUAL_OUT, _QUANT_OUT, _GAMMA)),
    Absent("scale_factor", _NO_TENSOR),
)
_FP8: dict[str, Any] = {"dtypes": {"T": _FLOATS, "Q": ("float8_e4m3fn",)}}


def _given_with(name: str, *patterns: int) -> Rule:
    """Require a tensor with these patterns, and None with others."""
    codes = " or ".join(map(str, patterns))
    condition = f"{name} == (pattern_code in {patterns})"
    return Rule(name, condition, f"one with pattern_code {codes}, and None with another")


def _scale_out(dtype: str, doc: str) -> Tensor:
    return Tensor(
        "scale_out",
        "scales",
        dtype,
        doc,
        writes=True,
        contiguous=True,
        entry_optional=True,
        no_index="written",
    )


def _fusion_rules(patterns: tuple[int, ...]) -> tuple[Rule, ...]:
    """Return the rules of every pattern."""
    return (
        *_ranks("workspace_ptrs"),
        _whole_vectors("hidden_size", "hidden_size"),
        # Threads shuffle in whole warps. On the CPU multiprocessors are unlimited.
        Rule(
            "hidden_size",
            "pattern_code == 0 or multiprocessors > 2**31 or "
            "hidden_size >= (128 if T == 'float32' else 256)",
            "at least 512 bytes, 16 for each thread of a warp",
            until="0.6.15",
        ),
        Rule("pattern_code", f"pattern_code in {patterns}", f"one of {patterns}"),
        Rule(
            "token_num",
            f"(world_size if use_oneshot else 2) * token_num * hidden_size <= {INT32_MAX}",
            f"{INT32_MAX} elements of all ranks, or less: the kernels count them in 32 bits",
        ),
        Rule(
            "use_oneshot",
            "use_oneshot or token_num > world_size or token_num == 0",
            "True for no more tokens than ranks",
        ),
    )


def _fusion(
    kind: str, releases: str, doc: str, *rules: Rule, of: Sequence[Arg] = (), **fields: Any
) -> tuple[Row, ...]:
    """Make an op for some patterns, with its own arguments in place of those of the first."""
    own = {arg.name: arg for arg in of}
    # A thread reads its elements of both tensors before it writes the same elements.
    outs = ("residual_out", "norm_out") if kind else ("allreduce_out", "residual_out", "norm_out")
    row = Row(
        f"trtllm_allreduce_fusion{kind}",
        "trtllm_comm",
        "trtllm_allreduce_fusion",
        "csrc/trtllm_allreduce_fusion.cu",
        doc,
        tuple(own.get(arg.name, arg) for arg in _ARGS),
        releases=releases,
        nothing_axis="token_num",
        requires=(*_fusion_rules(PATTERNS[kind]), *rules),
        in_place=tuple((out, inp) for out in outs for inp in ("allreduce_in", "residual_in")),
        **{**_ANY, **_GPUS, **fields},
    )
    return forms_of(row)


_MOE: dict[str, Any] = {
    "module": "trtllm_comm",
    "source": "csrc/trtllm_moe_allreduce_fusion.cu",
    "dtypes": {"T": _F16},
    "releases": ">=0.6.3",
    "nothing_axis": "token_num",
    "in_place": (("residual_out", "residual_in"), ("norm_out", "residual_in")),
    **_ANY,
    **_GPUS,
}
# A cluster's threads are whole warps: surplus threads would take the next token's elements.
_WHOLE_WARPS = Rule(
    "rms_gamma", "hidden_size % 256 == 0", "a multiple of 256 elements, whole warps"
)
_COUNTED = Rule(
    "residual_in",
    f"world_size * token_num * hidden_size <= {INT32_MAX}",
    f"{INT32_MAX} elements of all ranks, or less: the kernels count them in 32 bits",
)
_HANDLE = Scalar("handle", int, None, "the result of its `init`", low=1)
_ALGORITHM_DOC = (
    "FlashInfer's number of a variant for a topology: flashinfer/comm/pcie_ipc_policy.py"
)


def _launch_sizes(
    max_blocks: int, threads: tuple[int, int, int], variants: int
) -> tuple[Scalar, ...]:
    least, most, step = threads
    return (
        Scalar("blocks", int, None, "thread blocks, or pieces of a ring", low=1, high=max_blocks),
        Scalar("threads", int, None, "threads in a block", low=least, high=most, multiple_of=step),
        Scalar("algorithm", int, None, _ALGORITHM_DOC, low=0, high=variants - 1),
    )


def _over_pcie(name: str, doc: str, inp: str, out: str, *more: Arg) -> Row:
    is_whole = inp == out
    module, dtypes, releases = (
        ("pcie_ipc_comm", _F16, ">=0.7.0") if is_whole else ("pcie_ipc_ag_rs", _FLOATS, ">=0.7.1")
    )
    rules = [_whole_vectors("inp" if inp == "n" else "out", "n")]
    if not is_whole:
        expected = "2, 4 or 8 times as many elements: a shard of each rank"
        condition = "m in (2 * n, 4 * n, 8 * n)"
        rules.append(Rule("out" if out == "m" else "inp", condition, expected))
    return Row(
        name,
        module,
        name,
        f"csrc/{name}.cu",
        f"{doc} Works over PCIe, through memory that all ranks see. "
        f"`{name.removesuffix('_all_reduce')}_init` zeroes this rank's memory: synchronise the "
        "ranks between it and the first call.",
        (
            _HANDLE,
            Tensor("inp", inp, "T", "this rank's elements", **_IN),
            Tensor("out", out, "T", "what is made of all ranks'", **_OUT),
            *more,
        ),
        {"T": dtypes},
        releases,
        requires=tuple(rules),
        nothing_axis="n",
        **_ANY,
    )


_FOLLOWED = "add a residual and RMS-normalise the result"
_SHARDED = (64, (32, 512, 32))

OPS: tuple[Row, ...] = (
    Row(
        "all_reduce", "vllm_comm", "all_reduce", "csrc/vllm_custom_all_reduce.cu",
        "Add up the tensors of all ranks, in float32, and round once. Every rank gets the same "
        "bits.",
        (
            Scalar("fa", int, None, "what `init_custom_ar` returned", low=1),
            Tensor("inp", "n", "T", "this rank's addend", **_IN),
            Tensor("out", "n", "T", "the sum", **_OUT),
            Scalar("reg_buffer", int, None,
                   "address of a registered buffer for a copy of `inp`; 0 if `inp` is registered "
                   "itself", low=0),
            Scalar("reg_buffer_sz_bytes", int, None, "size of the buffer in bytes", low=0),
            Scalar("num_ctas", int, MAX_CTAS, "limit of thread blocks", low=1, high=MAX_CTAS),
        ),
        {"T": _FLOATS}, ">=0.6.3",
        in_place=(("out", "inp"),),
        requires=(
            f"n <= {INT32_MAX}",
            _whole_vectors("inp", "n"),
            Rule("reg_buffer_sz_bytes",
                 "reg_buffer == 0 or n * (4 if T == 'float32' else 2) <= reg_buffer_sz_bytes",
                 "the bytes of `inp`, or more"),
            Rule("out", "reg_buffer > 0 or not in_place",
                 "other memory than `inp`, which peers still read"),
        ),
        **_ANY,
    ),
    # Fused with the next op.
    *_fusion(
        "", ">=0.6.3",
        f"Add up the tensors of all ranks (pattern_code=0). Or {_FOLLOWED}, unquantised (1), in "
        "float8 (2), or both (4).",
        _given_with("allreduce_out", 0), _given_with("residual_in", 1, 2, 4),
        _given_with("residual_out", 1, 2, 4), _given_with("rms_gamma", 1, 2, 4),
        _given_with("norm_out", 1, 4),
        _given_with("quant_out", 2, 4), _given_with("scale_factor", 2, 4),
        **_FP8,
    ),
    *_fusion(
        "_fp4", ">=0.6.3",
        f"Add up the tensors of all ranks, {_FOLLOWED}: in FP4 with a scale for each block "
        "(pattern_code=3), or also unquantised (5).",
        _given_with("norm_out", 5),
        Rule("hidden_size", "hidden_size % 16 == 0", "whole blocks of 16 elements"),
        Rule("quant_out", "half_size * 2 == hidden_size", "half as many bytes as elements"),
        Rule("layout_code", "layout_code in (0, 2)",
             "0 (tiles of 128 x 4) or 2 (rows), the orders that kernels write"),
        Rule("scale_out", "scales >= (token_num * hidden_size // 16 if layout_code == 2 else "
             "round_up(token_num, 128) * round_up(hidden_size // 16, 4))",
             "a byte for every 16 elements, in whole tiles of 128 x 4 for layout_code=0"),
        of=(
            *_QUANTISED,
            _required(replace(_QUANT_OUT, axes="token_num half_size", dtype="uint8",
                            doc="the norm, two elements in a byte")),
            _scale_out("uint8", "a float8_e4m3fn scale for every 16 elements"),
            _required(Tensor("scale_factor", "1", "float32",
                           "factor of the norm before the scales of blocks")),
            Scalar("layout_code", int, 0, "order of the scales: 0 for tiles of 128 x 4, 2 for rows",
                   entry_optional=True),
        ),
        dtypes={"T": _F16}, capabilities=(10,),
        elsewhere="on other GPUs the kernels write zeros for FP4",
    ),
    *_fusion(
        "_block_fp8", ">=0.6.11",
        f"Add up the tensors of all ranks, {_FOLLOWED}: in float8 with a power of 2 for each group "
        "(pattern_code=8), or also unquantised (9).",
        _given_with("norm_out", 9),
        Rule("block_quant_group_size", "hidden_size % block_quant_group_size == 0",
             "a size that hidden_size is a multiple of"),
        Rule("scale_out", "scales >= token_num + (ceil_div(hidden_size, 4 * "
             "block_quant_group_size) - 1) * round_up(token_num, 4)",
             "a number for every token and four groups, in columns whose length is a multiple of "
             "4"),
        of=(
            *_QUANTISED,
            _scale_out("int32", "exponents of four groups in each number; a column has the tokens"),
            Scalar("block_quant_group_size", int, 128, "elements in a group", low=1,
                   entry_optional=True, since="0.6.11"),
        ),
        **_FP8,
    ),
    *_fusion(
        "_dynamic_fp8", ">=0.6.15",
        f"Add up the tensors of all ranks, {_FOLLOWED}: in float8 scaled by each token's largest "
        "element (pattern_code=10), or also unquantised (11).",
        _given_with("norm_out", 11),
        Rule("scale_out", "scales >= token_num", "a scale for each token"),
        of=(*_QUANTISED, _scale_out("float32", "the divisor of each token")),
        **_FP8,
    ),
    # Fused with experts.
    *forms_of(Row(
        "trtllm_moe_allreduce_fusion", symbol="trtllm_moe_allreduce_fusion",
        doc="Add up the scaled results of all ranks' experts, the other inputs of the tokens and a "
            "residual; then apply the RMS norm.",
        args=(
            _WORLD_SIZE, _WORLD_RANK, _size("token_num"), _size("hidden_size"), _WORKSPACE, _PDL,
            _RESIDUAL_IN, _GAMMA, _EPS,
            Absent("scale_factor", "float"),  # of 4-bit floats
            Scalar("moe_reduction_device_num_experts", int, None,
                   "number of this rank's experts", low=0, size_of="experts"),
            Tensor("moe_reduction_scale_input", "experts token_num", "float32",
                   "factor of each expert's results", contiguous=True),
            Tensor("moe_reduction_active_experts_token_input", f"experts {_TOKENS}", "T",
                   "the experts' results", **_IN),
            Tensor("moe_reduction_token_input", _TOKENS, "T", "added to them", **_IN),
            Absent("layout_code", "Optional<int>"),
            _optional(Tensor("moe_allreduce_out", _TOKENS, "T", "the sum", **_OUT)),
            _optional(_RESIDUAL_OUT), _required(_NORM_OUT),
            Absent("quant_out", _NO_TENSOR), Absent("scale_out", _NO_TENSOR), _BIAS,
        ),
        requires=(*_ranks("workspace_ptrs"), _WHOLE_WARPS, _COUNTED,
                  f"experts * token_num * hidden_size <= {INT32_MAX}"),
        **_MOE,
    )),
    # Up to 0.6.8 the entry could not quantise; later ones take a scale that nothing sets.
    *forms_of(
        Row(
            "trtllm_moe_finalize_allreduce_fusion", symbol="trtllm_moe_finalize_allreduce_fusion",
            doc="Add up the weighted rows of all ranks' experts for each token, and a residual; "
                "then apply the RMS norm. The next call empties the buffers that other ranks read: "
                "synchronise the ranks by other means between two calls.",
            args=(
                Tensor("allreduce_in", "permuted hidden_size", "T",
                       "results of this rank's experts", **_IN),
                _RESIDUAL_IN, replace(_GAMMA, name="norm_weight"),
                Tensor("expanded_idx_to_permuted_idx", "token_num top_k", "int32",
                       "row of `allreduce_in` for each token's experts, or -1", contiguous=True,
                       index=("-1 <= expanded_idx_to_permuted_idx < permuted",)),
                replace(_NORM_OUT, until="0.6.8"), replace(_RESIDUAL_OUT, until="0.6.8"),
                _required(replace(_NORM_OUT, since="0.6.8")),
                _optional(replace(_RESIDUAL_OUT, since="0.6.8")),
                Absent("quant_out", _NO_TENSOR, since="0.6.8"),
                Absent("scale_out", _NO_TENSOR, since="0.6.8"),
                _PDL, replace(_WORKSPACE, name="workspace"), _WORLD_RANK, _WORLD_SIZE,
                replace(_EPS, name="eps"),
                _optional(Tensor("shared_expert_output", _TOKENS, "T", "added to the rows", **_IN)),
                _optional(Tensor("expert_scale_factor", "token_num top_k", "T",
                                 "factor of each row", contiguous=True)),
                Scalar("routed_scaling_factor", float, 1.0, "factor of the sum",
                       entry_optional=True, since="0.6.8"),
                _BIAS,
            ),
            requires=(
                *_ranks("workspace"),
                replace(_WHOLE_WARPS, argument="norm_weight"), _COUNTED,
                "top_k >= 1", f"permuted * hidden_size <= {INT32_MAX}",
            ),
            variant="_plain",
            **_MOE,
        ),
        later={"0.6.8": {"variant": ""}},
    ),
    # Without NVLink.
    _over_pcie("pcie_ipc_all_reduce", "Add up the tensors of all ranks.", "n", "n",
               # The kernels refuse programmatic dependent launch.
               *_launch_sizes(2**16, (1, 1024, 1), 7), Absent("enable_pdl", "bool")),
    _over_pcie("pcie_ipc_all_gather", "Gather the tensors of all ranks, in rank order.", "n", "m",
               *_launch_sizes(*_SHARDED, 3)),
    _over_pcie("pcie_ipc_reduce_scatter",
               "Add up the tensors of all ranks, and give each rank its part, in rank order.",
               "m", "n", *_launch_sizes(*_SHARDED, 4)),
)  # fmt: skip
ALL_REDUCE, PCIE = OPS[0], OPS[-3:]


@dataclass(frozen=True)
class Setup:
    """An entry that takes Python values and is called rarely."""

    module: str
    source: str
    signature: Signature
    names: tuple[str, ...]
    releases: str = ">=0.6.3"


def _setup(module: str, source: str, name: str, result: str, params: Mapping[str, str]) -> Setup:
    signature = Signature(name, tuple(params.values()), result)
    return Setup(module, source, signature, tuple(params))


def _pcie(row: Row, **more: str) -> tuple[Setup, ...]:
    """Return the entries that set up and dispose of the ranks of a PCIe op."""
    name = row.name.removesuffix("_all_reduce")
    size = {"max_numel": "int", "elem_size": "int", "max_blocks": "int"} | more
    if name != "pcie_ipc":
        size = {"element_size" if each == "elem_size" else each: of for each, of in size.items()}
    params = {
        "workspace_size": ("int", {"world_size": "int", **size}),
        "init": ("int", {"ipc_ptrs": "Array<int>", "rank": "int", **size}),
        "dispose": ("void", {"handle": "int"}),
    }
    setups = (
        _setup(row.module, row.source, f"{name}_{what}", result, of)
        for what, (result, of) in params.items()
    )
    return tuple(replace(setup, releases=row.releases) for setup in setups)


_INTS = "Array<int>"
_VLLM = ("vllm_comm", ALL_REDUCE.source)
_LAMPORT = ("trtllm_comm", "csrc/trtllm_allreduce.cu")
_FA = {"fa": "int"}
_POINTERS = {"fake_ipc_ptrs": _INTS}
_RANK = {"rank_data": "DLTensor*", "rank": "int", "full_nvlink": "bool"}
_REGISTERED = {"handles": "Array<Array<int>>", "offsets": "Array<Array<int>>"}
_BUFFERS = {f"buffer_{i}_ptr": "int" for i in range(3)}
_FILLED = {"size": "int", "dtype": "DataType"}
SETUP = (
    _setup(*_VLLM, "init_custom_ar", "int", _POINTERS | _RANK),
    _setup(*_VLLM, "meta_size", "int", {}),
    _setup(*_VLLM, "dispose", "void", _FA),
    _setup(*_VLLM, "register_buffer", "void", _FA | _POINTERS),
    _setup(*_VLLM, "get_graph_buffer_ipc_meta", f"Tuple<{_INTS}, {_INTS}>", _FA),
    _setup(*_VLLM, "register_graph_buffers", "void", _FA | _REGISTERED),
    _setup(*_LAMPORT, "trtllm_lamport_initialize", "void", {"buffer_ptr": "int"} | _FILLED),
    _setup(*_LAMPORT, "trtllm_lamport_initialize_all", "void", _BUFFERS | _FILLED),
    *_pcie(PCIE[0]),
    *_pcie(PCIE[1], enable_copy_engine="bool"),
    *_pcie(PCIE[2]),
)
