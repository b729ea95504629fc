"""The ways of calling that are measured: fi_ffi's own, of an op and of a plan, and tvm_ffi's."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np

import fi_ffi
from fi_ffi import TensorDesc
from fi_ffi.cli.cases import bound
from fi_ffi.loader import tvm_ffi as libtvm_ffi
from fi_ffi.reference.arrays import Array
from fi_ffi.reference.attention.formula import Options, exact_batch, from_pages
from marks import replans
from marks.noop_kernel import Notes, kernels_replaced, noop_address, noop_call
from marks.turns import STREAM, Call

EMPTY = "empty cffi call"
PREPARED = "prepared call, in a scope"
TYPED = "typed call, stream given"
REPEATED = "typed call, 2 TensorDescs made, repeated length"
NUMPY_REPEATED = "typed call, numpy arrays (CPU), repeated length"
PLAN_TYPED = "plan.run, typed (CPU: no stream)"
PEER = "tvm_ffi call, its own tensors"

_EPS, _HIDDEN, _LENGTH = 1e-6, 64, 4
_MOST = 2**20  # rows of the arrays that lengths are slices of; nothing is read or written there
_ON_STREAM = f"{_EPS}, stream={STREAM}"
_MADE = "n = next(lengths); op(T(po, (n, 64), 'float16'), T(px, (n, 64), 'float16'), w, {})"
_SLICED = f"n = next(lengths); op(o[:n], x[:n], w, {_EPS})"


def own_calls() -> list[Call]:
    """Each of fi_ffi's; names are made inside `kernels_replaced(noop)`."""
    made, sliced = _MADE.format(_ON_STREAM), _SLICED
    update = "call.update(po, px, pw); call()"
    return [
        Call(EMPTY, "invoke()", lambda: {"invoke": noop_call()}, _wrong_noop),
        _rmsnorm(PREPARED, "call()", is_scoped=True),
        _rmsnorm("prepared call, 3 new pointers, in a scope", update, is_scoped=True),
        _rmsnorm("prepared call with a stream", "call()"),
        _rmsnorm("typed call, in a scope", f"op(o, x, w, {_EPS})", is_scoped=True),
        _rmsnorm(TYPED, f"op(o, x, w, {_ON_STREAM})"),
        _rmsnorm(REPEATED, made),
        _rmsnorm("typed call, 2 TensorDescs made, other lengths", made, repeated=REPEATED),
        _rmsnorm(NUMPY_REPEATED, sliced),
        _rmsnorm("typed call, numpy arrays (CPU), other lengths", sliced, repeated=NUMPY_REPEATED),
        Call("one TensorDesc made", _DESC, lambda: {"T": TensorDesc}, _wrong_desc),
        Call("TensorDesc.rows", _ROWS, _whole, lambda: _wrong_part(_ROWS, 4096 + 2 * _HIDDEN, 2)),
        Call("TensorDesc.at", _AT, _whole, lambda: _wrong_part(_AT, 8192, 4)),
        _decode(PLAN_TYPED, "plan.run(q, k, v, o)"),
        _decode("plan.run, prepared (CPU: no stream)", "call()"),
        *replans.calls(),
    ]


def _wrong_noop() -> str | None:
    code = noop_call()()
    return f"it returned {code}" if code else None


_DESC = f"T(4096, (4, {_HIDDEN}), 'float16')"


def _wrong_desc() -> str | None:
    got = eval(_DESC, {"T": TensorDesc})
    right = got.ptr, got.shape, got.strides, str(got.dtype), str(got.device)
    wrong = right != (4096, (4, _HIDDEN), (_HIDDEN, 1), "float16", "cuda:0")
    return f"it is {got}" if wrong else None


_ROWS, _AT = "desc.rows(1, 3)", "desc.at(8192)"


def _whole() -> dict[str, TensorDesc]:
    return {"desc": eval(_DESC, {"T": TensorDesc})}


