"""The entries behind `fi_ffi.ops.matmul` against the binding sources of each release, and what
their rows say of kernels against the kernels' sources."""

from __future__ import annotations

import re

import pytest

from fi_ffi.ops.functions import OPS
from fi_ffi.ops.matmul import rows
from fi_ffi.ops.releases import fits
from fi_ffi.ops.row import Row

from tests.releases.bindings import RELEASES, exported, methods, parameters

BLOCKSCALE = (
    "csrc/nv_internal/tensorrt_llm/kernels/cutlass_kernels/fp8_blockscale_gemm/"
    "fp8_blockscale_gemm_kernel.cuh"
)


def flat(text: str) -> str:
    return " ".join(text.split())


def names_of(row: Row) -> list[str]:
    return [arg.name for arg in row.args]


@pytest.mark.parametrize("release", RELEASES)
def test_entries_are_what_the_release_declares(release, sources):
    of_symbol: dict[str, list[Row]] = {}
    for row in rows.ROWS:
        of_symbol.setdefault(row.symbol, []).append(row)
    for symbol, known in of_symbol.items():
        text = sources(release, known[0].source)
        fitting = [row for row in known if fits(row, release)]
        if known[0].factory:
            found = methods(text)
            declared = {name: method.signature for name, method in found.items()}
            names = {name: [*method.names] for name, method in found.items()}
        else:
            declared, names = exported(text), parameters(text)
        if not fitting:
            assert symbol not in declared
            continue
        (row,) = fitting
        assert row.signature.same_types(declared[symbol]), release
        assert names_of(row) == names[symbol], release


@pytest.mark.parametrize("release", RELEASES)
def test_the_object_is_what_its_callers_take_it_for(release, sources):
    text = sources(release, rows.RUN_GEMM.source)
    found = {name: method.signature for name, method in methods(text).items()}
    assert (found["get_workspace_size"].params, found["get_workspace_size"].result) == (
        ("int",) * 3, "int",
    )  # fmt: skip
    assert found["configure_workspace"].params == ("DLTensor*",)
    assert exported(text)["init"].result == "ffi.Module" and not exported(text)["init"].params
    # It wants memory also where it has no use for it.
    assert "workspace_ != nullptr" in text
    # What is quantised, and for how many rows it makes room.
    source = flat(sources(release, BLOCKSCALE.replace("_kernel.cuh", ".cu")))
    assert source.count("max_shape_m_4_align_ * shape_k * sizeof(__nv_fp8_e4m3)") >= 2
    assert "max_shape_m_4_align_ * div_up(shape_k, 128) * sizeof(float);" in source
    assert "std::max(max_shape_m_4_align_, int64_t(div_up(max_shape_m, 4) * 4))" in source


@pytest.mark.parametrize("release", RELEASES)
def test_block_scales_are_what_the_rows_say(release, sources):
    """How the kernels compiled into the module read scales, and what they quantise to."""
    text = flat(sources(release, BLOCKSCALE))
    assert "MAX_SHAPE_K = 20480;" in text
    assert rows.RUN_GEMM.limits("<=")["k128"] == (20480 // 128,)
    # Of the input, numbers of one piece of 128 columns lie together, for rows in fours.
    assert "make_2d_tma_scales_a_desc(scales_a, div_up(shape_m, 4) * 4, shape_k)" in text
    assert "Layout::ColMajor, div_up(shape_m, ScaleGranMA)" in text
    assert "scales[(size_t)scales_idx_x * stride_scale_dim_y + scales_idx_y]" in text
    # Of the weight, there is one for each 128 rows: not for each.
    assert "scales_b += ((tile_n_idx * TILE_N) / ScaleGranNB) * scales_b_ld;" in text
    assert re.search(r"ScaleType::PerSubChannel, ScaleType::PerBlock, 1, 128, 128, 128>", text)
    # A weight is quantised by the largest value of some of its rows: it tests the row's number.
    clipped = "scales_idx_x * 128 + i * 32 + lane_id >= dim_x"
    kernel = text[text.index("void scale_128x128_kernel(") :].partition("__global__")[0]
    assert clipped in kernel
    # Without folders of headers nothing is compiled.
    assert "deep_gemm::jit::getGlobalCompiler().isValid()" in text


@pytest.mark.parametrize("release", RELEASES)
def test_segments_are_what_the_rows_say(release, sources):
    old = flat(sources(release, "include/flashinfer/gemm/group_gemm.cuh"))
    new = flat(sources(release, "include/flashinfer/gemm/group_gemm_sm90.cuh"))
    # The first adds to the output, the second does not.
    assert "epilogue_op(1.0, 1.0);" in old
    assert "Params(ElementAccumulator(1.f), ElementAccumulator(0.f))" in new
    # 16 bytes at a time; an error of the second ends the process, so none may come.
    assert old.count("8, // Granularity") == 2
    assert new.count("128 / cutlass::sizeof_bits<") == 3
    assert "exit(EXIT_FAILURE)" in new
    assert "Row-major layout is not supported for fp8 data type" in new


@pytest.mark.parametrize("release", RELEASES)
def test_routers_and_small_products_are_what_the_rows_say(release, sources):
    text = flat(sources(release, "csrc/dsv3_router_gemm.cu"))
    for name in ("mm_M1_16_K7168_N256", "mm_M1_16_K7168_N128", "mm_M1_16_K6144_N256"):
        row = next((row for row in OPS[name].rows if fits(row, release)), None)
        if row is None:
            continue
        hidden, experts = row.tensors[1].axis_names
        arguments = re.search(rf"void {row.symbol}\(.*?generic_router_gemm_op<(.*?)>", text)[1]
        kind = "float" if row.tensors[2].dtype == "float32" else "__nv_bfloat16"
        assert arguments.startswith(f"{kind},") and arguments.endswith(", 1, 16")
        assert f", {experts}, " in arguments
        assert hidden in (arguments if "kHiddenDim, int kBegin" in text else text)
        assert row.requires == ("n <= 16",)
    if any(fits(row, release) for row in OPS["tinygemm2"].rows):
        tiny = flat(sources(release, "csrc/tinygemm2.cu"))
        assert "TILE_N = 8;" in tiny and "dim3 grid(tiles_m, tiles_n);" in tiny
        assert "int input_features = input.shape()[1];" in tiny
        # A wait of a loop for the stage before it: where such a release must not come to one.
        row = next(row for row in OPS["tinygemm2"].rows if fits(row, release))
        old = "weight_ready = bar_try_wait(bar_ptr_wt, phase);"
        assert tiny.count(old) == (2 if row.limits("<=").get("k") == (4 * 256,) else 1)
        assert "TILE_K = 64;" in tiny and "STAGE_UNROLL = 4;" in tiny


@pytest.mark.parametrize("release", RELEASES)
def test_bmm_is_what_the_row_says(release, sources):
    text = flat(sources(release, "include/flashinfer/gemm/bmm_fp8.cuh"))
    assert "int64_t stride_a = m * k;" in text and "if (batch_size > 1)" in text
    assert "Unsupported combination: both A and B are e5m2" in text
    binding = flat(sources(release, "csrc/bmm_fp8.cu"))
    # A handle of either library will do: it is used as cuBLASLt's, which has no stream.
    if fits(OPS["bmm_fp8"].rows[0], release):
        assert "reinterpret_cast<cublasLtHandle_t>(cublas_handle)" in binding
    assert "cublasSetStream" not in binding + text
