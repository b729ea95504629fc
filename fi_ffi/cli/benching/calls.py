"""The ways of calling that are measured: fi_ffi's own, of an op and of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

import fi_ffi
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.frame import word_of
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.cli.benching.nothing import IdlePlan, next_frame, noted, nothing, put_behind
from fi_ffi.cli.benching.rounds import STREAM, Call
from fi_ffi.cli.cases import bound, default_dtypes, make_case
from fi_ffi.loader.lock import the_lock
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.op import Op
from fi_ffi.ops.row import Row, Tensor
from fi_ffi.reference.exact_attention import Options, exact_batch, from_pages

EMPTY = "empty cffi call"
PREPARED = "prepared call, in a scope"
TYPED = "typed call, stream given"
PLAN_TYPED = "plan.run, typed (CPU: no stream)"
_EPS = 1e-6
# Nobody's memory: nothing is read or written there.
_PTRS, _OTHER_PTRS = (4096, 8192, 16384), (36864, 40960, 49152)
_SHAPES = ((4, 64), (4, 64), (64,))
_MADE = "T({}, (4, 64), 'float16'), T({}, (4, 64), 'float16'), T({}, (64,), 'float16')"


def own_calls() -> list[Call]:
    """Each of fi_ffi's, on an op or plan of its own."""
    op = "op(o, x, w, 1e-6)", "op(o, x, w, 1e-6, stream=77)"
    made = _MADE.format(*_PTRS)
    update = f"call.update({', '.join(map(str, _OTHER_PTRS))}); call()"
    return [
        _empty(),
        _prepared(PREPARED, "call()", _PTRS, is_scoped=True),
        _prepared("prepared call, 3 new pointers, in a scope", update, _OTHER_PTRS, is_scoped=True),
        _prepared("prepared call with a stream", "call()", _PTRS),
        _typed("typed call, in a scope", op[0], is_scoped=True),
        _typed(TYPED, op[1]),
        _typed("typed call, stream given, 3 TensorDescs made", f"op({made}, 1e-6, stream=77)"),
        _desc(),
        _run(PLAN_TYPED, "plan.run(q, k, v, o)"),
        _run("plan.run, prepared (CPU: no stream)", "call()"),
    ]


class _Rmsnorm:
    """An op of its own: on these tensors it ends in the entry that does nothing."""

    def __init__(self) -> None:
        self.op = Op(OPS["rmsnorm"].row)
        self.op.settle(the_lock().default_release)
        self.tensors = _tensors(_PTRS)
        self.settled = put_behind(self.op, *self.tensors, _EPS, False)
        self.frame = next_frame(self.settled)

    def wrong_results(self, is_prepared: bool) -> str | None:
        """What is wrong with its results on the CPU, where there is a reference kernel."""
        row, rng = self.op.row, np.random.default_rng()
        cases = [make_case(row, {"n": 4, "h": 64}, default_dtypes(row), rng) for _ in range(2)]
        call: Any = None
        for case in cases:
            if not is_prepared:
                self.op(**case.arrays, **case.scalars)
            elif call is None:
                call = self.op.prepare(**case.arrays, **case.scalars)
                call()
            else:
                call.update(**{name: fi_ffi.as_desc(a).ptr for name, a in case.arrays.items()})
                call()
            error = case.error("out", case.arrays["out"])[1]
            if not error <= 1:
                return f"its result is {error:.2f} of its bound away from float64"
        return None

    def wrong_arguments(self, call: Call, ptrs: Sequence[int], erases: bool) -> str | None:
        """What is wrong with what one call gives the entry."""
        if erases:
            _erase(self.frame, self.op.row, [arg.name for arg in self.op.row.tensors])
        with noted(self.settled, self.frame) as given:
            call.once()
        expected = [*map(_told, _tensors(ptrs)), _EPS, False], STREAM
        got = [([*map(_told, one.arguments)], one.stream) for one in given]
        return None if got == [expected] else f"the entry was given {got}, not {[expected]}"


def _tensors(ptrs: Sequence[int]) -> list[TensorDesc]:
    return [TensorDesc(p, shape, "float16") for p, shape in zip(ptrs, _SHAPES, strict=True)]


def _told(value: object) -> object:
    """A value to compare: descriptors are of an address and a layout."""
    return (value.ptr, value.layout.key) if isinstance(value, TensorDesc) else value


def _erase(frame: Any, row: Row, names: Sequence[str]) -> None:
    """Overwrite the addresses that a call is to write."""
    for i, arg in enumerate(row.args):
        if isinstance(arg, Tensor) and arg.name in names:
            frame.pointers[word_of(i, True)] = 0


def _typed(name: str, statement: str, is_scoped: bool = False) -> Call:
    made = _Rmsnorm()
    names = dict(zip("oxw", made.tensors, strict=True)) | {"op": made.op, "T": TensorDesc}
    call = Call(
        name, statement, names, is_scoped=is_scoped, before=lambda: made.wrong_results(False),
        after=lambda: made.wrong_arguments(call, _PTRS, erases=True),
    )  # fmt: skip
    return call


def _prepared(name: str, statement: str, ptrs: Sequence[int], is_scoped: bool = False) -> Call:
    made = _Rmsnorm()
    ready = made.op.prepare(*made.tensors, _EPS, stream=None if is_scoped else STREAM)
    call = Call(
        name, statement, {"call": ready}, is_scoped=is_scoped,
        before=lambda: made.wrong_results(True),
        after=lambda: made.wrong_arguments(call, ptrs, erases=ptrs is not _PTRS),
    )  # fmt: skip
    return call


