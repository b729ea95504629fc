"""What the rows of small kernels say of them, against each release's kernels."""

from __future__ import annotations

import pytest

from fi_ffi.ops.functions import OPS
from fi_ffi.ops.releases import fits
from fi_ffi.ops.row import Row

from tests.releases.bindings import RELEASES


def row_of(name: str, release: str) -> Row | None:
    return next((row for row in OPS[name].rows if fits(row, release)), None)


def plain(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("release", RELEASES)
def test_activations(release, sources):
    """Whole vectors of 16 bytes, or the widest that a half is a multiple of."""
    launcher = plain(sources(release, "jit/activation.py"))
    row = row_of("silu_and_mul", release)
    needs_vectors = "config.blockDim = std::min(d / vec_size, 1024U);" in launcher
    assert needs_vectors != ("if (d % max_vec_size == 0)" in launcher)
    assert row.limits("%") == ({"d": (16 // 2,)} if needs_vectors else {})
    assert "16 / sizeof(c_type)" in launcher and row.vector.bytes == 16
    assert "config.gridDim = num_tokens;" in launcher
    assert "int d = input.size(input.ndim() -1) / 2;" in launcher


@pytest.mark.parametrize("release", RELEASES)
def test_states(release, sources):
    """Head sizes, threads, what is merged of empty states, and 32-bit offsets."""
    text = plain(sources(release, "include/flashinfer/attention/cascade.cuh"))
    math = sources(release, "include/flashinfer/math.cuh")
    for name in ("merge_state", "merge_state_in_place", "merge_states"):
        row = row_of(name, release)
        assert row.vector.threads == 32 and row.vector.bytes == 16
        assert bool(row.variant) == ("max(s_a_val - s_max, -math::inf)" in text)
        assert row.offset_limit == 2**32
    launches = ("DTypeIn", "DType", "DTypeIn")
    for dtype in launches:
        assert f"vec_size = std::max(16U / sizeof({dtype}), HEAD_DIM / 32U);" in text
    assert "uint32_t bdy = num_heads; dim3 nblks(seq_len); dim3 nthrs(bdx, bdy);" in text
    large = text[text.index("if (num_index_sets >= seq_len) {") :]
    assert large.index("dim3 nblks(seq_len, num_heads);") < large.index("uint32_t bdy = num_heads;")
    assert "constexpr uint32_t num_threads = 128;" in large
    assert ("constexpr float inf = 5e4;" in math) == (row_of("merge_states", release).variant == "")
    assert "v_a + (pos * num_heads + head_idx) * head_dim" in text
    assert "uint32_t pos = blockIdx.x;" in text


@pytest.mark.parametrize("release", RELEASES)
def test_keys_put_together(release, sources):
    text = sources(release, "include/flashinfer/concat_mla.cuh")
    row = row_of("concat_mla_k", release)
    for name, axis in (
        ("MLA_NUM_LOCAL_HEADS", "num_heads"),
        ("MLA_QK_NOPE_HEAD_DIM", "nope_dim"),
        ("MLA_QK_ROPE_HEAD_DIM", "rope_dim"),
    ):
        assert f"constexpr int {name} = {row.limits('in')[axis][0]};" in text
    assert "constexpr int MLA_HEAD_CHUNK_SIZE = 16;" in text  # and so 112 is the last one's head
    assert "head_row0 * k_stride_1" in text and "const int k_stride_1" in text
    assert "flat_warp_id = (blockIdx.x * blockDim.x + threadIdx.x) / 32;" in text
    binding = sources(release, "csrc/concat_mla.cu")
    assert ("FP16_FP8(" in binding) == ("float8_e4m3fn" in row.dtypes["T"])


@pytest.mark.parametrize("release", RELEASES)
def test_bits(release, sources):
    text = plain(sources(release, "include/flashinfer/quantization.cuh"))
    assert "const dim3 nthrs(256); const dim3 nblks(ceil_div(num_elements, nthrs.x * 8));" in text
    assert row_of("packbits", release).limits("<=") == {"n": ((2**31 - 1) * 256 * 8,)}
    assert "const dim3 nblks(batch_size);" in text


def having(name: str) -> list[str]:
    """The releases that have an op."""
    return [release for release in RELEASES if row_of(name, release) is not None]


@pytest.mark.parametrize("release", having("fused_qk_rmsnorm_rope"))
def test_norms_with_rope(release, sources):
    """What ends the process, and the parts of a table."""
    row = row_of("fused_qk_rmsnorm_rope", release)
    text = sources(release, "include/flashinfer/norm/fused_qk_rmsnorm_rope.cuh")
    assert "int MAX_HEADS = 32" in text and row.limits("<=")["num_heads_q"] == (32,)
    sizes = [size for size in (32, 64, 128, 256, 512) if f"case {size}:" in text]
    assert (*sizes,) == row.limits("in")["head_dim"]
    assert "FLASHINFER_FUSED_CHECK(attention_factor == 1.0f);" in text
    assert "FLASHINFER_FUSED_CHECK(offset == table_size);" in text


@pytest.mark.parametrize("release", having("fused_dit_gate_residual_layernorm_gamma_beta"))
def test_kernels_of_diffusion_transformers(release, sources):
    """The parts of a table, and the order of modes."""
    row = row_of("fused_dit_gate_residual_layernorm_gamma_beta", release)
    text = plain(sources(release, "include/flashinfer/norm/fused_dit_layernorm.cuh"))
    (gate,) = (arg for arg in row.tensors if arg.name == "gate")
    assert f"constexpr int gate_shift_scale_stride = {gate.parts};" in text
    assert "FLASHINFER_FUSED_LN_CHECK(hidden_size == 3072);" in text
    modes = text[text.index("enum class FusedLayerNormMode {") :].partition("}")[0]
    order = ("GATE_RESIDUAL_GAMMA_BETA", "RESIDUAL_SCALE_SHIFT", "GATE_RESIDUAL_SCALE_SHIFT")
    found = [word.strip(" ,") for word in modes.partition("{")[2].split(",")]
    assert [word for word in found if word] == [*order]


@pytest.mark.parametrize("release", RELEASES)
def test_blocks_with_scales(release, sources):
    kernels = "csrc/nv_internal/tensorrt_llm/kernels/quantization.cuh"
    text = plain(sources(release, kernels))
    start = text.index("quantize_with_block_size(")
    body = text[text.index("{", start) :]
    assert body.startswith("{ #if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ >= 1000)")
    for name in ("mxfp8_quantize", "fp4_quantize"):
        assert all(major >= 10 for major in row_of(name, release).capabilities)
    row = row_of("nvfp4_kv_dequant", release)
    if row is not None:
        text = plain(sources(release, "csrc/fp4_kv_dequantization.cu"))
        assert "smem_size = sizeof(float) + static_cast<size_t>(K / NVFP4_BLOCK_SIZE);" in text
        assert row.limits("<=")["blocks"] == (48 * 1024 - 4,)
        assert "cudaFuncSetAttribute" not in text
        assert "OutType* row_output = output + row * K;" in text and row.offset_limit == 2**31