def _wrong_part(statement: str, ptr: int, rows: int) -> str | None:
    got = eval(statement, _whole())
    right = TensorDesc(ptr, (rows, _HIDDEN), "float16")
    return None if repr(got) == repr(right) else f"it is {got}"


# Out, input and weight: arrays on the host, or addresses on a GPU that are nobody's memory.
# The latter are so far apart that no length makes two of them overlap.
_Tensors: TypeAlias = "Sequence[Any]"
_ONE, _OTHER = ([n << 40 for n in numbers] for numbers in ((1, 2, 3), (4, 5, 6)))


def _rmsnorm(
    name: str, statement: str, *, is_scoped: bool = False, repeated: str | None = None
) -> Call:
    """A way of calling rmsnorm.

    In the statement `o`, `x` and `w` are tensors, `po`, `px` and `pw` the addresses of others,
    and `lengths` gives one length again and again, or where there is a `repeated` call to be
    held beside, another length each time.
    """
    is_sliced = "[:n]" in statement

    def names(one: _Tensors, other: _Tensors, lengths: Iterator[int], device: str) -> Any:
        op = fi_ffi.OPS["rmsnorm"]
        made = {"op": op, "lengths": lengths, **dict(zip("oxw", one, strict=True))}
        if is_sliced:
            return made
        made |= zip(("po", "px", "pw"), map(_address, other), strict=True)
        made["T"] = T = TensorDesc if device == "cuda:0" else partial(TensorDesc, device=device)
        shapes = (_LENGTH, _HIDDEN), (_LENGTH, _HIDDEN), (_HIDDEN,)
        descs = [T(_address(a), shape, "float16") for a, shape in zip(one, shapes, strict=True)]
        made |= zip("oxw", descs, strict=True)
        if "call" in statement:
            made["call"] = op.prepare(*descs, _EPS, stream=None if is_scoped else STREAM)
        return made

    def timed() -> Any:
        some = range(1, _MOST) if repeated else (_LENGTH,)
        lengths = itertools.chain.from_iterable(itertools.repeat(some))
        return names(_arrays(_MOST) if is_sliced else _ONE, _OTHER, lengths, "cuda:0")

    def used(one: _Tensors, other: _Tensors) -> _Tensors:
        """The tensors that a call is of: those that the statement names."""
        both = zip("oxw", one, other, strict=True)
        return [theirs if f"p{of}" in statement else mine for of, mine, theirs in both]

    def problem() -> str | None:
        """Compare two calls of numpy's kernel with float64, and check what two calls give."""
        lengths = [3, 5] if repeated else [_LENGTH] * 2
        one: _Tensors = _arrays(8)
        other: _Tensors = _arrays(8)
        o, x, w = used(one, other)
        known = names(one, other, iter(lengths), "cpu")
        for n in lengths:
            x[...] = np.random.default_rng().standard_normal(x.shape)
            o[...] = np.nan
            _once(call, known)
            wrong = _wrong_rows(o, x, w, n)
            if wrong is not None:
                return wrong
        notes = Notes()
        with kernels_replaced(notes.entry):
            if not is_sliced:
                one, other = _ONE, _OTHER
            known = names(one, other, iter(lengths), "cuda:0")
            for _ in lengths:
                _once(call, known)
        ptrs = [*map(_address, used(one, other))]
        shapes = [[(n, _HIDDEN), (n, _HIDDEN), (_HIDDEN,)] for n in lengths]
        stream = 0 if is_sliced else STREAM
        return _wrong_notes(
            notes, [([*zip(ptrs, of, strict=True), _EPS, False], stream) for of in shapes]
        )

    call = Call(name, statement, timed, problem, is_scoped=is_scoped, repeated=repeated)
    return call


def _arrays(rows: int) -> list[Array]:
    """Room for out and input, which is not touched before it is used, and a weight."""
    room = [np.empty((rows, _HIDDEN), np.float16) for _ in range(2)]
    return [*room, np.linspace(-2, 2, _HIDDEN, dtype=np.float16)]


