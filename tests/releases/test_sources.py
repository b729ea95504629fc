"""What rows say of kernels, against the kernels' own sources in each release.

`TEXTS` has what FlashInfer's files say that a row, a formula or a bound relies on; where a number
of a row stands in a source, a test of its own compares the two.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from fi_ffi import reference
from fi_ffi.loader.distributions import is_in
from fi_ffi.ops import on_host
from fi_ffi.ops.attention.backends import FP8_WINDOWS, decode_groups
from fi_ffi.ops.attention.rows import UNIFORM
from fi_ffi.ops.attention.sizes import BY_QUERY
from fi_ffi.ops.attention.values import OWN_STRIDES
from fi_ffi.ops.call.releases import GUARDED, fits
from fi_ffi.ops.call.row import KV_LAYOUTS, Row
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.matmul.rows import RUN_GEMM
from fi_ffi.ops.table import renorm, rope, sampling, topk

from tests.helpers.limits import limits
from tests.releases.bindings import RELEASES

each_release = pytest.mark.parametrize("release", RELEASES)
_TENSORRT = "csrc/nv_internal/tensorrt_llm/kernels"
_BLOCKSCALE = f"{_TENSORRT}/cutlass_kernels/fp8_blockscale_gemm/fp8_blockscale_gemm"
_FLAT = "include/flashinfer/flat/hopper/collective"
DELTA = f"{_FLAT}/flat_collective_tma_warpspecialized_delta_rule.hpp"

# By file, each text and how often it is there; None: at least once.  White space is single blanks.
TEXTS: dict[str, dict[str, int | None]] = {
    RUN_GEMM.source: {"workspace_ != nullptr": None},  # also where it has no use for it
    f"{_BLOCKSCALE}.cu": {
        "max_shape_m_4_align_ * div_up(shape_k, 128) * sizeof(float);": None,
        "std::max(max_shape_m_4_align_, int64_t(div_up(max_shape_m, 4) * 4))": None,
    },
    f"{_BLOCKSCALE}_kernel.cuh": {
        "MAX_SHAPE_K = 20480;": None,
        # Of the input, numbers of one piece of 128 columns lie together, for rows in fours.
        "make_2d_tma_scales_a_desc(scales_a, div_up(shape_m, 4) * 4, shape_k)": None,
        "Layout::ColMajor, div_up(shape_m, ScaleGranMA)": None,
        "scales[(size_t)scales_idx_x * stride_scale_dim_y + scales_idx_y]": None,
        # Of the weight, there is one for each 128 rows: not for each.
        "scales_b += ((tile_n_idx * TILE_N) / ScaleGranNB) * scales_b_ld;": None,
        "ScaleType::PerSubChannel, ScaleType::PerBlock, 1, 128, 128, 128>": None,
        # A weight is quantised by the largest value of some of its rows: it tests the row's number.
        "scales_idx_x * 128 + i * 32 + lane_id >= dim_x": None,
        # Without folders of headers nothing is compiled.
        "deep_gemm::jit::getGlobalCompiler().isValid()": None,
    },
    # The first adds to the output, the second does not; each reads 16 bytes at a time.
    "include/flashinfer/gemm/group_gemm.cuh": {
        "epilogue_op(1.0, 1.0);": None, "8, // Granularity": 2,
    },
    "include/flashinfer/gemm/group_gemm_sm90.cuh": {
        "Params(ElementAccumulator(1.f), ElementAccumulator(0.f))": None,
        "128 / cutlass::sizeof_bits<": 3,
        "exit(EXIT_FAILURE)": None,  # an error ends the process, so none may come
        "Row-major layout is not supported for fp8 data type": None,
    },
    "include/flashinfer/gemm/bmm_fp8.cuh": {
        "int64_t stride_a = m * k;": None, "if (batch_size > 1)": None, "cublasSetStream": 0,
        "Unsupported combination: both A and B are e5m2": None,
    },
    "csrc/bmm_fp8.cu": {"cublasSetStream": 0},
    "include/flashinfer/pos_enc.cuh": {
        # Bytes of a vector where there are kernels of a size's own; elsewhere elements of 2 bytes.
        "vec_size = std::max(16 / sizeof(DType), HEAD_DIM / 32);": 5,
        "vec_size = 32 / sizeof(DType);": 3,
        "bdx = (rope_dim + vec_size - 1) / vec_size;": 3,
        "if (threadIdx.x * vec_size < rotary_dim) {": None,
        "cos.load(cos_sin_cache + (pos * rotary_dim) + vec_idx);": None,
        "dim3 nblks(nblks_x, num_qo_heads + num_kv_heads);": None,
        "dim3 nblks(nblks_x, total_blocks_y);": None,
    },
    "csrc/rope.cu": {
        # Strides in 32 bits, one cache's for both, and int32 indices.
        "const uint32_t q_rope_in_stride_n = q_rope_in.stride(0);": None,
        "size_t q_stride_n = q.stride(0);": None, "uint32_t q_stride_n": 0,
        " k_strides.data()": None, " v_strides.data()": 0,
        **{f"static_cast<int32_t*>({name}.data_ptr())": None
           for name in ("kv_indices", "kv_indptr", "batch_indices", "positions")},
    },
    "include/flashinfer/sampling.cuh": {
        "batch_size * num_slices * sizeof(PartialSoftmaxResult)": None,
    },
    "include/flashinfer/topk.cuh": {
        "std::min(static_cast<uint32_t>(num_sms) / ctas_per_group": None,
    },
    "jit/activation.py": {
        "16 / sizeof(c_type)": None, "config.gridDim = num_tokens;": None,
        "int d = input.size(input.ndim() -1) / 2;": None,
    },
    "include/flashinfer/attention/cascade.cuh": {
        "vec_size = std::max(16U / sizeof(DTypeIn), HEAD_DIM / 32U);": None,
        "vec_size = std::max(16U / sizeof(DType), HEAD_DIM / 32U);": None,
        "uint32_t bdy = num_heads; dim3 nblks(seq_len); dim3 nthrs(bdx, bdy);": None,
        "constexpr uint32_t num_threads = 128;": None,
        "v_a + (pos * num_heads + head_idx) * head_dim": None,
        "uint32_t pos = blockIdx.x;": None,
    },
    "include/flashinfer/concat_mla.cuh": {
        "constexpr int MLA_HEAD_CHUNK_SIZE = 16;": None,  # and so 112 is the last one's head
        "head_row0 * k_stride_1": None, "const int k_stride_1": None,
        "flat_warp_id = (blockIdx.x * blockDim.x + threadIdx.x) / 32;": None,
    },
    "include/flashinfer/quantization.cuh": {
        "const dim3 nthrs(256); const dim3 nblks(ceil_div(num_elements, nthrs.x * 8));": None,
        "const dim3 nblks(batch_size);": None,
    },
    f"{_TENSORRT}/quantization.cuh": {
        "#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ >= 1000)": None,
    },
    "include/flashinfer/fastdiv.cuh": {"void divmod(uint32_t n,": None},
    "csrc/page.cu": {"k/v strides must be identical": None},
}  # fmt: skip
# The same, of the files of one op, in releases that have it.
TEXTS_OF_OPS: dict[str, dict[str, dict[str, int | None]]] = {
    "gdn_prefill": {
        "include/flashinfer/flat/prefill/prefill_kernel_delta_rule_sm90.cuh": {
            "using TileShape = Shape<_64, _64, _128>;": None,
        },
        DELTA: {
            # States are laid out for the head size that was compiled, in integers of 32 bits.
            "make_layout(make_shape(Int<HeadSizeQK>{}, Int<HeadSizeV>{}, num_state_heads,": 2,
            "int num_state_heads = problem_size": None,
            # The first tile is waited for, whether or not there is one.
            "kv_load(tKVrKV); compute_loop_body(0,": None,
        },
        # A descriptor, of 16 numbers of 64 bits, for each multiprocessor.
        f"{_FLAT}/flat_collective_store.hpp": {"sizeof(cute::TmaDescriptor) * sm_count": None},
    },
    "tinygemm2": {
        "csrc/tinygemm2.cu": {
            "TILE_N = 8;": None, "dim3 grid(tiles_m, tiles_n);": None, "TILE_K = 64;": None,
            "STAGE_UNROLL = 4;": None, "int input_features = input.shape()[1];": None,
        },
    },
    "fused_qk_rmsnorm_rope": {
        # What ends the process, and the parts of a table.
        "include/flashinfer/norm/fused_qk_rmsnorm_rope.cuh": {
            "FLASHINFER_FUSED_CHECK(attention_factor == 1.0f);": None,
            "FLASHINFER_FUSED_CHECK(offset == table_size);": None,
        },
    },
    "fused_dit_gate_residual_layernorm_gamma_beta": {
        "include/flashinfer/norm/fused_dit_layernorm.cuh": {
            "FLASHINFER_FUSED_LN_CHECK(hidden_size == 3072);": None,
        },
    },
    "nvfp4_kv_dequant": {
        "csrc/fp4_kv_dequantization.cu": {
            "smem_size = sizeof(float) + static_cast<size_t>(K / NVFP4_BLOCK_SIZE);": None,
            "cudaFuncSetAttribute": 0, "OutType* row_output = output + row * K;": None,
        },
    },
}  # fmt: skip


def row_of(name: str, release: str) -> Row | None:
    """The row of a release's kernel, where that is compiled from C++."""
    found = (row for row in OPS[name].rows if fits(row, release))
    return next((row for row in found if not row.is_in_python), None)


