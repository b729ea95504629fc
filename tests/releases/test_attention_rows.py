"""The attention rows against the sources of each release, argument by argument."""

from __future__ import annotations

import pytest

import fi_ffi
from fi_ffi.loader.lock import the_lock
from fi_ffi.ops.attention.rows import FORMS, ROWS, of_release
from fi_ffi.ops.releases import FIRST, fits
from fi_ffi.ops.row import KvLayout, Row, Tensor

from tests.releases.bindings import RELEASES, added_parameters, exported, parameters

# Releases whose kernels can be called, the lock's and those around a change.
CALLABLE = [
    *RELEASES, "0.7.0", "0.7.1", "0.7.2",
    "0.6.9", "0.6.10", "0.6.10.post1", "0.6.11", "0.6.13.post1", "0.6.14", "0.6.15.post1",
    "0.6.16", "0.6.16.post4", "0.6.17", "0.6.18.post1",
]  # fmt: skip
IDS = [row.name + row.variant for row in ROWS]
# What bindings call the order of a cache's axes.
LAYOUT = ("layout", "kv_layout_code", "layout_code")


def of(release: str, first: Row) -> Row | None:
    """The row's form in a release, or None where it has none."""
    found = [form for form in FORMS[first] if fits(form, release)]
    assert len(found) <= 1, f"{len(found)} forms of {first.name} are of {release}"
    return found[0] if found else None


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("first", ROWS, ids=IDS)
def test_forms_are_what_the_release_declares(first, release, sources):
    modules = sources(release, "jit/attention/modules.py")
    backend = "fa3" if "fa3" in first.variant else "fa2"
    added = added_parameters(modules, first.module, backend, "fp8" in first.variant)
    binding = sources(release, first.source)
    # xqa has two wrappers in one source, and a macro that says which of them a module is.
    defines = {"MLA_WRAPPER": "1"} if first.module == "xqa_mla" else {}
    declared = exported(binding, added, **defines)[first.symbol]
    row = of(release, first)
    if row is None and first.variant == "_fp4":
        assert "maybe_k_cache_sf" not in {part.name for part in added}
        return
    assert row.signature.same_types(declared)
    names = parameters(binding, added, **defines)[first.symbol]
    for arg, name in zip(row.args, names, strict=True):
        assert name in LAYOUT if isinstance(arg, KvLayout) else name == arg.name
    dtypes = {part.name: part.dtype for part in added if part.dtype and part.name in names}
    ours = {arg.name: arg.dtype for arg in row.args if isinstance(arg, Tensor)}
    # Bytes for the binding; callers have them in the dtype that they are of.
    ours = {name: "uint8" if dtype == "SF" else dtype for name, dtype in ours.items()}
    assert dtypes == {name: ours[name] for name in dtypes}


@pytest.mark.parametrize("release", RELEASES)
def test_added_tensors_become_parameters_as_read_here(release, sources):
    """Which are optional is said by the generator's own text."""
    text = sources(release, "jit/attention/utils.py")
    assert 'f", Optional<ffi::Tensor> {var}"' in text
    assert 'if var.startswith("maybe")\n                else f", ffi::Tensor {var}"' in text


@pytest.mark.parametrize("release", RELEASES)
def test_where_mla_counts_in_32_bits(release, sources):
    """Its forms before 0.6.11 bound the caches' offsets, and need a key for each request."""
    widened = [
        "static_cast<int64_t>(packed_block_iter < packed_kv_bound ? indices[q] : 0)"
        in sources(release, f"include/flashinfer/attention/{name}.cuh")
        for name in ("mla", "mla_hopper")
    ]
    empty = "write_empty_o" in sources(release, "include/flashinfer/attention/mla.cuh")
    assert {*widened, empty} == {not release.startswith("0.6.3")}
    for first in (row for row in ROWS if row.name == "batch_mla.run"):
        row = of(release, first)
        if row is not None:
            caches = [arg for arg in row.tensors if arg.name in ("ckv_cache", "kpe_cache")]
            limits = {arg.offset_limit for arg in caches}
            assert limits == {2**63 if widened[0] else 2**32}


def test_the_first_forms_are_of_the_default_release():
    assert the_lock().default_release == FIRST
    assert all(fits(row, FIRST) for row in ROWS)


@pytest.mark.parametrize("release", CALLABLE)
@pytest.mark.parametrize("first", ROWS, ids=IDS)
def test_every_release_has_one_form(first, release):
    form = of(release, first)
    if form is None:
        assert first.variant == "_fp4"
        with pytest.raises(fi_ffi.KernelNotFoundError, match=">=0.6.10"):
            of_release(first, release)
        return
    assert of_release(first, release) is form


def test_a_release_that_has_none_is_told():
    first = next(row for row in ROWS if row.name == "batch_mla.plan")
    with pytest.raises(fi_ffi.KernelNotFoundError) as caught:
        of_release(first, "0.6.2")
    assert "batch_mla.plan can be called in FlashInfer >=0.6.3;" in str(caught.value)
    assert "the kernels in use are of 0.6.2" in str(caught.value)
