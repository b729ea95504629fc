"""benchmarks/serve_load.py on the CPU: its load, its figures, and a server under it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from tests.helpers import grammars

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("serve_load")


def test_a_load_is_the_same_for_a_seed(bench):
    given = bench.parsed(["--rate", "5", "--requests", "400", "--input", "3-9"])
    one, two = (bench.drawn(given, 5, 300, 7) for _ in range(2))
    assert one == two != bench.drawn(given, 5, 300, 8)
    assert {*map(len, one.prompts)} == {*range(3, 10)}
    assert min(map(min, one.prompts)) >= 0 and max(map(max, one.prompts)) < 300
    assert min(one.lengths) >= 100 and max(one.lengths) <= 1024
    assert one.arrivals == sorted(one.arrivals)
    # 400 gaps of a fifth of a second, within five deviations of their sum.
    assert abs(one.arrivals[-1] - 80) < 5 * 0.2 * 20
    for wrong in (["--input", "0-5"], ["--input", "9-3"], ["--model", "other"]):
        with pytest.raises(SystemExit):
            bench.parsed(wrong)


def test_figures(bench):
    rounds = [bench.Round(2.0, 10, 100, [0.1, 0.3], [0.01] * 98, 0),
              bench.Round(1.0, 10, 100, [0.2], [0.02] * 98 + [0.5], 1),
              bench.Round(4.0, 10, 100)]  # fmt: skip
    found = bench.summed(rounds)
    assert (found["tokens_a_second"], found["slowest"], found["fastest"]) == (50, 25, 100)
    assert found["first_ms_50"] == pytest.approx(200)
    assert found["token_ms_50"] == pytest.approx(20)
    assert found["failed"] == 1


@pytest.mark.parametrize("rate", [0, 20])
def test_on_the_cpu(bench, tmp_path, capsys, rate):
    given = ["--model", "tiny", "--requests", "8", "--input", "5-30", "--answer", "4-9",
             "--repeats", "1", "--rate", str(rate), "--output", str(tmp_path),
             "--", "--cpu", "--num-pages", "200", "--max-batch", "4"]  # fmt: skip
    assert bench.run(bench.parsed(given)) == 0
    assert "| serve.py | 8 |" in capsys.readouterr().out
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())["found"]
    assert found["failed"] == 0
    assert 8 * 4 <= found["tokens"][0] <= 8 * 9
    assert 0 < found["first_ms_50"] <= found["first_ms_99"]


def test_clients_of_every_kind(monkeypatch, tmp_path, capsys):
    """benchmarks/serve_mixed.py: each kind is answered, and the pages come back."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bench = importlib.import_module("serve_mixed")
    given = ["--model", "tiny", "--seconds", "4", "--clients", "16", "--long", "200",
             "--xgrammar", str(grammars.package()), "--output", str(tmp_path),
             "--", "--cpu", "--num-pages", "500", "--max-batch", "8"]  # fmt: skip
    assert bench.run(bench.parsed(given)) == 0
    assert "all pages are back" in capsys.readouterr().out
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())["found"]
    assert {*found["kinds"]} == {"text", "schema", "long", "choices", "polite"}
    assert found["left"] and found["tokens"] and not found["rejected"]


@pytest.mark.parametrize(
    ("text", "ends", "is_right"),
    [('{"a": 3, "b": true, "c": null}', {0: "stop"}, True),
     ('{"a": 4, "b": true, "c": null}', {0: "stop"}, False),
     ('{"a": 3, "b": 1, "c": null}', {0: "stop"}, False),
     ('{"a": 3, "b": true', {0: "length"}, False),
     ('{"a": 3, "b": true, "c": null}', {}, False)],
)  # fmt: skip
def test_what_is_judged_of_json(monkeypatch, text, ends, is_right):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bench = importlib.import_module("serve_mixed")
    schema = {"required": ["a", "b", "c"], "properties": {"a": {"enum": [3]}}}
    body = {"response_format": {"json_schema": {"schema": schema}}}
    assert (bench.Clients.fault("schema", body, {0: text}, ends) is None) is is_right