def rows_with(name: str, *more: str) -> list[Any]:
    """The releases that have an op, with its row."""
    found = [(release, row_of(name, release)) for release in (*RELEASES, *more)]
    return [pytest.param(release, row, id=release) for release, row in found if row is not None]


@pytest.fixture
def flat(sources):
    """A file's text with single blanks for white space."""
    return lambda release, file: " ".join(sources(release, file).split())


@each_release
def test_kernels_say_what_is_relied_on(release, flat):
    files = [*TEXTS.items()]
    for op, of_op in TEXTS_OF_OPS.items():
        files += of_op.items() if row_of(op, release) else ()
    for file, texts in files:
        text = flat(release, file)
        for wanted, times in texts.items():
            assert wanted in text if times is None else text.count(wanted) == times, (file, wanted)


EXPORTED = re.compile(r"EXPORT_TYPED_FUNC\(\s*\w+\s*,\s*(?:\w+::)*(\w+)\s*\)")
USES_CUDA = re.compile(r"get_stream|\bcu(?:da)?[A-Z]\w+\(")


def bodies(text: str, function: str) -> list[str]:
    """What stands between the braces of each definition of a function."""
    found = []
    for name in re.finditer(rf"{function}\(", text):  # a leading \b would be slow
        before = text[text.rindex("\n", 0, name.start()) + 1 : name.start()]
        brace, semicolon = text.find("{", name.end()), text.find(";", name.end())
        is_defined = brace >= 0 and not 0 <= semicolon < brace
        if is_defined and re.fullmatch(r"\w[\w:<>, *&]*[ *&]", before):
            found.append(text[brace : text.index("\n}", brace)])
    return found


