"""Plans and calls with each release's forms of the rows, on the CPU.

The reference has the first form of each entry; here it is called through the form of another
release: what that has more must be given its neutral value, and what it lacks left out.
"""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest

import fi_ffi
from fi_ffi import reference
from fi_ffi.abi.function import library_function, register
from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.tensor import parse_device
from fi_ffi.loader import generation
from fi_ffi.loader.distributions import is_in
from fi_ffi.loader.runtime import ensure_tvm_ffi
from fi_ffi.ops.attention import plan
from fi_ffi.ops.attention.rows import BATCH_MLA, WITH_COPY
from fi_ffi.ops.call import compiled, forms
from fi_ffi.ops.call.forms import form_of, in_force
from fi_ffi.ops.plans import single
from fi_ffi.ops.plans.rows import FORMS, ROWS
from fi_ffi.reference.attention.formula import Options, exact

# One of each form that an entry has.
RELEASES = ["0.6.3", "0.6.12", "0.6.13", "0.6.14", "0.6.16", "0.6.18", "0.7.0", "0.7.2.post1"]
NEUTRAL = {"uniform_q_len": 0, "ckv_scale": 1.0, "kpe_scale": 1.0, "maybe_ckv_scale_arr": None}
HEADS, KV_HEADS, DIM, PAGE = 4, 2, 64, 4
QO, KV = [3, 1, 5], [9, 4, 13]
BOUND = 2.0**-9  # of the sum of |weight * value|: float16's rounding, and as much again

_numbers = count()


def first_form(row):
    """The first form, whatever dtypes a plan has left of it."""
    key = (row.module, row.symbol, row.variant)
    return next(known for known in ROWS if (known.module, known.symbol, known.variant) == key)


@pytest.fixture
def seen():
    """The names of what was called, and how many arguments of it the reference lacks."""
    return []


@pytest.fixture
def kernels_of(monkeypatch, seen):
    """Makes rows take the forms of a release, on the CPU as well, served by the reference."""

    def entry_for(row, device, module=None):
        first = first_form(row)
        inner = reference.entry(row.module, first.signature, row.reference, ())
        names = [arg.name for arg in row.args]

        def run(*values):
            given = dict(zip(names, values, strict=True))
            more = {name: given.pop(name) for name in names if name in NEUTRAL}
            first_names = [arg.name for arg in first.args]
            assert more == {name: NEUTRAL[name] for name in more}
            seen.append((row.name, row.releases, *more))
            if row.result != WITH_COPY:
                return inner(*(given.pop(name, None) for name in first_names))
            # What it would have copied stays in the stage.
            elsewhere = np.zeros(given["int_workspace_buffer"].shape, np.uint8)
            given["int_workspace_buffer"] = as_desc(elsewhere)
            info = inner(*(given.pop(name, None) for name in first_names))
            return library_function("ffi.Array")(info, elsewhere.size)

        name = f"fi_ffi.tests.release.{next(_numbers)}"
        return register(name, row.signature, run)

    def use(release):
        ensure_tvm_ffi()
        generation.advance()
        monkeypatch.setattr(compiled, "entry_for", entry_for)
        for user in (plan, single):
            monkeypatch.setattr(user, "in_force", lambda forms, device: form_of(forms, release))

    yield use
    generation.advance()


def assert_right(out, q, k, v, causal, scale=DIM**-0.5):
    right = exact(q, k, v, Options(scale, causal))
    assert (np.abs(out - right.out) <= BOUND * right.magnitude).all()  # false for NaN as well


def drawn(*shape):
    return np.random.default_rng().standard_normal(shape, np.float32).astype(np.float16)


def starts(counts):
    return np.cumsum([0, *counts]).astype(np.int32)


