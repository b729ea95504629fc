"""Calls of the plan classes that are right, to be made wrong in one place.

Everything a call could write lies in `Case.memory`, filled with poison: a refusal must
leave all of it as it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.attention.options import DecodeKeywords, MlaKeywords, PrefillKeywords
from fi_ffi.ops.attention.plan import Plan
from fi_ffi.reference.attention.formula import Exact, Options, exact, exact_batch, from_pages

HEADS, KV_HEADS, DIM, PAGE, PAGES = 4, 2, 64, 4, 12
CKV, KPE = 512, 64
QO_LENS, KV_LENS = (3, 1, 0, 5), (7, 5, 2, 9)
KINDS = ("ragged", "paged", "decode", "mla")
PAGED = KINDS[1:]
SINGLES = ("single_prefill", "single_decode")
RUN_INDICES = {"paged": "paged_kv_indices", "decode": "paged_kv_indices", "mla": "kv_indices"}

_CLASSES = {
    "ragged": fi_ffi.BatchPrefillPlan, "paged": fi_ffi.BatchPrefillPlan,
    "decode": fi_ffi.BatchDecodePlan, "mla": fi_ffi.BatchMlaPlan,
}  # fmt: skip
_RUNS = {"ragged": "ragged_run", "paged": "paged_run"}
OPTIONS = {kind: cls._options_class for kind, cls in _CLASSES.items()}
KEYWORDS = dict.fromkeys(KINDS[:2], PrefillKeywords) | {
    "decode": DecodeKeywords,
    "mla": MlaKeywords,
}
_HEADS = {"num_qo_heads": HEADS, "num_kv_heads": KV_HEADS}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ragged": {**_HEADS, "head_dim_qk": DIM},
    "paged": {**_HEADS, "head_dim_qk": DIM, "page_size": PAGE},
    "decode": {**_HEADS, "head_dim": DIM, "page_size": PAGE},
    "mla": {"num_heads": 16, "page_size": PAGE, "q_data_type": "float16"},
}


def indptr(lens: Any) -> np.ndarray:
    return np.cumsum([0, *lens]).astype(np.int32)


class Case:
    """A batch of one kind: what plans it, what runs it, and what must come out."""

    def __init__(self, kind: str, qo_lens=QO_LENS, kv_lens=KV_LENS, **options: Any) -> None:
        self.kind, self.rng = kind, np.random.default_rng()
        self.cls = _CLASSES[kind]
        self.op = self.cls.op
        self.options = _DEFAULTS[kind] | options
        self.qo_lens = [1] * len(kv_lens) if kind == "decode" else list(qo_lens)
        self.kv_lens = list(kv_lens)
        self.qo_indptr = indptr(self.qo_lens)
        self.memory: dict[str, np.ndarray] = {}
        for name, count in (("float", 2**21), ("int", 2**20), ("staging", 2**20)):
            self.memory[name] = aligned(count)
        self._place_pages()
        self._draw()

    def _place_pages(self) -> None:
        pages = [-(-n // PAGE) for n in self.kv_lens]
        self.page_indptr = indptr(pages)
        self.last = np.int32([(n - 1) % PAGE + 1 for n in self.kv_lens])
        self.indices = self.rng.permutation(PAGES)[: sum(pages)].astype(np.int32)

    def _drawn(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(self.options.get("q_data_type", "float16"))

    def _draw(self) -> None:
        rows, make = sum(self.qo_lens), self._drawn
        if self.options.get("enable_cuda_graph"):
            rows = self.options.get("max_total_num_rows") or rows
        heads = self.options.get("num_heads", HEADS)
        if self.kind == "ragged":
            tokens = sum(self.kv_lens)
            inputs = {"q": make(rows, HEADS, DIM), "k": make(tokens, KV_HEADS, DIM),
                      "v": make(tokens, KV_HEADS, DIM)}  # fmt: skip
        elif self.kind == "mla":
            inputs = {"q_nope": make(rows, heads, CKV), "q_pe": make(rows, heads, KPE)}
            inputs["ckv_cache"] = make(PAGES, PAGE, CKV)
            inputs["kpe_cache"] = make(PAGES, PAGE, KPE)
        else:
            inputs = {"q": make(rows, HEADS, DIM)}
            for name in ("paged_k_cache", "paged_v_cache"):
                inputs[name] = make(PAGES, PAGE, KV_HEADS, DIM)
        first = next(iter(inputs.values()))
        self.memory |= inputs
        self.memory["o"] = np.full_like(first, np.nan)
        self.memory["lse"] = np.full(first.shape[:2], np.nan, np.float32)
        self.run_names = [*inputs, "o", "lse"]

    @property
    def arrays(self) -> dict[str, Any]:
        """The host arrays of a plan, by argument."""
        names = {
            "ragged": {"qo_indptr": self.qo_indptr, "kv_indptr": indptr(self.kv_lens)},
            "paged": {"qo_indptr": self.qo_indptr, "paged_kv_indptr": self.page_indptr,
                      "paged_kv_indices": self.indices, "paged_kv_last_page_len": self.last},
            "decode": {"indptr": self.page_indptr, "indices": self.indices,
                       "last_page_len": self.last},
            "mla": {"qo_indptr": self.qo_indptr, "kv_indptr": self.page_indptr,
                    "kv_indices": self.indices, "kv_len_arr": np.int32(self.kv_lens)},
        }  # fmt: skip
        return names[self.kind]

    def workspace(self) -> fi_ffi.Workspace:
        return fi_ffi.Workspace(*(self.memory[name] for name in ("float", "int", "staging")))

    def plan(self, **changes: Any) -> Plan:
        given = {"device": "cpu", "workspace": self.workspace()}
        return self.cls(**(self.arrays | self.options | given | changes))

    def replan(self, plan: Plan, **changes: Any) -> None:
        plan.replan(**(self.arrays | changes))  # type: ignore[attr-defined]

    def run_of(self, plan: Plan) -> Callable[..., None]:
        """The plan's method that runs this kind."""
        run: Callable[..., None] = getattr(plan, _RUNS.get(self.kind, "run"))
        return run

    def run(self, plan: Plan, **changes: Any) -> None:
        self.run_of(plan)(**({name: self.memory[name] for name in self.run_names} | changes))

    def prepared(self, plan: Plan) -> Any:
        return fi_ffi.prepare(self.run_of(plan), **{n: self.memory[n] for n in self.run_names})

    def keys(self, request: int) -> tuple[np.ndarray, np.ndarray]:
        if self.kind == "ragged":
            starts = indptr(self.kv_lens)
            rows = slice(starts[request], starts[request + 1])
            return self.memory["k"][rows], self.memory["v"][rows]
        where = self.page_indptr, self.indices, self.last, request
        if self.kind == "mla":
            ckv = from_pages(self.memory["ckv_cache"], *where)
            kpe = from_pages(self.memory["kpe_cache"], *where)
            return np.concatenate([ckv, kpe], axis=2), ckv
        k, v = (from_pages(self.memory[f"paged_{of}_cache"], *where) for of in "kv")
        return k, v

    def check(self, **options: Any) -> None:
        """The output is what the definition says of this batch, and rows of none are poison."""
        if self.kind == "mla":
            q = np.concatenate([self.memory["q_nope"], self.memory["q_pe"]], axis=2)
            scale = (128 + KPE) ** -0.5
        else:
            q, scale = self.memory["q"], DIM**-0.5
        expected: Exact = exact_batch(q, self.qo_indptr, self.keys, Options(scale, **options))
        rows = self.qo_indptr[-1]
        error = np.abs(self.memory["o"][:rows].astype(np.float64) - expected.out)
        assert (error <= 2.0**-9 * (1 + expected.magnitude)).all()
        assert np.isfinite(self.memory["lse"][:rows]).all()
        assert np.isnan(self.memory["o"][rows:]).all()

    def bytes(self) -> dict[str, bytes]:
        return {name: array.tobytes() for name, array in self.memory.items()}


