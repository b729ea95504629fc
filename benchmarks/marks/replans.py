"""Replans of each kind of plan on the CPU, of other batches in turn, and the first run after."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np

import fi_ffi
from fi_ffi.reference.arrays import Array
from fi_ffi.reference.attention.formula import Options, exact_batch, from_pages
from marks import Wrong
from marks.batches import check_attention, random, starts
from marks.turns import Call

REPLANS = {
    kind: f"{kind} replan, another batch (CPU: no copy)"
    for kind in ("decode", "ragged", "ragged fa3", "paged", "MLA")
}
FIRST_RUNS = {
    kind: f"{kind} replan and the first run (CPU: no copy, no stream)"
    for kind in ("decode", "ragged", "ragged fa3")
}
_REPLAN = "args, arrays, _ = next(batches); plan.replan(*args, **arrays)"
_WITH_RUN = "args, arrays, tensors = next(batches); plan.replan(*args, **arrays); run(*tensors)"
# Tokens of each request of the batches, and how many of them are queries.
_BATCHES = ((5, 3, 9), (4, 2, 7, 12, 1), (6, 8))
_QUERIES = 3
_HEADS, _KV_HEADS, _DIM, _PAGE, _PAGES = 4, 2, 64, 4, 16
_CKV, _KPE = 512, 64
_ROWS = 64  # room for queries and keys that lie side by side


class Batch(NamedTuple):
    """The arguments of a replan, and the tensors of a run."""

    args: tuple[Array, ...]
    arrays: dict[str, Array]
    tensors: tuple[Any, ...]


class Plan:
    """A plan of a kind, and batches for it."""

    def __init__(self, kind: str) -> None:
        rng = np.random.default_rng()
        self.kind, _, backend = kind.partition(" ")
        kind = self.kind
        if kind == "MLA":
            shapes = [(_ROWS, _HEADS, _CKV), (_ROWS, _HEADS, _KPE)]
            shapes += [(_PAGES, _PAGE, _CKV), (_PAGES, _PAGE, _KPE)]
        else:
            k = (_ROWS,) if kind == "ragged" else (_PAGES, _PAGE)
            shapes = [(_ROWS, _HEADS, _DIM), *[(*k, _KV_HEADS, _DIM)] * 2]
        self.inputs = [random(rng, *shape) for shape in shapes]
        self.out = np.empty(shapes[0], np.float16)
        self.pages = [rng.permutation(_PAGES).astype(np.int32) for _ in _BATCHES]
        self.batches = [self._batch(i) for i in range(len(_BATCHES))]
        args, arrays, _ = self.batches[0]
        heads = {"num_qo_heads": _HEADS, "num_kv_heads": _KV_HEADS}
        prefill = heads | {"head_dim_qk": _DIM, "causal": True}
        prefill["backend"] = backend or "fa2"
        make, options = {
            "decode": (fi_ffi.BatchDecodePlan, heads | {"head_dim": _DIM, "page_size": _PAGE}),
            "ragged": (fi_ffi.BatchPrefillPlan, prefill),
            "paged": (fi_ffi.BatchPrefillPlan, prefill | {"page_size": _PAGE}),
            "MLA": (fi_ffi.BatchMlaPlan, {
                "num_heads": _HEADS, "page_size": _PAGE, "backend": "fa2", "causal": True,
                "q_data_type": "float16",
            }),
        }[kind]  # fmt: skip
        self.plan: Any = make(*args, **arrays, **options, device="cpu")
        self.run = {"ragged": "ragged_run", "paged": "paged_run"}.get(kind, "run")

    def _lengths(self, i: int) -> tuple[Array, Array]:
        """How many tokens and queries each request has; MLA's decode as well."""
        tokens = np.array(_BATCHES[i])
        most = _QUERIES if self.kind in ("ragged", "paged") else 1
        return tokens, tokens if self.kind == "ragged" else np.minimum(tokens, most)

    def _tables(self, i: int) -> tuple[Array, Array, Array]:
        tokens, _ = self._lengths(i)
        counts = -(-tokens // _PAGE)
        last = (tokens - (counts - 1) * _PAGE).astype(np.int32)
        return starts(counts), self.pages[i][: counts.sum()], last

    def _batch(self, i: int) -> Batch:
        tokens, queries = self._lengths(i)
        qo_indptr, tables = starts(queries), self._tables(i)
        rows = {id(array): array[: queries.sum()] for array in (self.inputs[0], self.out)}
        if self.kind == "MLA":
            rows[id(self.inputs[1])] = self.inputs[1][: queries.sum()]
        tensors = [rows.get(id(array), array) for array in (*self.inputs, self.out)]
        made = tuple(fi_ffi.as_desc(tensor) for tensor in tensors)
        if self.kind == "decode":
            return Batch(tables, {}, made)
        if self.kind == "MLA":
            return Batch((qo_indptr, *tables[:2], tokens.astype(np.int32)), {}, made)
        if self.kind == "ragged":
            return Batch((qo_indptr,), {"kv_indptr": qo_indptr}, made)
        names = "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len"
        return Batch((qo_indptr,), dict(zip(names, tables, strict=True)), made)

    def names(self) -> dict[str, Any]:
        """What the statements name; the plan has had each batch, and has room for it."""
        run = getattr(self.plan, self.run)
        for args, arrays, tensors in self.batches:
            self.plan.replan(*args, **arrays)
            run(*tensors)
        return {"plan": self.plan, "run": run, "batches": itertools.cycle(self.batches)}

    def check(self, i: int) -> None:
        """Raise `Wrong` unless the output has the attention of a batch, and the rest is NaN."""
        _, queries = self._lengths(i)
        indptr, (q, k, v), scale = starts(queries), self.inputs[:3], _DIM**-0.5
        if self.kind == "MLA":
            q = np.concatenate(self.inputs[:2], -1)
            ckv, kpe = (cache[:, :, None] for cache in self.inputs[2:])
            k, v, scale = np.concatenate((ckv, kpe), -1), ckv, (128 + _KPE) ** -0.5

        def keys(request: int) -> tuple[Array, Array]:
            if self.kind == "ragged":
                where = slice(int(indptr[request]), int(indptr[request + 1]))
                return k[where], v[where]
            of_k, of_v = (from_pages(cache, *self._tables(i), request) for cache in (k, v))
            return of_k, of_v

        count = int(indptr[-1])
        exact = exact_batch(q[:count], indptr, keys, Options(scale, causal=True))
        check_attention(self.out[:count], exact, f"attention after a {self.kind} replan")
        if not np.isnan(self.out[count:]).all():
            raise Wrong(f"a run after a {self.kind} replan wrote past its rows")


def _call(name: str, kind: str, statement: str) -> Call:
    def problem() -> str | None:
        made = Plan(kind)
        code, names = compile(statement, "<call>", "exec"), made.names()
        for i, batch in enumerate(made.batches):
            made.out[...] = np.nan
            exec(code, names)
            if statement == _REPLAN:
                names["run"](*batch.tensors)
            try:
                made.check(i)
            except Wrong as wrong:
                return str(wrong)
        return None

    return Call(name, statement, lambda: Plan(kind).names(), problem)


def calls() -> list[Call]:
    """Each kind's replan, and that of some with the first run after it."""
    made = [_call(name, kind, _REPLAN) for kind, name in REPLANS.items()]
    return [*made, *(_call(name, kind, _WITH_RUN) for kind, name in FIRST_RUNS.items())]
