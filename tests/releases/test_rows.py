"""The declared rows and interfaces against the sources of every release of FlashInfer."""

from __future__ import annotations

import ast
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fi_ffi.catalogue.ahead_of_time import known_releases, recorded_releases, sha256_of
from fi_ffi.loader.distributions import is_in
from fi_ffi.loader.fetch.wheels_lock import the_lock
from fi_ffi.ops.call.releases import OLDEST, fits
from fi_ffi.ops.call.row import Row
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.matmul import rows as matmul
from fi_ffi.ops.states import gdn, kda
from fi_ffi.ops.table import ROWS, gemm_sm100
from tools.release.declared import ABSENT, FITS, UNCOVERED, answers, declared, why_refused
from tools.release.wheels import published

from tests.helpers import sampling
from tests.releases.bindings import RELEASES

each_release = pytest.mark.parametrize("release", RELEASES)


def test_every_release_is_known():
    """What pip finds now, from the oldest on, is recorded, and nothing else is."""
    sampling.only_in_full("asks the package index")
    found = published()
    newest = found.index(RELEASES[-1])
    assert found[found.index(OLDEST) : newest + 1] == RELEASES == known_releases()
    assert {*recorded_releases()} < {*RELEASES}


@each_release
def test_rows_are_what_the_release_declares(release, interface):
    """Types, names and results of every entry that a row or an interface is of."""
    found = answers(interface(release))
    for entry, answer in found.items():
        if answer == UNCOVERED:
            assert why_refused(entry.name, release), f"{entry.name}: no row is of {release}"
        else:
            what = f"{entry.name}: {answer}\nours {entry.form(release)}\ntheirs {entry.key}"
            assert answer in (FITS, ABSENT), what
    assert sum(answer == FITS for answer in found.values()) >= 100


@each_release
def test_the_sources_are_what_is_recorded(release, release_wheel, interface):
    """The wheel is the one that was read, and all of it was."""
    found = interface(release)
    assert release_wheel(release).sha256 == sha256_of(release)
    unread = {key.source.partition("/")[2].partition("/")[0] for key in found.unread}
    assert len(found.unread) <= 8 and not unread & {
        entry.key.source.partition("/")[2].partition("/")[0] for entry in declared()
    }


@each_release
def test_modules_of_other_gpus_declare_the_same(release, interface):
    """Of products: a module of its own, of a source of its name."""
    for row in gemm_sm100.ROWS:
        for module in {*row.modules.values()} if fits(row, release) else ():
            theirs = interface(release).of(f"csrc/{module}.cu", "", row.symbol)
            if theirs or release == the_lock().default_release:
                assert row.signature.same_types(theirs.signature), module


@each_release
def test_workspaces_of_products_are_what_the_release_declares(release, interface):
    """Methods that no row is of, and that `fi_ffi.ops.matmul` calls."""
    methods = {
        name.rpartition(".")[2]: function.signature
        for name, function in interface(release).of_source(matmul.RUN_GEMM.source).items()
    }
    size = methods["get_workspace_size"]
    assert (size.params, size.result) == (("int",) * 3, "int")
    assert methods["configure_workspace"].params == ("DLTensor*",)


# Of later releases than the default.
LATER = {"nvfp4_quantize_append_paged_kv_cache_with_slot_mapping"}


def test_first_rows_are_of_the_default_release():
    for name, op in OPS.items():
        assert fits(op.rows[0], the_lock().default_release) == (name not in LATER)


def test_no_release_fits_two_forms_of_an_entry():
    for entry in declared():
        for release in (*RELEASES, "0.6.19", "0.8.0"):
            fitting = [form for form in entry.forms if is_in(release, form.releases)]
            assert len(fitting) <= 1, (entry.name, release)
    assert len(ROWS) == sum(len(op.rows) for op in OPS.values())


def test_settling_on_a_release_changes_what_the_op_takes():
    op = OPS["rmsnorm_quant"]
    out = np.zeros((2, 8), ml_dtypes.float8_e4m3fn)
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
        op.forget()
    assert fits(op.row, the_lock().default_release)


# What kernels in CuTe DSL call what rows have other names for.
_CUTE_NAMES = {
    "h0_source": "state", "o": "output", "b_gate": "b", "h0_indices": "initial_state_indices",
    "h0_out_indices": "output_state_indices", "intermediate_states": "intermediate_states_buffer",
    "init_state": "input_state", "tensormaps": "workspace_buffer",
}  # fmt: skip


