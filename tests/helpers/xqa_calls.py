"""Calls of `xqa` for the CPU and for a GPU, and the same in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np

import fi_ffi
from fi_ffi.reference.attention.formula import Options, exact

from tests.helpers.calls import called

F16, BF16, FP8 = np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn


@dataclass(frozen=True)
class Spec:
    """A module, and a batch for it."""

    q: Any = BF16
    kv: Any = BF16
    out: Any = None  # None: as q
    page_size: int = 16
    group: int = 4
    head_dim: int = 128
    window: int = 0
    queries: int = 1
    tree: bool = False  # what the queries see of each other: any, or what is causal
    lengths: tuple[int, ...] = (1, 16, 17, 300)
    kv_heads: int = 2
    layout: str = "NHD"
    of_lengths: Any = np.uint32
    options: dict[str, Any] = field(default_factory=dict)


class Batch:
    """Random inputs; the output is NaN, and so is the cache where no request has tokens."""

    def __init__(self, spec: Spec, rng: np.random.Generator) -> None:
        self.spec = spec
        count = [-(-n // spec.page_size) for n in spec.lengths]
        pages = rng.permutation(sum(count) + 3)[: sum(count)]
        most = max(count) + 1
        table = np.full((len(count), most), pages[0] if len(pages) else 0, np.int32)
        for request, first in enumerate(np.cumsum([0, *count])[:-1]):
            table[request, : count[request]] = pages[first : first + count[request]]
        heads = spec.kv_heads * spec.group
        cache = sum(count) + 3, spec.page_size, spec.kv_heads, spec.head_dim
        self.keys, self.values = (self._cache(cache, table, rng) for _ in range(2))
        several = (spec.queries,) if spec.queries > 1 else ()
        q = rng.standard_normal((len(count), 1, *several, heads, spec.head_dim))
        self.arrays = {
            "q": q.astype(spec.q),
            "k_cache": self.keys, "v_cache": self.values, "page_table": table,
            "seq_lens": np.array(spec.lengths, spec.of_lengths).reshape(-1, 1),
            "output": np.full(q.shape, np.nan, spec.out or spec.q),
        }  # fmt: skip
        self.seen = np.tri(spec.queries, dtype=bool)[None].repeat(len(count), 0)
        if spec.tree:
            self.seen &= rng.random(self.seen.shape) < 0.5
            self.seen |= np.eye(spec.queries, dtype=bool)
        if several:
            width = 32 * -(-spec.queries // 32)
            bits = np.zeros((*self.seen.shape[:2], width), bool)
            bits[..., : spec.queries] = self.seen
            self.arrays["mask"] = np.packbits(bits, axis=2, bitorder="little").view(np.uint16)
        if spec.layout == "HND":
            for name in ("k_cache", "v_cache"):
                self.arrays[name] = np.ascontiguousarray(self.arrays[name].swapaxes(1, 2))

    def _cache(self, shape, table, rng) -> np.ndarray:
        cache = np.full(shape, np.nan, np.float32)
        for pages, length in zip(table, self.spec.lengths, strict=True):
            for position in range(length):
                page, slot = divmod(position, shape[1])
                cache[pages[page], slot] = rng.standard_normal(shape[2:])
            # The rest of a last page is read, and multiplied by 0: anything finite.
            if length % shape[1]:
                cache[pages[length // shape[1]], length % shape[1] :] = 3
        return cache.astype(self.spec.kv)

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """The output in float64, and the magnitude of its terms."""
        spec, options = self.spec, self.spec.options
        of_kv = float(np.ravel(options.get("kv_scale", 1.0))[0]) if spec.kv is FP8 else 1.0
        scale = float(np.ravel(options.get("q_scale", 1.0))[0]) * of_kv / spec.head_dim**0.5
        sink = np.ravel(options["sinks"]) if "sinks" in options else None
        how = Options(scale, window_left=spec.window - 1, sink=sink, v_scale=of_kv)
        count = spec.queries
        table = self.arrays["page_table"]
        found = []
        for request, length in enumerate(spec.lengths):
            k, v = (
                cache[table[request]].reshape(-1, *cache.shape[2:])[:length]
                for cache in (self.keys, self.values)
            )
            before = np.ones((count, length - count), bool)
            mask = np.hstack((before, self.seen[request]))
            q = self.arrays["q"][request].reshape(count, *self.arrays["q"].shape[-2:])
            found.append(exact(q, k, v, replace(how, mask=mask)))
        out, size = (np.stack([getattr(one, of) for one in found]) for of in ("out", "magnitude"))
        shape = self.arrays["q"].shape
        return out.reshape(shape), size.reshape(shape)

    def check(self, place: Callable[[np.ndarray], Any], stream: object = None) -> float:
        """Call it; the largest error as a fraction of its bound."""
        spec = self.spec
        placed = {n: place(v) for n, v in spec.options.items() if isinstance(v, np.ndarray)}
        options = spec.options | {name: array.desc() for name, array in placed.items()}
        found = called(
            fi_ffi.xqa, self.arrays, place, ("output",), **options, sliding_win_size=spec.window,
            kv_layout=spec.layout, stream=stream,
        )  # fmt: skip
        assert all(array.intact() for array in placed.values()), "bytes outside were written"
        if "semaphores" in placed:
            assert not placed["semaphores"].get().any(), "the semaphores are not zero again"
        value, size = self.expected()
        is_fp8 = spec.out is FP8
        if is_fp8:
            scale = spec.options.get("rcp_out_scale", 1.0)
            value, size = np.clip(value * scale, -448, 448), size * scale
        got = found["output"].astype(np.float64)
        # Probabilities are rounded to the queries' dtype, and on Hopper those of fp8 caches, and
        # their queries, to fp8.
        step = 2.0**-3 if spec.kv is FP8 else 2 * float(ml_dtypes.finfo(spec.q).eps)
        # A value of one key that is 0 is to be 0.
        bound = np.maximum(size * step, 2.0**-20)
        if is_fp8:  # half a step, of what is rounded before, and half the smallest number
            bound += (np.abs(value) + bound) * 2.0**-4 + 2.0**-10
        error = np.abs(got - value) / bound
        return float(np.nan_to_num(error, nan=np.inf).max())
