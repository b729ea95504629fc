"""Queries and keys on a machine, plans of batches over them, and what must come out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.loader.distributions import is_in
from fi_ffi.ops.attention.backends import Kernel
from fi_ffi.ops.attention.options import (
    DecodeOptions,
    MlaOptions,
    PrefillOptions,
)
from fi_ffi.ops.attention.rows import MLA_FP8
from fi_ffi.ops.call.releases import release_in_force
from fi_ffi.ops.plans.batch_attention import AttentionOptions
from fi_ffi.ops.plans.rows import BATCH_ATTENTION_FP4
from fi_ffi.reference.attention.formula import Exact, exact, from_pages

from tests.attention import judge
from tests.attention.batches import SPARE, Batch, bytes_of, draw, first, paged, ragged, random
from tests.attention.machines import POISON, Cpu, intact, part
from tests.attention.options import as_arguments, draw_extras, exact_options
from tests.attention.tables import Spec
from tests.helpers.calls import padded
from tests.helpers.untyped_calls import E2M1, E4M3

BF16 = np.dtype(ml_dtypes.bfloat16)
# A request of more queries times keys than this is compared by some of its rows, a batch
# of more requests by some of them, and MLA with more heads by some that lie side by side.
ALL_ROWS, ALL_REQUESTS, SOME_HEADS = 1 << 16, 16, 8
# What shows in a result that saw it, and does not where it was multiplied by 0.
LARGE = {
    "float16": 1e3,
    "bfloat16": 1e3,
    "float8_e4m3fn": 400.0,
    "float8_e5m2": 1e3,
    "uint8": 400.0,
}
PLANS = {
    "batch_prefill": (fi_ffi.BatchPrefillPlan, PrefillOptions),
    "batch_attention": (fi_ffi.BatchAttentionPlan, AttentionOptions),
    "batch_decode": (fi_ffi.BatchDecodePlan, DecodeOptions),
    "batch_mla": (fi_ffi.BatchMlaPlan, MlaOptions),
}


# Those whose kernels have one backend, which modules are not called after.
ONE_BACKEND = {
    "batch_attention": "persistent", "batch_decode": "cuda cores", "single_decode": "cuda cores",
}  # fmt: skip


@dataclass
class Result:
    """What a run writes."""

    o: Any
    lse: Any


class Case:
    """Fresh queries and a cache (or ragged keys), and plans over them.

    `rows` is how many queries there are, `room` how many pages or ragged keys.
    """

    plan_class: Any = None  # of batches

    def __init__(
        self, spec: Spec, machine: Cpu, rng: np.random.Generator, rows: int, room: int
    ) -> None:
        self.spec, self.machine, self.rng, self.rows, self.room = spec, machine, rng, rows, room
        self._placed: dict[str, Any] = {}
        self._extra: dict[int, dict[str, Any]] = {}
        kernel, op = self._kernel()
        self.backend, module_of = ONE_BACKEND.get(spec.family, ""), ""
        if spec.family not in ONE_BACKEND:
            is_paged = bool(spec.page_size)
            self.backend = machine.backend(op, spec.backend, kernel, spec.mask, is_paged)
            module_of = self.backend
        self.module = kernel.module(module_of)
        machine.need(self.module)
        if "decode" in spec.family:
            machine.need_group(spec.heads // spec.kv_heads)
        self.tensors = self._inputs()

    def _kernel(self) -> tuple[Kernel, str]:
        """What is compiled for it, and the op that says so."""
        self.plan_class, options = PLANS[self.spec.family]
        chosen = options(**self.spec.options())
        return chosen.kernel, chosen.op

    def _inputs(self) -> dict[str, Any]:
        spec, rng = self.spec, self.rng
        q = random(rng, (self.rows, spec.heads, spec.dim), spec.dtype, spec.pad)
        tokens = [self.room, spec.page_size] if spec.page_size else [self.room]
        at = len(tokens) - (spec.layout == "HND")
        shape = [*tokens[:at], spec.kv_heads, *tokens[at:], spec.dim]
        if spec.together:
            both = random(rng, [shape[0], 2, *shape[1:]], spec.kv, spec.pad)
            return {"q": q, "both": both, "k": both[:, 0], "v": both[:, 1]}
        k = random(rng, shape, spec.kv, spec.pad)
        v = random(rng, [*shape[:-1], spec.value_dim], spec.kv, spec.pad)
        if spec.page_size and spec.value_dim != spec.dim:
            v = padded(v, spec.dim + spec.pad - spec.value_dim)  # pages have the same strides
        return {"q": q, "k": k, "v": v}

    def batch(self, qo: list[int], kv: list[int]) -> Batch:
        spec = self.spec
        if spec.page_size:
            return paged(qo, kv, spec.page_size, self.room, self.rng)
        return ragged(qo, kv)

    def caches(self) -> list[str]:
        return ["k", "v"]

    def scaling(self) -> list[str]:
        """The tensors that poison of the caches is in."""
        return self.caches()

    def whole(self, name: str) -> Any:
        """The numbers of a cache."""
        return self.tensors[name]

    def poison(self, batch: Batch) -> None:
        """Make what belongs to no request show in the results of those that see it.

        Pages of no request become NaN.  Tokens after a request's last are loaded with it
        by some kernels, and multiplied by 0: they become large.  So do other pages with
        multi-item scoring, whose fa2 kernels load page 0 in place of some (prefill.cuh:
        `prefetch_skip_step`).
        """
        assert not self._placed
        large = LARGE[self.spec.kv]
        for name in self.scaling():
            cache = self.tensors[name]
            if batch.indices is None:
                axis = 1 if self.spec.layout == "HND" else 0
                np.moveaxis(cache, axis, 0)[batch.kv_indptr[-1] :] = large
                continue
            tokens_first = np.swapaxes(cache, 1, 2) if self.spec.layout == "HND" else cache
            used = batch.indices[: batch.kv_indptr[-1]]
            others = np.setdiff1d(np.arange(len(cache)), used)
            tokens_first[others] = large if self.spec.items else np.nan
            assert batch.last_page_len is not None
            for end, last in zip(batch.kv_indptr[1:], batch.last_page_len, strict=True):
                if last:
                    tokens_first[batch.indices[end - 1], last:] = large

    # What a plan and a run are given.

    def arguments(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The index arrays, for a plan or a replan."""
        indices = None if self.spec.indices_at_run else batch.indices
        if self.spec.family == "batch_decode":
            return (batch.kv_indptr, indices, batch.last_page_len), {}
        if batch.indices is None:
            return (batch.qo_indptr,), {"kv_indptr": batch.kv_indptr}
        names = ("paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")
        arrays = (batch.kv_indptr, indices, batch.last_page_len)
        return (batch.qo_indptr,), dict(zip(names, arrays, strict=True))

    def plan(self, batch: Batch, stream: Any = None, **more: Any) -> Any:
        args, arrays = self.arguments(batch)
        options = self.spec.options() | more
        stream = self.machine.stream if stream is None else stream
        where = {"device": self.machine.device, "stream": stream}
        plan = self.plan_class(*args, **arrays, **where, **options)
        assert (plan.module, plan.backend) == (self.module, self.backend)
        return plan

    def workspace_size(self, batch: Batch, **more: Any) -> Any:
        args, arrays = self.arguments(batch)
        options = self.spec.options() | more
        return self.plan_class.workspace_size(
            *args, **arrays, device=self.machine.device, **options
        )

    def replan(self, plan: Any, batch: Batch, stream: Any = None) -> None:
        args, arrays = self.arguments(batch)
        plan.replan(*args, **arrays, stream=self.machine.stream if stream is None else stream)

    def placed(self, name: str) -> Any:
        if name not in self._placed:
            self._placed[name] = self.machine.place(self.tensors[name])
        return self._placed[name]

    def outputs(self, rows: int | None = None) -> Result:
        """Fresh outputs for so many queries, or all of them, NaN in every byte."""
        spec, rows = self.spec, self.rows if rows is None else rows
        dtype = fi_ffi.DTYPES[spec.o].numpy
        o: Any = np.full((rows, spec.heads, spec.value_dim), np.nan, dtype)
        if spec.pad_o:
            o = padded(o, 16)
        lse = np.full((rows, spec.heads), np.nan, np.float32)
        place = self.machine.place
        return Result(place(o), place(lse) if spec.lse else None)

    def run(self, plan: Any, batch: Batch, into: Result | None = None, stream: Any = None,
            **changes: Any) -> Result:  # fmt: skip
        into = into or self.outputs()
        o = into.o.desc()
        tensors = self.inputs(o.shape[0])
        lse = None if into.lse is None else into.lse.desc()
        options = self.run_options(batch) | changes
        stream = self.machine.stream if stream is None else stream
        paged = self.spec.page_size or self.spec.family != "batch_prefill"
        runs = plan.run if hasattr(plan, "run") else plan.paged_run if paged else plan.ragged_run
        runs(*tensors, o, lse, stream=stream, **options)
        return into

    def inputs(self, rows: int) -> list[Any]:
        """The descriptors of the first queries and of the caches."""
        q = first(self.placed("q").desc(), rows)
        if self.spec.together:
            return [q, *fi_ffi.split_paged_kv_cache(self.placed("both").desc())]
        return [q, *(self.placed(name).desc() for name in self.caches())]

    def extras(self, batch: Batch) -> dict[str, Any]:
        """The random values of a run's options, by their names; made once for a batch."""
        if id(batch) not in self._extra:
            self._extra[id(batch)] = {"batch": batch, **draw_extras(self.spec, batch, self.rng)}
        return self._extra[id(batch)]

    def run_options(self, batch: Batch) -> dict[str, Any]:
        made = as_arguments(self.spec, self.extras(batch), self.machine)
        if self.spec.indices_at_run:
            made["paged_kv_indices"] = self.machine.place(batch.indices).desc()
        return made

    # What must come out.

    def keys(self, batch: Batch, request: int) -> tuple[Any, Any]:
        """A request's keys and values, [tokens, heads, size]."""
        found = []
        for name in self.caches():
            cache = self.whole(name)
            if batch.indices is None:
                rows = slice(batch.kv_indptr[request], batch.kv_indptr[request + 1])
                found.append(np.swapaxes(cache, 0, 1)[rows] if self.spec.layout == "HND"
                             else cache[rows])  # fmt: skip
            else:
                tables = batch.kv_indptr, batch.indices, batch.last_page_len
                found.append(from_pages(cache, *tables, request, self.spec.layout))
        return found[0], found[1]

    def rounding(self) -> judge.Rounding:
        spec = self.spec
        rope = spec.mode == "ROPE_LLAMA"
        if not self.machine.is_gpu:
            return judge.reference(spec.dtype, rope=rope, prefill="decode" not in spec.family)
        split = spec.plan.get("fixed_split_size")
        least = None if split is None else split * (spec.page_size or 1)
        return judge.rounding(spec.family, self.backend, spec.dtype, spec.kv, spec.o,
                              soft_cap=spec.cap > 0, rope=rope, least_piece=least)  # fmt: skip

    def exact_rows(self, batch: Batch, request: int) -> Iterator[tuple[slice, slice, Exact]]:
        """Rows of a request, which heads, and what they must be: all, or a sample."""
        spec, qo, kv = self.spec, batch.qo[request], batch.kv[request]
        k, v = (x.astype(np.float64) for x in self.keys(batch, request))
        start = int(batch.qo_indptr[request])
        q = self.queries(slice(start, start + qo))
        heads = slice(0, spec.heads)
        if spec.family == "batch_mla":
            heads = some_heads(spec.heads, self.rng)
        extras = self.extras(batch)
        for a, b in row_blocks(qo, kv, spec.whole_requests, self.rng):
            # Causal rows are the last ones of what they see.
            end = kv - qo + b if (spec.causal or spec.items) and kv >= qo else kv
            no_sink = self.backend == "fa3" and not kv
            options = exact_options(spec, extras, request, (a, b), end, no_sink)
            expected = exact(q[a:b, heads], k[:end], v[:end], options)
            yield slice(start + a, start + b), heads, expected

    def queries(self, rows: slice) -> Any:
        return self.tensors["q"][rows]

    def check(self, batch: Batch, result: Result) -> float:
        """The largest error as a fraction of its bound; fails above 1, and for anything that
        was written or left as it should not have been."""
        o = result.o.get()
        lse = None if result.lse is None else result.lse.get()
        for name, array in (("o", o), ("lse", lse)):
            if array is None:
                continue
            whole = array.astype(np.float32)
            unwritten = np.isnan(whole).any(axis=tuple(range(1, whole.ndim)))
            expected = np.arange(len(whole)) >= batch.rows
            wrong = np.flatnonzero(unwritten != expected)
            assert not len(wrong), (
                f"{name}: row {wrong[0]} of {batch.rows} is "
                f"{'NaN' if unwritten[wrong[0]] else 'written'}; {batch.qo=} {batch.kv=}"
            )
        assert intact([result.o, *([] if lse is None else [result.lse])]), "bytes beside o or lse"
        found = 0.0
        for request in sample(batch, self.rng):
            for rows, heads, expected in self.exact_rows(batch, request):
                part = None if lse is None else lse[rows, heads]
                error = judge.worst(expected, o[rows, heads], part, self.rounding(),
                                    batch.kv[request], base_e=self.spec.base_e)  # fmt: skip
                assert error <= 1, (
                    f"request {request} ({batch.qo[request]} queries, {batch.kv[request]} keys), "
                    f"rows {rows.start} to {rows.stop}: {error:.3g} of its bound; {self.spec}"
                )
                found = max(found, error)
        return found

    def check_inputs(self) -> None:
        """Nothing that is only read was written."""
        for name, placed in self._placed.items():
            before = self.tensors[name]
            if before.nbytes < 1 << 22:
                same = bytes_of(placed.get()) == bytes_of(before)
                assert same and placed.intact(), f"{name} was written to"