class Single:
    """A call of `single_prefill` or `single_decode`: its "plan" is the options of its runs."""

    queries, keys = 5, 9

    def __init__(self, op: str, dtype: Any = "float16", heads: int = HEADS, **options: Any) -> None:
        self.op, self.options, rng = op, options, np.random.default_rng()
        rows = (self.queries,) if op == "single_prefill" else ()
        shapes = {"q": (*rows, heads, DIM)} | dict.fromkeys("kv", (self.keys, KV_HEADS, DIM))
        self.memory = {n: rng.standard_normal(shape).astype(dtype) for n, shape in shapes.items()}
        self.memory["o"] = np.full((*rows, heads, DIM), np.nan, np.float16)
        self.memory["lse"] = np.full((*rows, heads), np.nan, np.float32)
        self.run_names = list(self.memory)
        self.memory["tmp"] = np.full(64, 0xA5, np.uint8)

    def plan(self, **options: Any) -> dict[str, Any]:
        return self.options | options

    def run(self, plan: dict[str, Any] | None = None, **changes: Any) -> None:
        getattr(fi_ffi, self.op)(**self.memory | (plan or self.options) | changes)

    def check(self) -> None:
        q, k, v = (self.memory[name] for name in "qkv")
        expected = exact(q.reshape(-1, *q.shape[-2:]), k, v, Options(DIM**-0.5)).out
        error = np.abs(self.memory["o"].reshape(expected.shape) - expected)
        assert (error <= 2.0**-8).all() and np.isfinite(self.memory["lse"]).all()

    def bytes(self) -> dict[str, bytes]:
        return {name: array.tobytes() for name, array in self.memory.items()}


def aligned(count: int) -> np.ndarray:
    """Poisoned bytes at an address that a workspace may have."""
    whole = np.full(count + 64, 0xA5, np.uint8)
    start = -whole.ctypes.data % 64
    return whole[start : start + count]


def refused(
    case: Any, argument: str | None, match: str, function: Callable[..., object],
    /, *args: Any, **given: Any,
) -> fi_ffi.ArgumentError:  # fmt: skip
    """The call's refusal: it says what, where and why, and nothing was written."""
    with pytest.raises(fi_ffi.ArgumentError) as caught:
        function(*args, **given)
    error, text = caught.value, str(caught.value)
    assert error.op == case.op, text
    assert argument in (None, error.argument), text
    assert str(error.expected)
    assert text.startswith(f"{error.op}: argument `{error.argument}`: got ")
    assert text.endswith(f"expected {error.expected}")
    assert re.search(match, text), text
    return error


def changed(array: Any, **fields: Any) -> fi_ffi.TensorDesc:
    """An array's descriptor with other fields."""
    desc = fi_ffi.as_desc(array)
    values = {"ptr": desc.ptr, "shape": desc.shape, "dtype": desc.dtype, "device": desc.device}
    values |= {"strides": desc.strides} if "shape" not in fields else {}
    values |= fields
    return fi_ffi.TensorDesc(values.pop("ptr"), values.pop("shape"), values.pop("dtype"), **values)
