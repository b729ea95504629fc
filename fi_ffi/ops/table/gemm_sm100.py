"""Matrix products for SM100 and later: NVFP4, MXFP8, bfloat16, and 16 bits for few rows.

They were compiled for these GPUs and never run. Scales are in tiles of 128 rows and 4 columns, as
`fp4_quantize` and `mxfp8_quantize` write them. If a workspace is too small for a tactic, the
kernels allocate memory.
"""

from __future__ import annotations

from typing import Any

from fi_ffi.ops.call.arguments import INT32_MAX
from fi_ffi.ops.call.row import Row, Rule, Scalar, Tensor, Vector
from fi_ffi.ops.table.gemm import F16

_OUT: dict[str, Any] = {"writes": True, "reads": False, "contiguous": True, "alignment": 16}
_IN: dict[str, Any] = {"contiguous": True, "alignment": 16}
_FIELDS: dict[str, Any] = {"vector": Vector(()), "offset_limit": 2**63}
# The workspace that FlashInfer passes.
_WORKSPACE = Tensor(
    "workspace_buffer",
    "workspace_size",
    "uint8",
    "scratch of 32 MiB; by default fi_ffi keeps one for each stream",
    writes=True,
    reads=False,
    contiguous=True,
    alignment=256,
    bytes=32 << 20,
)
_TACTIC = Scalar(
    "tactic",
    int,
    -1,
    "number of the kernel, below the module's `{}_tactic_num`; -1: the module chooses",
    low=-1,
)


def _tactic(of: str) -> Scalar:
    return Scalar(_TACTIC.name, int, -1, _TACTIC.doc.format(of), low=-1)


def _scales(name: str, axis: str, rows: str, columns: str) -> tuple[Tensor, Rule]:
    """Bytes in whole tiles, and how many there are."""
    doc = "bytes of the scales, in tiles of 128 x 4"
    count = f"{axis} == round_up({rows}, 128) * round_up({columns}, 4)"
    expected = f"whole tiles of 128 rows and 4 columns for {rows} rows"
    return Tensor(name, axis, "uint8", doc, **_IN), Rule(name, count, expected)


def _other(module: str, capabilities: tuple[tuple[int, int], ...]) -> dict[tuple[int, int], str]:
    return dict.fromkeys(capabilities, module)


_SM120 = ((12, 0), (12, 1))
_A4, _A4_RULE = _scales("mat1Scale", "scales_a", "m", "half // 8")
_B4, _B4_RULE = _scales("mat2Scale", "scales_b", "n", "half // 8")
_A8, _A8_RULE = _scales("mat1Scale", "scales_a", "m", "k // 32")
_B8, _B8_RULE = _scales("mat2Scale", "scales_b", "n", "k // 32")
_SIZES = (f"m <= {INT32_MAX}", f"n <= {INT32_MAX}")
# The kernels count the elements from one product to the next in an int.
_BATCH: tuple[str | Rule, ...] = (
    *_SIZES,
    f"k <= {INT32_MAX}",
    f"b <= {INT32_MAX}",
    *(
        Rule(
            name,
            f"b == 1 or {elements} <= {INT32_MAX}",
            f"of {elements} of at most {INT32_MAX} where there are several matrices",
        )
        for name, elements in (("mat1", "m * k"), ("mat2", "n * k"), ("out", "m * n"))
    ),
)


def _batched(name: str, axis: str, rows: str) -> tuple[Tensor, Rule, Rule]:
    """Return the scales of several MXFP8 matrices, and their rules. The rows of all matrices are
    counted on: the kernels expect each matrix in tiles of its own, and the launcher accepts no more
    than all rows have."""
    tensor, count = _scales(name, axis, f"b * {rows}", "k // 32")
    whole = Rule(
        name.removesuffix("Scale"),
        f"b == 1 or {rows} % 128 == 0",
        "a multiple of 128 rows in each of several matrices: otherwise their scales share tiles",
    )
    return tensor, whole, count


_A8B, *_A8B_RULES = _batched("mat1Scale", "scales_a", "m")
_B8B, *_B8B_RULES = _batched("mat2Scale", "scales_b", "n")