@each_release
def test_guards(release, release_wheel):
    """Each export of a guarded source has its guard before it uses CUDA."""
    wheel = release_wheel(release)
    names = [name for name in wheel.members if re.fullmatch(r"csrc/\w+\.cuh?", name)]
    text = "\n".join(wheel.text(name) for name in names)
    for source in GUARDED & {*names}:
        functions = EXPORTED.findall(wheel.text(source))
        assert functions, source
        for function in functions:
            found = bodies(text, function)
            assert found, (source, function)
            for body in found:
                before, guard, _ = body.partition("CUDADeviceGuard ")
                assert guard and not USES_CUDA.search(before), (source, function)


def dispatched(sources, release: str) -> tuple[int, ...]:
    """The head sizes that kernels are compiled for."""
    utils = sources(release, "include/flashinfer/utils.cuh")
    cases = utils[utils.index("#define DISPATCH_HEAD_DIM(") :].partition("#define DISPATCH_I")[0]
    return tuple(int(size) for size in re.findall(r"case (\d+):", cases))


@each_release
def test_pages(release, sources, flat):
    """What page.cuh compiles for, loads at a time, launches and counts in."""
    text = flat(release, "include/flashinfer/page.cuh")
    append = text[text.index("cudaError_t AppendPagedKVCache(") :]
    kv, mla = (row_of(f"append_paged_{of}kv_cache", release) for of in ("", "mla_"))
    assert dispatched(sources, release) == limits(kv, "in")["head_dim"]
    width = f"std::max({kv.vector.bytes} / sizeof(DType), HEAD_DIM / {kv.vector.threads})"
    threads = "uint32_t bdx = HEAD_DIM / vec_size; uint32_t bdy = num_heads;"
    assert f"vec_size = {width}; {threads}" in append and kv.block == ("num_kv_heads",)
    for of in ("ckv", "kpe"):
        assert f"HEAD_{of.upper()}_DIM = {limits(mla, 'in')[f'head_dim_{of}'][0]};" in append
    # Two elements, or 16 bytes: the row asks for 16 bytes of both.
    later = "std::max(uint32_t(16 / sizeof(DType)), uint32_t(HEAD_CKV_DIM / 128));"
    assert ("vec_size = 2;" in append) != (f"vec_size = {later}" in append)
    assert mla.vector.bytes == 16
    strides = re.findall(r"(\w+) stride_(?:page|n|h|page_ckv|page_kpe|n_ckv|n_kpe);", text)
    assert set(strides) == {"uint32_t"} and len(strides) == 7
    strides = {arg.stride_limit for row in (kv, mla) for arg in row.tensors if arg.writes}
    assert strides == {2**32}
    codes = re.findall(r"k(NHD|HND) = (\d)U", sources(release, "include/flashinfer/layout.cuh"))
    assert {name: int(code) for name, code in codes} == KV_LAYOUTS


