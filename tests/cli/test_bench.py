"""`fi-ffi bench --cpu`: figures of calls that were checked, and none of others."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fi_ffi.abi._cffi import ffi
from fi_ffi.cli import bench, main
from fi_ffi.cli.benching import nothing, peers
from fi_ffi.cli.benching.calls import EMPTY, PLAN_TYPED, PREPARED, TYPED, own_calls
from fi_ffi.cli.benching.rounds import Call, Timing, measure
from fi_ffi.loader import runtime
from fi_ffi.loader import tvm_ffi as libtvm_ffi
from fi_ffi.loader.tvm_ffi import Found

NAMES = [
    EMPTY, PREPARED, "prepared call, 3 new pointers, in a scope", "prepared call with a stream",
    "typed call, in a scope", TYPED, "typed call, stream given, 3 TensorDescs made",
    "one TensorDesc made", PLAN_TYPED, "plan.run, prepared (CPU: no stream)",
]  # fmt: skip
QUICK = ("--cpu", "--rounds", "3", "--calls", "20")


@pytest.fixture(autouse=True)
def no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """tvm_ffi is not brought into the process of the tests."""
    monkeypatch.setattr(bench, "find", lambda: peers.Peer(None, "not looked for"))


@pytest.fixture
def calls() -> dict[str, Call]:
    runtime.ensure_tvm_ffi()
    return {call.name: call for call in own_calls()}


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["bench", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_every_call_has_a_figure_and_ratios() -> None:
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
    assert document["results"][0]["of_empty"] == 1


def test_a_table_and_csv(tmp_path: Path) -> None:
    file = tmp_path / "host.csv"
    text = run(*QUICK, "--csv", file)
    assert all(name in text for name in NAMES)
    assert "3 x 20 calls" in text
    rows = [*csv.DictReader(file.open())]
    assert [row["call"] for row in rows] == NAMES
    assert all(float(row["ns"]) > 0 and row["of_tvm_ffi"] == "" for row in rows)


def test_it_fails_on_a_ratio_alone() -> None:
    # A prepared call is the empty one and more.
    text = run(*QUICK, "--fail-above", 1, code=1)
    assert f"Error: {PREPARED}: " in text
    assert "and 1 is the most" in text
    run(*QUICK, "--fail-above", 1e6)


def test_without_cpu_it_says_what_there_is() -> None:
    text = run(code=2)
    assert "--cpu" in text
    assert "benchmarks/host.py" in text
    assert (Path(__file__).parents[2] / "benchmarks").is_dir()


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_fails_its_check_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, when: str
) -> None:
    def wrong() -> list[Call]:
        problem: dict[str, Any] = {when: lambda: "it is wrong"}
        calls = own_calls()
        return [dataclasses.replace(c, **problem) if c.name == TYPED else c for c in calls]

    monkeypatch.setattr(bench, "own_calls", wrong)
    file = tmp_path / "host.csv"
    text = run(*QUICK, "--json", "--csv", file, code=1)
    document, _ = json.JSONDecoder().raw_decode(text)
    assert [row["call"] for row in document["results"]] == [n for n in NAMES if n != TYPED]
    assert document["not_shown"] == {TYPED: "it is wrong"}
    assert f"Error: not shown, because a check failed:\n  {TYPED}: it is wrong" in text
    assert TYPED not in [row["call"] for row in csv.DictReader(file.open())]


def _exchange(call: Call) -> None:
    names: Any = call.names
    first, second = ("q", "o") if "q" in names else ("o", "x")
    names[first], names[second] = names[second], names[first]


def _update(call: Call) -> None:
    ready = call.names["call"]
    if "plan" in call.names:
        ready.update(q=call.names["o"])
    else:
        ready.update(eps=1e-5)


@pytest.mark.parametrize("name", [n for n in NAMES if n != EMPTY and not n.endswith("made")])
def test_what_the_entry_was_given_is_looked_at(calls: dict[str, Call], name: str) -> None:
    call = calls[name]
    assert call.before() is None
    assert call.after() is None
    (_update if "prepared" in name else _exchange)(call)
    assert "the entry was given" in str(call.after())


def test_the_number_of_calls_and_the_stream_are_looked_at(calls: dict[str, Call]) -> None:
    names: Any = calls[TYPED].names
    ready = names["op"]
    names["op"] = lambda *args, stream: (ready(*args, stream=stream), ready(*args, stream=stream))
    assert "the entry was given" in str(calls[TYPED].after())
    names["op"] = lambda *args, stream: ready(*args, stream=stream + 1)
    assert ", 78)" in str(calls[TYPED].after())
    names["op"] = lambda *args, stream: None
    assert "the entry was given [], not" in str(calls[TYPED].after())


@pytest.mark.parametrize("name", [TYPED, PREPARED])
def test_results_are_held_against_float64(
    calls: dict[str, Call], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert calls[name].before() is None
    from fi_ffi.cli.benching import calls as ways

    # A kernel that writes nothing in the reference's place.
    monkeypatch.setattr("fi_ffi.ops.form.entry_for", lambda *_: nothing.nothing())
    made = ways._Rmsnorm()
    assert "of its bound away from float64" in str(made.wrong_results(name == PREPARED))


def test_results_of_a_plan_are_held_against_float64() -> None:
    from fi_ffi.cli.benching import calls as ways

    batch = ways._Decode()
    assert batch.wrong_results() is None
    batch.plan.is_idle = True
    batch.plan.replan(ways._INDPTR, ways._INDICES, ways._LAST)
    assert "of its bound away from float64" in str(batch.wrong_results())


def test_the_entry_does_nothing() -> None:
    entry = nothing.nothing()
    arguments, result = ffi.new("TVMFFIAny[5]"), ffi.new("TVMFFIAny *")
    handle = ffi.new("char[64]")
    for memory in (arguments, result, handle):
        ffi.buffer(memory)[:] = b"\xa5" * len(ffi.buffer(memory))
    assert entry.address(handle, arguments, 5, result) == 0
    for memory in (arguments, result, handle):
        assert {*bytes(ffi.buffer(memory))} == {0xA5}


def test_plans_beside_it_keep_their_kernel(calls: dict[str, Call]) -> None:
    """An idle plan's form is its own, whatever plans are alike."""
    from fi_ffi.cli.benching import calls as ways

    batch = ways._Decode()
    calls[PLAN_TYPED].once()
    assert batch.wrong_results() is None


