"""The entries that `fi_ffi.ops.matmul` calls, and the checks of its callers' arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fi_ffi.ops.call.arguments import INT32_MAX
from fi_ffi.ops.call.row import Arg, Row, Rule, Scalar, Tensor, Text, Vector
from fi_ffi.ops.table.gemm import BLOCKSCALE, BMM, BMM_ARGS, F16, FP8, HANDLE
from fi_ffi.ops.table.indices import starts

E4M3 = ("float8_e4m3fn",)
_OUT: dict[str, Any] = {"writes": True, "reads": False, "contiguous": True, "alignment": 16}
_IN: dict[str, Any] = {"contiguous": True, "alignment": 16}
_ANY: dict[str, Any] = {"offset_limit": 2**63, "vector": Vector(())}
_PLAIN: dict[str, Any] = {"contiguous": True}
_OWN = "fi_ffi's own"

# bmm_fp8's query of algorithms, and calls with one of them.
_ALGOS_DOC = "what cuBLASLt keeps of its algorithms, 64 bytes of each"
_ALGO = Tensor("algo_buffer", "algo_bytes", "uint8", _ALGOS_DOC, contiguous=True, host=True)
_ALGO_OUT = replace(_ALGO, writes=True, reads=False)
_INDEX = Scalar("algo_idx", int, None, "which of them", low=0)


def _algos(symbol: str, releases: str, *more: Tensor | Scalar, result: str = "void") -> Row:
    args = (*BMM_ARGS, *more)
    fields: dict[str, Any] = {"doc": "", "releases": releases, "result": result, **BMM}
    return Row(symbol, symbol=symbol, args=args, **fields)


def _tables(*of_strides: str) -> tuple[Tensor, ...]:
    """Describe a segment's table entries: the problem's sizes, the matrices' addresses, and their
    strides."""
    names = ("x_ptr", "w_ptr", "y_ptr", *of_strides)
    return (
        Tensor("all_problems", "segments 3", "int32", "", no_index=_OWN, **_PLAIN),
        *(Tensor(name, "segments", "int64", "", no_index=_OWN, **_PLAIN) for name in names),
    )


_COLUMN_MAJOR = Scalar("weight_column_major", bool, None, "")
_WORKSPACE: dict[str, Any] = {"dtype": "uint8", "doc": "", "contiguous": True, "alignment": 64}
_SEGMENT_SOURCE = "csrc/flashinfer_gemm_sm90_binding.cu"
# A TMA descriptor has 40 bits for a stride in bytes.
_SEGMENT: dict[str, Any] = {"alignment": 16, "stride_limit": 2**38}


def _segments(out: str, weights: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Row:
    """Return the checks of `segment_gemm`'s arguments; the row has no entry."""
    # The kernels read and write rows 16 bytes at a time.
    step = 16 if inputs is FP8 else 8
    args = (
        Tensor("x", "n d_in", "T", "", **_SEGMENT),
        Tensor("weights", f"num_weights {weights}", "T", "", **_SEGMENT),
        Tensor("out", "n d_out", out, "", writes=True, reads=False, **_SEGMENT),
    )
    least = (f"d_in >= {step}", "d_out >= 8", f"d_in % {step} == 0", "d_out % 8 == 0")
    most = tuple(f"{size} <= {INT32_MAX}" for size in ("n", "d_in", "d_out"))
    return Row(
        "segment_gemm",
        "gemm_sm90",
        "",
        _SEGMENT_SOURCE,
        "",
        args,
        {"T": inputs} | ({} if out == "T" else {out: outputs}),
        ">=0.6.3",
        requires=(*least, *most),
        vector=Vector(("d_in", "d_out")),
        offset_limit=2**63,
    )


# By whether inputs are fp8 and whether weights are column-major (num_weights, d_out, d_in).
SEGMENTS = {
    (False, True): _segments("T", "d_out d_in", F16, F16),
    (False, False): _segments("T", "d_in d_out", F16, F16),
    (True, True): _segments("O", "d_out d_in", FP8, F16),
}