def _address(tensor: Any) -> int:
    """The address of an array, or the address that was given."""
    return tensor if isinstance(tensor, int) else tensor.ctypes.data


def _once(call: Call, names: dict[str, Any]) -> None:
    with call.scope():
        exec(compile(call.statement, "<call>", "exec"), names)


def _wrong_rows(o: Array, x: Array, w: Array, n: int) -> str | None:
    """What is wrong with `o`, of which n rows are the norm of `x` and the others NaN."""
    of, scale = x[:n].astype(np.float64), w.astype(np.float64)
    exact = of / np.sqrt((of**2).mean(-1, keepdims=True) + _EPS) * scale
    return _wrong_values(o[:n], exact, abs(exact)) or (
        None if np.isnan(o[n:]).all() else "rows past its length were written"
    )


def _wrong_values(got: Array, exact: Array, magnitude: Array) -> str | None:
    error = np.abs(got.astype(np.float64) - exact) / bound(exact, magnitude, got.dtype)
    worst = np.where(np.isfinite(error), error, np.inf).max()
    return f"its result is {worst:.2f} of its bound away from float64" if worst > 1 else None


def _wrong_notes(notes: Notes, expected: list[Any]) -> str | None:
    """What is wrong with what an entry was given: address and shape of tensors, and numbers."""
    got = [
        ([(a.ptr, a.shape) if isinstance(a, TensorDesc) else a for a in given], stream)
        for given, stream in notes.calls
    ]
    return None if got == expected else f"the entry was given {got}, not {expected}"


_HEADS, _KV_HEADS, _DIM, _PAGE = 4, 2, 64, 4
_INDPTR, _INDICES, _LAST = (np.array(n, np.int32) for n in ([0, 2, 3], [3, 0, 2], [1, 4]))


def _decode(name: str, statement: str) -> Call:
    """A way of running a small batch, on the CPU, with a plan of its own."""
    cache = (4, _PAGE, _KV_HEADS, _DIM)
    shapes = {"q": (2, _HEADS, _DIM), "k": cache, "v": cache, "o": (2, _HEADS, _DIM)}
    arrays = {of: np.zeros(shape, np.float16) for of, shape in shapes.items()}

    def make() -> dict[str, Any]:
        plan = fi_ffi.BatchDecodePlan(
            _INDPTR, _INDICES, _LAST, device="cpu", num_qo_heads=_HEADS, num_kv_heads=_KV_HEADS,
            head_dim=_DIM, page_size=_PAGE,
        )  # fmt: skip
        made = {of: fi_ffi.as_desc(array) for of, array in arrays.items()}
        ready = fi_ffi.prepare(plan.run, *made.values()) if "call" in statement else None
        return {**made, "plan": plan, "call": ready}

    def problem() -> str | None:
        known, rng = make(), np.random.default_rng()
        for _ in range(2):
            for array in arrays.values():
                array[...] = rng.standard_normal(array.shape)
            arrays["o"][...] = np.nan
            _once(call, known)
            wrong = _wrong_values(arrays["o"], *_attention(arrays))
            if wrong is not None:
                return wrong
        notes = Notes()
        with kernels_replaced(notes.entry):
            known = make()
            for _ in range(2):
                _once(call, known)
        # Of a run's many arguments: the tensors that the caller gave, in the ABI's order.
        tensors = [(array.ctypes.data, array.shape) for array in arrays.values()]
        for given, _ in notes.calls:
            given[:] = [a for a in given if isinstance(a, TensorDesc) and a.ptr in dict(tensors)]
        return _wrong_notes(notes, [(tensors, 0)] * 2)

    call = Call(name, statement, make, problem)
    return call


def _attention(arrays: dict[str, Array]) -> tuple[Array, Array]:
    """What the output must be, and its magnitude."""

    def keys(request: int) -> tuple[Any, Any]:
        k, v = (from_pages(arrays[of], _INDPTR, _INDICES, _LAST, request) for of in "kv")
        return k, v

    exact = exact_batch(arrays["q"], np.arange(3), keys, Options(_DIM**-0.5))
    return exact.out, exact.magnitude * (1 + exact.spread[..., None])


