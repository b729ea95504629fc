"""Block-sparse attention and cascades for the CPU and for a GPU, and dense attention in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import fi_ffi
from fi_ffi.reference.attention.formula import Exact, Options, exact

from tests.helpers.calls import called

Place = Callable[..., Any]
DIM = 128
# float16 probabilities, outputs and merged outputs, of the sum of |p * v|.
BOUND = 2.0**-8


def worst(found: dict[str, np.ndarray], right: Exact, lse: bool = True) -> float:
    """The largest error as a fraction of its bound; rows without keys are 0, at -5e4 or less."""
    out = found["o"].reshape(right.out.shape).astype(np.float64)
    error = np.abs(out - right.out) / np.maximum(right.magnitude * BOUND, 2.0**-24)
    result = float(np.nan_to_num(error, nan=np.inf).max(initial=0))
    if not lse:
        return result
    sums = found["lse"].reshape(right.lse2.shape)
    blind = np.isneginf(right.lse2)
    error = np.abs(sums - np.where(blind, 0, right.lse2)) / 2.0**-8
    error = np.where(blind, np.where(sums <= -3e4, 0, np.inf), error)
    return max(result, float(np.nan_to_num(error, nan=np.inf).max(initial=0)))


def drawn(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float16)


def outputs(*shape: int) -> dict[str, np.ndarray]:
    """Results of queries of this shape without the head's size: NaN."""
    return {
        "o": np.full((*shape, DIM), np.nan, np.float16),
        "lse": np.full(shape, np.nan, np.float32),
    }


