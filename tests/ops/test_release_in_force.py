"""The release in force is one for every device, and what was learnt of kernels ends with them."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi
from fi_ffi.loader import generation, search
from fi_ffi.loader.fetch import wheels_lock
from fi_ffi.ops.call import compiled
from fi_ffi.ops.call.releases import fits, release_in_force
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.moe import kernels

from tests.helpers import xqa_calls
from tests.helpers.calls import HostArray
from tests.helpers.cases import default_dtypes, make_case
from tests.helpers.decode_calls import DecodeCall
from tests.helpers.inputs import inputs_of
from tests.helpers.moe_layers import a as layer
from tests.helpers.plan_calls import KINDS, SINGLES, Case, Single

RELEASES = ["0.6.3", "0.6.13", "0.6.18", "0.7.0", "0.7.2.post1"]
CHANGED = [name for name, op in OPS.items() if len(op.rows) > 1]


def case_of(name: str, rng):
    op = OPS[name]
    sizes = {**inputs_of(op.row).small, "seeds": 1, "offsets": 1, "page_size": 4}
    return op, make_case(op.row, sizes, default_dtypes(op.row), rng)


@pytest.mark.parametrize("release", RELEASES)
def test_ops_have_the_arguments_of_the_release(release, put_release):
    put_release("0.6.13")
    before = {name: op.row for name, op in OPS.items()}
    put_release(release)
    for name, op in OPS.items():
        fitting = [row for row in op.rows if fits(row, release)]
        assert op.row is (fitting or op.rows)[0]
        assert [*op.__signature__.parameters][:-1] == [arg.name for arg in op.row.given], name
    assert release == "0.6.13" or before != {name: op.row for name, op in OPS.items()}


def test_the_variable_is_followed_while_the_process_runs(monkeypatch, put_release, rng):
    """`supports` and plans read it each time; calls are of the release that these were of."""
    put_release("0.6.13")
    for release in [*rng.permutation([each for each in RELEASES if each != "0.6.13"]), ""]:
        monkeypatch.setenv("FI_FFI_RELEASE", release)
        assert fi_ffi.rmsnorm.supports(90).release == (release or search.default_release())
        assert fi_ffi.BatchDecodePlan.supports(90).release == (release or search.default_release())
        for op in OPS.values():
            fitting = [row for row in op.rows if fits(row, release_in_force())]
            assert op.row is (fitting or op.rows)[0]
        kept = generation.number
        assert fi_ffi.rmsnorm.supports(90, release="0.6.3").release == "0.6.3"
        assert generation.number == kept


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("kind", KINDS)
def test_plans_on_the_cpu_are_of_the_release(release, kind, monkeypatch, put_release):
    put_release("0.6.18")
    monkeypatch.setenv("FI_FFI_RELEASE", release)
    case = Case(kind)
    plan = case.plan()
    case.replan(plan)
    case.run(plan)
    case.check()
    assert plan.module.count("_planabi2") == (kind == "mla" and release >= "0.7.0")


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("op", SINGLES)
def test_single_requests_on_the_cpu_are_of_the_release(release, op, put_release):
    put_release(release)
    case = Single(op)
    case.run()
    case.check()


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("drafts", [1, 5])
def test_xqa_on_the_cpu_is_of_the_release(release, drafts, put_release, rng):
    put_release(release)
    spec = xqa_calls.Spec(queries=drafts, lengths=(5, 16, 300))
    assert xqa_calls.Batch(spec, rng).check(HostArray) <= 1


@pytest.mark.parametrize("name", CHANGED)
def test_calls_on_the_cpu_are_of_the_release(name, put_release, rng):
    for release in rng.permutation(RELEASES).tolist():
        put_release(release)
        op, case = case_of(name, rng)
        op(**case.arrays, **case.scalars)
        for out in case.expected:
            assert case.error(out, case.arrays[out])[1] <= 1, release


def test_a_seed_for_each_request_of_a_later_release(put_release, rng):
    put_release("0.7.2.post1")
    seeds = next(a for a in fi_ffi.sampling_from_probs.row.tensors if a.name == "maybe_seed_arr")
    put_release("0.6.13")
    one = next(a for a in fi_ffi.sampling_from_probs.row.tensors if a.name == "maybe_seed_arr")
    assert (one.axes, seeds.axes) == ("1", "seeds")
    put_release("0.7.2.post1")
    probs = rng.dirichlet(np.ones(50), 6).astype(np.float32)
    output = np.full(6, -1, np.int32)
    each = {"maybe_seed_arr": np.arange(6, dtype=np.uint64)}
    each["maybe_offset_arr"] = np.zeros(6, np.uint64)
    valid = np.zeros(6, bool)
    fi_ffi.sampling_from_probs(probs, output, valid=valid, **each)
    assert valid.all() and ((output >= 0) & (output < 50)).all()
    names = fi_ffi.top_k_renorm_probs.__signature__.parameters
    assert "is_deterministic" in names


@pytest.mark.parametrize("release", ["0.6.18.post1", "0.7.0"])
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_logarithms_of_requests_without_keys(kind, release, put_release, rng):
    """-5e4 before 0.7.0, and minus infinity from it on."""
    put_release(release)
    nothing = -np.inf if release == "0.7.0" else -5e4
    q = rng.standard_normal((2, 2, 64)).astype(np.float16)
    cache = rng.standard_normal((2, 3, 16, 1, 64)).astype(np.float16)
    tables = np.array([0, 0, 2], np.int32), np.array([2, 1], np.int32), np.array([0, 5], np.int32)
    o, lse = np.full_like(q, np.nan), np.full((2, 2), np.nan, np.float32)
    heads = {"num_qo_heads": 2, "num_kv_heads": 1, "page_size": 16, "device": "cpu"}
    if kind == "decode":
        plan = fi_ffi.BatchDecodePlan(*tables, head_dim=64, **heads)
        plan.run(q, *cache, o, lse)
    else:
        named = zip(
            ("paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len"), tables, strict=True
        )
        plan = fi_ffi.BatchPrefillPlan(
            np.array([0, 1, 2], np.int32), **dict(named), head_dim_qk=64, **heads
        )
        plan.paged_run(q, *cache, o, lse)
    assert (lse[0] == nothing).all() and (o[0] == 0).all()
    assert np.isfinite(lse[1]).all() and np.isfinite(o[1].astype(np.float32)).all()
    v, s = np.zeros((2, 1, 64), np.float16), np.full((2, 1), nothing, np.float32)
    merged, of_merged = np.full_like(v, np.nan), np.full_like(s, np.nan)
    fi_ffi.merge_state(v, s, v, s, merged, of_merged)
    assert (merged == 0).all() and (of_merged <= -4.9e4).all()
    assert np.isinf(of_merged).all() == (release == "0.7.0")


def test_the_first_kernels_decide(tmp_path, monkeypatch):
    """A folder of kernels that says its release, before the lock's default; a name before both."""
    folder = tmp_path / "flashinfer_jit_cache"
    (folder / "jit_cache" / "norm").mkdir(parents=True)
    (folder / "jit_cache" / "norm" / "norm.so").write_bytes(b"\x7fELF")
    (folder / "__init__.py").write_text('__version__ = "0.6.4+cu130"\n')
    try:
        fi_ffi.use_kernels(folder)
        assert release_in_force() == "0.6.4"
        assert fits(fi_ffi.rmsnorm_quant.row, "0.6.4")
        search.use_source(None)
        assert release_in_force() == "0.6.13"
        assert not fits(fi_ffi.rmsnorm_quant.row, "0.6.4")
        monkeypatch.setenv("FI_FFI_RELEASE", "0.6.18")
        generation.advance()
        assert release_in_force() == "0.6.18"
    finally:
        monkeypatch.undo()
        search.use_source(None)


