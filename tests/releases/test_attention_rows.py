"""The attention rows against the sources of each release, argument by argument."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import fi_ffi
from fi_ffi.loader.distributions import is_in
from fi_ffi.loader.fetch.wheels_lock import the_lock
from fi_ffi.ops.call.forms import form_of
from fi_ffi.ops.call.releases import FIRST, fits
from fi_ffi.ops.call.row import Row, Tensor
from fi_ffi.ops.plans.rows import BATCH_ATTENTION_FP4, FORMS, ROWS
from tools.release.generators import added_parameters

from tests.releases.bindings import RELEASES

# Forms that came later, each with what its release's sources then say, and where.
LATER = {
    "_fp4": ("maybe_k_cache_sf", "jit/attention/modules.py"),
    "_fa2_fp8": ("maybe_ckv_scale_arr", "csrc/batch_mla_run.cu"),
    "_fa3_fp8": ("ckv_scale", "csrc/batch_mla_sm90_run.cu"),
}


def of(release: str, first: Row) -> Row | None:
    """The row's form in a release, or None where it has none."""
    found = [form for form in FORMS[first] if fits(form, release)]
    assert len(found) <= 1, f"{len(found)} forms of {first.name} are of {release}"
    return found[0] if found else None


def has_one_scale(release: str, sources: Callable[[str, str], str]) -> bool:
    """Whether batch attention finds the scale of every token where the first one's is."""
    return "k_sf_stride_page = 0;" in sources(release, "csrc/batch_attention.cu")


@pytest.mark.parametrize("release", RELEASES)
def test_batch_attention_finds_scales(release, sources):
    """In the releases that its row for keys of 4 bits is of."""
    if of(release, BATCH_ATTENTION_FP4[1]) is not None:
        assert not has_one_scale(release, sources)
        kernel = sources(release, "include/flashinfer/attention/persistent.cuh")
        assert "page_produce_kv_sf<true, KTraits>" in kernel


@pytest.mark.parametrize("release", RELEASES)
def test_dtypes_are_what_generators_add(release, sources):
    """Of the tensors that a generator adds to a binding's parameters."""
    modules = sources(release, "jit/attention/modules.py")
    for first in ROWS:
        backend = "fa3" if "fa3" in first.variant else "fa2"
        added = added_parameters(modules, first.module, backend, "fp8" in first.variant)
        row = of(release, first)
        if row is None:
            word, path = LATER[first.variant]
            is_there = word in sources(release, path)
            if first is BATCH_ATTENTION_FP4[1]:
                is_there = is_there and not has_one_scale(release, sources)
            assert not is_there, first.name
            continue
        ours = {arg.name: arg.dtype for arg in row.args if isinstance(arg, Tensor)}
        # Bytes for the binding; callers have them in the dtype that they are of.
        ours = {name: "uint8" if dtype == "SF" else dtype for name, dtype in ours.items()}
        dtypes = {part.name: part.dtype for part in added if part.dtype and part.name in ours}
        assert dtypes == {name: ours[name] for name in dtypes}, first.name


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
    assert {*widened, empty} == {is_in(release, ">=0.6.11")}
    for first in (row for row in ROWS if row.name == "batch_mla.run"):
        row = of(release, first)
        if row is not None:
            caches = [arg for arg in row.tensors if arg.name in ("ckv_cache", "kpe_cache")]
            limits = {arg.offset_limit for arg in caches}
            assert limits == {2**63 if widened[0] else 2**32}


# What kernels read of arrays that no call compares with another: of each request, of each and one
# more, of each page, or of each head.
OF_REQUESTS = "kv_len_arr kv_len paged_kv_last_page_len maybe_prefix_len_ptr maybe_max_item_len_ptr"
ENDS_OF_REQUESTS = "qo_indptr kv_indptr indptr paged_kv_indptr maybe_mask_indptr"
LENGTHS = {
    **dict.fromkeys(OF_REQUESTS.split(), "b"), **dict.fromkeys(ENDS_OF_REQUESTS.split(), "b+1"),
    "paged_kv_indices": "num_indices", "kv_indices": "num_indices",
    "maybe_alibi_slopes": "num_qo_heads", "sink": "num_qo_heads", "maybe_scale_q": "num_qo_heads",
    "maybe_scale_k": "num_kv_heads", "maybe_scale_v": "num_kv_heads",
    "float_workspace_buffer": "float_bytes", "int_workspace_buffer": "int_bytes",
    "page_locked_int_workspace_buffer": "int_bytes", "empty_q_data": "0", "empty_kv_data": "0",
}  # fmt: skip
UNSIGNED = {"maybe_prefix_len_ptr": "uint32", "maybe_max_item_len_ptr": "uint16"}
ON_DEVICE = ("float_workspace_buffer", "int_workspace_buffer")  # of what a planner is given
FLOATS = ("maybe_alibi_slopes", "sink", "maybe_scale_q", "maybe_scale_k", "maybe_scale_v")


def test_arrays_are_as_long_as_there_are_requests_pages_or_heads():
    seen = set()
    for row in ROWS:
        for arg in row.tensors:
            if arg.name not in LENGTHS:
                continue
            seen.add(arg.name)
            is_bytes = "workspace" in arg.name or "empty" in arg.name
            dtype = "uint8" if is_bytes else "float32" if arg.name in FLOATS else "int32"
            assert (arg.axes, arg.dtype) == (LENGTHS[arg.name], UNSIGNED.get(arg.name, dtype))
            assert arg.writes == ("workspace" in arg.name)
            assert arg.host == (row.symbol == "plan" and arg.name not in ON_DEVICE)
    assert seen == {*LENGTHS}


def test_the_first_forms_are_of_the_default_release():
    assert the_lock().default_release == FIRST
    assert all(fits(row, FIRST) for row in ROWS if row.variant not in LATER)


@pytest.mark.parametrize("release", RELEASES)
def test_every_release_has_one_form(release):
    for first in ROWS:
        form = of(release, first)
        if form is None:
            since = ">=0.6.10" if first.variant == "_fp4" else ">=0.6.1[48]"
            with pytest.raises(fi_ffi.KernelNotFoundError, match=since):
                form_of(FORMS[first], release)
        else:
            assert form_of(FORMS[first], release) is form


def test_a_release_that_has_none_is_told():
    first = next(row for row in ROWS if row.name == "batch_mla.plan")
    with pytest.raises(fi_ffi.KernelNotFoundError) as caught:
        form_of(FORMS[first], "0.6.2")
    assert "batch_mla.plan can be called in FlashInfer >=0.6.3;" in str(caught.value)
    assert "the kernels in use are of 0.6.2" in str(caught.value)
