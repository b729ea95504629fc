"""The loop of examples/llm once more, with torch and flashinfer-python: the peer of llm.py.

Dense Llama 3 and Qwen3.  Weights are shared with the engine it is compared with, and so are caches
where both have one GPU: the sides take turns.  Everything else is its own.  All prompts first, in
steps of at most `max_tokens`, with those that decode already in the same batch; the host reads the
tokens of each step before it queues the next.  What a step needs goes to the GPU in one copy from
page-locked memory, and the planners are given the host's arrays: neither waits for the GPU.

`eager` launches every kernel from Python; `graph` replays a CUDA graph of the model for the
sizes of batch it was told of, planned by FlashInfer's wrappers for graphs; other batches are padded
to the next size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import flashinfer
import numpy as np
import torch
import torch.nn.functional as F
from engine import Sampling
from flashinfer import sampling as draws

WORKSPACE = 256 << 20
ARRAYS = ("tokens", "positions", "requests", "indptr", "last_page_len", "last", "indices")


@dataclass(eq=False)
class Request:
    prompt: list[int]
    row: int  # of the page table
    length: int  # tokens that it gets; 0: padding
    tokens: list[int] = field(default_factory=list)
    computed: int = 0


@dataclass
class Weights:
    """Tensors of the model: a mapping by short names for each layer."""

    embed: torch.Tensor
    head: torch.Tensor
    norm: torch.Tensor
    layers: list[Mapping[str, torch.Tensor]]
    cos_sin: torch.Tensor


class Loop:
    """A model, its cache and its requests; `kind` is "eager" or "graph"."""

    def __init__(
        self, config: Any, weights: Weights, page_size: int, max_batch: int, max_length: int,
        max_tokens: int, use_tensor_cores: bool = False, graph_sizes: tuple[int, ...] = (),
        ranks: int = 1, caches: list[torch.Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.config, self.weights, self.max_tokens = config, weights, max_tokens
        self.ranks = ranks  # each with a part of the weights: llm_ranks.py
        self.device, self.dtype = weights.embed.device, weights.embed.dtype
        self.page_size, each = page_size, -(-max_length // page_size)
        # Page 0 belongs to nobody: the last row pads batches, with a token each.
        self.table = np.zeros((max_batch + 1, each), np.int32)
        self.table[:-1] = 1 + np.arange(max_batch * each).reshape(max_batch, each)
        shape = (1 + max_batch * each, 2, page_size, config.kv_heads, config.head_dim)
        self.caches = caches or [self.zeros(*shape, dtype=self.dtype) for _ in config.layers]
        room = 3 * max_tokens + 4 * max_batch + self.table.size + 64
        self.staging = torch.zeros(room, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        self.prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(self.workspace(), "NHD")
        self.use_tensor_cores = use_tensor_cores  # for decode: FlashInfer's prefill kernels
        self.decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self.workspace(), "NHD", use_tensor_cores=self.use_tensor_cores
        )
        self.graph_workspace = self.workspace() if graph_sizes else None
        self.graph_sizes, self.graphs, self.kind = graph_sizes, dict[int, Graph](), "eager"
        self.running: list[Request] = []
        self.rows = [*range(max_batch)][::-1]  # that no request has
        self.on_logits: Callable[[list[Request], np.ndarray], None] | None = None
        self.is_greedy, self.is_filtered = False, False
        self.temperature = self.zeros(max_batch, dtype=torch.float32)
        self.top_k = self.zeros(max_batch, dtype=torch.int32)
        self.top_p = self.zeros(max_batch, dtype=torch.float32)

    def zeros(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def workspace(self) -> torch.Tensor:
        return self.zeros(WORKSPACE, dtype=torch.uint8)

    def submit(self, prompt: list[int], sampling: Sampling) -> Request:
        """Take in a prompt; all that run at a time are sampled alike, but for their lengths."""
        if not self.running:
            self.is_greedy = sampling.temperature == 0
            self.is_filtered = sampling.top_p < 1 or sampling.top_k > 0
            self.temperature.fill_(sampling.temperature or 1)
            self.top_k.fill_(sampling.top_k or self.config.vocab)
            self.top_p.fill_(sampling.top_p)
        request = Request(prompt, self.rows.pop(), sampling.max_tokens)
        self.running.append(request)
        return request

    @torch.inference_mode()
    def step(self) -> bool:
        if not self.running:
            return False
        is_decode = all(request.tokens for request in self.running)
        work = self.decoding() if is_decode else self.mixed()
        host = self.arrays(work)
        sampled = [request for request, _, is_last in work if is_last and request.length]
        logits = self.logits(host, is_decode)[: len(sampled)]
        if self.on_logits:
            self.on_logits(sampled, logits.float().cpu().numpy())
        if sampled:
            tokens = self.draw(logits).tolist()  # waits for the GPU
            for request, token in zip(sampled, tokens, strict=True):
                request.tokens.append(token)
        else:
            torch.cuda.synchronize()  # before the page-locked memory is written again
        ended = [request for request in sampled if len(request.tokens) == request.length]
        if ended:
            self.rows += [request.row for request in ended]
            self.running = [request for request in self.running if request not in ended]
        return True

    def decoding(self) -> list[tuple[Request, list[int], bool]]:
        """One token of each, padded to a size that has a graph."""
        work = [(request, request.tokens[-1:], True) for request in self.running]
        sizes = self.graph_sizes if self.kind == "graph" else ()
        size = next((size for size in sizes if size >= len(work)), 0)
        padding = [Request([], len(self.table) - 1, 0) for _ in range(len(work), size)]
        return work + [(request, [0], True) for request in padding]

    def mixed(self) -> list[tuple[Request, list[int], bool]]:
        """(request, tokens, whether the last of the prompt is among them)."""
        work = [(request, request.tokens[-1:], True) for request in self.running if request.tokens]
        room = self.max_tokens - len(work)
        for request in self.running:
            if not request.tokens and room:
                tokens = request.prompt[request.computed : request.computed + room]
                room -= len(tokens)
                is_last = request.computed + len(tokens) == len(request.prompt)
                work.append((request, tokens, is_last))
        return work

    def arrays(self, work: list[tuple[Request, list[int], bool]]) -> dict[str, np.ndarray]:
        counts = np.array([len(tokens) for _, tokens, _ in work], np.int32)
        computed = np.array([request.computed for request, _, _ in work], np.int32)
        ends, lengths = np.cumsum(counts), computed + counts
        owners = np.repeat(np.arange(len(work), dtype=np.int32), counts)
        pages = -(-lengths // self.page_size)
        table = self.table[[request.row for request, _, _ in work], : pages.max()]
        for (request, _, _), length in zip(work, lengths.tolist(), strict=True):
            request.computed = length
        return {
            "tokens": np.array([token for _, tokens, _ in work for token in tokens], np.int32),
            "positions": np.arange(ends[-1], dtype=np.int32) - (ends - lengths)[owners],
            "requests": owners,
            "indptr": np.concatenate([[0], np.cumsum(pages)]),
            "last_page_len": lengths - (pages - 1) * self.page_size,
            "last": (ends - 1)[[is_last for _, _, is_last in work]],
            "indices": table[np.arange(pages.max()) < pages[:, None]],
            "qo_indptr": np.concatenate([[0], ends]),
        }

    def upload(self, host: dict[str, np.ndarray], target: torch.Tensor | None) -> dict[str, Any]:
        """Views of the arrays on the GPU, to which one copy has brought them."""
        at, places, memory = 0, {}, self.staging.numpy()
        for name in ARRAYS:
            values = host[name]
            memory[at : at + len(values)] = values
            places[name] = at, at + len(values)
            at += -(-len(values) // 4) * 4
        if target is None:
            target = torch.empty(at, dtype=torch.int32, device=self.device)
        target[:at].copy_(self.staging[:at], non_blocking=True)
        return {name: target[start:end] for name, (start, end) in places.items()}

    def options(self) -> dict[str, Any]:
        return {
            "num_qo_heads": self.config.heads, "num_kv_heads": self.config.kv_heads,
            "page_size": self.page_size, "q_data_type": self.dtype,
        }  # fmt: skip

    def plan_decode(self, wrapper: Any, host: dict[str, np.ndarray], given: dict[str, Any]) -> None:
        indptr, last = (host_ints(host[name]) for name in ("indptr", "last_page_len"))
        head_dim = self.config.head_dim
        wrapper.plan(indptr, given["indices"], last, head_dim=head_dim, **self.options())

    def logits(self, host: dict[str, np.ndarray], is_decode: bool) -> torch.Tensor:
        size = len(host["last_page_len"])
        if is_decode and self.kind == "graph" and size in self.graph_sizes:
            if size not in self.graphs:
                self.graphs[size] = Graph(self, size, host)
            return self.graphs[size](host)
        given = self.upload(host, None)
        if is_decode:
            self.plan_decode(self.decode, host, given)
            return self.forward(given, self.decode, True)
        qo_indptr, indptr, last = (
            host_ints(host[name]) for name in ("qo_indptr", "indptr", "last_page_len")
        )
        self.prefill.plan(
            qo_indptr, indptr, given["indices"], last, head_dim_qk=self.config.head_dim,
            causal=True, **self.options(),
        )  # fmt: skip
        return self.forward(given, self.prefill, False)

    def forward(self, given: dict[str, Any], attention: Any, is_decode: bool) -> torch.Tensor:
        """Logits of the last token of each request, in the model's dtype; padding last."""
        weights, eps = self.weights, self.config.eps
        residual = F.embedding(given["tokens"], weights.embed)
        x = flashinfer.rmsnorm(residual, weights.layers[0]["input_norm"], eps)
        following = [layer["input_norm"] for layer in weights.layers[1:]] + [weights.norm]
        for layer, cache, next_norm in zip(weights.layers, self.caches, following, strict=True):
            x = self.added(self.attend(layer, x, given, cache, attention))
            flashinfer.fused_add_rmsnorm(x, residual, layer["post_norm"], eps)
            x = flashinfer.silu_and_mul(F.linear(x, layer["gate_up"]))
            x = self.added(F.linear(x, layer["down"]))
            flashinfer.fused_add_rmsnorm(x, residual, next_norm, eps)
        return self.gathered(F.linear(x if is_decode else x[given["last"]], weights.head))

    def added(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' x."""
        if self.ranks > 1:
            torch.distributed.all_reduce(x)
        return x

    def gathered(self, logits: torch.Tensor) -> torch.Tensor:
        """Those of the whole vocabulary."""
        if self.ranks == 1:
            return logits
        parts = logits.new_empty((self.ranks, *logits.shape))
        torch.distributed.all_gather_into_tensor(parts, logits)
        return parts.transpose(0, 1).reshape(len(logits), -1)[:, : self.config.vocab]

    def attend(
        self, layer: Mapping[str, torch.Tensor], x: torch.Tensor, given: dict[str, Any],
        cache: torch.Tensor, attention: Any,
    ) -> torch.Tensor:  # fmt: skip
        config, n, dim = self.config, len(x), self.config.head_dim
        sizes = [config.heads * dim, config.kv_heads * dim, config.kv_heads * dim]
        q, k, v = F.linear(x, layer["qkv"]).split(sizes, dim=-1)
        heads, keys = q.view(n, -1, dim), k.view(n, -1, dim)
        if config.qk_norm:
            flashinfer.rmsnorm(heads, layer["q_norm"], config.eps, out=heads)
            flashinfer.rmsnorm(keys, layer["k_norm"], config.eps, out=keys)
        positions, table = given["positions"], self.weights.cos_sin
        flashinfer.apply_rope_with_cos_sin_cache_inplace(positions, q, k, dim, table)
        flashinfer.append_paged_kv_cache(
            keys, v.view(n, -1, dim), given["requests"], positions, cache,
            given["indices"], given["indptr"], given["last_page_len"],
        )  # fmt: skip
        return F.linear(attention.run(heads, cache).view(n, -1), layer["out"])

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        if self.is_greedy:
            return logits.argmax(-1)
        n = len(logits)
        probs = draws.softmax(logits, temperature=self.temperature[:n])
        if self.is_filtered:
            return draws.top_k_top_p_sampling_from_probs(probs, self.top_k[:n], self.top_p[:n])
        return draws.sampling_from_probs(probs)


class Graph:
    """The model for a size of batch, recorded; called with a step's arrays."""

    def __init__(self, loop: Loop, size: int, host: dict[str, np.ndarray]) -> None:
        self.loop = loop
        self.inputs = loop.zeros(len(loop.staging), dtype=torch.int32)
        # The pages come last: there is room behind for as many as there may be.
        given = loop.upload(host, self.inputs)
        start = given["indices"].storage_offset() - self.inputs.storage_offset()
        given["indices"] = self.inputs[start : start + loop.table.size]
        self.wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            loop.graph_workspace, "NHD", use_cuda_graph=True,
            use_tensor_cores=loop.use_tensor_cores, paged_kv_indptr_buffer=given["indptr"],
            paged_kv_indices_buffer=given["indices"],
            paged_kv_last_page_len_buffer=given["last_page_len"],
        )  # fmt: skip
        loop.plan_decode(self.wrapper, host, loop.upload(host, self.inputs))
        loop.forward(given, self.wrapper, True)  # whatever is loaded or allocated once
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = loop.forward(given, self.wrapper, True)

    def __call__(self, host: dict[str, np.ndarray]) -> torch.Tensor:
        self.loop.plan_decode(self.wrapper, host, self.loop.upload(host, self.inputs))
        self.graph.replay()
        return self.logits


def host_ints(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.int32))
