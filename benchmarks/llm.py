"""Tokens a second of examples/llm, beside the same loop in torch and flashinfer-python.

    python3 benchmarks/llm.py [--model llama-3-8b] [--batch 1,64] [--repeats 3] [--output .out]
    python3 benchmarks/llm.py --tp 4      # the model split over four GPUs, beside torch and NCCL
    python3 benchmarks/llm.py --load --rate 0,16       # nano-vllm's load instead, by the same sides
    python3 benchmarks/llm.py --host      # what a step costs the host; needs no GPU

Needs a GPU, nvmath-python and what examples/llm needs; for the peer (llm_torch.py) torch,
flashinfer-python of the kernels' release and the kernel wheel installed, so that both load
the same files; tools/gpu_llm.sh sets that up.

Random weights in the shapes of Qwen3-0.6B or Llama-3-8B, bfloat16.  Each of b requests has
another prompt of 128 random tokens and gets 128, at temperature 1.  All sides live in one
process on the same weights and take turns, a batch each; figures are medians, after a batch
of each to warm up.  Decoding is timed from when the host has the first token of all requests
to when it has the last.  First their logits and greedy tokens are compared: where they are
not the same within rounding there is no figure, and the exit status is 1.

The load of --load is that of serve_load.py, in this process: 256 requests of 100 to 1,024 tokens
that get 100 to 1,024, all at once or by Poisson arrivals.  In each round every side gets the same
one.  Latencies are of all rounds, tokens a second their median.

The share of time that the GPU is idle is from 30 steps under torch.profiler, after all that
is timed ("idle there"); and, as that slows launches, from the same busy time and what a step
takes without it ("idle").
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples/llm"))

from engine import Sampling, load_model
from marks import Missing, Wrong, llm_host
from marks.about import about
from marks.llm_check import compare
from marks.llm_idle import Idle, idle, profiled
from marks.llm_load import Load, Round, add_arguments, drawn, offered, shortened, summed, table
from marks.llm_models import MODELS, RandomWeights, config_of
from marks.llm_sides import Ours, RandomPrompts, Side, Timing, timed
from marks.peers import Peers

PAGE, MAX_TOKENS = 16, 8192
BATCHES = (1, 16, 64, 256)
FILTERED = 64  # the batch that is also run with top_p and top_k
_CUDA_CORES = "the peer decodes on them; without, from 4 query heads a key head on, on tensor cores"
MODULES = ("norm", "page", "rope", "silu_and_mul", "sampling")


def least_ratio(batch: int, tp: int) -> float:
    """What is asked of our tokens a second, in parts of the eager peer's."""
    return 1.3 if batch == 1 or tp > 1 else 1.0


@dataclass
class Row:
    """A batch, and by side its rounds and how idle the GPU is."""

    batch: int
    filters: dict[str, float]
    tp: int = 1
    timings: dict[str, list[Timing]] = field(default_factory=dict)
    idles: dict[str, Idle] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return ", ".join([str(self.batch), *(f"{k} {v}" for k, v in self.filters.items())])

    def median(self, side: str, figure: str) -> float:
        return median(getattr(timing, figure) for timing in self.timings[side])

    def ratio(self, side: str) -> float:
        return self.median("fi_ffi", "decode_rate") / self.median(side, "decode_rate")

    def idle_without_profiler(self, side: str) -> float:
        return 1 - self.idles[side].busy_ms / self.median(side, "step_ms")