@each_release
def test_norms_clamp_as_the_row_says(release, sources):
    """The one thing that changed in what an op computes and not in its arguments."""
    fixed = "fminf(output_vec[j], 448.0f)" in sources(release, "include/flashinfer/norm.cuh")
    assert fixed == (row_of("rmsnorm_quant", release).variant == "")


@pytest.mark.parametrize(("release", "row"), rows_with("fused_qk_rmsnorm_rope"))
def test_norms_with_rope(release, row, sources):
    text = sources(release, "include/flashinfer/norm/fused_qk_rmsnorm_rope.cuh")
    assert "int MAX_HEADS = 32" in text and limits(row, "<=")["num_heads_q"] == (32,)
    sizes = [size for size in (32, 64, 128, 256, 512) if f"case {size}:" in text]
    assert (*sizes,) == limits(row, "in")["head_dim"]


NAME = "fused_dit_gate_residual_layernorm_gamma_beta"


@pytest.mark.parametrize(("release", "row"), rows_with(NAME))
def test_kernels_of_diffusion_transformers(release, row, flat):
    """The parts of a table, and the order of modes."""
    text = flat(release, "include/flashinfer/norm/fused_dit_layernorm.cuh")
    (gate,) = (arg for arg in row.tensors if arg.name == "gate")
    assert f"constexpr int gate_shift_scale_stride = {gate.parts};" in text
    modes = text[text.index("enum class FusedLayerNormMode {") :].partition("}")[0]
    order = ["GATE_RESIDUAL_GAMMA_BETA", "RESIDUAL_SCALE_SHIFT", "GATE_RESIDUAL_SCALE_SHIFT"]
    found = [word.strip(" ,") for word in modes.partition("{")[2].split(",")]
    assert [word for word in found if word] == order


@each_release
def test_rope(release, sources, flat):
    """Head sizes, where the sizes of a grid come from, and tokens of no request."""
    text, sizes = flat(release, "include/flashinfer/pos_enc.cuh"), dispatched(sources, release)
    assert sizes == rope._HEAD_DIMS and rope.WIDE == 32 // 2
    assert f"if ({' || '.join(f'head_dim == {size}' for size in sizes)}) {{" in text
    heads = "(num_qo_heads + num_kv_heads)"
    assert f"nblks_x = batch_size * {heads};" in text or f"nblks(batch_size * {heads});" in text
    is_older = tuple(map(int, release.split(".")[:3])) < (0, 6, 8)
    assert is_older == ("if (batch_indices[idx] >= 0)" not in text)
    row = OPS["rope_quantize_append_paged_kv_cache"].row
    (doc,) = (arg.doc for arg in row.tensors if arg.name == "batch_indices")
    assert "since FlashInfer 0.6.8" in doc


