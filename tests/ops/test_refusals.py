"""Bad input to every argument of every op: a typed error, and nothing written.

The cases come from the rows, so a new row is covered when it is added.  Each is refused three
times in the same words: by the first call of its kind, after a good call (with which it has most
in common), and where it is only prepared.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi.cli.cases import Case
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.call.notation import parse_axis
from fi_ffi.ops.call.row import KvLayout, Row, Scalar, Tensor, default_of
from fi_ffi.ops.functions import OPS

from tests.helpers.calls import having
from tests.helpers.cases import default_dtypes, make_case
from tests.helpers.inputs import inputs_of
from tests.helpers.limits import limits
from tests.helpers.prepared_calls import same_error


def a_case(row: Row, dtypes: dict[str, str], **more: int | str) -> Case:
    """A call, with other sizes or another layout than usual."""
    small = inputs_of(row).small
    sizes = {name: size for name, size in more.items() if name in axes_of(row)}
    others = {name: value for name, value in more.items() if name not in sizes}
    return make_case(row, {**small, **sizes}, dtypes, np.random.default_rng(), **others)


def axes_of(row: Row) -> set[str]:
    return {n for arg in row.tensors for axis in arg.axis_names for n in parse_axis(axis).names}


def described(case: Case) -> dict:
    """The call's arguments, tensors as descriptors."""
    return {name: fi_ffi.as_desc(array) for name, array in case.arrays.items()} | case.scalars


def changed(desc: fi_ffi.TensorDesc, **fields: object) -> fi_ffi.TensorDesc:
    values = {"shape": desc.shape, "dtype": desc.dtype, "device": desc.device} | fields
    return fi_ffi.TensorDesc(
        values.pop("ptr", desc.ptr), values.pop("shape"), values.pop("dtype"), **values
    )


Change = Callable[[fi_ffi.TensorDesc], Any]


def is_bound(row: Row, axis: str) -> bool:
    """Whether something else of the row says what this axis' size must be."""
    bases = set(parse_axis(axis).names)
    having = [
        arg
        for arg in row.tensors
        if bases & {name for other in arg.axis_names for name in parse_axis(other).names}
    ]
    return axis.isdigit() or axis in limits(row, "in") or len(having) > 1


def may_lie_apart(arg: Tensor) -> bool:
    """Whether a tensor's rows may lie anywhere."""
    return len(arg.axis_names) > 1 and not arg.contiguous and arg.parts == 1


def first(stride: Callable[[int], int]) -> Change:
    """Rows so far from each other, by how far they are."""
    return lambda d: changed(d, strides=(stride(d.strides[0]), *d.strides[1:]))


