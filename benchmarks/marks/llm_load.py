"""A load like nano-vllm's: its requests, its figures, and how a side in this process is given it.

serve_load.py sends it over HTTP.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter, sleep
from typing import Any

import numpy as np
from engine import Sampling

from marks.llm_sides import Served, Side

WARM = 8  # the load that warms up has answers of this part of the length
IDLE_S = 1e-4  # between looks at what arrives, where nothing is left to do


@dataclass
class Load:
    """Lengths and times of requests, the same for a seed."""

    prompts: list[list[int]]
    lengths: list[int]
    arrivals: list[float]  # seconds from the start


@dataclass
class Running:
    """A request of a load, and what came of it so far."""

    request: Served
    length: int
    last: float  # when it arrived, or got its last token
    count: int = 0


@dataclass
class Round:
    """What came of a load; latencies in seconds."""

    seconds: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    each: list[float] = field(default_factory=list)
    failed: int = 0


def lengths(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    both = int(low), int(high or low)
    if not 1 <= both[0] <= both[1]:
        raise argparse.ArgumentTypeError(f"{text}: LOW-HIGH, of 1 or more")
    return both


def add_arguments(parser: argparse.ArgumentParser) -> Any:
    """What a load is made from, arguments of `drawn`, as a group to which more may be added."""
    of_load = parser.add_argument_group("a load")
    of_load.add_argument("--requests", type=int, default=256)
    of_load.add_argument("--input", type=lengths, default=(100, 1024), metavar="LOW-HIGH")
    of_load.add_argument("--answer", type=lengths, default=(100, 1024), metavar="LOW-HIGH")
    of_load.add_argument("--temperature", type=float, default=0.6)
    return of_load


def drawn(given: argparse.Namespace, rate: float, vocab: int, seed: int) -> Load:
    """Requests by Poisson arrivals, `rate` a second; all at once where that is 0."""
    rng = np.random.default_rng(seed)
    low, high = given.input
    sizes = rng.integers(low, high + 1, given.requests)
    answers = rng.integers(given.answer[0], given.answer[1] + 1, given.requests)
    gaps = rng.exponential(1 / rate, given.requests) if rate else [0.0] * given.requests
    prompts = [rng.integers(0, vocab, size).tolist() for size in sizes]
    return Load(prompts, answers.tolist(), np.cumsum(gaps).tolist())


def shortened(load: Load) -> Load:
    """The same with short answers, all at once: every size of batch comes up."""
    answers = [max(length // WARM, 1) for length in load.lengths]
    return Load(load.prompts, answers, [0.0] * len(answers))


def offered(side: Side, load: Load, temperature: float) -> Round:
    """All requests of a load to one side in this process, each from its time on.

    A first-token latency is from when the request arrives, in a step or not.
    """
    to, waiting = Round(), [*zip(load.prompts, load.lengths, load.arrivals, strict=True)][::-1]
    running: list[Running] = []
    start = perf_counter()
    while waiting or running:
        while waiting and waiting[-1][2] <= perf_counter() - start:
            prompt, length, arrival = waiting.pop()
            sampling = Sampling(temperature=temperature, max_tokens=length, ignore_eos=True)
            (request,) = side.start([prompt], sampling)
            running.append(Running(request, length, start + arrival))
            to.prompt_tokens += len(prompt)
        if not side.step():
            sleep(IDLE_S)
        now = perf_counter()
        for one in running:
            if len(one.request.tokens) > one.count:
                (to.each if one.count else to.first).append(now - one.last)
                one.count, one.last = len(one.request.tokens), now
        running = [one for one in running if one.count < one.length]
    while side.step():  # what was queued ahead
        pass
    to.seconds, to.tokens = perf_counter() - start, sum(load.lengths)
    return to


def milliseconds(values: list[float], share: float) -> float:
    return float(np.percentile(values, share) * 1000) if values else float("nan")


def summed(rounds: list[Round]) -> dict[str, Any]:
    """The figures of a load: of all rounds, tokens a second their median."""
    rates = [one.tokens / one.seconds for one in rounds]
    first = [x for one in rounds for x in one.first]
    each = [x for one in rounds for x in one.each]
    return {
        "tokens_a_second": median(rates), "slowest": min(rates), "fastest": max(rates),
        "prompt_tokens_a_second": median(one.prompt_tokens / one.seconds for one in rounds),
        "first_ms_50": milliseconds(first, 50), "first_ms_99": milliseconds(first, 99),
        "token_ms_50": milliseconds(each, 50), "token_ms_99": milliseconds(each, 99),
        "seconds": [one.seconds for one in rounds], "tokens": [one.tokens for one in rounds],
        "failed": sum(one.failed for one in rounds),
    }  # fmt: skip


def table(rows: Iterable[tuple[str, int, float, dict[str, Any]]]) -> str:
    """Markdown: the side, its requests, how many arrive in a second, and the figures."""
    lines = [
        "| | requests | arrivals | tokens/s (least, most) | first token, 50 % | 99 % "
        "| a token, 50 % | 99 % | failed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, requests, rate, found in rows:
        arrivals = f"{rate:g} a second" if rate else "all at once"
        most = f"{found['slowest']:,.0f}, {found['fastest']:,.0f}"
        first = f"{found['first_ms_50']:,.1f} ms | {found['first_ms_99']:,.1f} ms"
        each = f"{found['token_ms_50']:.2f} ms | {found['token_ms_99']:.2f} ms"
        lines.append(
            f"| {name} | {requests} | {arrivals} | {found['tokens_a_second']:,.0f} ({most}) "
            f"| {first} | {each} | {found['failed']} |"
        )
    return "\n".join(lines)