@pytest.mark.parametrize(("release", "row"), rows_with("gdn_prefill", "0.6.7", "0.6.8"))
def test_the_gated_delta_rule(release, row, flat):
    """Sizes and limits; checkpoints are kept as the helper counts them."""
    delta = flat(release, DELTA)
    assert limits(row, "in") == {"head_size": (128,)}
    assert "total_seq_len >= num_seqs" in row.requires
    states = [arg for arg in row.tensors if arg.name in ("input_state", "output_state")]
    assert [arg.offset_limit for arg in states] == [2**31] * 2
    assert [arg.bytes_per_multiprocessor for arg in row.tensors if "workspace" in arg.name] == [128]
    assert bool(row.together) == ("checkpoint_every_n_tokens" in delta)
    if row.together:  # neither the first tile nor the last has to be full
        store = "{ kv_checkpoint_store(ckpt_count"
        assert f"if (ckpt_blk_interval == 1) {store}++);" in delta
        assert f"if (num_blocks % ckpt_blk_interval == 0) {store});" in delta
        assert "num_blocks = ceil_div(work_desc.seq_len, get<0>(TileShape{}));" in delta


@each_release
def test_block_scaled_products(release, flat, interface):
    assert limits(RUN_GEMM, "<=")["k128"] == (20480 // 128,)
    text = flat(release, f"{_BLOCKSCALE}.cu")
    assert text.count("max_shape_m_4_align_ * shape_k * sizeof(__nv_fp8_e4m3)") >= 2
    init = interface(release).of(RUN_GEMM.source, "", "init").signature
    assert init.result == "ffi.Module" and not init.params
    # A handle of either library will do: it is used as cuBLASLt's, which has no stream.
    if fits(OPS["bmm_fp8"].rows[0], release):
        bmm = flat(release, "csrc/bmm_fp8.cu")
        assert "reinterpret_cast<cublasLtHandle_t>(cublas_handle)" in bmm
    for name in ("mxfp8_quantize", "fp4_quantize"):
        assert all(major >= 10 for major in row_of(name, release).capabilities)
    if row := row_of("nvfp4_kv_dequant", release):
        assert limits(row, "<=")["blocks"] == (48 * 1024 - 4,) and row.offset_limit == 2**31


ROUTERS = ("mm_M1_16_K7168_N256", "mm_M1_16_K7168_N128", "mm_M1_16_K6144_N256")


@each_release
def test_routers_and_small_products(release, flat):
    text = flat(release, "csrc/dsv3_router_gemm.cu")
    for row in filter(None, (row_of(name, release) for name in ROUTERS)):
        hidden, experts = row.tensors[1].axis_names
        arguments = re.search(rf"void {row.symbol}\(.*?generic_router_gemm_op<(.*?)>", text)[1]
        kind = "float" if row.tensors[2].dtype == "float32" else "__nv_bfloat16"
        assert arguments.startswith(f"{kind},") and arguments.endswith(", 1, 16")
        assert f", {experts}, " in arguments
        assert hidden in (arguments if "kHiddenDim, int kBegin" in text else text)
        assert row.requires == ("n <= 16",)
    if row := row_of("tinygemm2", release):
        # A wait of a loop for the stage before it: where such a release must not come to one.
        waits = flat(release, "csrc/tinygemm2.cu").count(
            "weight_ready = bar_try_wait(bar_ptr_wt, phase);"
        )
        (most,) = [rule.condition for rule in row.rules] or [""]
        assert waits == (2 if most == f"k <= {4 * 256}" else 1)


@each_release
def test_activations(release, flat):
    """Whole vectors of 16 bytes, or the widest that a half is a multiple of."""
    launcher, row = flat(release, "jit/activation.py"), row_of("silu_and_mul", release)
    needs_vectors = "uint32_t vec_size = 16 / sizeof(c_type);" in launcher
    assert needs_vectors != ("if (d % max_vec_size == 0)" in launcher)
    assert limits(row, "%") == ({"d": (16 // 2,)} if needs_vectors else {})
    assert row.vector.bytes == 16


@each_release
def test_states(release, flat, sources):
    """Threads, what is merged of empty states, and 32-bit offsets."""
    text = flat(release, "include/flashinfer/attention/cascade.cuh")
    for name in ("merge_state", "merge_state_in_place", "merge_states"):
        row = row_of(name, release)
        assert (row.vector.threads, row.vector.bytes, row.offset_limit) == (32, 16, 2**32)
        assert bool(row.variant) == ("max(s_a_val - s_max, -math::inf)" in text)
    large = text[text.index("if (num_index_sets >= seq_len) {") :]
    assert large.index("dim3 nblks(seq_len, num_heads);") < large.index("uint32_t bdy = num_heads;")
    has_5e4 = "constexpr float inf = 5e4;" in sources(release, "include/flashinfer/math.cuh")
    assert has_5e4 == (row_of("merge_states", release).variant == "")
    assert has_5e4 != is_in(release, reference._HAVE_INFINITY)


@each_release
def test_attention_that_later_releases_have(release, sources):
    """Groups of heads that decode is for, fa3's windows with fp8, and how partial results count."""
    text = sources(release, "include/flashinfer/utils.cuh")
    groups = re.findall(r"constexpr size_t GROUP_SIZE = (\d+);", text)
    assert decode_groups(release) == [*map(int, groups)]
    loop = sources(release, "include/flashinfer/attention/hopper/quantization/mainloop_mma.cuh")
    has_windows = "for (; kv_tile_idx > swa_begin_kv_tile_idx; --kv_tile_idx) {" in loop
    assert is_in(release, FP8_WINDOWS) == has_windows
    prefill = sources(release, "include/flashinfer/attention/prefill.cuh")
    assert is_in(release, OWN_STRIDES) == ("entry_idx * sf_stride_n + sf_smem_col" in prefill)
    planner = sources(release, "include/flashinfer/attention/scheduler.cuh")
    assert is_in(release, UNIFORM) == ("batch_size * ceil_div(packed_uniform_len" in planner)
    assert is_in(release, BY_QUERY) == ("num_qo_heads * max_partial_rows * head_dim_vo" in planner)


@each_release
def test_keys_put_together_and_bits(release, sources):
    text, row = (
        sources(release, "include/flashinfer/concat_mla.cuh"),
        row_of("concat_mla_k", release),
    )
    names = {"MLA_NUM_LOCAL_HEADS": "num_heads", "MLA_QK_NOPE_HEAD_DIM": "nope_dim",
             "MLA_QK_ROPE_HEAD_DIM": "rope_dim"}  # fmt: skip
    for name, axis in names.items():
        assert f"constexpr int {name} = {limits(row, 'in')[axis][0]};" in text
    has_fp8 = "FP16_FP8(" in sources(release, "csrc/concat_mla.cu")
    assert has_fp8 == ("float8_e4m3fn" in row.dtypes["T"])
    assert limits(row_of("packbits", release), "<=") == {"n": ((2**31 - 1) * 256 * 8,)}


@each_release
def test_seeds(release, sources):
    """Whose seed an output has."""
    text = sources(release, "include/flashinfer/sampling.cuh")
    of_all, of_each = "seed_arr[0]", "seed_arr[bx * seed_stride]"
    for name in ("sampling_from_probs", "sampling_from_logits", "chain_speculative_sampling"):
        args = {arg.name: arg for arg in row_of(name, release).args}
        if "philox_seed" in args:
            assert of_all not in text and of_each not in text
        else:
            axes = args["maybe_seed_arr"].axes
            assert (axes == "1") == (of_all in text) == (of_each not in text)


FILTERS = {
    "top_k_sampling_from_probs": ("TopKSamplingFromProbKernel", "top_k_arr"),
    "min_p_sampling_from_probs": ("MinPSamplingFromProbKernel", "min_p_arr"),
    "top_p_sampling_from_probs": ("TopPSamplingFromProbKernel", "top_p_arr"),
    "top_k_top_p_sampling_from_probs": ("TopKTopPSamplingFromProbKernel", "top_k_arr"),
}


@each_release
def test_arrays_of_parameters(release, sources):
    """Read by output, or by row of the probabilities; k in the tokens' dtype."""
    text = sources(release, "include/flashinfer/sampling.cuh")
    for name, (function, array) in FILTERS.items():
        row = row_of(name, release)
        # From the kernel's parameters to the end of its body.
        body = re.search(rf"\b{function}\(\s*DType\* .*?\n}}\n", text, re.DOTALL)[0]
        by_output = any(rule.argument == f"maybe_{array}" for rule in row.rules)
        assert (f"{array}[bx]" in body) == by_output
        assert (f"{array}[row_idx]" in body) != by_output
        if array == "top_k_arr":
            assert "IdType* top_k_arr" in body
            assert next(arg for arg in row.tensors if arg.name == f"maybe_{array}").dtype == "I"


@each_release
def test_softmax_in_slices(release, sources):
    text = sources(release, "include/flashinfer/sampling.cuh")
    constants = dict(re.findall(r"constexpr uint32_t ([A-Z_]+) = (\d+);", text))
    names = ("SMALL_BATCH_THRESHOLD", "LARGE_VOCAB_THRESHOLD", "DEFAULT_SLICE_SIZE")
    ours = [sampling._SHARED_ROWS, sampling._SHARED_FROM, sampling._SLICE]
    assert [int(constants[name]) for name in names] == ours
    assert sampling._softmax_bytes({"n": 128, "h": 2**23}) == 2**20
    assert sampling._softmax_bytes({"n": 128, "h": 2**24}) == 2**21


WITH_WORKSPACE = [
    param for param in rows_with("top_p_renorm_probs")
    if param.values[1].tensors[-1].name == "workspace"
]  # fmt: skip


@pytest.mark.parametrize(("release", "row"), WITH_WORKSPACE)
def test_the_workspace_of_top_p_renorm(release, row, sources):
    """As FlashInfer's Python function makes it."""
    text = sources(release, "include/flashinfer/air_top_p.cuh")
    assert "BITS_PER_PASS = 11;" in text and renorm._BUCKETS == 2**11
    assert "dim3 grid(blockNum, batch_size);" in text and limits(row, "<=")["n"] == (2**16 - 1,)
    assert "probs[batchId * vocabSize + i]" in text and row.offset_limit == 2**31
    python = sources(release, "sampling.py")
    body = re.search(r"align256 = lambda.*?ws_size = \(.*?\n    \)\n", python, re.DOTALL)
    for n, h, of in itertools.product((1, 3, 100), (2048, 32000, 128256), (True, False)):
        known = {"batch_size": n, "vocab_size": h, "is_deterministic": of}
        exec(re.sub(r"^    ", "", body[0], flags=re.MULTILINE), known)
        assert on_host.top_p_renorm_workspace_size(n, h, of) == known["ws_size"]


@each_release
def test_rows_that_blocks_share(release, sources):
    """What a group of blocks has of the scratch, and what a block may choose of its own row."""
    text = sources(release, "include/flashinfer/topk.cuh")
    state = re.search(r"struct RadixRowState \{(.*?)\};", text, re.DOTALL)[1]
    fields = re.findall(r"^  (.*?)(?: \w+(?:\[\d+\])*);", state, re.MULTILINE)
    assert "histogram[3][256];" in state and fields[0] == "uint32_t"
    assert {*fields} <= {"uint32_t", "int", "float", "unsigned long long"}
    group = 4 * 3 * 256 + 8 * len(fields)
    assert renorm.ROW_STATES.alignment % (8 if "unsigned long long" in fields else 4) == 0
    found = re.search(r"MAX_DETERMINISTIC_CTAS_PER_GROUP = (\d+);", text)
    group += 2 * 4 * int(found[1]) if found else 0
    # Half as many groups as multiprocessors: enough for 400 of these.
    assert renorm.ROW_STATES.bytes >= 200 * group
    assert re.search(rf"FILTERED_TOPK_MAX_K = {topk.MOST_CHOSEN};", text)
