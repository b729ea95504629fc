"""benchmarks/llm_torch.py over several GPUs: a process each, as vLLM has them; sums by NCCL.

Every rank runs the same loop, told by rank 0, and draws the same tokens from the same seed.  Each
has its part of the weights as examples/llm splits them, in memory of its own, and all of the
embedding.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from engine import Config, Sampling
from engine.split import Split, of_rank
from engine.weights import of_layer

from marks.peers import Peers


@dataclass(frozen=True)
class Job:
    """What every rank makes its loop from; `options` are `Loop`'s."""

    config: Config
    weights: Callable[[str], np.ndarray]
    ranks: int
    meeting: str  # a file
    options: dict[str, Any]


def loop_of(job: Job, rank: int) -> Any:
    """A rank's loop, on the GPU of its number."""
    import torch
    from llm_torch import Loop, Weights

    torch.cuda.set_device(rank)
    torch.cuda.set_stream(torch.cuda.Stream())  # not the one that all others wait for
    torch.distributed.init_process_group(
        "nccl", init_method=f"file://{job.meeting}", rank=rank, world_size=job.ranks,
        device_id=torch.device("cuda", rank),
    )  # fmt: skip
    config, part = of_rank(job.config, job.ranks), Split(job.weights, job.config, rank, job.ranks)

    def put(x: np.ndarray) -> torch.Tensor:
        if x.dtype.name != "bfloat16":
            return torch.from_numpy(x).cuda()
        return torch.from_numpy(np.ascontiguousarray(x).view(np.int16)).cuda().view(torch.bfloat16)

    layers = [
        {name: put(x) for name, x in of_layer(part, config, i).items()}
        for i in range(len(config.layers))
    ]
    table = "model.embed_tokens.weight"
    head = put(part(table if config.tied else "lm_head.weight"))
    cos_sin = put(config.cos_sin_cache(config.max_positions))
    whole = Weights(put(job.weights(table)), head, put(part("model.norm.weight")), layers, cos_sin)
    return Loop(config, whole, ranks=job.ranks, **job.options)


def start(loop: Any, kind: str, prompts: list[list[int]], sampling: Sampling) -> list[Any]:
    """A batch, with the draws of every rank begun alike."""
    import torch

    torch.cuda.manual_seed(len(prompts))
    loop.kind = kind
    return [loop.submit(prompt, sampling) for prompt in prompts]


def follow(job: Job, rank: int, told: Connection) -> None:
    """What rank 0 tells: a batch to start, or a step."""
    Peers()
    loop = loop_of(job, rank)
    while True:
        batch = told.recv()
        if batch is None:
            loop.step()
        else:
            start(loop, *batch)


class RankedPeer:
    """Rank 0's loop as one of the two kinds, and the others that do what it does."""

    def __init__(self, loop: Any, kind: str, others: list[Connection]) -> None:
        self.loop, self.kind, self.others = loop, kind, others
        self.name = f"torch {kind}"

    @property
    def on_logits(self) -> Callable[[list[Any], np.ndarray], None] | None:
        return self.loop.on_logits  # type: ignore[no-any-return]

    @on_logits.setter
    def on_logits(self, called: Callable[[list[Any], np.ndarray], None] | None) -> None:
        self.loop.on_logits = called

    def _tell(self, what: Any) -> None:
        for other in self.others:
            other.send(what)

    def start(self, prompts: list[list[int]], sampling: Sampling) -> list[Any]:
        self._tell((self.kind, prompts, sampling))
        return start(self.loop, self.kind, prompts, sampling)

    def step(self) -> bool:
        self._tell(None)
        return bool(self.loop.step())


def peers(
    config: Config, weights: Callable[[str], np.ndarray], ranks: int, **options: Any
) -> list[RankedPeer]:
    """The eager loop and the one that replays graphs, over `ranks` GPUs."""
    meeting = str(Path(tempfile.mkdtemp()) / "meeting")
    job = Job(config, weights, ranks, meeting, options)
    spawn, others = multiprocessing.get_context("spawn"), []
    for rank in range(1, ranks):
        told, tell = spawn.Pipe(duplex=False)
        spawn.Process(target=follow, args=(job, rank, told), daemon=True).start()
        others.append(tell)
    loop = loop_of(job, 0)
    return [RankedPeer(loop, kind, others) for kind in ("eager", "graph")]