def _of_rows(k128: int, m: int) -> tuple[int, str, str]:
    room = -(-m // 4) * 4
    return room, f"shape ({k128}, {room})", "as fp8_quantize_1x128 writes it"


def _of_blocks(n: int, k128: int) -> tuple[int, str, str]:
    count = -(-n // 128)
    return count, f"shape ({count}, {k128})", "one for each block of 128 x 128"


def _as_required(dtype: str, has_scales: bool, *_: int) -> bool:
    return (dtype in E4M3) is has_scales


_Sizes = Callable[[int, int], tuple[int, str, str]]


def _scales_of(
    dtype: str, scales: str, axes: tuple[str, str, str], wanted: _Sizes
) -> tuple[Rule, Rule]:
    """Require scales for fp8 values, with a last axis that follows from the others, and none for
    values that the kernels quantise."""

    def presence(name: str, has_scales: bool, *sizes: int) -> str:
        if has_scales:
            return f"None: the kernels quantise {name} themselves"
        return "scales of {}, {}".format(*wanted(*sizes[:2])[1:])

    def shape(size: int, *sizes: int) -> str:
        return "{}, {}".format(*wanted(*sizes)[1:])

    one, other, size = axes
    wanted_size = f"{wanted.__name__}({one}, {other})[0]"
    return (
        Rule(
            scales,
            f"as_required({dtype}, {scales}, {one}, {other})",
            presence,
            {"as_required": _as_required},
        ),
        Rule(scales, f"{size} in (None, {wanted_size})", shape, {wanted.__name__: wanted}),
    )


_GRANULARITY = tuple(Scalar(f"scale_granularity_{axis}", int, None, "") for axis in "mnk")
_MODE = Text("scale_major_mode", ("MN", "K"), None, "", "std::string")
_MMA_SM = Scalar("mma_sm", int, 1, "", low=1, high=2)


def _blocks(scales: str, axes: tuple[str, str], granularity: str) -> Rule:
    """Require a scale for each block of this many rows, along k."""

    def blocks(rows: int, k: int, size: int, mode: str) -> tuple[int, int]:
        counts = -(-rows // size), -(-k // 128)
        return counts if mode == "K" else counts[::-1]

    def expected(first: int, second: int, *of: Any) -> str:
        return f"shape {blocks(*of)}, with scale_major_mode={of[-1]!r}"

    one, other = axes
    sizes = f"{granularity}, k, scale_granularity_{granularity}, scale_major_mode"
    name = f"blocks_of_{granularity}"
    return Rule(scales, f"({one}, {other}) == {name}({sizes})", expected, {name: blocks})


_GROUPWISE: dict[str, Any] = {
    "module": "gemm_sm100",
    "doc": "",
    "releases": ">=0.6.3",
    "dtypes": {"T": FP8, "O": F16},
    "capabilities": (10,),
    "also": (12,),
    **_ANY,
}
# SM120's entries have the same names, but lack `mma_sm`.
_SM120: dict[str, Any] = {
    **_GROUPWISE,
    "modules": {(12, 0): "gemm_sm120", (12, 1): "gemm_sm120"},
    "capabilities": (12,),
    "also": (10,),
}
_BLOCKS = (
    *("k >= 128", "n >= 8", "k % 128 == 0", "n % 8 == 0"),
    *(f"m * n <= {INT32_MAX}", f"m <= {INT32_MAX}"),
    _blocks("SFA", ("a0", "a1"), "m"),
    _blocks("SFB", ("b0", "b1"), "n"),
)
# SM120's kernels need whole blocks of rows and columns: otherwise they compute nothing and report
# no error.
_WHOLE_BLOCKS = (
    "n % 128 == 0",
    Rule("A", "m % scale_granularity_m == 0", "whole blocks of scale_granularity_m rows"),
    *_BLOCKS,
)
# In mode MN the launcher takes the number of blocks for the number of rows, and computes the stride
# of the scales from it.
_STRIDE = Rule(
    "SFA",
    "scale_granularity_m == 1 or scale_major_mode == 'K' or k == 128 or m <= 128",
    "scale_major_mode='K', where scales are of 128 rows: of several rows of scales the kernels "
    "find the first alone",
)
# FlashInfer gives these kernels 32 MiB.
_SCRATCH: dict[str, Any] = {
    **_WORKSPACE,
    "writes": True,
    "reads": False,
    "bytes_per_multiprocessor": 216 << 10,
}
_ARGS: tuple[Arg, ...] = (
    Tensor("float_workspace_buffer", "workspace_size", **_SCRATCH),
    Tensor("A", "m k", "T", "", **_IN),
    Tensor("B", "n k", "T", "", **_IN),
    Tensor("SFA", "a0 a1", "float32", "", **_IN),
    Tensor("SFB", "b0 b1", "float32", "", **_IN),
    Tensor("C", "m n", "O", "", **_OUT),
    *_GRANULARITY,
    _MODE,
)
_GROUP_ARGS: tuple[Arg, ...] = (
    Tensor("int_workspace_buffer", "workspace_size", **_SCRATCH),
    Tensor("float_workspace_buffer", "float_size", **_SCRATCH),
    Tensor("A", "m k", "T", "", **_IN),
    Tensor("B", "groups n k", "T", "", **_IN),
    Tensor("SFA", "a0 a1", "float32", "", **_IN),
    Tensor("SFB", "groups b0 b1", "float32", "", **_IN),
    Tensor("D", "m n", "O", "", **_OUT),
    starts("m_indptr", "groups+1", "", "m"),
    Scalar("n", int, None, "", size_of="n"),
    Scalar("k", int, None, "", size_of="k"),
    *_GRANULARITY,
    _MODE,
)

# An entry has a form for each span of releases, or for each kind of GPU.
ROWS: tuple[Row, ...] = (
    _algos("bmm_fp8_get_algos", ">=0.6.11,<0.7", HANDLE, _ALGO_OUT, result="int"),
    _algos("bmm_fp8_get_algos", ">=0.7", _ALGO_OUT, result="int"),
    _algos("bmm_fp8_run_with_algo", ">=0.6.11,<0.7", HANDLE, _ALGO, _INDEX),
    _algos("bmm_fp8_run_with_algo", ">=0.7", _ALGO, _INDEX),
    # Tensor-core kernels of SM80. They add to the output's contents.
    Row(
        "cutlass_segment_gemm", "gemm", "cutlass_segment_gemm",
        "csrc/flashinfer_gemm_binding.cu", "",
        (
            Tensor("workspace_buffer", "workspace_size", **_WORKSPACE),
            *_tables("x_ld", "w_ld", "y_ld"),
            Tensor("empty_x_data", "0", "T", ""),
            _COLUMN_MAJOR,
        ),
        {"T": F16}, ">=0.6.3", **_ANY,
    ),
    Row(
        "cutlass_segment_gemm_sm90", "gemm_sm90", "cutlass_segment_gemm_sm90",
        _SEGMENT_SOURCE, "",
        (
            Tensor("float_workspace_buffer", "workspace_size", **_WORKSPACE),
            Tensor("int_workspace_buffer", "unused", **_WORKSPACE),
            *_tables("x_stride", "weight_stride", "y_stride"),
            Tensor("empty_x_data", "0", "T", ""),
            Tensor("empty_y_data", "0", "O", ""),
            _COLUMN_MAJOR,
        ),
        {"T": (*F16, *FP8), "O": F16}, ">=0.6.3", capabilities=(9,), **_ANY,
    ),
    # A method of the object that `init` makes. A product takes its inputs as they are, or in fp8.
    Row(
        "fp8_blockscale_gemm_sm90", symbol="run_gemm", doc="",
        args=(
            Tensor("input", "m 128*k128", "TA", "", **_IN),
            Tensor("weight", "n 128*k128", "TB", "", **_IN),
            Tensor("output", "m n", "bfloat16", "", **_OUT),
            Tensor("scales_a", "k128 m4", "float32", "", optional=True, **_IN),
            Tensor("scales_b", "n128 k128", "float32", "", optional=True, contiguous=True),
        ),
        dtypes={"TA": ("bfloat16", *E4M3), "TB": ("bfloat16", *E4M3)},
        lacks=({"TA": E4M3[0], "TB": "bfloat16"},),
        requires=(
            "k128 >= 1", "n >= 64", "n % 64 == 0",
            # Shared memory has room for this many scales of a row of blocks; the elements of the
            # output and the weight are counted in an int.
            "k128 <= 160", f"m * n <= {INT32_MAX}", f"n * k128 <= {INT32_MAX // 128}",
            *_scales_of("TA", "scales_a", ("k128", "m", "m4"), _of_rows),
            *_scales_of("TB", "scales_b", ("n", "k128", "n128"), _of_blocks),
        ),
        **BLOCKSCALE,
    ),
    Row(
        "gemm_fp8_nt_groupwise", symbol="gemm_fp8_nt_groupwise",
        source="csrc/gemm_sm100_binding.cu", args=(*_ARGS, _MMA_SM),
        requires=("m % 4 == 0", *_BLOCKS), **_GROUPWISE,
    ),
    Row(
        "gemm_fp8_nt_groupwise", symbol="gemm_fp8_nt_groupwise",
        source="csrc/gemm_sm120_binding.cu", args=_ARGS,
        requires=_WHOLE_BLOCKS, **_SM120,
    ),
    Row(
        "group_gemm_fp8_nt_groupwise", symbol="group_gemm_fp8_nt_groupwise",
        source="csrc/group_gemm_sm100_binding.cu", args=(*_GROUP_ARGS, _MMA_SM),
        requires=(*_BLOCKS, _STRIDE, Rule(
            "B", "groups == 1 or n % 128 == 0", "a multiple of 128 columns in each of several "
            "matrices: the kernels count whole blocks of scales from one to the next",
        )), **_GROUPWISE,
    ),
    Row(
        "group_gemm_fp8_nt_groupwise", symbol="group_gemm_fp8_nt_groupwise",
        source="csrc/group_gemm_sm120_binding.cu", args=_GROUP_ARGS,
        requires=(*_WHOLE_BLOCKS, _STRIDE, Rule(
            "B", "groups == 1", "one matrix: FlashInfer knows of wrong products where there are "
            "more on GPUs of compute capability 12.x",
        )), **_SM120,
    ),
)  # fmt: skip


def _forms(symbol: str) -> tuple[Row, ...]:
    return tuple(row for row in ROWS if row.symbol == symbol)


GET_ALGOS, RUN_WITH_ALGO = _forms("bmm_fp8_get_algos"), _forms("bmm_fp8_run_with_algo")
(SEGMENT_SM80,) = _forms("cutlass_segment_gemm")
(SEGMENT_SM90,) = _forms("cutlass_segment_gemm_sm90")
(RUN_GEMM,) = _forms("run_gemm")
GROUPWISE, GROUP_GROUPWISE = _forms("gemm_fp8_nt_groupwise"), _forms("group_gemm_fp8_nt_groupwise")

_MEMORY = Tensor("workspace_buffer", "bytes", "uint8", "", contiguous=True, alignment=256)
# Sets the memory that the object quantises into; a product uses the memory set last. The entry is
# another method of the object.
CONFIGURE = Row(
    RUN_GEMM.name,
    symbol="configure_workspace",
    doc="",
    args=(replace(_MEMORY, writes=True, reads=False),),
    dtypes={},
    **BLOCKSCALE,
)