def wrong_tensors(
    row: Row, arg: Tensor, desc: fi_ffi.TensorDesc, mask: int
) -> Iterator[tuple[Any, str]]:
    """What a tensor may not be, and words of the error; told of any argument where they are "".

    `mask` has the bits that its address must not have.
    """
    step = (mask + 1) // desc.dtype.itemsize
    yield changed(desc, shape=(*desc.shape, 2 if arg.is_loose else 1)), "rank"
    yield changed(desc, dtype="int32" if desc.dtype.name == "float64" else "float64"), "float64"
    yield changed(desc, ptr=0, strides=desc.strides), "not null"
    if not arg.contiguous or desc.numel > 1:  # one element lies nowhere apart
        yield changed(desc, strides=[2 * s for s in desc.strides]), "stride"
    for other in ("cuda_managed:0", "cuda:0"):
        yield changed(desc, device=other), ""
    if mask:
        yield changed(desc, ptr=desc.ptr + 1, strides=desc.strides), "multiple of"
    if is_bound(row, arg.axis_names[-1]):
        yield changed(desc, shape=(*desc.shape[:-1], desc.shape[-1] + 1)), ""
    for other in ("tensor", 7, [1.0, 2.0]):
        yield other, type(other).__name__
    if arg.name in row.together:
        yield None, ""
    elif default_of(arg) is None:
        yield None, "None"
    # A row may be read many times, or rows that overlap; but not written so.
    if len(arg.axis_names) > 1:
        for stride in (0, 8, -64) if arg.writes or arg.contiguous else (-64,):
            yield first(lambda own, stride=stride: stride)(desc), "stride" * (stride < 0)  # type: ignore[misc]
    if may_lie_apart(arg) and step > 1:
        yield first(lambda own: 2 * own + 1)(desc), f"{step} elements"
    if row.offset_limit < 2**63 and may_lie_apart(arg):
        yield first(lambda own: row.offset_limit // 2)(desc), str(row.offset_limit)
    # Rows that touch, or lie further from each other than a whole tensor's.
    for parts in {1, arg.parts - 1, arg.parts + 1} if arg.parts > 1 else ():
        strides = [stride // arg.parts * parts for stride in desc.strides[:-1]]
        yield changed(desc, strides=(*strides, 1)), f"one of {arg.parts} parts"
    if arg.stride_limit < 2**63:
        yield first(lambda own: arg.stride_limit)(desc), f"strides below {arg.stride_limit}"
    if arg.name in row.same_strides[1:]:
        yield first(lambda own: 2 * own)(desc), row.same_strides[0]


# The ops that a test has called well.
_called: set[str] = set()


@pytest.fixture(autouse=True)
def _anew():
    """Let nothing be known of ops from other tests' calls."""
    for name in OPS:
        OPS[name].forget()
    _called.clear()
    yield
    for name in _called:
        OPS[name].forget()


def call_refused(op, case: Case, values: dict, argument: str | None) -> fi_ffi.ArgumentError:
    error = _refused(op, case, values, argument)
    if op.row.name not in _called:
        _called.add(op.row.name)
        with contextlib.suppress(fi_ffi.ArgumentError):  # some cases have no good call
            good = copy.deepcopy(case.arrays)  # its outputs are not the case's
            op(**good, **case.scalars)
    again = _refused(op, case, values, argument)
    assert same_error(error, again), (error, again)
    try:
        op.prepare(**values)
    except fi_ffi.ArgumentError as told:
        # To prepare takes no stream: what else is wrong is told.
        assert error.argument == "stream" or same_error(error, told), (error, told)
    else:
        assert error.argument == "stream", "it can be prepared"
    return error


def _refused(op, case: Case, values: dict, argument: str | None) -> fi_ffi.ArgumentError:
    with pytest.raises(fi_ffi.ArgumentError) as caught:
        op(**values)
    error = caught.value
    assert error.op == op.row.name
    if argument is not None:
        assert error.argument == argument
    assert str(error.expected) and str(error.got)
    assert f"`{error.argument}`" in str(error)
    assert op.row.name in str(error)
    return error


@having()
def test_each_tensor(op, dtypes):
    case = a_case(op.row, dtypes)
    values = described(case)
    _, _, _, masks = CompiledRow(op.row).pack(**values)
    for arg, mask in zip(op.row.tensors, masks, strict=True):
        for wrong, words in wrong_tensors(op.row, arg, values[arg.name], mask):
            told = arg.name if words and words != "stride" else None
            error = call_refused(op, case, values | {arg.name: wrong}, told)
            assert words in f"{error} {wrong}", (error, words)
    for arg in op.row.tensors:
        if arg.writes:
            case = a_case(op.row, dtypes)
            case.arrays[arg.name].flags.writeable = False
            call_refused(op, case, case.arrays | case.scalars, arg.name)


def test_some_row_has_each_limit():
    rows = [op.row for op in OPS.values()]
    tensors = [arg for row in rows for arg in row.tensors]
    assert any(arg.parts > 1 for arg in tensors)
    assert any(arg.stride_limit < 2**63 for arg in tensors)
    assert any(row.same_strides for row in rows) and any(row.together for row in rows)
    assert any(row.offset_limit < 2**63 and any(map(may_lie_apart, row.tensors)) for row in rows)


@having(lambda row: limits(row, "in"))
def test_sizes_the_kernel_was_not_compiled_for(op, dtypes):
    for axis, sizes in limits(op.row, "in").items():
        case = a_case(op.row, dtypes, **{axis: 2 * max(sizes)})
        error = call_refused(op, case, described(case), None)
        assert f"{axis} of {' or '.join(map(str, sizes))}" in str(error)


@having(lambda row: limits(row, ">="))
def test_sizes_that_are_too_small(op, dtypes):
    # Empty tensors need no memory; nothing is looked at before the sizes.
    small = {axis: least for axis, (least,) in limits(op.row, ">=").items()}
    for axis in small:
        least = dict.fromkeys(axes_of(op.row), 0) | small
        sizes = {**least, **inputs_of(op.row).small, axis: 0}
        values = {}
        for arg in op.row.tensors:
            shape = [parse_axis(axis).size(sizes) for axis in arg.axis_names]
            values[arg.name] = fi_ffi.TensorDesc(
                16, shape, op.row.dtypes.get(arg.dtype, (arg.dtype,))[0], device="cpu"
            )
        others = {
            arg.name: 1.0
            for arg in op.row.given
            if isinstance(arg, Scalar) and default_of(arg) is None
        }
        with pytest.raises(fi_ffi.ArgumentError, match=f"{axis} of at least"):
            op(**values, **others)


class LikeText(str):
    """Equal to a layout's name, and not one."""


def wrong_numbers(arg: Any) -> tuple[object, ...]:
    if isinstance(arg, KvLayout):
        return "nhd", "", None, 0, 1, b"NHD", ["NHD"], np.str_("NHD"), LikeText("NHD")
    if not isinstance(arg, Scalar):
        return ()
    none = () if default_of(arg) == "None" else (None,)  # which stands for a size
    large = (2**63, -(2**63) - 1) if arg.type is int else (10**400,)
    return "1", 1j, [1.0], math.nan, math.inf, -1.0, -math.inf, "é", *large, *none


@having(lambda row: any(map(wrong_numbers, row.args)))
def test_each_number_and_layout(op, dtypes):
    case = a_case(op.row, dtypes)
    values = described(case)
    for arg in op.row.args:
        for value in wrong_numbers(arg):
            instead = {name: None for name in [getattr(arg, "instead", "")] if name}
            call_refused(op, case, values | {arg.name: value} | instead, arg.name)


@having(lambda row: any(isinstance(arg, KvLayout) for arg in row.args))
def test_tensors_of_the_other_layout(op, dtypes):
    for layout, other in (("NHD", "HND"), ("HND", "NHD")):
        of_it, not_of_it = (a_case(op.row, dtypes, kv_layout=name) for name in (layout, other))
        for arg in op.row.tensors:
            if arg.kv:
                values = described(of_it)
                values[arg.name] = fi_ffi.as_desc(not_of_it.arrays[arg.name])
                call_refused(op, of_it, values, None)
        call_refused(op, not_of_it, described(not_of_it) | of_it.scalars, None)


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_a_missing_stream_is_told_before_kernels_are_looked_for(op):
    case = a_case(op.row, default_dtypes(op.row))
    descs = {name: fi_ffi.as_desc(array) for name, array in case.arrays.items()}
    values = case.scalars | {
        name: changed(desc, ptr=i << 24, strides=desc.strides, device="cuda:0")
        for i, (name, desc) in enumerate(descs.items(), 1)
    }
    with pytest.raises(fi_ffi.ArgumentError, match="stream") as caught:
        op(**values)
    assert (caught.value.op, caught.value.argument) == (op.row.name, "stream")
    with pytest.raises(fi_ffi.ArgumentTypeError, match="stream"):
        op(**values, stream="default")
    with pytest.raises(fi_ffi.ArgumentError, match="stream"):
        op(**values, stream=-1)


@pytest.mark.parametrize("stride", [1, 4, 8])
def test_rows_that_share_one_element_are_not_written(stride):
    """Nine elements a row, so that any stride is one that the kernel can load."""
    x, weight = np.ones((4, 9), np.float16), np.ones(9, np.float16)
    memory = np.full(64, np.nan, np.float16)
    out = np.lib.stride_tricks.as_strided(memory, (4, 9), (2 * stride, 2))
    with pytest.raises(fi_ffi.ArgumentError, match="elements that do not overlap") as caught:
        fi_ffi.rmsnorm(out, x, weight)
    assert caught.value.argument == "out" and np.isnan(memory).all()
    fi_ffi.rmsnorm(np.lib.stride_tricks.as_strided(memory, (4, 9), (18, 2)), x, weight, eps=0.0)
    assert (memory[:36] == 1).all() and np.isnan(memory[36:]).all()


def test_one_row_that_is_read_for_all():
    x, out = np.ones((1, 16), np.float16), np.full((4, 16), np.nan, np.float16)
    fi_ffi.rmsnorm(out, np.broadcast_to(x, (4, 16)), x[0], eps=0.0)
    assert (out == 1).all()


@pytest.mark.parametrize("past", [1, 2, 64])
def test_offsets_end_where_the_kernel_stops_counting(past):
    """The last element of the second row is the first that is too far."""
    limit = OPS["rmsnorm"].row.offset_limit
    x = fi_ffi.TensorDesc(1 << 20, (2, 9), "float16", strides=(limit - 9 + past, 1), device="cpu")
    with pytest.raises(fi_ffi.ArgumentError, match=f"offsets below {limit} elements") as caught:
        fi_ffi.rmsnorm(np.ones((2, 9), np.float16), x, np.ones(9, np.float16))
    assert caught.value.argument == "input"