class Bench:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.rng = arguments, np.random.default_rng()
        self.raw = MODELS[arguments.model]
        self.most, self.length = max(arguments.batch), arguments.prompt + arguments.tokens
        if arguments.load:
            self.most, self.length = arguments.requests, arguments.input[1] + arguments.answer[1]
        self.is_gpu = arguments.device != "cpu"
        # Before fi_ffi loads anything: there is to be one libtvm_ffi.
        self.peers = Peers() if self.is_gpu else None
        self.prompts = RandomPrompts(self.raw["vocab_size"], arguments.prompt, self.rng)
        pages = 1 + self.most * -(-self.length // PAGE)
        self.weights = RandomWeights(self.raw, self.rng)
        max_tokens = MAX_TOKENS if self.is_gpu else 64
        self.engines = [
            load_model(
                config_of(self.raw), self.weights, arguments.device, pages, PAGE, self.most,
                max_tokens, True, tp=arguments.tp, way="ray" if name == "ray" else "processes",
            )
            for name in ("fi_ffi", *arguments.beside)
        ]  # fmt: skip
        self.engine = self.engines[0]
        self.sides: list[Side] = [Ours(self.engine)]
        for name, other in zip(arguments.beside, self.engines[1:], strict=True):
            if name == "replans":
                other.runner.has_pieces = False
            self.sides.append(Ours(other, name))
        self.about: dict[str, Any] = {}

    def sampling(self, tokens: int = 0, **filters: Any) -> Sampling:
        return Sampling(max_tokens=tokens or self.arguments.tokens, ignore_eos=True, **filters)

    def add_peers(self) -> None:
        """The peers, on the very kernels that our engine has just used."""
        assert self.peers is not None
        timed(self.sides[0], self.prompts(min(16, self.most)), self.sampling(4))
        runner = self.engine.runner
        plans = (*runner.plans.values(), *runner.plans_of_pieces.values())
        used = {plan.module for plan in plans}
        # And prefill of fa2, which is FlashInfer's decode on tensor cores.
        self.peers.flashinfer(*MODULES, *used, *(name.removesuffix("_sm90") for name in used))
        from marks.llm_peer import is_wide, peers
        from marks.llm_ranks import peers as ranked_peers

        engine = self.engine
        sizes = tuple(engine.steps.sizes if self.arguments.load else self.arguments.batch)
        if self.arguments.tp == 1:
            self.sides += peers(engine, self.length, sizes, self.arguments.cuda_cores)
            return
        self.sides += ranked_peers(
            config_of(self.raw), self.weights, self.arguments.tp, page_size=engine.page_size,
            max_batch=self.most, max_length=self.length, max_tokens=engine.max_tokens,
            use_tensor_cores=is_wide(engine.config) and not self.arguments.cuda_cores,
            graph_sizes=sizes,
        )  # fmt: skip

    def weight_bytes(self) -> int:
        """What a GPU reads of weights in a step of decoding: all but the embedding's other rows."""
        model = self.engine.model
        weights = [x for layer in model.layers for x in layer.values()] + [model.head, model.norm]
        return sum(x.numel * x.dtype.itemsize for x in weights)

    def check(self) -> None:
        """Every side against ours, but Ray's, whose logits stay with it."""
        for other in self.sides[1:]:
            if other.name == "ray":
                continue
            sizes = {self.arguments.batch[0], min(16, self.most)}
            if self.arguments.load:
                sizes.add(min(13, self.most))  # which is padded
            same = {
                str(batch): compare(self.sides[0], other, self.prompts(batch))
                for batch in sorted(sizes)
            }
            self.about[f"same as {other.name}"] = same
            print(f"{other.name}: {same}", flush=True)

    def rows(self) -> list[Row]:
        tp = self.arguments.tp
        rows = [Row(batch, {}, tp) for batch in self.arguments.batch]
        if FILTERED in self.arguments.batch:
            rows.append(Row(FILTERED, {"top_p": 0.9, "top_k": 50}, tp))
        return rows

    def measure(self, row: Row) -> None:
        """The sides take turns."""
        sampling = self.sampling(**row.filters)
        repeats = self.arguments.repeats or (5 if row.batch <= 16 else 3)
        for side in self.sides:
            timed(side, self.prompts(row.batch), sampling)
            row.timings[side.name] = []
        for turn in range(repeats):
            for side in self.in_turn(turn):
                timing = timed(side, self.prompts(row.batch), sampling)
                row.timings[side.name].append(timing)

    def in_turn(self, turn: int) -> list[Side]:
        """The sides, beginning with another one each time."""
        first = turn % len(self.sides)
        return self.sides[first:] + self.sides[:first]

    def load(self, rate: float) -> Load:
        seed = int(self.rng.integers(2**31))
        return drawn(self.arguments, rate, self.raw["vocab_size"], seed)

    def measure_load(self, rate: float) -> dict[str, list[Round]]:
        """The rounds of each side, which takes its turn with the same requests."""
        found = {side.name: list[Round]() for side in self.sides}
        for turn in range(self.arguments.repeats or 3):
            load = self.load(rate)
            for side in self.in_turn(turn):
                found[side.name].append(offered(side, load, self.arguments.temperature))
        return found

    def measure_idle(self, row: Row) -> None:
        assert self.peers is not None
        torch = self.peers.need("torch")
        for side in self.sides:
            prompts = self.prompts(row.batch)
            row.idles[side.name] = idle(torch, side, prompts, self.sampling(**row.filters))


def speeds(rows: list[Row], sides: list[str]) -> str:
    """Markdown: tokens a second, and ours in parts of each peer's."""
    names = [f"{side} {what}" for side in sides for what in ("decode", "prefill")]
    ratios = [f"ours / {side}" for side in sides[1:]]
    heads = ["batch", *names, *ratios, "ms a step", "mark"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        cells = [
            f"{row.median(side, figure):,.0f}"
            for side in sides for figure in ("decode_rate", "prefill_rate")
        ]  # fmt: skip
        cells += [f"{row.ratio(side):.2f}" for side in sides[1:]]
        cells.append(f"{row.median('fi_ffi', 'step_ms'):.3f}")
        lines.append([row.name, *cells, mark(row)])
    return as_table(lines)


def mark(row: Row) -> str:
    if "torch eager" not in row.timings:
        return "no peer"
    least = least_ratio(row.batch, row.tp)
    met = row.ratio("torch eager") >= least
    return f"≥ {least:.1f}: {'met' if met else 'NOT met'}"


def idleness(rows: list[Row], sides: list[str]) -> str:
    """Markdown: what the GPU does in a step of decoding."""
    heads = ["batch", "side", "kernels", "busy ms", "step ms", "idle", "profiled ms", "idle there"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        for side in sides:
            one = row.idles[side]
            untouched = row.median(side, "step_ms")
            lines.append([
                row.name, side, f"{one.kernels:.0f}", f"{one.busy_ms:.3f}", f"{untouched:.3f}",
                f"{row.idle_without_profiler(side):.1%}", f"{one.wall_ms:.3f}", f"{one.share:.1%}",
            ])  # fmt: skip
    return as_table(lines)


def shares(row: Row, count: int = 8) -> str:
    """Markdown: which of our kernels make a step as long as it is."""
    adds = row.idles["fi_ffi"].adds_ms
    most = sorted(adds, key=lambda name: -adds[name])[:count]
    lines = [["batch", "kernel", "ms a step"], ["---"] * 3]
    lines += [[row.name, name[:60].replace("|", " "), f"{adds[name]:.3f}"] for name in most]
    return as_table(lines)


def as_table(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def run(arguments: argparse.Namespace) -> int:
    bench = Bench(arguments)
    try:
        return measured(bench, arguments)
    finally:
        for engine in bench.engines:
            engine.close()


def measured(bench: Bench, arguments: argparse.Namespace) -> int:
    status = 0
    told = about() | {"model": arguments.model, "prompt": arguments.prompt}
    told |= {"tokens": arguments.tokens, "max_tokens": bench.engine.max_tokens}
    told |= {"GPUs": arguments.tp, "bytes of weights a step and GPU": bench.weight_bytes()}
    told |= {"peer on CUDA cores": arguments.cuda_cores}
    print(json.dumps(told, indent=2), flush=True)
    if bench.is_gpu and arguments.peer:
        try:
            bench.add_peers()
        except Missing as missing:
            status = 1
            print(f"without the peer, for there is not: {missing}")
    try:
        bench.check()
    except Wrong as wrong:
        print(f"FAILED: {wrong}")
        return 1
    if arguments.load:
        return loads(bench, told | bench.about)
    names, rows = [side.name for side in bench.sides], bench.rows()
    for row in rows:
        bench.measure(row)
        print(speeds([row], names), flush=True)
    print(f"\nTokens a second, {told['model']}, {told['gpu']}\n\n{speeds(rows, names)}", flush=True)
    for row in rows:
        rate = bench.weight_bytes() / row.median("fi_ffi", "step_ms") / 1e6
        print(f"batch {row.name}: each GPU reads its weights at {rate:,.0f} GB/s", flush=True)
    write(arguments, told | bench.about, [asdict(row) for row in rows])
    if bench.is_gpu and arguments.idle and bench.peers.has("torch"):
        profiled(bench.peers.need("torch"), lambda: None)  # which takes seconds the first time
        for row in rows:
            bench.measure_idle(row)
        print(f"\nThe GPU in a step of decoding\n\n{idleness(rows, names)}", flush=True)
        for row in rows:
            print(f"\n{shares(row)}", flush=True)
        write(arguments, told | bench.about, [asdict(row) for row in rows])
    return status


def loads(bench: Bench, told: dict[str, Any]) -> int:
    """The tables of --load."""
    for side in bench.sides:  # to warm up
        offered(side, shortened(bench.load(0)), bench.arguments.temperature)
    rows: list[dict[str, Any]] = []
    for rate in bench.arguments.rate:
        for name, rounds in bench.measure_load(rate).items():
            rows.append({"side": name, "rate": rate, **summed(rounds)})
        print(table((row["side"], bench.most, row["rate"], row) for row in rows), flush=True)
        write(bench.arguments, told, rows)
    return 0


def write(arguments: argparse.Namespace, told: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Everything that was measured so far."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    over = f"-tp{arguments.tp}" if arguments.tp > 1 else ""
    kind = "load" if arguments.load else "llm"
    path = arguments.output / f"{kind}-{arguments.model}{over}.json"
    path.write_text(json.dumps({"about": told, "rows": rows}, indent=1))


def host(arguments: argparse.Namespace) -> int:
    """The table of --host."""
    lines = [["batch", "ms a step"], ["---", "---"]]
    lines += [[str(batch), f"{llm_host.step_ms(batch):.3f}"] for batch in arguments.batch]
    print(f"{about()['cpu']}\n\n{as_table(lines)}")
    return 0


def batches(text: str) -> list[int]:
    sizes = sorted({int(part) for part in text.split(",")})
    if sizes[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a batch is 1 request or more")
    return sizes


def rates(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def parsed(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="qwen3-0.6b")
    parser.add_argument("--tp", type=int, default=1, help="GPUs that the model is split over")
    parser.add_argument("--batch", type=batches, default=list(BATCHES), metavar="N,N")
    parser.add_argument("--repeats", type=int, help="5, 3 from batch 64 on")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens that each request gets")
    parser.add_argument("--device", choices=("cuda:0", "cpu"), default="cuda:0")
    of_load = add_arguments(parser)
    of_load.add_argument("--load", action="store_true", help="a load instead of batches")
    of_load.add_argument("--rate", type=rates, default=[0.0], metavar="R,R",
                         help="requests a second; 0: all at once")  # fmt: skip
    parser.add_argument("--host", action="store_true", help="only what a step costs the host")
    parser.add_argument("--cuda-cores", action="store_true", help=_CUDA_CORES)
    beside = {"--replans": "that decodes without pieces", "--ray": "whose ranks Ray places"}
    for name, engine in beside.items():
        parser.add_argument(name, action="append_const", const=name[2:], dest="beside", default=[],
                            help=f"beside an engine {engine}")  # fmt: skip
    parser.add_argument("--no-peer", dest="peer", action="store_false")
    parser.add_argument("--no-idle", dest="idle", action="store_false")
    parser.add_argument("--output", type=Path, default=os.environ.get("OUT", ".out"))
    return parser.parse_args(given)


if __name__ == "__main__":
    chosen = parsed()
    sys.exit(host(chosen) if chosen.host else run(chosen))
