"""benchmarks/host_calls.py: figures of calls that were checked, and none of others."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from fi_ffi.abi._cffi import ffi
from fi_ffi.loader import runtime
from fi_ffi.loader import tvm_ffi as libtvm_ffi
from fi_ffi.loader.tvm_ffi import Found

from tests.helpers.benchmarks import (
    Call,
    Timing,
    host_calls,
    kernels_replaced,
    measure,
    noop,
    replans,
    ways,
)

NAMES = [
    ways.EMPTY, ways.PREPARED, "prepared call, 3 new pointers, in a scope",
    "prepared call with a stream", "typed call, in a scope", ways.TYPED, ways.REPEATED,
    "typed call, 2 TensorDescs made, other lengths", ways.NUMPY_REPEATED,
    "typed call, numpy arrays (CPU), other lengths", "one TensorDesc made", "TensorDesc.rows",
    "TensorDesc.at", ways.PLAN_TYPED,
    "plan.run, prepared (CPU: no stream)", *replans.REPLANS.values(), *replans.FIRST_RUNS.values(),
]  # fmt: skip
OTHERS = {ways.REPEATED: NAMES[7], ways.NUMPY_REPEATED: NAMES[9]}
PROGRAM = host_calls.__file__
QUICK = ("--rounds", "3", "--calls", "20")


@pytest.fixture(autouse=True)
def no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """tvm_ffi is not brought into the process of the tests."""
    monkeypatch.setattr(host_calls, "find_peer", lambda: ways.Peer(None, "not looked for"))


@pytest.fixture
def calls() -> dict[str, Call]:
    runtime.ensure_tvm_ffi()
    return {call.name: call for call in ways.own_calls()}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The program's output, of both kinds."""

    def run(*arguments: object, code: int = 0) -> str:
        assert host_calls.main([*map(str, arguments)]) == code
        printed = capsys.readouterr()
        return printed.out + printed.err

    return run


def test_every_call_has_a_figure_and_ratios(run: Callable[..., str]) -> None:
    document = json.loads(run(*QUICK, "--json"))
    assert [row["call"] for row in document["results"]] == NAMES
    assert document["not_shown"] == {}
    assert (document["rounds"], document["calls"]) == (3, 20)
    assert {*document["machine"]} >= {"python", "cpu", "libtvm_ffi"}
    for row in document["results"]:
        assert len(row["rounds"]) == 3
        assert row["ns"] == sorted(row["rounds"])[1] > 0
        assert row["of_empty"] > 0
        assert row["of_tvm_ffi"] is None
        assert (row["of_repeated"] is None) == (row["call"] not in OTHERS.values())
    assert document["results"][0]["of_empty"] == 1


def test_a_table(run: Callable[..., str]) -> None:
    text = run(*QUICK)
    assert all(name in text for name in NAMES)
    assert "3 x 20 calls" in text


def test_it_fails_on_a_ratio_alone(run: Callable[..., str]) -> None:
    # A prepared call is the empty one and more.
    text = run(*QUICK, "--fail-above", 1, code=1)
    assert f"Error: {ways.PREPARED}: " in text
    assert "and 1 is the most" in text
    run(*QUICK, "--fail-above", 1e6)


