"""Whether two sides of benchmarks/llm.py compute the same: logits and greedy tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from engine import Sampling

from marks import Wrong
from marks.llm_sides import Prompts, Side, finish

# How far logits may be apart, in parts of their own deviation: both round to bfloat16 after
# every operation, in another order.  What is wrong (a position, a page, a norm) is several
# times that.
BOUND = 0.15
TOKENS = 4
STEP = 2.0**-7  # of bfloat16, which the peer's logits are, in parts of a number


def logits_of(side: Side, prompts: Prompts) -> list[tuple[list[int], np.ndarray]]:
    """Of each request, its first greedy tokens and the logits that they were drawn from."""
    rows: dict[int, list[np.ndarray]] = {}

    def keep(requests: list[Any], logits: np.ndarray) -> None:
        for request, row in zip(requests, logits, strict=True):
            rows.setdefault(id(request), []).append(np.array(row, np.float32))

    side.on_logits = keep
    greedy = Sampling(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    try:
        requests = side.start(prompts, greedy)
        finish(side)
    finally:
        side.on_logits = None
    return [(request.tokens, np.array(rows[id(request)])) for request in requests]


def compare(one: Side, other: Side, prompts: Prompts) -> dict[str, float]:
    """The worst difference of logits, and how many greedy tokens are the same.

    Rows are compared as far as both had the same tokens before; one side may choose another
    token than the other only where the logits of the two are as near as rounding leaves them.
    Raises `Wrong`.
    """
    worst, same, compared = 0.0, 0, 0
    pairs = zip(logits_of(one, prompts), logits_of(other, prompts), strict=True)
    for request, ((tokens, logits), (tokens_b, logits_b)) in enumerate(pairs):
        for step in range(TOKENS):
            a, b = logits[step], logits_b[step]
            apart = float(np.sqrt(np.mean((a - b) ** 2)) / a.std())
            if not apart <= BOUND:  # NaN is not
                where = f"{one.name} and {other.name}, request {request}, token {step}"
                raise Wrong(f"{where}: logits are {apart:.3f} of their deviation apart")
            worst, compared = max(worst, apart), compared + 1
            first, second = tokens[step], tokens_b[step]
            if first == second:
                same += 1
                continue
            if not a[first] - a[second] <= 10 * apart * a.std() + STEP * abs(a[first]):
                raise Wrong(f"request {request}: tokens {first} and {second}, far apart in logits")
            break
    return {"logits_apart": worst, "same_tokens": same, "compared": compared}