def test_without_a_lock_the_first_forms_are_in_force(tmp_path, monkeypatch):

    monkeypatch.setenv("FI_FFI_LOCK", str(tmp_path / "none.lock"))
    wheels_lock.the_lock.cache_clear()
    try:
        generation.advance()
        assert fi_ffi.rmsnorm_quant.row is fi_ffi.rmsnorm_quant.rows[0]
    finally:
        monkeypatch.undo()
        wheels_lock.the_lock.cache_clear()
        generation.advance()


# ------------------------------------------------------------- what calls learn of kernels


@pytest.fixture
def asked(monkeypatch):
    """The names of entries that were looked for."""
    found = []
    for module in (compiled, kernels):
        real = module.entry_for
        monkeypatch.setattr(
            module,
            "entry_for",
            lambda row, *more, real=real: found.append(row.name) or real(row, *more),
        )
    generation.advance()
    yield found
    monkeypatch.undo()
    generation.advance()


def every_call(rng):
    """Calls of each kind of function, to make again and again."""
    op, case = case_of("rmsnorm", rng)
    yield lambda: op(**case.arrays, **case.scalars)
    made = DecodeCall(rng)
    yield lambda: fi_ffi.gdn_decode(**made.arrays, **made.options)
    half = np.zeros((2, 1, 1, 64), np.float16).astype("bfloat16")
    states, beta, out = (
        np.zeros(shape, half.dtype) for shape in ((2, 1, 64, 64), (2, 1, 1), half.shape)
    )
    yield lambda: fi_ffi.recurrent_kda(
        half, half.copy(), half.copy(), half.copy(), beta, initial_state=states, output=out
    )
    experts = layer("half")
    yield lambda: experts.call()
    q, k = np.zeros((1, 1, 64), np.float16), np.zeros((4, 1, 64), np.float16)
    yield lambda: fi_ffi.single_decode(
        q=q[0], k=k, v=k.copy(), tmp=np.zeros(1 << 20, np.uint8), o=np.empty_like(q[0])
    )


def test_what_was_learnt_ends_with_the_kernels(asked, rng):
    for call in every_call(rng):
        call()
        assert asked, "looked for by the first call"
        asked.clear()
        call()
        assert not asked, "kept by the second"
        generation.advance()
        call()
        assert asked, "and looked for again"
        asked.clear()


def test_cached_results_are_of_one_generation():
    seen = []

    @generation.cached
    def learn(of: int, *, more: int = 0) -> int:
        seen.append((of, more))
        return len(seen)

    assert [learn(1), learn(1), learn(2), learn(1, more=1)] == [1, 1, 2, 3]
    generation.advance()
    assert [learn(1), learn(1)] == [4, 4]


def test_one_who_follows_is_not_kept_alive():
    import gc
    import weakref

    class Learner:
        told = 0

        def forget(self) -> None:
            self.told += 1

    learner = Learner()
    generation.follow(learner)
    generation.advance()
    assert learner.told == 1
    gone = weakref.ref(learner)
    del learner
    gc.collect()
    assert gone() is None
    generation.advance()
