"""Calls of `BatchPodPlan` for the CPU and for a GPU, and the same in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import fi_ffi
from fi_ffi.reference.attention.formula import Exact, Options, exact_batch, from_pages

from tests.helpers.calls import called
from tests.helpers.pod_calls import worst


@dataclass(frozen=True)
class Spec:
    """Queries and keys of each prefill, and keys of each request that is decoded."""

    prefills: tuple[tuple[int, int], ...] = ((40, 90), (1, 1), (0, 7), (17, 17))
    lengths: tuple[int, ...] = (1, 16, 17, 100)
    kv_heads: int = 2
    group: int = 4
    head_dim: int = 128
    page_size: int = 16
    causal: bool = False
    window_left: int = -1
    layout: str = "NHD"
    lse: bool = True
    scale: float | None = None


SPECS = {
    "plain": Spec(),
    "causal": Spec(causal=True),
    "HND": Spec(layout="HND"),
    "one of each": Spec(prefills=((1, 1),), lengths=(1,)),
}


class Batch:
    """Random inputs; outputs are NaN, and so are pages of no request."""

    def __init__(self, spec: Spec, rng: np.random.Generator) -> None:
        self.spec = spec
        self.given: dict[str, np.ndarray] = {}
        self.where: dict[str, tuple[np.ndarray, ...]] = {}
        heads, dim = spec.kv_heads * spec.group, spec.head_dim
        counts = {"p": [n for n, _ in spec.prefills], "d": [1] * len(spec.lengths)}
        keys = {"p": [n for _, n in spec.prefills], "d": list(spec.lengths)}
        self.qo = {of: np.cumsum([0, *each]).astype(np.int32) for of, each in counts.items()}
        for of, lengths in keys.items():
            pages = [-(-n // spec.page_size) for n in lengths]
            total = sum(pages)
            indptr = np.cumsum([0, *pages]).astype(np.int32)
            indices = rng.permutation(total + 3)[:total].astype(np.int32)
            last = np.array([(n - 1) % spec.page_size + 1 for n in lengths], np.int32)
            self.where[of] = indptr, indices, last
            shape = total + 3, spec.page_size, spec.kv_heads, dim
            for name in ("paged_k_cache", "paged_v_cache"):
                cache = np.full(shape, np.nan, np.float16)
                cache[indices] = rng.standard_normal((total, *shape[1:])).astype(np.float16)
                self.given[f"{name}_{of}"] = cache
            q = rng.standard_normal((sum(counts[of]), heads, dim))
            self.given[f"q_{of}"] = q.astype(np.float16)

    def planned(self) -> tuple[np.ndarray, ...]:
        return (self.qo["p"], *self.where["p"], *self.where["d"])

    def plan(self, **options: Any) -> fi_ffi.BatchPodPlan:
        spec = self.spec
        return fi_ffi.BatchPodPlan(
            *self.planned(), num_qo_heads=spec.kv_heads * spec.group, num_kv_heads=spec.kv_heads,
            head_dim=spec.head_dim, page_size=spec.page_size, causal_p=spec.causal,
            window_left=spec.window_left, **options,
        )  # fmt: skip

    def arrays(self) -> dict[str, np.ndarray]:
        """All tensors of a run, as they lie in memory."""
        made = dict(self.given)
        if self.spec.layout == "HND":
            for name, array in made.items():
                if "cache" in name:
                    made[name] = np.ascontiguousarray(array.swapaxes(1, 2))
        made |= {f"o_{of}": np.full_like(made[f"q_{of}"], np.nan) for of in "pd"}
        if self.spec.lse:
            made |= {
                f"lse_{of}": np.full(made[f"q_{of}"].shape[:2], np.nan, np.float32) for of in "pd"
            }
        return made

    def expected(self, of: str) -> Exact:
        """Of the prefills (p) or of the decode (d), in float64."""
        spec = self.spec

        def keys(request: int) -> tuple[Any, Any]:
            where = *self.where[of], request
            k, v = (from_pages(self.given[f"paged_{x}_cache_{of}"], *where) for x in "kv")
            return k, v

        options = Options(
            spec.scale or spec.head_dim**-0.5, causal=spec.causal and of == "p",
            window_left=spec.window_left,
        )  # fmt: skip
        return exact_batch(self.given[f"q_{of}"], self.qo[of], keys, options)

    def run(self, plan: Any, place: Callable[..., Any], stream: object) -> float:
        """Run it; the largest error as a fraction of its bound."""
        spec, written = self.spec, ("o_p", "o_d", "lse_p", "lse_d")
        found = called(
            plan.run, self.arrays(), place, written, kv_layout=spec.layout,
            sm_scale_p=spec.scale, sm_scale_d=spec.scale, stream=stream,
        )  # fmt: skip
        return worst(found, {of: self.expected(of) for of in "pd"}, spec.lse)