def test_it_fails_where_other_lengths_take_longer(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ratios stand in for those measured: a test is not to fail by the machine's speed."""
    ratios = dict.fromkeys(OTHERS, 1.5)

    def ratio(timing: Timing, other: Timing) -> float:
        return ratios[other.call.name] if timing.call.repeated == other.call.name else 1

    monkeypatch.setattr(Timing, "ratio", ratio)
    run(*QUICK, "--fail-above-repeated", 1.5)
    ratios[ways.NUMPY_REPEATED] = 1.51
    text = run(*QUICK, "--fail-above-repeated", 1.5, code=1)
    expected = "1.51 times the repeated length, and 1.5 is the most"
    assert f"Error: {OTHERS[ways.NUMPY_REPEATED]}: {expected}\n" in text
    assert f"{OTHERS[ways.REPEATED]}: 1" not in text
    run(*QUICK)


def test_lengths_are_others_in_each_call(calls: dict[str, Call]) -> None:
    """And the arrays that they are slices of are nowhere written, so they take no memory."""
    for repeated, name in OTHERS.items():
        assert calls[name].statement == calls[repeated].statement
        lengths, same = (calls[of].names["lengths"] for of in (name, repeated))
        assert len({next(lengths) for _ in range(10_000)}) == 10_000
        assert len({next(same) for _ in range(10)}) == 1


def test_no_rounds_are_no_figures() -> None:
    with pytest.raises(SystemExit):
        host_calls.main(["--rounds", "0"])


def test_what_fails_its_check_is_not_shown(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong() -> list[Call]:
        return [
            dataclasses.replace(call, problem=lambda: "it is wrong")
            if call.name == ways.TYPED
            else call
            for call in ways.own_calls()
        ]

    monkeypatch.setattr(host_calls, "own_calls", wrong)
    text = run(*QUICK, "--json", code=1)
    document, _ = json.JSONDecoder().raw_decode(text)
    assert [row["call"] for row in document["results"]] == [n for n in NAMES if n != ways.TYPED]
    assert document["not_shown"] == {ways.TYPED: "it is wrong"}
    assert f"Error: not shown, because a check failed: {ways.TYPED}: it is wrong" in text


def test_every_call_passes_its_checks(calls: dict[str, Call]) -> None:
    assert {name: call.problem() for name, call in calls.items()} == dict.fromkeys(NAMES)


# A statement that does something else, and what is said of it.
WRONG = {
    "op(o, x, w, 0.1)": "of its bound away from float64",
    "op(o, x, w, 1.1e-6)": "the entry was given [([",
    "op(x, o, w, 1e-6)": "of its bound away from float64",
    "pass": "of its bound away from float64",
    "op(o, x, w, 1e-6, True)": "the entry was given [([",
    "op(o, x, w, 1e-6); op(o, x, w, 1e-6)": "the entry was given [([",
    "op(o, x, w, 1e-6, stream=78)": ", 78)",
}


@pytest.mark.parametrize("statement", WRONG)
def test_another_call_is_told(calls: dict[str, Call], statement: str) -> None:
    made = ways._rmsnorm("", statement, is_scoped=True)
    assert WRONG[statement] in str(made.problem())


def test_rows_past_the_length_are_looked_at() -> None:
    statement = ways._MADE.format(ways._ON_STREAM).replace("(n, 64)", "(n + 1, 64)")
    assert "rows past its length" in str(
        ways._rmsnorm("", statement, repeated=ways.REPEATED).problem()
    )


@pytest.mark.parametrize(
    ("statement", "told"),
    [("plan.run(o, k, v, q)", "away from float64"), ("plan.run(q, v, k, o)", "away from float64"),
     ("plan.run(q, k, v, o); plan.run(q, k, v, o)", "the entry was given")],
)  # fmt: skip
def test_another_run_of_a_plan_is_told(statement: str, told: str) -> None:
    assert told in str(ways._decode("", statement).problem())


def test_the_entry_does_nothing() -> None:
    entry = noop()
    arguments, result = ffi.new("TVMFFIAny[5]"), ffi.new("TVMFFIAny *")
    handle = ffi.new("char[64]")
    for memory in (arguments, result, handle):
        ffi.buffer(memory)[:] = b"\xa5" * len(ffi.buffer(memory))
    assert entry.address(handle, arguments, 5, result) == 0
    for memory in (arguments, result, handle):
        assert {*bytes(ffi.buffer(memory))} == {0xA5}


def test_kernels_are_back_after_the_block(calls: dict[str, Call]) -> None:
    """Those of the op and of plans like the one that was timed."""
    with kernels_replaced(noop):
        for name in (ways.NUMPY_REPEATED, ways.PLAN_TYPED):
            measure([calls[name]], 1, 1)
        assert "away from float64" in str(calls[ways.PLAN_TYPED].problem())
    assert calls[ways.NUMPY_REPEATED].problem() is None
    assert calls[ways.PLAN_TYPED].problem() is None


def test_rounds_take_turns() -> None:
    order: list[str] = []
    calls = [
        Call(name, f"order.append({name!r})", lambda: {"order": order}, lambda: None)
        for name in "abc"
    ]
    timings = measure(calls, 2, 3)
    # One to warm up, and three timed.
    assert "".join(order) == "aaaabbbbcccc" + "ccccbbbbaaaa"
    assert [timing.call for timing in timings] == calls


def test_ratios_are_of_the_same_round() -> None:
    call = Call("", "", dict, lambda: None)
    slow, fast = Timing(call, [20, 200, 22]), Timing(call, [10, 100, 11])
    assert slow.ratio(fast) == 2
    assert slow.nanoseconds == 22


def test_tvm_ffi_is_left_alone_where_it_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways.importlib, "import_module", lambda name: pytest.fail(name))
    monkeypatch.setattr(libtvm_ffi, "installed", lambda: None)
    assert ways.find_peer().module is None
    assert "not installed" in ways.find_peer().told
    monkeypatch.setattr(libtvm_ffi, "installed", lambda: Found("/its/libtvm_ffi.so", "installed"))
    monkeypatch.setattr(libtvm_ffi, "in_process", lambda: Found("/other/libtvm_ffi.so", "here"))
    assert ways.find_peer() == (None, "this process has another libtvm_ffi: /other/libtvm_ffi.so")


def test_beside_tvm_ffi_where_it_is_installed() -> None:
    command = [sys.executable, PROGRAM, *QUICK, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    rows = {row["call"]: row for row in document["results"] if row["is_peer"]}
    if libtvm_ffi.installed() is None:
        assert not rows
        assert "not installed" in document["peer"]
        return
    assert document["peer"].startswith("apache-tvm-ffi 0.1")
    assert rows[ways.PEER]["of_tvm_ffi"] == 1
    assert "tvm_ffi call, numpy arrays" in rows
    assert ("tvm_ffi call, torch tensors" in rows) == bool(importlib.util.find_spec("torch"))
    assert all(row["of_tvm_ffi"] > 0 for row in document["results"])
