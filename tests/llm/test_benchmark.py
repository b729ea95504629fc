"""benchmarks/llm.py without a GPU: its arguments, weights, checks, and all of it on the CPU."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from engine import load_model

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    """The benchmark, and its parts by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    parts = ("check", "host", "idle", "load", "models", "sides")
    modules = {name: importlib.import_module(f"marks.llm_{name}") for name in parts}
    # By another name: `llm` is the folder of these tests.
    spec = importlib.util.spec_from_file_location("llm_benchmark", BENCHMARKS / "llm.py")
    main = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, main)  # its dataclasses look themselves up
    spec.loader.exec_module(main)
    return SimpleNamespace(main=main, **modules)


def test_arguments(bench, capsys):
    given = bench.main.parsed([])
    assert given.batch == [1, 16, 64, 256]
    assert (given.model, given.repeats, given.peer, given.idle) == ("qwen3-0.6b", None, True, True)
    given = bench.main.parsed(["--batch", "8,1", "--model", "llama-3-8b", "--no-peer"])
    assert (given.batch, given.model, given.peer) == ([1, 8], "llama-3-8b", False)
    for wrong in (["--batch", "0,2"], ["--batch", "x"], ["--model", "other"]):
        with pytest.raises(SystemExit):
            bench.main.parsed(wrong)
    assert "a batch is 1 request or more" in capsys.readouterr().err


def test_weights(bench, rng):
    """Of a name's shape and spread, the same each time; no two rows of the embedding are."""
    for model, is_tied in (("qwen3-0.6b", True), ("llama-3-8b", False)):
        config = bench.models.config_of(bench.models.MODELS[model])
        assert config.dtype == "bfloat16" and config.tied == config.qk_norm == is_tied
    raw = bench.models.MODELS["qwen3-0.6b"] | {"vocab_size": 20_000}
    weights = bench.models.RandomWeights(raw, rng)
    name = "model.embed_tokens.weight"
    values = weights(name)
    assert (values.shape, values.dtype.name) == (weights.shapes[name], "bfloat16")
    assert np.array_equal(values.view(np.uint16), weights(name).view(np.uint16))
    mean, deviation = bench.models.scale(name, values.shape)
    sample = values.reshape(-1)[:200_000].astype(np.float64)
    assert abs(sample.mean() - mean) < 6 * deviation / len(sample) ** 0.5 + 2e-3
    assert abs(sample.std() - deviation) < deviation * 0.4
    rows = values.view(np.uint16)[rng.choice(len(values), 3000, replace=False)]
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_time_that_the_gpu_is_busy(bench):
    """Of two steps; copies run beside kernels, and one ends before another that began earlier."""
    spans = [
        ("kernel", "a", 0, 10), ("gpu_memcpy", "copy", 5, 10), ("kernel", "b", 35, 5),
        ("kernel", "a", 16, 8), ("kernel", "b", 17, 2), ("cpu_op", "a", 0, 900),
    ]  # fmt: skip
    events = [
        {"ph": "X", "cat": kind, "name": name, "ts": ts, "dur": dur}
        for kind, name, ts, dur in spans
    ]
    idle = bench.idle.of_trace([*events, {"ph": "M"}], 2)
    assert idle.adds_ms == pytest.approx({"a": 0.009, "copy": 0.0025, "b": 0.0025})
    assert (idle.busy_ms, idle.wall_ms, idle.kernels) == pytest.approx((0.014, 0.020, 2))
    assert abs(idle.share - 0.3) < 1e-12
    with pytest.raises(RuntimeError, match="no kernel"):
        bench.idle.of_trace([{"ph": "M"}], 1)


def test_the_check_fails_where_sides_differ(bench, rng):
    raw = bench.models.MODELS["tiny"]
    weights = bench.models.RandomWeights(raw, rng)

    class Other(bench.models.RandomWeights):
        def __call__(self, name):
            values = weights(name)
            return values[::-1] if name == "model.layers.1.self_attn.o_proj.weight" else values

    other = Other(raw, rng)

    def side(given):
        config = bench.models.config_of(raw)
        return bench.sides.Ours(load_model(config, given, "cpu", 20, 16, 2, 64, False))

    one, same, wrong = side(weights), side(weights), side(other)
    prompts = bench.sides.RandomPrompts(raw["vocab_size"], 9, rng)(2)
    found = bench.check.compare(one, same, prompts)
    assert found == {"logits_apart": 0, "same_tokens": 8, "compared": 8}
    with pytest.raises(bench.main.Wrong, match="of their deviation apart"):
        bench.check.compare(one, wrong, prompts)
    assert one.on_logits is None


