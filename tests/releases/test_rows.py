"""The declared rows against the binding sources of each supported FlashInfer release."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from fi_ffi.abi.signature import Signature
from fi_ffi.loader.lock import the_lock
from fi_ffi.ops import mamba
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.matmul import rows as matmul
from fi_ffi.ops.moe import lora
from fi_ffi.ops.releases import fits
from fi_ffi.ops.table import ROWS, gemm_sm100, rope

from tests.helpers.rope_calls import APPLY, QUANTISE
from tests.releases.bindings import RELEASES, exported, methods, parameters


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
def test_modules_of_other_gpus_declare_the_same(release, sources):
    """Of products: a module of its own, of a source of its name."""
    for row in gemm_sm100.ROWS:
        for module in {*row.modules.values()} if fits(row, release) else ():
            declared = declared_by(release, replace(row, source=f"csrc/{module}.cu"), sources)
            if declared or release == the_lock().default_release:
                assert row.signature.same_types(declared[row.symbol]), module


@pytest.mark.parametrize("release", RELEASES)
def test_names_are_the_bindings(release, sources):
    """Of RoPE, but for the codes of words and layouts."""
    declared = parameters(sources(release, rope.SOURCE))
    rows = [OPS[name].row for name in (*APPLY, *QUANTISE)]
    for row in rows:
        wanted = [name.removesuffix("_code") for name in declared[row.symbol]]
        assert [arg.name for arg in row.args] == wanted
    assert {row.symbol for row in rows} == declared.keys()


@pytest.mark.parametrize("release", RELEASES)
def test_products_are_what_the_release_declares(release, sources):
    """The entries behind `fi_ffi.ops.matmul`, exported or methods of an object."""
    for symbol, source in {(row.symbol, row.source) for row in matmul.ROWS}:
        known = [row for row in matmul.ROWS if (row.symbol, row.source) == (symbol, source)]
        text = sources(release, source)
        if known[0].factory:
            found = {name: (made.signature, [*made.names]) for name, made in methods(text).items()}
        else:
            names = parameters(text)
            found = {name: (made, names[name]) for name, made in exported(text).items()}
        fitting = [row for row in known if fits(row, release)]
        if not fitting:
            assert symbol not in found
            continue
        (row,) = fitting
        assert row.signature.same_types(found[symbol][0])
        assert [arg.name for arg in row.args] == found[symbol][1]
    of_object = methods(sources(release, matmul.RUN_GEMM.source))
    size = of_object["get_workspace_size"].signature
    assert (size.params, size.result) == (("int",) * 3, "int")
    assert of_object["configure_workspace"].signature.params == ("DLTensor*",)


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
        op.select_release(None)
    assert fits(op.row, the_lock().default_release)


@pytest.mark.parametrize("release", RELEASES)
def test_states_are_what_the_release_declares(release, sources):
    """Of every kind of call: the entry of Mamba's modules, compiled for each."""
    for kind in ("one", "steps", "sequences"):
        row = mamba.row_of(kind, 1, 2)
        declared = exported(sources(release, row.source))[row.symbol]
        assert row.signature.same_types(declared) is fits(row, release)
        if fits(row, release):
            wanted = parameters(sources(release, row.source))[row.symbol]
            assert [arg.name for arg in row.args] == ["out" if n == "output" else n for n in wanted]


@pytest.mark.parametrize("release", RELEASES)
def test_adapters_are_what_the_release_declares(release, sources):
    for forms in (lora.SHRINK, lora.EXPAND):
        fitting = [row for row in forms if fits(row, release)]
        declared = declared_by(release, forms[0], sources)
        assert len(fitting) == (forms[0].symbol in declared)
        for row in fitting:
            assert row.signature.same_types(declared[row.symbol])
            names = parameters(sources(release, row.source))[row.symbol]
            assert [arg.name for arg in row.args] == names
