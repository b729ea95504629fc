"""Bad input to every argument of every op: a typed error, and nothing written.

The cases come from the rows, so a new row is covered when it is added.  Each is refused three
times in the same words: by the first call of its kind, after a good call (with which it has most
in common), and where it is only prepared.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fi_ffi
from fi_ffi.cli.cases import Case
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.notation import axis_size, parse_axis
from fi_ffi.ops.row import KV_LAYOUTS, KvLayout, Row, Scalar, Tensor, default_of

from tests.helpers.calls import having
from tests.helpers.cases import default_dtypes, make_case
from tests.helpers.inputs import inputs_of
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


def _another_dtype(desc: fi_ffi.TensorDesc) -> str:
    return "int32" if desc.dtype.name == "float64" else "float64"


def _longer(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return tuple(n + (i == axis) for i, n in enumerate(shape))


WRONG: dict[str, Callable[[fi_ffi.TensorDesc], object]] = {
    "rank": lambda d: changed(d, shape=(*d.shape, 1)),
    "dtype": lambda d: changed(d, dtype=_another_dtype(d)),
    "device": lambda d: changed(d, device="cuda_managed:0"),
    "null": lambda d: changed(d, ptr=0),
    "last stride": lambda d: changed(d, strides=[2 * s for s in d.strides]),
    "misaligned": lambda d: changed(d, ptr=d.ptr + 1),
    "size": lambda d: changed(d, shape=_longer(d.shape, len(d.shape) - 1)),
    "None": lambda d: None,
    "text": lambda d: "tensor",
    "number": lambda d: 7,
    "list": lambda d: [1.0, 2.0],
}


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
    before = {name: array.tobytes() for name, array in case.arrays.items()}
    with pytest.raises(fi_ffi.ArgumentError) as caught:
        op(**values)
    error = caught.value
    assert error.op == op.row.name
    if argument is not None:
        assert error.argument == argument
    assert str(error.expected) and str(error.got)
    assert f"`{error.argument}`" in str(error)
    assert op.row.name in str(error)
    assert {name: array.tobytes() for name, array in case.arrays.items()} == before
    return error


def is_bound(row: Row, axis: str) -> bool:
    """Whether something else of the row says what this axis' size must be."""
    bases = set(parse_axis(axis).names)
    having = [
        arg
        for arg in row.tensors
        if bases & {name for other in arg.axis_names for name in parse_axis(other).names}
    ]
    return axis.isdigit() or axis in row.limits("in") or len(having) > 1


def alignment_of(row: Row, arg: Tensor, values: dict) -> int:
    """What a tensor's address is a multiple of, in bytes."""
    _, _, _, masks = CompiledRow(row).pack(**values)
    return int(masks[row.tensors.index(arg)]) + 1


@having()
def test_each_tensor(op, dtypes):
    for arg, wrong in itertools.product(op.row.tensors, WRONG):
        if wrong == "size" and not is_bound(op.row, arg.axis_names[-1]):
            continue
        if wrong == "None" and default_of(arg) is not None and arg.name not in op.row.together:
            continue
        case = a_case(op.row, dtypes)
        values = described(case)
        if wrong == "misaligned" and alignment_of(op.row, arg, values) == 1:
            continue
        values[arg.name] = WRONG[wrong](values[arg.name])
        # A size or a device that differs may be told of the tensor it differs from.
        anywhere = wrong in ("size", "device")
        # What cannot be described at all is told of before the form is known.
        anywhere = anywhere or (wrong == "None" and arg.name in op.row.together)
        call_refused(op, case, values, None if anywhere else arg.name)


@having()
def test_wrong_device_and_read_only(op, dtypes):
    for arg in op.row.tensors:
        case = a_case(op.row, dtypes)
        values = described(case)
        values[arg.name] = changed(values[arg.name], device="cuda:0")
        call_refused(op, case, values, None)
        if arg.writes:
            case.arrays[arg.name].flags.writeable = False
            call_refused(op, case, case.arrays | case.scalars, arg.name)


@having(lambda row: any(len(arg.axis_names) > 1 for arg in row.tensors))
def test_rows_that_overlap_or_go_backwards(op, dtypes):
    for arg in op.row.tensors:
        if len(arg.axis_names) == 1:
            continue
        # A row may be read many times, or rows that overlap; but not written so.
        written = arg.writes or arg.contiguous
        for first in (0, 8, -64) if written else (-64,):
            case = a_case(op.row, dtypes)
            values = described(case)
            strides = (first, *values[arg.name].strides[1:])
            values[arg.name] = changed(values[arg.name], strides=strides)
            call_refused(op, case, values, arg.name)