def launched(text: str, function: str) -> list[str]:
    """The parameters of a function in CuTe DSL that are not compiled into it, by rows' names."""
    definitions = [
        node for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.name == function
        and any("cute.jit" in ast.unparse(of) for of in node.decorator_list)
    ]  # fmt: skip
    (found,) = definitions
    names = [
        arg.arg.removeprefix("g_") for arg in found.args.args
        if "Constexpr" not in ast.unparse(arg.annotation or ast.Constant(0))
    ]  # fmt: skip
    return [_CUTE_NAMES.get(name, name) for name in names if name not in ("self", "stream")]


def text_of(sources, release, row) -> str:
    return str(sources(release, row.source.removeprefix("flashinfer/")))


_PREFILL = [
    pytest.param(release, row, id=release)
    for release in RELEASES
    for row in OPS["gdn_prefill"].rows
    if fits(row, release) and row.is_in_python
]


@pytest.mark.parametrize(("release", "row"), _PREFILL)
def test_kernels_in_python_take_what_rows_say(release, row, sources):
    """Modules are compiled without those that a call has not: then the row has "None" for it."""
    wanted = launched(text_of(sources, release, row), "__call__")
    wanted = ["output_state" if name == "state" else name for name in wanted]
    assert [arg.name for arg in row.args] == wanted


_DECODE = [
    ("_run_wide_vec_t1", {"states": 1024}),
    ("_run_wide_vec", {"t": 2, "states": 1024}),
    ("run_gdn_decode_bf16state_mtp_ilp4", {}),
    ("run_gdn_decode_kernel_small_batch_pretranspose", {"state_dtype": "float32"}),
    ("run_gdn_verify_kernel_mtp", {"t": 2, "state_dtype": "float32", "states": 1024}),
    ("run_gdn_verify_kernel_mtp_inline", {"t": 2, "state_dtype": "float32", "keeps_each": True}),
    ("run_gdn_decode_kernel_big_batch_nontranspose",
     {"state_dtype": "float32", "state_layout": "KV", "is_indexed": False, "states": 1024}),
]  # fmt: skip


def row_of(compiled: dict[str, Any]) -> Row:
    kernel = gdn.GdnKernel(16, 32, **compiled)
    return gdn.row_of(kernel, kernel.names((9, 0), 132)[1])


_DECODED = [
    pytest.param(release, function, compiled, id=f"{release}-{function}")
    for release in RELEASES
    for function, compiled in _DECODE
    if fits(row_of(compiled), release)
]


@pytest.mark.parametrize(("release", "function", "compiled"), _DECODED)
def test_decoding_kernels_take_what_rows_say(release, function, compiled, sources):
    row = row_of(compiled)
    assert [arg.name for arg in row.args] == launched(text_of(sources, release, row), function)


_OF_KDA = {
    "h": "initial_state", "o": "output", "initialstatesource": "initial_state_source",
    "initialstateindices": "initial_state_indices", "alog": "A_log", "dtbias": "dt_bias",
    "cuseqlens": "cu_seqlens", "ssmstateindices": "ssm_state_indices",
    "numacceptedtokens": "num_accepted_tokens", "cu": "cu_seqlens", "ssm_idx": "ssm_state_indices",
    "nat": "num_accepted_tokens", "state": "initial_state", "src": "initial_state_source",
    "src_idx": "initial_state_indices", "out": "output", "a_log": "A_log",
    "stride_q": "g_stride_q",
}  # fmt: skip


_KDA = [
    pytest.param(release, kernel, function, id=f"{release}-{function}-{kernel.is_packed:d}")
    for release in RELEASES
    for kernel, function in (
        (kda.KdaKernel(), "recurrent_kda_launch"),
        (kda.KdaKernel(is_packed=True), "recurrent_kda_launch"),
        (kda.KdaKernel(t=3), "_grouped_kda_host"),
    )
    if fits(kda.row_of(kernel), release)
]


@pytest.mark.parametrize(("release", "kernel", "function"), _KDA)
def test_kimis_kernel_takes_what_the_row_says(release, kernel, function, sources):
    row = kda.row_of(kernel, kernel.names((9, 0))[1])
    found = launched(text_of(sources, release, row), function)
    wanted = [_OF_KDA.get(name, name) for name in (
        one.removeprefix("m").lower() if one.startswith("m") else one for one in found
    )]  # fmt: skip
    assert [arg.name for arg in row.args] == wanted
