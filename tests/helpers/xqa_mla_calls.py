"""Calls of `xqa_mla` for the CPU and for a GPU, and the same in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

import fi_ffi

from tests.helpers.calls import called

BF16, FP8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
HEADS, DIM, VALUES = 128, 576, 512


@dataclass(frozen=True)
class Spec:
    """A module, and a batch for it."""

    dtype: Any = BF16
    page_size: int = 16
    lengths: tuple[int, ...] = (1, 16, 17, 100)
    axis: int | None = None  # where the caches' axis of one head is; None: nowhere
    apart: bool = False  # values in a cache of their own
    options: dict[str, Any] = field(default_factory=dict)


class Batch:
    """Random inputs; the output is NaN, and so is the cache where no request has tokens."""

    def __init__(self, spec: Spec, rng: np.random.Generator) -> None:
        self.spec = spec
        count = [-(-n // spec.page_size) for n in spec.lengths]
        self.pages = np.split(rng.permutation(sum(count) + 2)[: sum(count)], np.cumsum(count)[:-1])
        table = np.zeros((len(count), max(count) + 1), np.int32)
        for row, pages in zip(table, self.pages, strict=True):
            row[: len(pages)] = pages
        self.keys = self._cache(rng)
        self.values = self._cache(rng) if spec.apart else self.keys
        caches = (self.keys, self.values)
        if spec.axis is not None:
            caches = tuple(np.expand_dims(cache, spec.axis) for cache in caches)
        q = (rng.standard_normal((len(count), 1, HEADS, DIM)) / 4).astype(spec.dtype)
        self.arrays = {
            "q": q, "k_cache": caches[0], "v_cache": caches[1], "page_table": table,
            "seq_lens": np.array(spec.lengths, np.uint32)[:, None],
            "output": np.full((len(count), 1, HEADS, VALUES), np.nan, BF16),
        }  # fmt: skip

    def _cache(self, rng: np.random.Generator) -> np.ndarray:
        size = self.spec.page_size
        cache = np.full((sum(map(len, self.pages)) + 2, size, DIM), np.nan, np.float32)
        for pages, length in zip(self.pages, self.spec.lengths, strict=True):
            tokens = np.full((len(pages) * size, DIM), 3.0)  # read, and multiplied by 0
            tokens[:length] = rng.standard_normal((length, DIM))
            cache[pages] = tokens.reshape(-1, size, DIM)
        return cache.astype(self.spec.dtype)

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """The output in float64, by numpy alone, and the magnitude of its terms."""
        q_scale, kv_scale = (
            float(np.ravel(self.spec.options.get(name, 1.0))[0]) for name in ("q_scale", "kv_scale")
        )
        out, sizes = [], []
        for q, pages, n in zip(self.arrays["q"], self.pages, self.spec.lengths, strict=True):
            k, v = (
                cache[pages].astype(np.float64).reshape(-1, DIM)[:n]
                for cache in (self.keys, self.values)
            )
            logits = q[0].astype(np.float64) @ k.T * (q_scale * kv_scale)
            shares = np.exp(logits - logits.max(axis=1, keepdims=True))
            shares *= kv_scale / shares.sum(axis=1, keepdims=True)
            out.append(shares @ v[:, :VALUES])
            sizes.append(shares @ np.abs(v[:, :VALUES]))
        return np.stack(out)[:, None], np.stack(sizes)[:, None]

    def check(self, place: Callable[[np.ndarray], Any], stream: object = None) -> float:
        """Call it; the largest error as a fraction of its bound."""
        options = self.spec.options
        placed = {n: place(v) for n, v in options.items() if isinstance(v, np.ndarray)}
        given = options | {name: array.desc() for name, array in placed.items()}
        found = called(
            fi_ffi.xqa_mla, self.arrays, place, ("output",), **given, stream=stream
        )  # fmt: skip
        assert all(array.intact() for array in placed.values()), "bytes outside were written"
        value, size = self.expected()
        # Probabilities are rounded to the queries' dtype, and outputs to bfloat16.
        step = 2.0**-3 if self.spec.dtype is FP8 else 2.0**-7
        error = np.abs(found["output"].astype(np.float64) - value)
        error /= np.maximum(size * step, 2.0**-20)
        return float(np.nan_to_num(error, nan=np.inf).max())