ROWS = (
    Row(
        "fp4_gemm", "fp4_gemm_cutlass", "fp4_gemm", "csrc/fp4_gemm_cutlass.cu",
        "Product of NVFP4 matrices, with a scale for every 16 elements of a row: `out = "
        "globalScale * (mat1 * mat1Scale) @ (mat2 * mat2Scale).T`.",
        (
            Tensor("mat1", "m half", "uint8",
                   "two e2m1 elements in a byte, the first in the low half", **_IN),
            Tensor("mat2", "n half", "uint8",
                   "the same, with one row for each column of the output",
                   **_IN),
            _A4, _B4,
            Tensor("globalScale", "1", "float32",
                   "factor of the product: 1 / (global scale of mat1 * global scale of mat2)"),
            Tensor("out", "m n", "O", "the products", **_OUT),
            _WORKSPACE, _tactic("fp4_gemm"),
        ),
        {"O": F16}, ">=0.6.3", **_FIELDS, allocates=True, capabilities=(10, 11, 12),
        modules=_other("fp4_gemm_cutlass_sm120", _SM120),
        requires=("half >= 16", "half % 16 == 0", "n % 32 == 0",
                  f"half <= {INT32_MAX // 2}", *_SIZES, _A4_RULE, _B4_RULE),
    ),
    Row(
        "mxfp8_gemm", "mxfp8_gemm_cutlass", "mxfp8_gemm", "csrc/mxfp8_gemm_cutlass.cu",
        "Product of MXFP8 matrices, with a power of 2 for every 32 elements of a row: `out = (mat1 "
        "* mat1Scale) @ (mat2 * mat2Scale).T`.",
        (
            Tensor("mat1", "m k", "float8_e4m3fn", "rows", **_IN),
            Tensor("mat2", "n k", "float8_e4m3fn", "one row for each column of the output", **_IN),
            _A8, _B8,
            Tensor("out", "m n", "O", "the products", **_OUT),
            _WORKSPACE, _tactic("mxfp8_gemm"),
        ),
        {"O": F16}, ">=0.6.4", **_FIELDS, allocates=True, capabilities=(10, 11, 12),
        modules=_other("mxfp8_gemm_cutlass_sm120", _SM120),
        requires=("k >= 32", "k % 32 == 0", "n % 32 == 0", f"k <= {INT32_MAX}", *_SIZES,
                  _A8_RULE, _B8_RULE),
    ),
    Row(
        "bf16_gemm", "bf16_gemm_cutlass", "bf16_gemm", "csrc/bf16_gemm_cutlass.cu",
        "Product of bfloat16 matrices: `out = mat1 @ mat2.T`.",
        (
            Tensor("mat1", "m k", "bfloat16", "rows", **_IN),
            Tensor("mat2", "n k", "bfloat16", "one row for each column of the output", **_IN),
            Tensor("out", "m n", "O", "the products", **_OUT),
            _WORKSPACE, _tactic("bf16_gemm"),
        ),
        {"O": ("bfloat16", "float16", "float32")}, ">=0.6.3", **_FIELDS, allocates=True,
        capabilities=(10,),
        requires=("k >= 8", "k % 8 == 0", "n % 8 == 0", f"k <= {INT32_MAX}", *_SIZES),
    ),
    Row(
        "bmm_bf16", "bf16_gemm_cutlass", "bf16_gemm", "csrc/bf16_gemm_cutlass.cu",
        "Several products of bfloat16 matrices: `out[i] = mat1[i] @ mat2[i].T`.",
        (
            Tensor("mat1", "b m k", "bfloat16", "rows", **_IN),
            Tensor("mat2", "b n k", "bfloat16", "one row for each column of the output", **_IN),
            Tensor("out", "b m n", "O", "the products", **_OUT),
            _WORKSPACE, _tactic("bf16_gemm"),
        ),
        {"O": ("bfloat16", "float16", "float32")}, ">=0.6.3", **_FIELDS, allocates=True,
        capabilities=(10,),
        requires=("k >= 8", "k % 8 == 0", "n % 8 == 0", *_BATCH),
    ),
    Row(
        "bmm_mxfp8", "mxfp8_gemm_cutlass", "mxfp8_gemm", "csrc/mxfp8_gemm_cutlass.cu",
        "Several products of MXFP8 matrices, with a power of 2 for every 32 elements of a row: "
        "`out[i] = (mat1[i] * mat1Scale[i]) @ (mat2[i] * mat2Scale[i]).T`.",
        (
            Tensor("mat1", "b m k", "float8_e4m3fn", "rows", **_IN),
            Tensor("mat2", "b n k", "float8_e4m3fn",
                   "one row for each column of the output", **_IN),
            _A8B, _B8B,
            Tensor("out", "b m n", "O", "the products", **_OUT),
            _WORKSPACE, _tactic("mxfp8_gemm"),
        ),
        {"O": F16}, ">=0.6.4", **_FIELDS, allocates=True, capabilities=(10, 11, 12),
        modules=_other("mxfp8_gemm_cutlass_sm120", _SM120),
        requires=("k >= 32", "k % 32 == 0", "n % 32 == 0", *_BATCH, *_A8B_RULES, *_B8B_RULES),
    ),
    Row(
        "tgv_gemm", "tgv_gemm_bf16", "tgv_gemm", "csrc/tgv_gemm.cu",
        "Product for few columns: `out = (mat1 @ mat2 + bias[:, None]).T`.",
        (
            Tensor("mat1", "m k", "T", "a layer's weights", **_IN),
            Tensor("mat2", "k n", "T", "inputs, column-major: the transpose of a contiguous "
                   "(n, k)", transposed=True, **_IN),
            Tensor("bias", "m", "T",
                   "added to each of the n columns", contiguous=True, optional=True),
            _tactic("tgv_gemm"),
            Tensor("out", "n m", "T", "the products", **_OUT),
            Scalar("pdl", bool, False,
                   "programmatic dependent launch: start while the previous kernel finishes"),
        ),
        {"T": ("bfloat16",)}, ">=0.6.3", **_FIELDS, capabilities=(10,),
        requires=("k >= 8", "k % 8 == 0", "m % 8 == 0",
                  # The bytes of each matrix fit an int.
                  f"m * n <= {2**30 - 1}", f"m * k <= {2**30 - 1}", f"n * k <= {2**30 - 1}"),
    ),
)  # fmt: skip