class LengthsCase(Case):
    """A `Case` whose plan is given the tokens of each request."""

    def arguments(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        indices = None if self.spec.indices_at_run else batch.indices
        lengths = np.array(batch.kv, np.int32)
        return (batch.qo_indptr, batch.kv_indptr, indices, lengths), {}

    def run_options(self, batch: Batch) -> dict[str, Any]:
        made = super().run_options(batch)
        if "paged_kv_indices" in made:
            made["kv_indices"] = made.pop("paged_kv_indices")
        return made


# Multi-head latent attention: two parts of each query, and of each token of the cache.

CKV, KPE = 512, 64
# Of fp8 caches: no powers of two, so that what is rounded is seen.
CKV_SCALE, KPE_SCALE = 0.7, 1.3


def in_bf16(cache: Any, scale: float) -> Any:
    """fp8 as the kernels take it: in bfloat16, times a scale in bfloat16."""
    return cache.astype(BF16) * np.array(scale, BF16)


class MlaCase(LengthsCase):
    """A `Case` whose keys are compressed, and whose values are the first part of the keys."""

    def _inputs(self) -> dict[str, Any]:
        spec, rng = self.spec, self.rng
        made = {}
        for name, size in (("q", CKV), ("q_pe", KPE)):
            made[name] = random(rng, (self.rows, spec.heads, size), spec.dtype, spec.pad)
        for name, size in (("ckv", CKV), ("kpe", KPE)):
            made[name] = random(rng, (self.room, spec.page_size, size), spec.kv, spec.pad)
        if "groups" in spec.scales:
            if self.machine.is_gpu and not is_in(release_in_force(), MLA_FP8["fa2"]):
                pytest.skip(f"FlashInfer {release_in_force()} has no scales of groups")
            shape = (self.room, spec.page_size, CKV // 128)
            made["groups"] = (2 * rng.random(shape) + 0.1).astype(np.float32)
        return made

    def caches(self) -> list[str]:
        return ["ckv", "kpe"]

    def arguments(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        (qo_indptr, kv_indptr, *more), options = super().arguments(batch)
        starts = np.append(kv_indptr, np.int32([9, -9]))  # the last are of no request
        return (qo_indptr, starts, *more), options

    def inputs(self, rows: int) -> list[Any]:
        parts = [first(self.placed(name).desc(), rows) for name in ("q", "q_pe")]
        return [*parts, *(self.placed(name).desc() for name in self.caches())]

    def run_options(self, batch: Batch) -> dict[str, Any]:
        made = super().run_options(batch)
        if self.spec.kv != self.spec.dtype:
            made |= {"kpe_scale": KPE_SCALE}
            made |= (
                {"ckv_scale_arr": self.placed("groups").desc()}
                if "groups" in self.tensors
                else {"ckv_scale": CKV_SCALE}
            )
        return made

    def keys(self, batch: Batch, request: int) -> tuple[Any, Any]:
        tables = batch.kv_indptr, batch.indices, batch.last_page_len, request
        ckv, kpe = (from_pages(self.tensors[name], *tables) for name in ("ckv", "kpe"))
        if self.spec.kv != self.spec.dtype:
            kpe, scale = in_bf16(kpe, KPE_SCALE), CKV_SCALE
            if "groups" in self.tensors:
                ckv = ckv.astype(np.float32)
                scale = np.repeat(from_pages(self.tensors["groups"], *tables), 128, axis=-1)
                ckv = (ckv * scale).astype(BF16)
            else:
                ckv = in_bf16(ckv, scale)
        return np.concatenate((ckv, kpe), axis=-1), ckv

    def queries(self, rows: slice) -> Any:
        return np.concatenate([self.tensors[name][rows] for name in ("q", "q_pe")], axis=-1)


# Which of many results are compared: the formula in float64 takes longer than a GPU.


def sample(batch: Batch, rng: np.random.Generator) -> list[int]:
    """Requests to compare: all, or the first and last ones, the longest and some others."""
    count = len(batch.qo)
    if count <= ALL_REQUESTS:
        return list(range(count))
    some = rng.permutation(count)[: ALL_REQUESTS - 6].tolist()
    longest = int(np.argmax(batch.kv))
    return sorted({0, 1, 2, 3, longest, count - 1, *some})


def row_blocks(qo: int, kv: int, whole: bool, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Rows to compare: all, or the first and last ones, those around tiles' ends and some."""
    if not qo or whole or qo * kv <= ALL_ROWS:
        return [(0, qo)] if qo else []
    starts = {0, qo - 3, int(rng.integers(0, qo)), *(n for n in (63, 127, 191) if n < qo)}
    return [(a, min(a + 3, qo)) for a in sorted(starts) if a >= 0]


def some_heads(heads: int, rng: np.random.Generator) -> slice:
    """Heads to compare, of queries that share their keys."""
    first = int(rng.integers(0, max(heads - SOME_HEADS, 0) + 1))
    return slice(first, min(first + SOME_HEADS, heads))


# Calls for one request.


def row_of(desc: fi_ffi.TensorDesc) -> fi_ffi.TensorDesc:
    """The only row of a tensor."""
    assert desc.shape[0] == 1
    return fi_ffi.TensorDesc(
        desc.ptr, desc.shape[1:], desc.dtype, strides=desc.strides[1:], device=desc.device
    )


class SingleCase(Case):
    """A `Case` of one request, for `single_prefill` and `single_decode`: there is no plan."""

    def _kernel(self) -> tuple[Kernel, str]:
        spec = self.spec
        kernel = Kernel(
            spec.family, spec.dtype, spec.kv, spec.o, spec.dim, spec.value_dim, spec.mode,
            spec.window_left >= 0, spec.cap > 0,
        )  # fmt: skip
        self.function = getattr(fi_ffi, spec.family)
        self.scratch: list[Any] = []  # of each call: see `remains._GROWING`
        return kernel, spec.family

    def plan(self, batch: Batch, stream: Any = None, **more: Any) -> Any:
        return None

    def given(self, batch: Batch, into: Result) -> tuple[list[Any], dict[str, Any]]:
        """The function's arguments, with `tmp` of as many bytes as are asked for, and its
        options."""
        spec, (qo,), (kv,) = self.spec, batch.qo, batch.kv
        heads = spec.heads, spec.kv_heads
        options = self.run_options(batch) | {
            "pos_encoding_mode": spec.mode, "window_left": spec.window_left,
            "logits_soft_cap": spec.cap,
        }  # fmt: skip
        q, k, v = self.inputs(qo)
        o, lse = into.o.desc(), None if into.lse is None else into.lse.desc()
        if spec.family == "single_decode":
            q, o, lse = row_of(q), row_of(o), lse and row_of(lse)
            size, sizes = fi_ffi.single_decode_workspace_size, (kv, *heads, spec.dim)
        else:
            options |= {"causal": spec.causal, "backend": spec.backend}
            size, sizes = fi_ffi.single_prefill_workspace_size, (qo, kv, *heads, spec.value_dim)
        need = self.machine.bytes_for_one(size, *sizes)
        self.scratch.append(self.machine.place(np.full(need, POISON, np.uint8)))
        return [q, k, v, self.scratch[-1].desc(), o, lse], options

    def run(self, plan: Any, batch: Batch, into: Result | None = None, stream: Any = None,
            **changes: Any) -> Result:  # fmt: skip
        into = into or self.outputs()
        args, options = self.given(batch, into)
        stream = self.machine.stream if stream is None else stream
        self.function(*args, **options | changes, stream=stream)
        return into

    def check(self, batch: Batch, result: Result) -> float:
        assert intact(self.scratch), "bytes beside tmp"
        return super().check(batch, result)


# Keys and values of 4 bits.


class Fp4Case(Case):
    """A `Case` with NVFP4 keys and values: the scale of every 16 is in a tensor of its own."""

    def _inputs(self) -> dict[str, Any]:
        spec, rng = self.spec, self.rng
        made = {"q": random(rng, (self.rows, spec.heads, spec.dim), spec.dtype, spec.pad)}
        tokens = [self.room, spec.page_size] if spec.page_size else [self.room]
        at = len(tokens) - (spec.layout == "HND")
        shape = [*tokens[:at], spec.kv_heads, *tokens[at:]]
        whole = [shape[0], 2, *shape[1:]] if spec.together else shape
        for name in ("both",) if spec.together else ("k", "v"):
            packed = rng.integers(0, 256, (*whole, spec.dim // 2), np.uint8)
            # Of all sizes: those of values are of their results' magnitude.
            scales = (2.0 ** rng.uniform(-4, 0, (*whole, spec.dim // 16))).astype(E4M3)
            if spec.pad:
                packed, scales = padded(packed, 8 * spec.pad), padded(scales, spec.pad)
            made |= {name: packed, f"{name}_sf": scales}
        if spec.together:
            for i, name in enumerate("kv"):
                made |= {name: made["both"][:, i], f"{name}_sf": made["both_sf"][:, i]}
        return made

    def scaling(self) -> list[str]:
        return ["k_sf", "v_sf"]

    def whole(self, name: str) -> Any:
        with np.errstate(invalid="ignore"):
            return dequantised(self.tensors[name], self.tensors[f"{name}_sf"])

    def run_options(self, batch: Batch) -> dict[str, Any]:
        if self.spec.together:
            scales = fi_ffi.split_paged_kv_cache(self.placed("both_sf").desc())
        else:
            scales = self.placed("k_sf").desc(), self.placed("v_sf").desc()
        names = "k_cache_sf", "v_cache_sf"
        return super().run_options(batch) | dict(zip(names, scales, strict=True))


class SingleFp4Case(Fp4Case, SingleCase):
    """The same, of one request."""


class LengthsFp4Case(Fp4Case, LengthsCase):
    """The same, of a plan that is given the tokens of each request."""

    def plan(self, batch: Batch, stream: Any = None, **more: Any) -> Any:
        if self.machine.is_gpu and not is_in(release_in_force(), BATCH_ATTENTION_FP4[1].releases):
            pytest.skip(
                f"FlashInfer {release_in_force()} has batch attention without scales of 4 bits"
            )
        return super().plan(batch, stream, **more)


def dequantised(packed: Any, scales: Any) -> Any:
    """The numbers that bytes [..., d / 2] and scales [..., d / 16] stand for."""
    numbers = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]))
    numbers[..., ::2], numbers[..., 1::2] = E2M1[packed % 16], E2M1[packed // 16]
    blocks = numbers.reshape(*scales.shape, 16) * scales.astype(np.float64)[..., None]
    return blocks.reshape(numbers.shape)


def kind_of(spec: Spec) -> type[Case]:
    if spec.kv == "uint8":
        fp4_kinds = {"single_prefill": SingleFp4Case, "batch_attention": LengthsFp4Case}
        return fp4_kinds.get(spec.family, Fp4Case)
    kinds = {
        "batch_attention": LengthsCase,
        "batch_mla": MlaCase,
        "single_prefill": SingleCase,
        "single_decode": SingleCase,
    }
    return kinds.get(spec.family, Case)


def lengths(spec: Spec, machine: Cpu, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Queries and keys of each request, as many as the machine is for."""
    most = machine.most_keys
    if spec.lengths:
        kv = [min(n, most) for _, n in spec.lengths]
        qo = [min(n, most, k or n) for (n, _), k in zip(spec.lengths, kv, strict=True)]
        return qo, kv
    count = min(spec.batch, machine.most_requests)
    qo, kv = draw(count, min(spec.queries, most), min(spec.keys, most), spec.page_size or 1, rng,
                  no_keys=spec.no_keys)  # fmt: skip
    return [1] * count if spec.family == "batch_decode" else qo, kv


def make(spec: Spec, machine: Cpu, rng: np.random.Generator) -> tuple[Any, Batch]:
    """A case of one batch, and what belongs to no request poisoned."""
    qo, kv = lengths(spec, machine, rng)
    room = sum(kv) + SPARE * (not spec.family.startswith("single"))
    if spec.page_size:
        room = SPARE + sum(-(-n // spec.page_size) for n in kv) + 2
    case = kind_of(spec)(spec, machine, rng, sum(qo), room)
    batch = case.batch(qo, kv)
    case.poison(batch)
    return case, batch


def check_results(spec: Spec, machine: Cpu, rng: np.random.Generator) -> float:
    """Plan, run, compare; returns the largest error as a fraction of its bound."""
    case, batch = make(spec, machine, rng)
    plan = case.plan(batch)
    found = case.check(batch, case.run(plan, batch))
    case.check_inputs()
    return found


# Batches of many lengths over one cache, as a server plans them.


class Service:
    """One cache that batches of many lengths are planned over."""

    def __init__(self, spec: Spec, machine: Cpu, rng: np.random.Generator) -> None:
        self.spec, self.rng = spec, rng
        self.most_keys = min(spec.keys, machine.most_keys)
        self.rows = spec.batch * spec.queries
        room = SPARE + spec.batch * -(-self.most_keys // spec.page_size) + 2
        self.case = kind_of(spec)(spec, machine, rng, self.rows, room)
        for name in self.case.caches():
            self.case.tensors[name][:SPARE] = np.nan  # no batch has these pages

    def batch(self) -> Batch:
        """Another batch of the same number of requests."""
        spec = self.spec
        size = spec.page_size
        qo, kv = draw(spec.batch, spec.queries, self.most_keys, size, self.rng,
                      no_keys=spec.no_keys)  # fmt: skip
        if spec.family == "batch_decode":
            qo = [1] * spec.batch
        elif spec.family == "batch_mla":
            # As many that the number of blocks that work together stays the same.
            qo = [spec.queries] * spec.batch
            kv = [max(n, spec.queries) for n in kv]
        return self.case.batch(qo, kv)


def exact_workspace(
    case: Case, batch: Batch, less: tuple[int, int] = (0, 0), **more: Any
) -> tuple[fi_ffi.Workspace, list[Any]]:
    """A workspace of just as many bytes as are asked for, or fewer, poisoned."""
    sizes = case.workspace_size(batch, **more)
    device = case.machine.device
    placed = [case.machine.place(np.full(max(n, 16), POISON, np.uint8)) for n in sizes]
    counts = [n - m for n, m in zip(sizes, less, strict=True)]
    parts = [part(array, n, device) for array, n in zip(placed, counts, strict=True)]
    return fi_ffi.Workspace(*parts), placed


# CUDA graphs; on the CPU a run is repeated instead of a graph.


def graph_options(service: Service) -> dict[str, Any]:
    """Room for every batch of a service."""
    made = {"enable_cuda_graph": True, "max_num_indices": service.case.room}
    if service.spec.family != "batch_decode":
        made["max_total_num_rows"] = service.rows
    return made


def refused(service: Service, like: Batch) -> list[Batch]:
    """Batches that would change what was captured."""
    assert like.indices is not None and like.last_page_len is not None
    fewer = service.case.batch(like.qo[:-1], like.kv[:-1])
    past = like.indices.copy()
    past[0] = service.case.room + 5  # a page that the cache has not
    wrong = [fewer, replace(like, indices=past)]
    if service.spec.family != "batch_decode":
        more = [n + service.rows for n in like.qo]
        starts = np.cumsum([0, *more]).astype(np.int32)
        wrong.append(replace(like, qo=more, qo_indptr=starts))
    counts = np.diff(like.kv_indptr) + service.case.room
    starts = np.cumsum([0, *counts]).astype(np.int32)
    full = np.full(len(like.last_page_len), service.spec.page_size, np.int32)
    pages = np.zeros(starts[-1], np.int32)
    kv = [int(n) * service.spec.page_size for n in counts]
    wrong.append(replace(like, kv=kv, kv_indptr=starts, indices=pages, last_page_len=full))
    return wrong
