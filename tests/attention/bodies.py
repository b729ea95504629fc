"""The tests of results: the same on the CPU and on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

import fi_ffi
from fi_ffi.ops.attention.backends import Kernel
from fi_ffi.reference.attention.formula import exact

from tests.attention import judge
from tests.attention.arrays import random
from tests.attention.batches import Batch, draw
from tests.attention.cases import Case, MlaCase, Result, room_for
from tests.attention.machines import Cpu
from tests.attention.options import as_arguments, draw_extras, exact_options
from tests.attention.specs import Spec


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


def make(spec: Spec, machine: Cpu, rng: np.random.Generator) -> tuple[Case, Batch]:
    """A case of one batch, and what belongs to no request poisoned."""
    qo, kv = lengths(spec, machine, rng)
    kind = MlaCase if spec.family == "batch_mla" else Case
    case = kind(spec, machine, rng, sum(qo), room_for(spec, kv))
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


# Calls for one request, without a plan.


class One:
    """One request's tensors, for `single_prefill` and `single_decode`."""

    def __init__(self, spec: Spec, machine: Cpu, rng: np.random.Generator) -> None:
        (qo,), (kv,) = lengths(spec, machine, rng)
        self.spec, self.machine, self.rng = spec, machine, rng
        self.batch = Batch([qo], [kv], np.array([0, qo]), np.array([0, kv]))
        decode = spec.family == "single_decode"
        kernel = Kernel(
            spec.family, spec.dtype, spec.kv, spec.o, spec.dim, spec.value_dim, spec.mode,
            spec.window_left >= 0, spec.cap > 0,
        )  # fmt: skip
        self.backend = "cuda cores"
        if not decode:
            self.backend = machine.backend("single_prefill", spec.backend, kernel, spec.mask)
        machine.need(kernel.module("" if decode else self.backend))
        self.q = random(rng, (qo, spec.heads, spec.dim), spec.dtype, spec.pad)
        shapes = ((kv, spec.kv_heads, size) for size in (spec.dim, spec.value_dim))
        self.k, self.v = (random(rng, shape, spec.kv, spec.pad) for shape in shapes)
        self.extras = draw_extras(spec, self.batch, rng)

    def stored(self, x: np.ndarray) -> Any:
        """Keys or values as they lie in memory."""
        if self.spec.layout == "NHD":
            return self.machine.place(x)
        turned = np.swapaxes(x, 0, 1)
        return self.machine.place(turned if self.spec.pad else np.ascontiguousarray(turned))

    def scratch(self) -> Any:
        """`tmp`: as many bytes as are asked for, poisoned."""
        spec, (qo,), (kv,) = self.spec, self.batch.qo, self.batch.kv
        if spec.family == "single_decode":
            size = fi_ffi.single_decode_workspace_size
            need = self.machine.bytes_for_one(size, kv, spec.heads, spec.kv_heads, spec.dim)
        else:
            size = fi_ffi.single_prefill_workspace_size
            need = self.machine.bytes_for_one(
                size, qo, kv, spec.heads, spec.kv_heads, spec.value_dim
            )
        return self.machine.place(np.full(need, 0xFF, np.uint8))

    def arguments(self) -> tuple[Any, list[Any], dict[str, Any], Result, Any]:
        """The function, its arguments and options, and what it writes: outputs, and `tmp`."""
        spec, place = self.spec, self.machine.place
        decode = spec.family == "single_decode"
        shape = (len(self.q), spec.heads, spec.value_dim)
        o: Any = np.full(shape, np.nan, fi_ffi.DTYPES[spec.o].numpy)
        lse = np.full(shape[:2], np.nan, np.float32)
        q, out = (x[0] if decode else x for x in (self.q, o))
        written = Result(place(out), place(lse[0] if decode else lse) if spec.lse else None)
        options = as_arguments(spec, self.extras, self.machine) | {
            "pos_encoding_mode": spec.mode, "window_left": spec.window_left,
            "logits_soft_cap": spec.cap,
        }  # fmt: skip
        if not decode:
            options |= {"causal": spec.causal, "backend": spec.backend}
        call = fi_ffi.single_decode if decode else fi_ffi.single_prefill
        tmp = self.scratch()
        self.kept = (place(q), self.stored(self.k), self.stored(self.v), tmp, written.o)
        given = [tensor.desc() for tensor in self.kept]
        given.append(None if written.lse is None else written.lse.desc())
        return call, given, options, written, tmp

    def run(self) -> tuple[Result, Any]:
        call, given, options, written, tmp = self.arguments()
        call(*given, **options, stream=self.machine.stream)
        return written, tmp

    def error(self, written: Result) -> float:
        """The largest error as a fraction of its bound."""
        spec, (qo,), (kv,) = self.spec, self.batch.qo, self.batch.kv
        options = exact_options(spec, self.extras, 0, (0, qo), kv, no_sink=False)
        expected = exact(self.q, self.k, self.v, options)
        o = written.o.get().reshape(expected.out.shape)
        lse = None if written.lse is None else written.lse.get().reshape(expected.lse2.shape)
        how = judge.reference(spec.dtype, rope=spec.mode == "ROPE_LLAMA",
                              prefill=spec.family == "single_prefill")  # fmt: skip
        if self.machine.is_gpu:
            how = judge.rounding(
                spec.family, self.backend, spec.dtype, spec.kv, spec.o,
                soft_cap=spec.cap > 0, rope=spec.mode == "ROPE_LLAMA",
            )  # fmt: skip
        return judge.worst(expected, o, lse, how, kv)


def check_one(spec: Spec, machine: Cpu, rng: np.random.Generator) -> float:
    """Call for one request, compare; returns the largest error as a fraction of its bound."""
    one = One(spec, machine, rng)
    written, tmp = one.run()
    found = one.error(written)
    assert found <= 1, f"{found:.3g} of its bound; {one.batch.qo}, {one.batch.kv} {spec}"
    outputs = [written.o, *([] if written.lse is None else [written.lse])]
    assert all(array.intact() for array in [*outputs, tmp]), "bytes beside o, lse or tmp"
    return found