def may_lie_apart(arg: Tensor) -> bool:
    """Whether a tensor's rows may lie anywhere."""
    return len(arg.axis_names) > 1 and not arg.contiguous and arg.parts == 1


def with_first_stride(op, dtypes, first, args) -> Iterator[fi_ffi.ArgumentError]:
    """The refusals of those whose rows may lie apart, at a stride got from their own."""
    for arg in args:
        if may_lie_apart(arg):
            case = a_case(op.row, dtypes)
            values = described(case)
            own = values[arg.name].strides
            values[arg.name] = changed(values[arg.name], strides=(first(own[0]), *own[1:]))
            yield call_refused(op, case, values, arg.name)


@having(lambda row: any(map(may_lie_apart, row.tensors)))
def test_strides_between_vectors(op, dtypes):
    values = described(a_case(op.row, dtypes))
    steps = {
        arg.name: alignment_of(op.row, arg, values) // values[arg.name].dtype.itemsize
        for arg in op.row.tensors
    }
    loaded = [arg for arg in op.row.tensors if steps[arg.name] > 1]
    for error in with_first_stride(op, dtypes, lambda own: 2 * own + 1, loaded):
        assert f"{steps[error.argument]} elements" in str(error)


@having(lambda row: row.offset_limit < 2**63 and any(map(may_lie_apart, row.tensors)))
def test_offsets_past_what_the_kernel_counts(op, dtypes):
    for error in with_first_stride(
        op, dtypes, lambda own: op.row.offset_limit // 2, op.row.tensors
    ):
        assert str(op.row.offset_limit) in str(error)