@dataclass(frozen=True)
class Sparse:
    """A matrix of blocks."""

    M: int = 90
    N: int = 192
    R: int = 32
    C: int = 16
    heads: int = 4
    kv_heads: int = 2
    density: float = 0.4
    mask: bool = False
    backend: str = "auto"

    def check(self, rng: np.random.Generator, place: Place, device: str, stream: object) -> float:
        """Plan, run, replan, run; the largest error as a fraction of its bound."""
        found, plan = 0.0, None
        for _ in range(2):
            rows, columns = -(-self.M // self.R), self.N // self.C
            blocks = rng.random((rows, columns)) < self.density
            blocks[0] = False  # a row of blocks without any
            blocks[-1, -1] = True
            indptr = np.concatenate(([0], np.cumsum(blocks.sum(axis=1)))).astype(np.int32)
            indices = np.nonzero(blocks)[1].astype(np.int32)
            seen = blocks.repeat(self.R, 0)[: self.M].repeat(self.C, 1)
            more = {}
            if self.mask:
                part = rng.random((len(indices), self.R, self.C)) < 0.5
                for i, (row, column) in enumerate(zip(*np.nonzero(blocks), strict=True)):
                    there = seen[row * self.R :, column * self.C :][: self.R, : self.C]
                    there &= part[i, : len(there)]
                more["custom_mask"] = fi_ffi.pack_block_mask(part, indptr, self.M)
            if plan is None:
                plan = fi_ffi.BlockSparseAttentionPlan(
                    indptr, indices, M=self.M, N=self.N, R=self.R, C=self.C,
                    num_qo_heads=self.heads, num_kv_heads=self.kv_heads, head_dim=DIM,
                    use_custom_mask=self.mask, backend=self.backend, device=device, stream=stream,
                )  # fmt: skip
            else:
                plan.replan(indptr, indices, stream=stream)
            given = {
                "q": drawn(rng, self.M, self.heads, DIM),
                "k": drawn(rng, self.N, self.kv_heads, DIM),
                "v": drawn(rng, self.N, self.kv_heads, DIM),
            }
            # Blocks that are not there are not read.
            unread = ~blocks.any(axis=0).repeat(self.C)
            given["k"][unread] = given["v"][unread] = np.nan
            arrays = given | outputs(self.M, self.heads) | more
            result = called(plan.run, arrays, place, ("o", "lse"), stream=stream)
            k, v = (np.where(unread[:, None, None], 0, given[name]) for name in "kv")
            right = exact(given["q"], k, v, Options(DIM**-0.5, mask=seen))
            found = max(found, worst(result, right))
        return found


@dataclass(frozen=True)
class Variable:
    """Blocks of any sizes, for each key head."""

    rows: int = 3
    columns: int = 4
    qo_len: int = 70
    kv_len: int = 300
    kv_heads: int = 2
    group: int = 2
    backend: str = "auto"

    def _sizes(self, rng: np.random.Generator, total: int, count: int) -> np.ndarray:
        cuts = np.sort(rng.integers(0, total + 1, (self.kv_heads, count - 1)), axis=1)
        ends = np.hstack((cuts, np.full((self.kv_heads, 1), total)))
        return np.diff(ends, axis=1, prepend=0).astype(np.int32)

    def check(self, rng: np.random.Generator, place: Place, device: str, stream: object) -> float:
        found, plan = 0.0, None
        for _ in range(2):
            blocks = rng.random((self.kv_heads, self.rows, self.columns)) < 0.5
            blocks[0, 0] = False
            rows = self._sizes(rng, self.qo_len, self.rows)
            columns = self._sizes(rng, self.kv_len, self.columns)
            if plan is None:
                plan = fi_ffi.VariableBlockSparseAttentionPlan(
                    blocks, rows, columns, num_qo_heads=self.kv_heads * self.group,
                    num_kv_heads=self.kv_heads, head_dim=DIM, backend=self.backend, device=device,
                    stream=stream,
                )  # fmt: skip
            else:
                plan.replan(blocks, rows, columns, stream=stream)
            given = {
                "q": drawn(rng, self.kv_heads, self.qo_len, self.group, DIM),
                "k": drawn(rng, self.kv_heads, self.kv_len, DIM),
                "v": drawn(rng, self.kv_heads, self.kv_len, DIM),
            }
            arrays = given | outputs(self.kv_heads, self.qo_len, self.group)
            result = called(plan.run, arrays, place, ("o", "lse"), stream=stream)
            for head in range(self.kv_heads):
                seen = blocks[head].repeat(rows[head], 0).repeat(columns[head], 1)
                k, v = (given[name][head][:, None] for name in "kv")
                right = exact(given["q"][head], k, v, Options(DIM**-0.5, mask=seen))
                found = max(
                    found, worst({name: result[name][head] for name in ("o", "lse")}, right)
                )
        return found


@dataclass(frozen=True)
class Cascade:
    """Levels: how many requests side by side share a group's keys, and how many these are."""

    shares: Sequence[int] = (6, 2, 1)
    queries: Sequence[int] = (3, 1, 2, 5, 1, 4)
    page_size: int = 16
    most_keys: int = 60
    heads: int = 4
    kv_heads: int = 2
    causal: bool = True
    dense: bool = False  # the first level side by side: `SharedPrefixPlan`
    sm_scale: float | None = None
    kv_layout: str = "NHD"

    def _batch(self, rng: np.random.Generator) -> tuple[list[list[Any]], list[list[int]]]:
        """Each level's arrays, and its groups' keys."""
        qo_ends, first, levels, keys = np.cumsum([0, *self.queries]), 0, [], []
        for share in self.shares:
            groups = len(self.queries) // share
            least = max(self.queries) if share == 1 else 1
            lengths = rng.integers(least, self.most_keys + 1, groups)
            counts = -(-lengths // self.page_size)
            indptr = np.concatenate(([0], np.cumsum(counts)))
            last = (lengths - 1) % self.page_size + 1
            pages = first + rng.permutation(int(counts.sum()))
            first += int(counts.sum())
            level = [qo_ends[::share], indptr, pages, last]
            levels.append([np.array(each, np.int32) for each in level])
            keys.append(lengths.tolist())
        return levels, keys

    def check(self, rng: np.random.Generator, place: Place, device: str, stream: object) -> float:
        found, plan = 0.0, None
        more: dict[str, Any] = {"num_qo_heads": self.heads, "num_kv_heads": self.kv_heads}
        more |= {"head_dim_qk": DIM, "page_size": self.page_size, "causal": self.causal}
        for _ in range(2):
            levels, lengths = self._batch(rng)
            pages = sum(len(level[2]) for level in levels)
            caches = [drawn(rng, pages, self.page_size, self.kv_heads, DIM) for _ in "kv"]
            given = {"q": drawn(rng, sum(self.queries), self.heads, DIM)}
            planned: list[Any]
            if self.dense:
                planned = [lengths[0][0], *levels[1]]
                if {*self.queries} == {1}:
                    planned[1] = None
                where = levels[0][2]
                shared = [c[where].reshape(-1, *c.shape[2:])[: lengths[0][0]] for c in caches]
                given |= dict(zip(("k_shared", "v_shared"), shared, strict=True))
                cls: Any = fi_ffi.SharedPrefixPlan
            else:
                planned = [list(each) for each in zip(*levels, strict=True)]
                cls = fi_ffi.MultiLevelCascadePlan
            if plan is None:
                plan = cls(*planned, device=device, stream=stream, **more)
            else:
                plan.replan(*planned, stream=stream)
            given |= dict(zip(("paged_k_cache", "paged_v_cache"), caches, strict=True))
            if self.kv_layout == "HND":
                for name in given.keys() - {"q"}:
                    given[name] = np.ascontiguousarray(given[name].swapaxes(-3, -2))
            arrays = given | outputs(sum(self.queries), self.heads)
            arrays |= {f"tmp_{name}": arrays[name].copy() for name in ("o", "lse")}
            written = ("o", "lse", "tmp_o", "tmp_lse")
            options = {"sm_scale": self.sm_scale, "kv_layout": self.kv_layout}
            result = called(plan.run, arrays, place, written, stream=stream, **options)
            found = max(found, self._judge(result, given["q"], caches, levels, lengths))
        return found

    def _judge(
        self, result: dict[str, np.ndarray], q: np.ndarray, caches: list[np.ndarray],
        levels: list[list[Any]], lengths: list[list[int]],
    ) -> float:  # fmt: skip
        """Each request against all its levels' keys side by side."""
        found, starts = 0.0, np.cumsum([0, *self.queries])
        for request, count in enumerate(self.queries):
            parts: list[list[np.ndarray]] = [[], []]
            for share, (_, indptr, pages, _last), keys in zip(
                self.shares, levels, lengths, strict=True
            ):
                group = request // share
                mine = pages[indptr[group] : indptr[group + 1]]
                for part, cache in zip(parts, caches, strict=True):
                    part.append(cache[mine].reshape(-1, *cache.shape[2:])[: keys[group]])
            k, v = (np.concatenate(part) for part in parts)
            rows = slice(starts[request], starts[request] + count)
            right = exact(q[rows], k, v, Options(self.sm_scale or DIM**-0.5, causal=self.causal))
            found = max(found, worst({n: result[n][rows] for n in ("o", "lse")}, right))
        return found


SPECS: dict[str, Sparse | Variable | Cascade] = {
    "blocks": Sparse(),
    "blocks of one row": Sparse(M=20, R=1, C=1, N=64),
    "blocks, masks": Sparse(mask=True),
    "blocks, masks, last row short": Sparse(mask=True, M=70, heads=2),
    "large blocks": Sparse(M=256, N=1024, R=128, C=128, heads=2, kv_heads=1),
    "blocks fa2": Sparse(backend="fa2"),
    "variable": Variable(),
    "variable, one head a key": Variable(group=1, kv_heads=3),
    "variable fa2": Variable(backend="fa2"),
    "three levels": Cascade(),
    "two levels, decode": Cascade(shares=(4, 1), queries=(1, 1, 1, 1), causal=False),
    "two levels, scaled": Cascade(shares=(2, 1), sm_scale=0.25, kv_layout="HND"),
    "one level": Cascade(shares=(1,)),
    "shared prefix": Cascade(shares=(6, 1), dense=True),
    "shared prefix, scaled": Cascade(shares=(6, 1), dense=True, sm_scale=0.25, kv_layout="HND"),
    "shared prefix, decode": Cascade(
        shares=(3, 1), queries=(1, 1, 1), dense=True, causal=False, most_keys=700
    ),
}
