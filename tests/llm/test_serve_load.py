"""benchmarks/serve_load.py and serve_mixed.py on the CPU: load, figures, and a server under it."""

from __future__ import annotations

import asyncio
import importlib
import json
from pathlib import Path

import pytest
from tiny import byte_tokenizer

from tests.helpers import grammars

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("serve_load")


@pytest.fixture
def mixed(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("serve_mixed")


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


def test_clients_of_every_kind(mixed, tmp_path, capsys):
    """Each kind is answered, and the pages come back."""
    given = ["--model", "tiny", "--seconds", "4", "--clients", "16", "--long", "200",
             "--xgrammar", str(grammars.package()), "--output", str(tmp_path),
             "--", "--cpu", "--num-pages", "500", "--max-batch", "8"]  # fmt: skip
    assert mixed.run(mixed.parsed(given)) == 0
    assert "all pages are back" in capsys.readouterr().out
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())["found"]
    kinds = {"text", "schema", "long", "choices", "polite"}
    assert {*found["kinds"]} - {"leaves"} == kinds  # who leaves may have had its answer before
    assert found["left"] and found["tokens"] and not found["rejected"]


def test_clients_that_are_refused(mixed, tmp_path, capsys):
    """They are counted apart, ask again, and are wrong in nothing."""
    given = ["--model", "tiny", "--seconds", "2", "--clients", "16", "--long", "200",
             "--output", str(tmp_path), "--",
             "--cpu", "--num-pages", "500", "--max-batch", "2", "--max-queue", "1"]  # fmt: skip
    assert mixed.run(mixed.parsed(given)) == 0
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())["found"]
    refused = {kind: of["refused"] for kind, of in found["kinds"].items()}
    assert refused["text"] and found["kinds"]["text"]["answers"]
    assert sum(refused.values()) <= found["rejected"]  # some leave before they read it
    assert f"| text | {found['kinds']['text']['answers']} | {refused['text']} |" in (
        capsys.readouterr().out
    )


def test_prompts_before_json_end_with_a_whole_character(mixed, rng):
    clients = mixed.Clients("http://a", mixed.parsed([]), 300, 9)
    ends = {clients.body("schema", rng)["prompt"][-1] for _ in range(20)}
    assert [byte_tokenizer().decode([token]) for token in ends] == ["!"]


@pytest.mark.parametrize("says", [None, 3])
def test_a_refusal_says_when_to_ask_again(mixed, says):
    """It is wrong where it does not."""
    told = f"Retry-After: {says}\r\n" if says else ""

    async def refuse(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 429 Too Many\r\n{told}Content-Length: 2\r\n\r\n{{}}".encode())
        writer.close()

    async def asked():
        server = await asyncio.start_server(refuse, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        clients = mixed.Clients(url, mixed.parsed([]), 9, 9)
        wait = await clients.ask("text", {"prompt": "a"})
        server.close()
        return wait, dict(clients.refused), len(clients.wrong), [*clients.first]

    expected = (says, {"text": 1}, 0, []) if says else (1, {}, 1, [])
    assert asyncio.run(asked()) == expected


@pytest.mark.parametrize(
    ("text", "ends", "is_right"),
    [('{"a": 3, "b": true, "c": null}', {0: "stop"}, True),
     ('{"a": 4, "b": true, "c": null}', {0: "stop"}, False),
     ('{"a": 3, "b": 1, "c": null}', {0: "stop"}, False),
     ('{"a": 3, "b": true', {0: "length"}, False),
     ('{"a": 3, "b": true, "c": null}', {}, False)],
)  # fmt: skip
def test_what_is_judged_of_json(mixed, text, ends, is_right):
    schema = {"required": ["a", "b", "c"], "properties": {"a": {"enum": [3]}}}
    body = {"response_format": {"json_schema": {"schema": schema}}}
    assert (mixed.Clients.fault("schema", body, {0: text}, ends) is None) is is_right