@pytest.mark.parametrize(("tp", "more"), [(1, ["--replans"]), (2, ["--ray"])])
def test_on_the_cpu(tp, more, bench, tmp_path, capsys):
    if "--ray" in more:
        pytest.importorskip("ray", reason="ray is not installed")
    given = ["--device", "cpu", "--model", "tiny", "--batch", "1,3", "--tokens", "4"]
    given += ["--prompt", "30", "--repeats", "2", "--output", str(tmp_path), "--tp", str(tp)]
    assert bench.main.run(bench.main.parsed(given + more)) == 0
    told = capsys.readouterr().out
    assert "| 3 |" in told
    assert f"ours / {more[0][2:]}" in told
    over = "-tp2" if tp == 2 else ""
    written = json.loads((tmp_path / f"llm-tiny{over}.json").read_text())
    assert written["about"]["max_tokens"] == 64  # so that three prompts take two steps
    for row in written["rows"]:
        assert len(row["timings"]["fi_ffi"]) == 2
        for timing in row["timings"]["fi_ffi"]:
            assert timing["prefill_tokens"] == 30 * row["batch"]
            assert 0 < timing["decode_tokens"] <= 3 * row["batch"]


def test_a_load_on_the_cpu(bench, tmp_path, capsys):
    given = ["--device", "cpu", "--model", "tiny", "--load", "--requests", "6", "--rate", "0,50"]
    given += ["--input", "5-90", "--answer", "3-9", "--repeats", "2", "--output", str(tmp_path)]
    assert bench.main.run(bench.main.parsed(given)) == 0
    assert "| fi_ffi | 6 | 50 a second |" in capsys.readouterr().out
    rows = json.loads((tmp_path / "load-tiny.json").read_text())["rows"]
    assert [(row["side"], row["rate"]) for row in rows] == [("fi_ffi", 0), ("fi_ffi", 50)]
    for row in rows:
        assert all(6 * 3 <= tokens <= 6 * 9 for tokens in row["tokens"])
        assert 0 < row["first_ms_50"] <= row["first_ms_99"] < 10_000
        assert 0 < row["token_ms_50"] <= row["token_ms_99"] < 10_000
    assert rows[1]["seconds"][0] > 0.01


class Paced:
    """A side that gives each request a token in every step of its time, by a clock of its own."""

    name, on_logits, now = "paced", None, 100.0

    def __init__(self, step_s):
        self.step_s, self.running = step_s, []

    def start(self, prompts, sampling):
        made = [SimpleNamespace(tokens=[], most=sampling.max_tokens) for _ in prompts]
        self.running += made
        return made

    def step(self):
        if not self.running:
            return False
        self.pass_on(self.step_s)
        for request in self.running:
            request.tokens.append(0)
        self.running = [r for r in self.running if len(r.tokens) < r.most]
        return True

    def pass_on(self, seconds):
        self.now += seconds


def test_latencies_of_a_load(bench, monkeypatch):
    """They count from when a request arrives, though the side is in the middle of a step."""
    side = Paced(4.0)
    monkeypatch.setattr(bench.load, "perf_counter", lambda: side.now)
    monkeypatch.setattr(bench.load, "sleep", side.pass_on)
    load = bench.load.Load([[1], [1, 2], [3]], [3, 2, 1], [0.0, 5.0, 30.0])
    found = bench.load.offered(side, load, 0.6)
    assert (found.tokens, found.prompt_tokens, found.failed) == (6, 4, 0)
    assert found.first == pytest.approx([4, 7, 4], abs=1e-3)
    assert found.each == pytest.approx([4, 4, 4])
    assert found.seconds == pytest.approx(34, abs=1e-3)


def test_of_the_host_alone(bench, capsys):
    assert bench.main.host(bench.main.parsed(["--host", "--batch", "2"])) == 0
    table = capsys.readouterr().out.splitlines()
    assert 0.01 < float(table[-1].split("|")[2]) < 50
