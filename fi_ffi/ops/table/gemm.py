"""Matrix products: entries of FlashInfer's `gemm`, `gemm_sm90` and similar modules.

These are called as they are. `fi_ffi/ops/matmul` has the products that need work around the entry,
and docs/gemm.md says which to use.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fi_ffi.ops.call.arguments import INT32_MAX
from fi_ffi.ops.call.releases import forms_of
from fi_ffi.ops.call.row import Row, Rule, Scalar, Tensor, Vector

_BF16 = ("bfloat16",)
FP8 = ("float8_e4m3fn", "float8_e5m2")
F16 = ("float16", "bfloat16")
_OUT: dict[str, Any] = {"writes": True, "reads": False, "contiguous": True, "alignment": 16}
_IN: dict[str, Any] = {"contiguous": True, "alignment": 16}
_PDL = "programmatic dependent launch: start while the previous kernel finishes"

# 32 MiB or slightly less on Hopper and Blackwell, which NVIDIA recommends and FlashInfer uses.
CUBLAS_BYTES = 216 << 10
HANDLE = Scalar(
    "cublas_handle",
    int,
    0,
    "a cublasLtHandle_t or cublasHandle_t; 0: fi_ffi's own handle for the device",
    low=0,
    library="cublasLt",
)
_MATRICES = (
    Tensor("A", "b m k", "TA", "left factors", **_IN),
    Tensor(
        "B",
        "b k n",
        "TB",
        "right factors, column-major: the transpose of a contiguous (b, n, k)",
        transposed=True,
        **_IN,
    ),
)
_SCALES = (
    Tensor("A_scale", "1", "float32", "factor of A"),
    Tensor("B_scale", "1", "float32", "factor of B"),
    Tensor(
        "workspace_buffer",
        "workspace_size",
        "uint8",
        writes=True,
        reads=False,
        contiguous=True,
        alignment=256,
        bytes_per_multiprocessor=CUBLAS_BYTES,
        any_size=True,
        doc="scratch of any size, for one stream at a time. cuBLASLt skips algorithms that need "
        "more; NVIDIA recommends 32 MiB. By default fi_ffi keeps 216 KiB per "
        "multiprocessor for each stream",
    ),
)
BMM_ARGS = (*_MATRICES, Tensor("D", "b m n", "T", "the products", **_OUT), *_SCALES)
BMM: dict[str, Any] = {
    "module": "gemm",
    "source": "csrc/flashinfer_gemm_binding.cu",
    "dtypes": {"TA": FP8, "TB": FP8, "T": F16},
    "offset_limit": 2**63,
    "vector": Vector(()),
    "requires": (
        # cuBLASLt's requirements for fp8.
        "k >= 16",
        "k % 16 == 0",
        "n % 16 == 0",
        f"m <= {INT32_MAX}",
        f"n <= {INT32_MAX}",
        f"k <= {INT32_MAX}",
        # With several matrices, the launcher counts the elements of each in an int.
        *(
            Rule(
                matrix,
                f"b == 1 or {elements} <= {INT32_MAX}",
                f"of {elements} of at most {INT32_MAX} where there are several matrices",
            )
            for matrix, elements in (("A", "m * k"), ("B", "k * n"), ("D", "m * n"))
        ),
    ),
    "capabilities": (8, 9, 10, 11, 12),  # of 8.x only 8.9
    "lacks": ({"TA": "float8_e5m2", "TB": "float8_e5m2"},),
}


_BMM = Row(
    "bmm_fp8",
    symbol="bmm_fp8",
    args=(*BMM_ARGS, replace(HANDLE, until="0.7")),
    releases=">=0.6.3",
    doc="Products of fp8 matrices, by cuBLASLt: `D = (A * A_scale) @ (B * B_scale)`.",
    **BMM,
)


def _tiny(name: str, *bias: Tensor, since: str) -> tuple[Row, ...]:
    plus = " + bias" if bias else ""
    always = (
        # TMA copies rows: strides are multiples of 16 bytes, and reads past the end give 0.
        "k >= 64",
        "m >= 16",
        "k % 8 == 0",
        "m % 16 == 0",
        # The output is counted in an int, blocks of 8 rows by the grid's second axis.
        f"n * m <= {INT32_MAX}",
        f"n <= {8 * 65535}",
        f"m * k <= {INT32_MAX}",
        f"n * k <= {INT32_MAX}",
    )
    row = Row(
        name,
        "tinygemm2",
        f"{name}_op",
        "csrc/tinygemm2.cu",
        f"A product for few rows (best 8 or fewer): `output = input @ weight.T{plus}`, rounded "
        "once.",
        (
            Tensor("input", "n k", "T", "rows", **_IN),
            Tensor("weight", "m k", "T", "one row for each column of the output", **_IN),
            *bias,
            Tensor("output", "n m", "T", "the products", **_OUT),
            Scalar("use_pdl", bool, False, _PDL),
        ),
        {"T": _BF16},
        f">={since}",
        # A warp that had to wait polled its first stage instead of its next one. With several
        # stages (256 of k for each of four warps) results were sometimes wrong, and the kernel
        # hung at k = 5120, where stages are reused.
        requires=(
            *always,
            Rule(
                "input",
                "k <= 1024",
                "k of at most 1024: before FlashInfer 0.6.14 the kernel sometimes gives wrong "
                "results above it (docs/gemm.md)",
            ),
        ),
        offset_limit=2**63,
        vector=Vector(()),
        capabilities=(9, 10, 11, 12),
    )
    return forms_of(row, {"0.6.14": {"requires": always}})


_BIAS = Tensor("bias", "m", "T", "added to every row", contiguous=True)


def _router(
    name: str, symbol: str, k: int, experts: int, dtype: str, model: str, releases: str
) -> Row:
    return Row(
        name,
        "dsv3_router_gemm",
        symbol,
        "csrc/dsv3_router_gemm.cu",
        f"The router's product for 1 to 16 tokens, of {model}'s sizes: `out = mat_a @ mat_b`.",
        (
            Tensor("mat_a", f"n {k}", "T", "hidden states", **_IN),
            Tensor(
                "mat_b",
                f"{k} {experts}",
                "T",
                "the experts' weights, column-major: the "
                f"transpose of a contiguous ({experts}, {k})",
                transposed=True,
                **_IN,
            ),
            Tensor(
                "out", f"n {experts}", dtype, "scores", writes=True, reads=False, contiguous=True
            ),
            Scalar("launch_with_pdl", bool, True, _PDL),
        ),
        {"T": _BF16},
        releases,
        offset_limit=2**63,
        vector=Vector(()),
        requires=("n <= 16",),
    )


# fp8_blockscale_gemm_90: methods of the object that `init` makes.
BLOCKSCALE: dict[str, Any] = {
    "module": "fp8_blockscale_gemm_90",
    "source": "csrc/fp8_blockscale_gemm_sm90_binding.cu",
    "factory": "init",
    "releases": ">=0.6.3",
    "offset_limit": 2**63,
    "vector": Vector(()),
    "capabilities": (9,),
}

ROWS = (
    *forms_of(_BMM),
    *_tiny("tinygemm2", _BIAS, since="0.6.5"),
    *_tiny("tinygemm2_nobias", since="0.6.9"),
    _router(
        "mm_M1_16_K7168_N256", "dsv3_router_gemm_op", 7168, 256, "float32", "DeepSeek-V3", ">=0.6.3"
    ),
    _router(
        "mm_M1_16_K7168_N128",
        "ml3_router_gemm_op",
        7168,
        128,
        "bfloat16",
        "Mistral Large 3",
        ">=0.6.3",
    ),
    _router(
        "mm_M1_16_K6144_N256",
        "glm_dsa_router_gemm_op",
        6144,
        256,
        "float32",
        "GLM-MoE-DSA",
        ">=0.6.12",
    ),
    Row(
        "fp8_quantize_1x128",
        symbol="fp8_quantize_1x128",
        doc="Quantise rows in blocks of 128 columns: `outValueE4M3 = fp8(input * 448 / largest)` "
        "and `outScaleFP8SF = largest / 448`, where `largest` is the largest element of the "
        "block. The scale of a block of zeros is 1.",
        args=(
            Tensor("input", "n 128*k128", "T", "rows", **_IN),
            Tensor("outValueE4M3", "n 128*k128", "float8_e4m3fn", "quantised rows", **_OUT),
            Tensor(
                "outScaleFP8SF",
                "k128 n4",
                "float32",
                "scales: one row for every 128 columns, with a number for each row of the "
                "input; padding up to a multiple of 4 is not written",
                **_OUT,
            ),
            Scalar("use_ue8m0", bool, False, "ignored by the kernels"),
        ),
        dtypes={"T": _BF16},
        requires=(
            "k128 >= 1",
            f"n <= {INT32_MAX}",
            f"k128 <= {INT32_MAX // 128}",
            Rule(
                "outScaleFP8SF",
                "n4 == round_up(n, 4)",
                "of n rounded up to a multiple of 4 in its second axis",
            ),
        ),
        **BLOCKSCALE,
    ),
)
