"""Batches of attention on the host: random numbers, tables, and what must come out."""

from __future__ import annotations

import numpy as np

from fi_ffi.reference.arrays import Array
from fi_ffi.reference.attention.formula import Exact, Options, exact_batch, from_pages
from marks import Wrong

HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 16
SM_SCALE = HEAD_DIM**-0.5
# Outputs, pieces of a split request, and (prefill) softmax weights are rounded to float16,
# each by 2^-11 at most of the sum of weights times |values|.
_TOLERANCE = 2.0**-9


def random(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape, np.float32).astype(np.float16)


def starts(counts: Array) -> Array:
    """Where each of ragged parts begins, and where the last ends."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def check_attention(got: Array, exact: Exact, what: str) -> None:
    """Raise `Wrong` where an element is further from float64 than rounding explains."""
    error = np.abs(got.astype(np.float64) - exact.out)
    if not (error <= _TOLERANCE * exact.magnitude).all():  # which NaN is not either
        worst = (error / np.maximum(exact.magnitude, 2.0**-24)).max()
        told = f"{worst:.3g} of the magnitude, {_TOLERANCE:.3g} allowed"
        raise Wrong(f"{what} is off by {told}")


class Batch:
    """Requests of these lengths, each a token longer in each step than in the one before."""

    def __init__(self, lengths: Array, steps: int) -> None:
        self.lengths, self.steps = lengths, steps
        self._exact: dict[int, Exact] = {}

    def exact(self, step: int) -> Exact:
        """What the outputs of a step must be, from float64; worked out once."""
        if step not in self._exact:
            self._exact[step] = self._work_out(step)
        return self._exact[step]

    def check(self, step: int, got: Array) -> None:
        """Raise `Wrong` where an element is further from float64 than rounding explains."""
        check_attention(got, self.exact(step), f"attention at step {step}")

    def _work_out(self, step: int) -> Exact:
        raise NotImplementedError


class Decoding(Batch):
    """A query a request, over a paged cache."""

    def __init__(self, lengths: Array, steps: int) -> None:
        super().__init__(lengths, steps)
        rng = np.random.default_rng()
        most = -(-(lengths + steps - 1) // PAGE)
        count = int(most.sum())
        self._pages = np.split(rng.permutation(count).astype(np.int32), np.cumsum(most)[:-1])
        self.q = random(rng, len(lengths), HEADS, HEAD_DIM)
        self.k = random(rng, count, PAGE, KV_HEADS, HEAD_DIM)
        self.v = random(rng, count, PAGE, KV_HEADS, HEAD_DIM)

    def tables(self, step: int) -> tuple[Array, Array, Array]:
        """indptr, indices and last_page_len: int32 on the host, as plans take them."""
        lengths = self.lengths + step
        counts = -(-lengths // PAGE)
        pages = [own[:n] for own, n in zip(self._pages, counts, strict=True)]
        last = lengths - (counts - 1) * PAGE
        return starts(counts), np.concatenate(pages), last.astype(np.int32)

    def _work_out(self, step: int) -> Exact:
        tables = self.tables(step)

        def keys(request: int) -> tuple[Array, Array]:
            k, v = (from_pages(cache, *tables, request) for cache in (self.k, self.v))
            return k, v

        indptr = np.arange(len(self.lengths) + 1)
        return exact_batch(self.q, indptr, keys, Options(SM_SCALE))


class Ragged(Batch):
    """Prompts side by side that are prefilled together, causal."""

    def __init__(self, lengths: Array, steps: int) -> None:
        super().__init__(lengths, steps)
        rng = np.random.default_rng()
        most = int((lengths + steps - 1).sum())
        self.q = random(rng, most, HEADS, HEAD_DIM)
        self.k = random(rng, most, KV_HEADS, HEAD_DIM)
        self.v = random(rng, most, KV_HEADS, HEAD_DIM)

    def indptr(self, step: int) -> Array:
        """Of queries, and of keys, which are as many."""
        return starts(self.lengths + step)

    def _work_out(self, step: int) -> Exact:
        indptr = self.indptr(step)

        def keys(request: int) -> tuple[Array, Array]:
            where = slice(int(indptr[request]), int(indptr[request + 1]))
            return self.k[where], self.v[where]

        return exact_batch(self.q, indptr, keys, Options(SM_SCALE, causal=True))