class Paged:
    """Requests' tokens in random pages, of any number of arrays."""

    def __init__(self, *tokens):
        pages = [-(-length // PAGE) for length in KV]
        self.indptr = starts(pages)
        self.indices = np.random.default_rng().permutation(sum(pages)).astype(np.int32)
        self.last = np.array([(length - 1) % PAGE + 1 for length in KV], np.int32)
        self.caches = [np.full((sum(pages), PAGE, *t.shape[1:]), np.nan, t.dtype) for t in tokens]
        where = starts(KV)
        for cache, rows in zip(self.caches, tokens, strict=True):
            for i, length in enumerate(KV):
                for token in range(length):
                    page = self.indices[self.indptr[i] + token // PAGE]
                    cache[page, token % PAGE] = rows[where[i] + token]


@pytest.mark.parametrize("backend", ["fa2", "fa3"])
@pytest.mark.parametrize("release", RELEASES)
def test_batch_prefill(release, backend, kernels_of, seen):
    kernels_of(release)
    qo, kv = starts(QO), starts(KV)
    q, (k, v) = drawn(sum(QO), HEADS, DIM), drawn(2, sum(KV), KV_HEADS, DIM)
    sizes = {"num_qo_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim_qk": DIM}
    more = {**sizes, "causal": True, "backend": backend, "device": "cpu"}
    paged = Paged(k, v)
    for is_paged in (False, True):
        out = np.full_like(q, np.nan)
        if is_paged:
            made = fi_ffi.BatchPrefillPlan(
                qo, paged_kv_indptr=paged.indptr, paged_kv_indices=paged.indices,
                paged_kv_last_page_len=paged.last, page_size=PAGE, **more,
            )  # fmt: skip
            made.paged_run(q, *paged.caches, out)
        else:
            made = fi_ffi.BatchPrefillPlan(qo, kv_indptr=kv, **more)
            made.ragged_run(q, k, v, out)
        for i in range(len(QO)):
            rows, keys = slice(*qo[i : i + 2]), slice(*kv[i : i + 2])
            assert_right(out[rows], q[rows], k[keys], v[keys], True)
    planned = [more for name, _, *more in seen if name == "batch_prefill.plan"]
    later = is_in(release, ">=0.6.16") and backend == "fa2"
    assert planned == [["uniform_q_len"] if later else []] * 2


@pytest.mark.parametrize("release", RELEASES)
def test_batch_decode(release, kernels_of):
    kernels_of(release)
    q, (k, v) = drawn(len(KV), HEADS, DIM), drawn(2, sum(KV), KV_HEADS, DIM)
    paged, out, kv = Paged(k, v), np.full_like(q, np.nan), starts(KV)
    made = fi_ffi.BatchDecodePlan(
        paged.indptr, paged.indices, paged.last, page_size=PAGE, num_qo_heads=HEADS,
        num_kv_heads=KV_HEADS, head_dim=DIM, device="cpu",
    )  # fmt: skip
    made.run(q, *paged.caches, out)
    for i in range(len(KV)):
        keys = slice(*kv[i : i + 2])
        assert_right(out[i : i + 1], q[i : i + 1], k[keys], v[keys], False)


@pytest.mark.parametrize("backend", ["fa2", "fa3"])
@pytest.mark.parametrize("release", RELEASES)
def test_batch_mla(release, backend, kernels_of, seen):
    kernels_of(release)
    q_nope, q_pe = drawn(sum(QO), 16, 512) / np.float16(8), drawn(sum(QO), 16, 64)
    ckv, kpe = drawn(sum(KV), 512), drawn(sum(KV), 64)
    paged, out, kv, qo = Paged(ckv, kpe), np.full_like(q_nope, np.nan), starts(KV), starts(QO)
    made = fi_ffi.BatchMlaPlan(
        qo, paged.indptr, paged.indices, np.array(KV, np.int32), num_heads=16, page_size=PAGE,
        q_data_type="float16", causal=True, device="cpu", backend=backend,
    )  # fmt: skip
    made.run(q_nope, q_pe, *paged.caches, out)
    for i in range(len(QO)):
        rows, keys = slice(*qo[i : i + 2]), slice(*kv[i : i + 2])
        q = np.concatenate([q_nope[rows], q_pe[rows]], 2)
        k = np.concatenate([ckv[keys], kpe[keys]], 1)[:, None]
        assert_right(out[rows], q, k, ckv[keys, None], True, 192**-0.5)
    assert {"batch_mla.plan", "batch_mla.run"} == {name for name, *_ in seen}


@pytest.mark.parametrize("release", RELEASES)
def test_single_requests(release, kernels_of):
    kernels_of(release)
    q, (k, v) = drawn(7, HEADS, DIM), drawn(2, 30, KV_HEADS, DIM)
    for backend in ("fa2", "fa3"):
        out = np.full_like(q, np.nan)
        tmp = np.zeros(2**16, np.uint8)
        fi_ffi.single_prefill(q, k, v, tmp, out, causal=True, backend=backend)
        assert_right(out, q, k, v, True)
    out = np.full_like(q[0], np.nan)
    fi_ffi.single_decode(q[0], k, v, tmp, out)
    assert_right(out[None], q[:1], k, v, False)


def mla_plan(kv_len):
    kv_len = np.array(kv_len, np.int32)
    pages = -(-kv_len // PAGE)
    fi_ffi.BatchMlaPlan(
        starts([1] * len(kv_len)), starts(pages), np.arange(pages.sum(), dtype=np.int32), kv_len,
        num_heads=16, page_size=PAGE, device="cpu",
    )  # fmt: skip


@pytest.mark.parametrize("release", RELEASES)
def test_mla_of_requests_without_keys(release, kernels_of):
    kernels_of(release)
    mla_plan([5, 1])
    if release == "0.6.3":
        with pytest.raises(fi_ffi.ArgumentError, match="0 for request 1.*before 0.6.11"):
            mla_plan([5, 0])
    else:
        mla_plan([5, 0])


@pytest.mark.parametrize("release", RELEASES)
def test_mla_of_another_batch(release, kernels_of):
    """What the planner leaves in the stage is sent with each plan: runs, and prepared ones."""
    kernels_of(release)
    made = None
    for lens in ([9, 4, 13], [30, 1, 2], [2, 2, 2]):
        keys = np.array(lens, np.int32)
        pages = -(-keys // PAGE)
        indices = np.random.default_rng().permutation(pages.sum()).astype(np.int32)
        batch = starts([1] * 3), starts(pages), indices, keys
        q_nope, q_pe = drawn(3, 16, 512) / np.float16(8), drawn(3, 16, 64)
        caches = drawn(len(indices), PAGE, 512), drawn(len(indices), PAGE, 64)
        out = np.full_like(q_nope, np.nan)
        if made is None:
            made = fi_ffi.BatchMlaPlan(
                *batch, num_heads=16, page_size=PAGE, q_data_type="float16", device="cpu"
            )
        else:
            made.replan(*batch)
        assert len(made.plan_info) == 8
        tensors = q_nope, q_pe, *caches, out
        for run, given in ((made.run, tensors), (fi_ffi.prepare(made.run, *tensors), ())):
            out[...] = np.nan
            run(*given)
            for i, length in enumerate(lens):
                at = indices[batch[1][i] : batch[1][i + 1]]
                ckv, kpe = (cache[at].reshape(-1, cache.shape[2])[:length] for cache in caches)
                q = np.concatenate([q_nope[i : i + 1], q_pe[i : i + 1]], 2)
                k = np.concatenate([ckv, kpe], 1)[:, None]
                assert_right(out[i : i + 1], q, k, ckv[:, None], False, 192**-0.5)


def test_a_gpu_s_rows_are_of_the_kernels_release(monkeypatch):
    rows = BATCH_MLA["fa2"]
    for release in RELEASES:
        monkeypatch.setattr(forms, "release_in_force", lambda release=release: release)
        found = tuple(in_force(FORMS[row], parse_device("cuda:0")) for row in rows)
        assert found == tuple(form_of(FORMS[row], release) for row in rows)
        assert tuple(in_force(FORMS[row], parse_device("cpu")) for row in rows) == found
    for row in rows:
        assert len({form_of(FORMS[row], release) for release in RELEASES}) == len(FORMS[row])
