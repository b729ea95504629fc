"""benchmarks/llm_torch.py as sides of benchmarks/llm.py, on an engine's weights and caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from engine import Engine, Sampling
from llm_torch import Loop, Request, Weights

import fi_ffi

# From this many query heads a key head on, servers have FlashInfer decode on tensor cores.
TENSOR_CORES_FROM = 4


def is_wide(config: Any) -> bool:
    """Whether a server has FlashInfer decode these heads on tensor cores."""
    return bool(config.heads // config.kv_heads >= TENSOR_CORES_FROM)


class Peer:
    """A loop as one of the two kinds: they share weights, cache and memory."""

    def __init__(self, loop: Loop, kind: str) -> None:
        self.loop, self.kind, self.name = loop, kind, f"torch {kind}"

    @property
    def on_logits(self) -> Callable[[list[Request], np.ndarray], None] | None:
        return self.loop.on_logits

    @on_logits.setter
    def on_logits(self, called: Callable[[list[Request], np.ndarray], None] | None) -> None:
        self.loop.on_logits = called

    def start(self, prompts: list[list[int]], sampling: Sampling) -> list[Request]:
        self.loop.kind = self.kind
        return [self.loop.submit(prompt, sampling) for prompt in prompts]

    def step(self) -> bool:
        return self.loop.step()


class Memory:
    """An address as torch takes it over, without a copy."""

    def __init__(self, x: Any, typestr: str) -> None:
        data = (x.ptr, False)
        self.__cuda_array_interface__ = {
            "shape": tuple(x.shape), "typestr": typestr, "data": data, "version": 2,
        }  # fmt: skip


def tensor(x: Any) -> torch.Tensor:
    """A contiguous `TensorDesc` on the GPU as a tensor of torch's; bfloat16 goes as int16."""
    if x.dtype.name == "bfloat16":
        return torch.as_tensor(Memory(x, "<i2"), device="cuda:0").view(torch.bfloat16)
    return torch.as_tensor(Memory(x, "<f4"), device="cuda:0")


def weights_of(model: Any) -> Weights:
    """The weights of an engine's model, in its memory."""
    layers = [{name: tensor(x) for name, x in layer.items()} for layer in model.layers]
    embed = tensor(model.embed)
    head = embed if model.config.tied else tensor(model.head)
    return Weights(embed, head, tensor(model.norm), layers, tensor(model.cos_sin))


def cache_of(keys: Any) -> torch.Tensor:
    """A layer's keys and values, [pages, 2, page size, heads, head size], of which `keys` begin."""
    count, size, *rest = keys.shape
    whole = fi_ffi.TensorDesc(keys.ptr, (count, 2, size, *rest), keys.dtype, device=keys.device)
    return tensor(whole)


def peers(
    engine: Engine, max_length: int, sizes: tuple[int, ...], use_cuda_cores: bool
) -> list[Peer]:
    """Of an engine: the eager loop, and the one that replays graphs of these sizes of batch."""
    torch.cuda.set_stream(torch.cuda.Stream())  # not the one that all others wait for
    config, model = engine.config, engine.model
    use_tensor_cores = is_wide(config) and not use_cuda_cores
    loop = Loop(
        config, weights_of(model), engine.page_size, model.slots, max_length, model.max_tokens,
        use_tensor_cores, sizes, caches=[cache_of(keys) for keys, _ in model.caches],
    )  # fmt: skip
    return [Peer(loop, "eager"), Peer(loop, "graph")]