def test_rounds_take_turns() -> None:
    order: list[str] = []
    calls = [
        Call(name, f"order.append({name!r})", {"order": order}, lambda: None) for name in "abc"
    ]
    timings = measure(calls, 2, 3)
    # One to warm up, and three timed.
    assert "".join(order) == "aaaabbbbcccc" + "ccccbbbbaaaa"
    assert [timing.call for timing in timings] == calls


def test_ratios_are_of_the_same_round() -> None:
    call = Call("", "", {}, lambda: None)
    slow, fast = Timing(call, [20, 200, 22]), Timing(call, [10, 100, 11])
    assert slow.ratio(fast) == 2
    assert slow.nanoseconds == 22


def test_matplotlib_is_asked_for_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("it measured"))
    text = run(*QUICK, "--plot", tmp_path / "host.png", code=1)
    assert "Error: --plot needs matplotlib: pip install 'fi-ffi[bench]'" in text


def test_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "host.png"
    run(*QUICK, "--plot", file)
    assert file.read_bytes().startswith(b"\x89PNG")
    assert "host.what: " in run(*QUICK, "--plot", tmp_path / "host.what", code=1)


def test_tvm_ffi_is_left_alone_where_it_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib, "import_module", lambda name: pytest.fail(name))
    monkeypatch.setattr(libtvm_ffi, "installed", lambda: None)
    assert peers.find().module is None
    assert "not installed" in peers.find().told
    monkeypatch.setattr(libtvm_ffi, "installed", lambda: Found("/its/libtvm_ffi.so", "installed"))
    monkeypatch.setattr(libtvm_ffi, "in_process", lambda: Found("/other/libtvm_ffi.so", "here"))
    assert peers.find() == (None, "this process has another libtvm_ffi: /other/libtvm_ffi.so")


def test_beside_tvm_ffi_where_it_is_installed() -> None:
    program = "from fi_ffi.cli import main; main()"
    command = [sys.executable, "-c", program, "bench", *QUICK, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    rows = {row["call"]: row for row in document["results"] if row["is_peer"]}
    if libtvm_ffi.installed() is None:
        assert not rows
        assert "not installed" in document["peer"]
        return
    assert document["peer"].startswith("apache-tvm-ffi 0.1")
    assert rows[peers.PEER]["of_tvm_ffi"] == 1
    assert "tvm_ffi call, numpy arrays" in rows
    assert ("tvm_ffi call, torch tensors" in rows) == bool(importlib.util.find_spec("torch"))
    assert all(row["of_tvm_ffi"] > 0 for row in document["results"])
