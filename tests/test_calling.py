"""The record of entries that GPU tests called: which calls count, and under what names."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import Entry, global_function, probe
from fi_ffi.loader import search

from tests.helpers import calling
from tests.helpers.pinned import pinned_wheel, testing_library, tvm_ffi_loaded

__all__ = ["pinned_wheel", "testing_library", "tvm_ffi_loaded"]


@pytest.fixture
def calls(tmp_path, monkeypatch):
    monkeypatch.setattr(Entry, "__init__", Entry.__init__)  # put back afterwards
    gpu = SimpleNamespace(name="a GPU", capability=(9, 0))
    monkeypatch.setattr(calling, "gpus", lambda: [gpu])
    monkeypatch.setattr(search, "release", lambda: "0.6.13")
    made = calling.Calls(tmp_path)
    made.watch()
    return made


def report(calls: calling.Calls, passed: bool) -> None:
    """What pytest does after a test."""
    hook = calls.pytest_runtest_makereport(None, SimpleNamespace(when="call"))
    next(hook)
    with pytest.raises(StopIteration):
        hook.send(SimpleNamespace(get_result=lambda: SimpleNamespace(passed=passed)))


def called(calls: calling.Calls) -> dict:
    calls.pytest_sessionfinish()
    path = calls._folder / f"entries-called-{search.release()}.json"
    return json.loads(path.read_text())["entries"] if path.exists() else {}


def entry(code: int = 0) -> Entry:
    @ffi.callback("int(void *, const TVMFFIAny *, int32_t, TVMFFIAny *)")
    def address(handle, packed, count, result):
        return code

    made = Entry("rmsnorm", address, owner=address)
    made.name = "norm.rmsnorm"  # as the loader names it, after it was made
    return made


def invoke(one: Entry, count: int = 5) -> int:
    arguments, result = ffi.new("TVMFFIAny[]", 8), ffi.new("TVMFFIAny *")
    return one.address(one.handle, arguments, count, result)


def test_a_call_of_a_test_that_passed_counts(calls, monkeypatch):
    assert invoke(entry()) == 0
    report(calls, passed=True)
    assert called(calls) == {"norm": ["rmsnorm"]}
    # What another session called is added to it.
    other = entry()
    other.name = "norm.layernorm"
    invoke(other)
    report(calls, passed=True)
    assert called(calls) == {"norm": ["layernorm", "rmsnorm"]}
    # What it called of other kernels stays apart.
    monkeypatch.setattr(search, "release", lambda: "0.6.18")
    other.name, calls._passed = "norm.gemma_rmsnorm", set()
    invoke(other)
    report(calls, passed=True)
    assert called(calls) == {"norm": ["gemma_rmsnorm"]}


@pytest.mark.parametrize(
    ("code", "count", "passed"),
    [(0, 5, False), (-1, 5, True), (0, 512, True)],
    ids=["its test failed", "it failed", "a function that takes any arguments was asked for them"],
)
def test_what_does_not_count(calls, code, count, passed):
    assert invoke(entry(code), count) == code
    report(calls, passed=passed)
    report(calls, passed=True)
    assert called(calls) == {}


def test_asking_for_a_signature_does_not(calls, testing_library):
    one = global_function("testing.add_one")
    one.name = "norm.rmsnorm"
    assert probe(one).params == ("int",)
    report(calls, passed=True)
    assert called(calls) == {}
    assert one(1) == 2
    report(calls, passed=True)
    assert called(calls) == {"norm": ["rmsnorm"]}


def test_names():
    names = {
        "norm.rmsnorm", "fi_ffi.reference.norm.rmsnorm", "ffi.ArraySize", "run_moe",
        "gemm_sm90.cutlass_segment_gemm_sm90",
        "batch_mla_attention_dtype_q_f16_dtype_kv_f16_dtype_o_f16_dtype_idx_i32_head_dim_ckv_512_"
        "head_dim_kpe_64_profiler_False_sm90.run",
    }  # fmt: skip
    assert calling.by_family(names, "0.6.13") == [
        ("batch_mla:fa3", "run"),
        ("fused_moe", "run_moe"),
        ("gemm_sm90", "cutlass_segment_gemm_sm90"),
        ("norm", "rmsnorm"),
    ]