@having(lambda row: any(arg.parts > 1 for arg in row.tensors))
def test_strides_of_parts(op, dtypes):
    """Rows that touch, or lie further from each other than a whole tensor's."""
    for arg in op.row.tensors:
        for parts in {1, arg.parts - 1, arg.parts + 1} if arg.parts > 1 else ():
            case = a_case(op.row, dtypes)
            values = described(case)
            desc = values[arg.name]
            strides = [stride // arg.parts * parts for stride in desc.strides[:-1]]
            values[arg.name] = changed(desc, strides=(*strides, 1))
            error = call_refused(op, case, values, arg.name)
            assert f"one of {arg.parts} parts" in str(error)


@having(lambda row: any(arg.stride_limit < 2**63 for arg in row.tensors))
def test_strides_past_what_the_kernel_keeps(op, dtypes):
    for arg in op.row.tensors:
        if arg.stride_limit < 2**63:
            case = a_case(op.row, dtypes)
            values = described(case)
            strides = (arg.stride_limit, *values[arg.name].strides[1:])
            values[arg.name] = changed(values[arg.name], strides=strides)
            error = call_refused(op, case, values, arg.name)
            assert f"strides below {arg.stride_limit}" in str(error)


@having(lambda row: row.same_strides)
def test_strides_that_differ(op, dtypes):
    for name in op.row.same_strides[1:]:
        case = a_case(op.row, dtypes)
        values = described(case)
        own = values[name].strides
        values[name] = changed(values[name], strides=(2 * own[0], *own[1:]))
        assert op.row.same_strides[0] in str(call_refused(op, case, values, name))


@having(lambda row: row.limits("in"))
def test_sizes_the_kernel_was_not_compiled_for(op, dtypes):
    for axis, sizes in op.row.limits("in").items():
        case = a_case(op.row, dtypes, **{axis: 2 * max(sizes)})
        error = call_refused(op, case, described(case), None)
        assert f"{axis} of {' or '.join(map(str, sizes))}" in str(error)


@having(lambda row: row.limits(">="))
def test_sizes_that_are_too_small(op, dtypes):
    # Empty tensors need no memory; nothing is looked at before the sizes.
    small = {axis: least for axis, (least,) in op.row.limits(">=").items()}
    for axis in small:
        least = dict.fromkeys(axes_of(op.row), 0) | small
        sizes = {**least, **inputs_of(op.row).small, axis: 0}
        values = {}
        for arg in op.row.tensors:
            shape = [axis_size(axis, sizes) for axis in arg.axis_names]
            values[arg.name] = fi_ffi.TensorDesc(16, shape, _dtype(op.row, arg), device="cpu")
        others = {
            arg.name: 1.0
            for arg in op.row.given
            if isinstance(arg, Scalar) and default_of(arg) is None
        }
        with pytest.raises(fi_ffi.ArgumentError, match=f"{axis} of at least"):
            op(**values, **others)


def has_layouts(row: Row) -> bool:
    return any(isinstance(arg, KvLayout) for arg in row.args)


@having(has_layouts)
def test_tensors_of_the_other_layout(op, dtypes):
    for layout, other in (("NHD", "HND"), ("HND", "NHD")):
        of_it, not_of_it = (a_case(op.row, dtypes, kv_layout=name) for name in (layout, other))
        for arg in op.row.tensors:
            if arg.kv:
                values = described(of_it)
                values[arg.name] = fi_ffi.as_desc(not_of_it.arrays[arg.name])
                call_refused(op, of_it, values, None)
        call_refused(op, not_of_it, described(not_of_it) | of_it.scalars, None)


@having(has_layouts)
def test_each_layout(op, dtypes):
    case = a_case(op.row, dtypes)
    (arg,) = (arg for arg in op.row.args if isinstance(arg, KvLayout))
    for value in ("nhd", "", None, 0, 1, b"NHD", ["NHD"], np.str_("NHD")):
        call_refused(op, case, described(case) | {arg.name: value}, arg.name)


def test_a_contiguous_op_counts_its_elements_too():
    shape = (2**21, 1024)
    x = fi_ffi.TensorDesc(16, shape, "bfloat16", device="cpu")
    column = fi_ffi.TensorDesc(16, shape[1:], "float32", device="cpu")
    fewer = fi_ffi.TensorDesc(16, (shape[0] + 1, 1024), "bfloat16", device="cpu")
    with pytest.raises(fi_ffi.ArgumentError, match="offsets below 2147483648"):
        fi_ffi.layernorm(fewer, fewer, column, column)
    assert x.numel == OPS["layernorm"].row.offset_limit


@having(lambda row: any(isinstance(arg, Scalar) for arg in row.args))
def test_each_scalar(op, dtypes):
    case = a_case(op.row, dtypes)
    values = described(case)
    for arg in op.row.args:
        if isinstance(arg, Scalar):
            for value in ("1", None, 1j, [1.0], math.nan, math.inf, -1.0, -math.inf, "é"):
                if value is not None or default_of(arg) != "None":  # which stands for a size
                    call_refused(op, case, values | {arg.name: value}, arg.name)


@pytest.mark.parametrize("value", [True, np.bool_(True)])
def test_a_bool_is_no_float(value):
    op = OPS["rmsnorm"]
    case = a_case(op.row, {"T": "float16"})
    call_refused(op, case, described(case) | {"eps": value}, "eps")


@pytest.mark.parametrize("value", [1, np.float32(1), np.float64(1), np.int64(1)])
def test_numbers_of_other_types_are_floats(value):
    op = OPS["rmsnorm"]
    case = make_case(
        op.row, inputs_of(op.row).small, {"T": "float16"}, np.random.default_rng(), eps=1.0
    )
    op(**case.arrays, eps=value)
    assert case.error("out", case.arrays["out"])[1] <= 1


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


def _dtype(row: Row, arg: Tensor) -> str:
    return row.dtypes.get(arg.dtype, (arg.dtype,))[0]


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_unknown_and_missing_arguments(op):
    case = a_case(op.row, default_dtypes(op.row))
    with pytest.raises(TypeError, match=op.row.name):
        op(**case.arrays, temperature=1)
    with pytest.raises(TypeError, match=op.row.name):
        op()


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.builds(
        lambda ptr, shape, dtype, device: fi_ffi.TensorDesc(ptr, shape, dtype, device=device),
        st.one_of(st.just(0), st.integers(1, 2**40)),
        st.lists(st.integers(0, 2**12), max_size=4),
        st.sampled_from(list(fi_ffi.DTYPES)),
        st.sampled_from(["cuda:0", "cuda:7", "cuda_host"]),
    ),
)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_anything_anywhere(data):
    """Any argument replaced by anything: a typed error, or a scalar that was fine."""
    op = data.draw(st.sampled_from(list(OPS.values())))
    case = a_case(op.row, default_dtypes(op.row))
    arg = data.draw(st.sampled_from(op.row.given))
    value = data.draw(ANYTHING)
    before = {name: array.tobytes() for name, array in case.arrays.items()}
    try:
        op(**(described(case) | {arg.name: value}))
    except fi_ffi.ArgumentError as error:
        assert error.op == op.row.name
        after = {name: array.tobytes() for name, array in case.arrays.items()}
        assert after == before
    else:
        if value is None and default_of(arg) == "None":
            return
        assert not isinstance(arg, Tensor), f"{arg.name}={value!r} was accepted"
        assert value in KV_LAYOUTS if isinstance(arg, KvLayout) else type(value) in (arg.type, int)
