"""How much of the time the GPU computes or copies, as torch.profiler (CUPTI) records it.

CUPTI records every kernel and copy of the process, whoever launched it, those of graphs too.
It makes launches slower, graphs' most of all, but not kernels: beside the share of the time
that was recorded, the busy time is therefore held against what a step takes without it.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import Sampling

from marks.llm_sides import Prompts, Side, finish, prefill

STEPS = 30  # at most
_KINDS = {"kernel", "gpu_memcpy", "gpu_memset"}


@dataclass(frozen=True)
class Idle:
    """Milliseconds a step: of kernels and copies, in all, and what each kind of them adds."""

    busy_ms: float
    wall_ms: float
    kernels: float  # a step
    adds_ms: dict[str, float]  # by kernel or copy: how long it runs after all that began before it

    @property
    def share(self) -> float:
        return 1 - self.busy_ms / self.wall_ms


def of_trace(events: list[dict[str, Any]], steps: int) -> Idle:
    """From the events of a Chrome trace, whose times are microseconds."""
    found = [event for event in events if event.get("cat") in _KINDS and event.get("ph") == "X"]
    if not found:
        raise RuntimeError("the profiler has recorded no kernel")
    spans = [(float(event["ts"]), float(event["ts"]) + float(event["dur"])) for event in found]
    wall = max(end for _, end in spans) - min(start for start, _ in spans)
    count = sum(event["cat"] == "kernel" for event in found)
    adds, reached = dict.fromkeys((event["name"] for event in found), 0.0), float("-inf")
    for (start, end), event in sorted(zip(spans, found, strict=True), key=lambda pair: pair[0]):
        adds[event["name"]] += max(0.0, end - max(start, reached)) / steps / 1e3
        reached = max(reached, end)
    return Idle(sum(adds.values()), wall / steps / 1e3, count / steps, adds)


def profiled(torch: Any, call: Any) -> list[dict[str, Any]]:
    """What the GPU did in a call, as events of a Chrome trace."""
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=kinds) as profile:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def idle(torch: Any, side: Side, prompts: Prompts, sampling: Sampling) -> Idle:
    """Of some steps in the middle of decoding, when requests are as long as on average."""
    prefill(side, side.start(prompts, sampling))
    count = max(1, min(STEPS, sampling.max_tokens // 2))
    for _ in range((sampling.max_tokens - count) // 2):
        side.step()

    def steps() -> None:
        for _ in range(count):
            side.step()

    events = profiled(torch, steps)
    finish(side)
    return of_trace(events, count)