class Peer(NamedTuple):
    """tvm_ffi where it can be measured; else why it cannot."""

    module: Any
    told: str


def find_peer() -> Peer:
    """Import tvm_ffi if it is installed and its libtvm_ffi can be the one of this process.

    Before fi_ffi loads one: two of them in a process abort.
    """
    here, installed = libtvm_ffi.in_process(), libtvm_ffi.installed()
    if installed is None:
        return Peer(None, "apache-tvm-ffi is not installed, or not in a version fi_ffi works with")
    if here is not None and here.path != installed.path:
        return Peer(None, f"this process has another libtvm_ffi: {here.path}")
    try:
        module = importlib.import_module("tvm_ffi")
    except ImportError as error:
        return Peer(None, f"tvm_ffi does not import: {error}")
    return Peer(module, f"apache-tvm-ffi {importlib.metadata.version('apache-tvm-ffi')}")


_READ = "t.data_ptr(), t.shape, t.stride(), t.dtype, t.get_device()"
_READS = "; ".join(_READ.replace("t.", f"{of}.") for of in "oxw")


def torch_calls() -> list[Call]:
    """A typed call with torch tensors on the CPU, and the floor of it: what has to be asked of
    each tensor in every call, and the slices that stand for other lengths."""
    torch: Any = importlib.import_module("torch")

    def make() -> dict[str, Any]:
        arrays = [*map(torch.from_numpy, _arrays(_LENGTH))]
        return {"op": fi_ffi.OPS["rmsnorm"], **dict(zip("oxw", arrays, strict=True))}

    def call(name: str, statement: str, is_floor: bool = True) -> Call:
        def problem() -> str | None:
            known = make()
            known["x"].normal_()
            known["o"].fill_(np.nan)
            exec(statement, known)
            o, x, w = (known[of].numpy() for of in "oxw")
            return None if is_floor else _wrong_rows(o, x, w, _LENGTH)

        return Call(name, statement, make, problem)

    return [
        call("typed call, 3 torch tensors (CPU)", f"op(o, x, w, {_EPS})", is_floor=False),
        call("of it, 5 attributes of each tensor", _READS),
        call("2 slices of torch tensors", "o[:3]; x[:3]"),
    ]


def peer_calls(tvm_ffi: Any) -> list[Call]:
    """The same entry called by tvm_ffi, with each kind of tensor that is here."""
    arrays = [a.copy() for a in _arrays(_LENGTH)]
    calls = [
        _peer_call(PEER, tvm_ffi, [tvm_ffi.from_dlpack(array) for array in arrays], arrays),
        _peer_call("tvm_ffi call, numpy arrays", tvm_ffi, arrays, arrays),
    ]
    if importlib.util.find_spec("torch") is not None:
        of_torch = [*map(importlib.import_module("torch").from_numpy, arrays)]
        calls.append(_peer_call("tvm_ffi call, torch tensors", tvm_ffi, of_torch, arrays))
    return calls


def _peer_call(name: str, tvm_ffi: Any, tensors: _Tensors, arrays: list[Array]) -> Call:
    known = dict(zip("oxw", tensors, strict=True))

    def timed() -> dict[str, Any]:
        return known | {"f": tvm_ffi.Function.__from_extern_c__(noop_address())}

    def problem() -> str | None:
        notes = Notes()
        notes.entry(fi_ffi.OPS["rmsnorm"].row.signature)
        _once(call, known | {"f": tvm_ffi.get_global_func(notes.NAME)})
        given = [*((array.ctypes.data, array.shape) for array in arrays), _EPS, False]
        return _wrong_notes(notes, [(given, 0)])

    call = Call(name, f"f(o, x, w, {_EPS}, False)", timed, problem, is_peer=True)
    return call
