"""What rope rows say of the kernels, against the sources of each supported FlashInfer release."""

from __future__ import annotations

import re

import pytest

from fi_ffi.ops.functions import OPS
from fi_ffi.ops.table import rope

from tests.helpers.rope_calls import APPLY, QUANTISE
from tests.releases.bindings import RELEASES, parameters


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("release", RELEASES)
def test_names_are_the_bindings(release, sources):
    declared = parameters(sources(release, rope.SOURCE))
    for name in (*APPLY, *QUANTISE):
        row = OPS[name].row
        names = [arg.name for arg in row.args]
        wanted = declared[row.symbol]
        assert names == [word.removesuffix("_code") for word in wanted]
    assert {OPS[name].row.symbol for name in (*APPLY, *QUANTISE)} == declared.keys()


@pytest.mark.parametrize("release", RELEASES)
def test_kernels_are_what_the_rows_say(release, sources):
    """Head sizes, how much a thread has, and where the sizes of a grid come from."""
    text = flat(sources(release, "include/flashinfer/pos_enc.cuh"))
    utils = sources(release, "include/flashinfer/utils.cuh")
    dispatch = utils[utils.index("#define DISPATCH_HEAD_DIM(") :].partition("#define DISPATCH_I")[0]
    sizes = tuple(int(size) for size in re.findall(r"case (\d+):", dispatch))
    assert sizes == rope._HEAD_DIMS
    own = " || ".join(f"head_dim == {size}" for size in sizes)
    assert f"if ({own}) {{" in text
    # Bytes of a vector where there are kernels of a size's own; elements, of 2 bytes, elsewhere.
    assert text.count("vec_size = std::max(16 / sizeof(DType), HEAD_DIM / 32);") == 5
    assert text.count("vec_size = 32 / sizeof(DType);") == 3 and rope.WIDE == 32 // 2
    assert text.count("bdx = (rope_dim + vec_size - 1) / vec_size;") == 3
    assert "if (threadIdx.x * vec_size < rotary_dim) {" in text
    assert "cos.load(cos_sin_cache + (pos * rotary_dim) + vec_idx);" in text
    assert "dim3 nblks(nblks_x, num_qo_heads + num_kv_heads);" in text
    assert "dim3 nblks(nblks_x, total_blocks_y);" in text
    assert "nblks_x = batch_size * (num_qo_heads + num_kv_heads);" in text or (
        "dim3 nblks(batch_size * (num_qo_heads + num_kv_heads));" in text
    )


@pytest.mark.parametrize("release", RELEASES)
def test_entries_are_what_the_rows_say(release, sources):
    """Strides in 32 bits, one cache's for both, int32 indices, and tokens of no request."""
    text = flat(sources(release, "csrc/rope.cu"))
    quantise = text[text.index("void rope_quantize(") :]
    assert "const uint32_t q_rope_in_stride_n = q_rope_in.stride(0);" in quantise
    apply = text[: text.index("void rope_quantize(")]
    assert "size_t q_stride_n = q.stride(0);" in apply and "uint32_t q_stride_n" not in text
    append = text[text.index("void rope_quantize_append_paged_kv_cache(") :]
    assert " k_strides.data()" in append and " v_strides.data()" not in append
    for name in ("kv_indices", "kv_indptr", "batch_indices", "positions"):
        assert f"static_cast<int32_t*>({name}.data_ptr())" in append
    kernels = sources(release, "include/flashinfer/pos_enc.cuh")
    older = tuple(map(int, release.split(".")[:3])) < (0, 6, 8)
    assert older == ("if (batch_indices[idx] >= 0)" not in kernels)
    (doc,) = (a.doc for a in OPS[QUANTISE[1]].row.tensors if a.name == "batch_indices")
    assert "since FlashInfer 0.6.8" in doc
