"""The declared rows against the binding sources of each supported FlashInfer release."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fi_ffi.abi.signature import Signature
from fi_ffi.loader.lock import the_lock
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.releases import fits
from fi_ffi.ops.row import KV_LAYOUTS
from fi_ffi.ops.table import ROWS

from tests.releases.bindings import RELEASES, abi_type, exported, methods


def declared_by(release, row, sources) -> dict[str, Signature]:
    """What the row's source exports in a release, if that has it."""
    try:
        text = sources(release, row.source)
    except KeyError:
        return {}
    if row.factory:
        found = methods(text) if row.factory in exported(text) else {}
        return {name: method.signature for name, method in found.items()}
    # A template's entry has the name that it is filled in with.
    return exported(text.replace("{{ func_name }}", row.symbol))


@pytest.mark.parametrize("release", RELEASES)
def test_rows_are_what_the_release_declares(release, sources):
    for op in OPS.values():
        rows = [row for row in op.rows if fits(row, release)]
        if not rows:
            assert op.row.symbol not in declared_by(release, op.row, sources)
            continue
        assert len(rows) == 1, f"{op.__name__}: {len(rows)} rows for {release}"
        declared = declared_by(release, rows[0], sources)
        assert rows[0].signature.same_types(declared[rows[0].symbol]), release
        names = [arg.name for arg in rows[0].args]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("release", RELEASES)
def test_kernels_clamp_as_the_row_says(release, sources):
    """The one thing that changed in what an op computes and not in its arguments."""
    text = sources(release, "include/flashinfer/norm.cuh")
    fixed = "fminf(output_vec[j], 448.0f)" in text
    (row,) = [row for row in OPS["rmsnorm_quant"].rows if fits(row, release)]
    assert fixed == (row.variant == "")


@pytest.mark.parametrize("release", RELEASES)
def test_pages_are_what_the_rows_say(release, sources):
    """What page.cuh compiles for, loads at a time, launches and counts in."""
    text = " ".join(sources(release, "include/flashinfer/page.cuh").split())
    utils = sources(release, "include/flashinfer/utils.cuh")
    append = text[text.index("cudaError_t AppendPagedKVCache(") :]
    dispatch = utils[utils.index("#define DISPATCH_HEAD_DIM(") :].partition("#define DISPATCH_I")[0]
    rows = {
        name: next(row for row in OPS[name].rows if fits(row, release))
        for name in ("append_paged_kv_cache", "append_paged_mla_kv_cache")
    }
    kv, mla = rows.values()

    sizes = tuple(int(size) for size in re.findall(r"case (\d+):", dispatch))
    assert sizes == kv.limits("in")["head_dim"]
    width = f"std::max({kv.vector.bytes} / sizeof(DType), HEAD_DIM / {kv.vector.threads})"
    threads = "uint32_t bdx = HEAD_DIM / vec_size; uint32_t bdy = num_heads;"
    assert f"vec_size = {width}; {threads}" in append
    assert kv.block == ("num_kv_heads",)
    assert f"HEAD_CKV_DIM = {mla.limits('in')['head_dim_ckv'][0]};" in append
    assert f"HEAD_KPE_DIM = {mla.limits('in')['head_dim_kpe'][0]};" in append
    # Two elements, or 16 bytes: the row asks for 16 bytes of both.
    later = "std::max(uint32_t(16 / sizeof(DType)), uint32_t(HEAD_CKV_DIM / 128));"
    assert ("vec_size = 2;" in append) != (f"vec_size = {later}" in append)
    assert mla.vector.bytes == 16

    strides = re.findall(r"(\w+) stride_(?:page|n|h|page_ckv|page_kpe|n_ckv|n_kpe);", text)
    assert set(strides) == {"uint32_t"} and len(strides) == 7
    limits = {arg.stride_limit for row in rows.values() for arg in row.tensors if arg.writes}
    assert limits == {2**32}
    assert "void divmod(uint32_t n," in sources(release, "include/flashinfer/fastdiv.cuh")
    codes = re.findall(r"k(NHD|HND) = (\d)U", sources(release, "include/flashinfer/layout.cuh"))
    assert {name: int(code) for name, code in codes} == KV_LAYOUTS
    assert "k/v strides must be identical" in sources(release, "csrc/page.cu")


def test_first_rows_are_of_the_default_release():
    for op in OPS.values():
        assert fits(op.rows[0], the_lock().default_release)


def test_no_release_fits_two_rows_of_an_op():
    releases = [*RELEASES, "0.6.6", "0.6.7", "0.6.15", "0.6.15.post1", "0.6.16", "0.6.18.post1"]
    for op in OPS.values():
        for release in releases:
            assert sum(fits(row, release) for row in op.rows) <= 1, (op, release)
    assert len(ROWS) == sum(len(op.rows) for op in OPS.values())


def test_settling_on_a_release_changes_what_the_op_takes():
    import numpy as np

    op = OPS["rmsnorm_quant"]
    out = np.zeros((2, 8), op.row.dtypes and __import__("ml_dtypes").float8_e4m3fn)
    x, weight = np.ones((2, 8), np.float16), np.ones(8, np.float16)
    try:
        op.select_release("0.6.3")
        op(out, x, weight, 0.5)
        assert (out.astype(float) == 2).all()
        assert "scale (float)" in op.__doc__
        with pytest.raises(TypeError):
            op(out, x, weight, np.ones(1, np.float32))
        op.select_release("0.6.18")
        op(out, x, weight, np.array([0.25], np.float32))
        assert (out.astype(float) == 4).all()
    finally:
        op.select_release(None)
    assert fits(op.row, the_lock().default_release)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("TensorView", "DLTensor*"),
        ("ffi::Tensor", "ffi.Tensor"),
        ("const Optional<ffi::Tensor>&", "Optional<ffi.Tensor>"),
        ("Array<int64_t>", "Array<int>"),
        ("Optional<Array<int64_t>>", "Optional<Array<int>>"),
        ("double", "float"),
    ],
)
def test_types_as_tvm_ffi_prints_them(text, expected):
    assert abi_type(text) == expected


def test_the_parser_reads_a_real_binding_as_the_binary_does(sources, built_wheel):
    from fi_ffi.loader.kernels import open_source
    from fi_ffi.loader.runtime import file_signatures

    default = the_lock().default_release
    declared = exported(sources(default, "csrc/flashinfer_norm_binding.cu"))
    binary = file_signatures(Path(open_source(built_wheel).file("norm").path))
    assert declared == binary