def _empty() -> Call:
    """What cffi takes for a call of four arguments: the floor of all others."""
    invoke: Any = _Rmsnorm().frame.invoke

    def after() -> str | None:
        entry, code = nothing(), invoke()
        is_it = ffi.cast("void *", invoke.func) == ffi.cast("void *", entry.address)
        return None if is_it and code == 0 else f"not a call of {entry.name}: {code}"

    return Call(EMPTY, "invoke()", {"invoke": invoke}, after)


def _desc() -> Call:
    statement = f"T({_PTRS[0]}, (4, 64), 'float16')"

    def after() -> str | None:
        got = eval(statement, {"T": TensorDesc})
        right = got.ptr, got.shape, got.strides, str(got.dtype), str(got.device)
        wrong = right != (_PTRS[0], (4, 64), (64, 1), "float16", "cuda:0")
        return f"it is {got}" if wrong else None

    return Call("one TensorDesc made", statement, {"T": TensorDesc}, after)


_HEADS, _KV_HEADS, _DIM, _PAGE = 4, 2, 64, 4
_INDPTR, _INDICES, _LAST = (np.array(n, np.int32) for n in ([0, 2, 3], [3, 0, 2], [1, 4]))


class _Decode:
    """A small batch with a plan of its own, on the CPU, which runs are of."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng()
        self.plan = IdlePlan(
            _INDPTR, _INDICES, _LAST, device="cpu", num_qo_heads=_HEADS, num_kv_heads=_KV_HEADS,
            head_dim=_DIM, page_size=_PAGE,
        )  # fmt: skip
        self.draw()

    def draw(self) -> None:
        """New tensors, which keep their arrays alive."""
        cache = (4, _PAGE, _KV_HEADS, _DIM)
        shapes = {"q": (2, _HEADS, _DIM), "k": cache, "v": cache}
        self.arrays = {
            name: self.rng.standard_normal(shape).astype(np.float16)
            for name, shape in shapes.items()
        }
        self.arrays["o"] = np.full_like(self.arrays["q"], np.nan)
        self.tensors = {name: fi_ffi.as_desc(array) for name, array in self.arrays.items()}

    def wrong_results(self) -> str | None:
        """Runs with the reference kernel, of which the second is like the first, and packed ones:
        what is wrong with them.  Afterwards runs do nothing."""
        ready: Any = None
        for is_prepared in (False, False, True, True):
            self.draw()
            q, k, v, o = self.tensors.values()
            if not is_prepared:
                self.plan.run(q, k, v, o)
            else:
                ready = ready or fi_ffi.prepare(self.plan.run, q, k, v, o)
                ready.update(q=q.ptr, paged_k_cache=k.ptr, paged_v_cache=v.ptr, o=o.ptr)
                ready()
            error = self._error()
            if not error <= 1:
                return f"its result is {error:.2f} of its bound away from float64"
        return None

    def _error(self) -> float:
        """The largest error of the output as a fraction of its bound."""
        q, caches = self.arrays["q"], [self.arrays[name] for name in "kv"]

        def keys(request: int) -> tuple[Any, Any]:
            k, v = (from_pages(cache, _INDPTR, _INDICES, _LAST, request) for cache in caches)
            return k, v

        exact = exact_batch(q, np.arange(3), keys, Options(_DIM**-0.5))
        allowed = bound(
            exact.out, exact.magnitude * (1 + exact.spread[..., None]), np.dtype(np.float16)
        )
        error = np.abs(self.arrays["o"].astype(np.float64) - exact.out)
        return float(np.where(np.isfinite(error), error / allowed, np.inf).max())

    def wrong_arguments(self, call: Call, erases: bool) -> str | None:
        """What is wrong with what one run gives the entry."""
        names = {"q": "q", "paged_k_cache": "k", "paged_v_cache": "v", "o": "o"}
        if erases:
            _erase(self.plan.frame, self.plan.row, [*names])
        with noted(self.plan.settled, self.plan.frame) as given:
            call.once()
        if len(given) != 1:
            return f"the entry was called {len(given)} times"
        arguments = {
            arg.name: value
            for arg, value in zip(self.plan.row.args, given[0].arguments, strict=True)
        }
        expected = {name: self.tensors[short] for name, short in names.items()}
        expected["sm_scale"] = _DIM**-0.5
        got = {name: _told(arguments[name]) for name in expected}
        right = {name: _told(value) for name, value in expected.items()}
        return None if got == right else f"the entry was given {got}, not {right}"


def _run(name: str, statement: str) -> Call:
    batch = _Decode()
    wrong = batch.wrong_results()
    batch.plan.is_idle = True
    batch.plan.replan(_INDPTR, _INDICES, _LAST)  # which forgets runs of the reference kernel
    batch.draw()
    q, k, v, o = batch.tensors.values()
    batch.plan.run(q, k, v, o)
    names = batch.tensors | {"plan": batch.plan}
    is_prepared = "call" in statement
    if is_prepared:
        names["call"] = fi_ffi.prepare(batch.plan.run, q, k, v, o)
    call = Call(
        name, statement, names, before=lambda: wrong,
        after=lambda: batch.wrong_arguments(call, erases=not is_prepared),
    )  # fmt: skip
    return call
