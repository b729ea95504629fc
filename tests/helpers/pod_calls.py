"""Calls of `PodPlan` for the CPU and for a GPU, and the same in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import fi_ffi
from fi_ffi.reference.attention.formula import Exact, Options, exact, exact_batch, from_pages

from tests.helpers.calls import called

PAGE = 16


@dataclass(frozen=True)
class Spec:
    qo_len: int = 40
    kv_len: int = 90
    lengths: tuple[int, ...] = (1, 16, 17, 100)
    kv_heads: int = 2
    group: int = 4
    head_dim: int = 128
    causal: bool = False
    mask: bool = False
    layout: str = "NHD"
    lse: bool = True
    scale: float | None = None
    # Keys before its own that a query of the prefill, or of the decode, sees.
    window_left_p: int = -1
    window_left: int = -1


SPECS = {
    "plain": Spec(),
    "causal": Spec(causal=True),
    "mask": Spec(mask=True),
    "HND": Spec(layout="HND"),
    "one of each": Spec(qo_len=1, kv_len=1, lengths=(1,)),
}


class Batch:
    """Random inputs; outputs are NaN."""

    def __init__(self, spec: Spec, rng: np.random.Generator) -> None:
        self.spec = spec
        heads, kv_heads, dim = spec.kv_heads * spec.group, spec.kv_heads, spec.head_dim
        counts = [-(-n // PAGE) for n in spec.lengths]
        self.indptr = np.cumsum([0, *counts]).astype(np.int32)
        pages = sum(counts) + 3
        self.indices = rng.permutation(pages)[: sum(counts)].astype(np.int32)
        self.last = np.array([(n - 1) % PAGE + 1 for n in spec.lengths], np.int32)

        def drawn(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(np.float16)

        b = len(spec.lengths)
        self.given = {
            "q_p": drawn(spec.qo_len, heads, dim), "k_p": drawn(spec.kv_len, kv_heads, dim),
            "v_p": drawn(spec.kv_len, kv_heads, dim), "q_d": drawn(b, heads, dim),
            "paged_k_cache_d": drawn(pages, PAGE, kv_heads, dim),
            "paged_v_cache_d": drawn(pages, PAGE, kv_heads, dim),
        }  # fmt: skip
        self.visible = np.ones((spec.qo_len, spec.kv_len), bool)
        if spec.mask:
            self.visible = rng.random(self.visible.shape) < 0.5
            self.visible[:, 0] = True
        if spec.causal:
            self.visible = np.tri(spec.qo_len, spec.kv_len, spec.kv_len - spec.qo_len, dtype=bool)
        if spec.window_left_p >= 0:
            own = spec.kv_len - spec.qo_len + np.arange(spec.qo_len)[:, None]
            self.visible &= own - np.arange(spec.kv_len) <= spec.window_left_p

    def plan(self, **options: Any) -> fi_ffi.PodPlan:
        spec = self.spec
        return fi_ffi.PodPlan(
            self.indptr, paged_kv_indices=self.indices, paged_kv_last_page_len=self.last,
            num_qo_heads=spec.kv_heads * spec.group, num_kv_heads=spec.kv_heads,
            head_dim=spec.head_dim, page_size=PAGE, window_left=spec.window_left, **options,
        )  # fmt: skip

    def arrays(self, tmp_bytes: int) -> dict[str, np.ndarray]:
        """All tensors of a run, as they lie in memory."""
        made = dict(self.given)
        if self.spec.layout == "HND":
            for name in ("k_p", "v_p", "paged_k_cache_d", "paged_v_cache_d"):
                made[name] = np.ascontiguousarray(made[name].swapaxes(-3, -2))
        made |= {f"o_{part}": np.full_like(made[f"q_{part}"], np.nan) for part in "pd"}
        if self.spec.lse:
            for part in "pd":
                shape = made[f"q_{part}"].shape[:2]
                made[f"lse_{part}"] = np.full(shape, np.nan, np.float32)
        if self.spec.mask:
            made["custom_mask_p"] = np.packbits(self.visible, bitorder="little")
        return made | {"tmp_p": np.zeros(max(tmp_bytes, 16), np.uint8)}

    def expected(self) -> dict[str, Exact]:
        """Of the prefill (p) and of the decode (d), in float64."""
        scale = self.spec.scale or self.spec.head_dim**-0.5
        a, each = self.given, np.arange(len(self.spec.lengths) + 1)

        def keys(request: int) -> tuple[Any, Any]:
            where = self.indptr, self.indices, self.last, request
            k, v = (from_pages(a[f"paged_{of}_cache_d"], *where) for of in "kv")
            return k, v

        prefill = exact(a["q_p"], a["k_p"], a["v_p"], Options(scale, mask=self.visible))
        options = Options(scale, window_left=self.spec.window_left)
        return {"p": prefill, "d": exact_batch(a["q_d"], each, keys, options)}

    def run(self, plan: Any, place: Callable[..., Any], stream: object, tmp: int) -> float:
        """Run it; the largest error as a fraction of its bound."""
        spec, written = self.spec, ("o_p", "o_d", "lse_p", "lse_d", "tmp_p")
        found = called(
            plan.run, self.arrays(tmp), place, written, causal_p=spec.causal,
            kv_layout_p=spec.layout, kv_layout_d=spec.layout, sm_scale_p=spec.scale,
            sm_scale_d=spec.scale, window_left_p=spec.window_left_p, stream=stream,
        )  # fmt: skip
        return worst(found, self.expected(), spec.lse)


def worst(found: dict[str, np.ndarray], expected: dict[str, Exact], lse: bool) -> float:
    """The largest error of the prefill (p) and of the decode (d), as a fraction of its bound."""
    errors = [0.0]
    for part, (out, size, sums, _) in expected.items():
        pairs = [(found[f"o_{part}"].astype(np.float64) - out, size * 2.0**-9)]
        pairs += [(found[f"lse_{part}"] - sums, 2.0**-10)] if lse else []
        errors += [float(np.nan_to_num(abs(off) / bound, nan=np.inf).max()) for off, bound in pairs]
    return max(errors)
