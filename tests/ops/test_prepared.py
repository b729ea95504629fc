"""Prepared calls on the CPU: the same bits as calls in full, whatever was updated, and how."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi.tensor import make_desc
from fi_ffi.cli.cases import Case
from fi_ffi.ops.call.compiled import KEEP
from fi_ffi.ops.call.prepared import Prepared
from fi_ffi.ops.call.row import KvLayout, Scalar
from fi_ffi.ops.functions import OPS

from tests.helpers.cases import make_case
from tests.helpers.inputs import inputs_of
from tests.helpers.prepared_calls import (
    EVERY_OP,
    EVERY_WAY,
    Placed,
    draw,
    frame_of,
    full,
    placed,
    refusal_of,
    room_for,
    same_error,
)

INT64 = 2**63


@pytest.mark.parametrize(("op", "dtypes", "more"), EVERY_WAY)
def test_the_same_bits(op, dtypes, more, recorded):
    """Prepared; and updated by place, where what is no tensor nor number stays as it is."""
    expected, first, other = placed(draw(op.row, dtypes, more), more, 3)
    full(op.row, expected)
    call = op.prepare(**first.values)
    call()
    assert not first.differs(expected)
    ordered = [
        other.values.get(arg.name, KEEP if hasattr(arg, "bytes_per_multiprocessor") else None)
        for arg in op.row.given
    ]
    call.update(*(KEEP if isinstance(value, str) else value for value in ordered))
    call()
    assert not other.differs(expected) and not first.differs(expected)


WRONG_TENSORS = [
    -1, INT64, 2**64, 2**64 - 1, 1 << 70, "tensor", 7.5, [1], True, None, object(),
    np.zeros((3, 3), np.complex64), np.zeros(0, np.float16),
]  # fmt: skip
WRONG_NUMBERS = [
    "1", None, 1j, [1.0], np.nan, np.inf, -1.0, -np.inf, -1, 2**70, 63, 1.5, True, np.bool_(True),
    np.float32(-1), np.int64(-64),
]  # fmt: skip


def candidates(arg):
    """What an argument of a prepared call is updated to, right and wrong."""
    if isinstance(arg, Scalar):
        return [*WRONG_NUMBERS, 64, 128, 0, 0.5, 3, False, np.float64(0.25)]
    if isinstance(arg, KvLayout):
        return ["NHD", "HND", 0, None]
    return [*WRONG_TENSORS, 1, 3, 256, 0]


@pytest.mark.parametrize(("op", "dtypes", "more"), EVERY_OP)
def test_updates_are_refused_as_calls_are_and_change_nothing(op, dtypes, more):
    """Each argument by each thing that it may not be, others right beside it."""
    first, other = placed(draw(op.row, dtypes, more), more, 2)
    call = op.prepare(**first.values)
    # Others in the same update must not be changed by one that fails.
    others = {} if more.get("in place") else other.addresses
    for arg in op.row.given:
        joined = {rule.argument for rule in op.row.rules if arg.name in rule.names}
        if getattr(arg, "is_scratch", False) and arg.name not in first.arrays:
            continue  # memory of the prepared call's own
        for value in candidates(arg):
            now, expected, comparable = frame_of(call), *refusal(op.row, first, arg, value)
            try:
                call.update(**others | {arg.name: value})
            except fi_ffi.ArgumentError as error:
                assert frame_of(call) == now, f"{arg.name}={value!r} failed and changed something"
                assert error.op == op.row.name
                assert error.argument in {arg.name, *op.row.together, *joined}
                assert not comparable or same_error(error, expected), (error, expected)
            else:
                assert expected is None, f"{arg.name}={value!r} was accepted: {expected}"
                call.update(**{n: v for n, v in first.values.items() if type(v) is not str})
    call()


def refusal(row, first, arg, value):
    """What a call in full says of one argument that is this, and whether an update is to say it
    in the same words: not where an update is given what no call can be, nor of layouts."""
    values = first.values | {arg.name: value}
    if isinstance(arg, Scalar):
        expected = refusal_of(row, values)
        return expected, expected is not None
    is_right = False
    if type(value) is int and arg.name in first.arrays:
        with contextlib.suppress(fi_ffi.ArgumentError):
            before = first.descs[arg.name]
            values[arg.name] = make_desc(
                value, before.shape, before.dtype, before.strides, before.device
            )
            is_right = True
    expected = refusal_of(row, values)
    return expected, expected is not None and is_right


@pytest.mark.parametrize(("op", "dtypes", "more"), EVERY_OP)
def test_random_updates(op, dtypes, more, recorded):
    """Many updates of any arguments one after the other, and a launch after each: what the
    arguments are now is what a call in full is given beside it."""
    rng = np.random.default_rng()
    cases = [draw(op.row, dtypes, more)]
    for _ in range(2):  # of the same indices, which belong together
        arrays = {
            name: array.copy() if array.dtype.kind in "iu" else shuffled(array, rng)
            for name, array in cases[0].arrays.items()
        }
        cases.append(Case(op.row, arrays, draw(op.row, dtypes, more).scalars, {}))
    ours = [made for case in cases for made in placed(case, more, 1)]
    theirs = [made for case in cases for made in placed(case, more, 1)]
    call = op.prepare(**ours[0].values)
    which, numbers = dict.fromkeys(ours[0].arrays, 0), dict(cases[0].scalars)
    joined = [pair for pair in op.row.in_place if more.get("in place")]
    for _ in range(25):
        changed = {n: int(rng.integers(3)) for n in which if rng.random() < 0.4}
        for one, two in joined:
            changed.pop(one, None)
            if two in changed:
                changed[one] = changed[two]
        given = {
            name: [ours[i].addresses, ours[i].descs, ours[i].arrays][rng.integers(3)][name]
            for name, i in changed.items()
        }
        fresh = {
            arg.name: cases[rng.integers(3)].scalars[arg.name]
            for arg in op.row.args
            if isinstance(arg, Scalar) and rng.random() < 0.4
        }
        call.update(**given, **fresh)
        which |= changed
        numbers |= fresh
        call()
        model = Placed.__new__(Placed)
        model.arrays = {name: theirs[i].arrays[name] for name, i in which.items()}
        model.scalars = numbers
        full(op.row, model)
        for our, their in zip(ours, theirs, strict=True):
            assert not our.differs(their)


def shuffled(array, rng):
    """The values in another order, in memory of the same strides."""
    _, made = room_for(array)
    made[...] = rng.permutation(array.ravel()).reshape(array.shape)
    return made


@pytest.mark.parametrize(("op", "dtypes", "more"), EVERY_OP)
def test_nothing_to_do(op, dtypes, more):
    """A call that writes nothing is prepared, launched and updated like any other."""
    if op.row.module == "gdn_prefill_sm90":
        pytest.skip("every sequence has a token: test_gdn.py has no sequence")
    if op.row.name == "seq_chunk_cumsum":
        pytest.skip("the number of all pieces is always written: test_mamba.py has no sequence")
    if op.row.name == "moe_align_block_size":
        pytest.skip("the number of all routes is always written, and there is one")
    sizes = {**inputs_of(op.row).small, "n": 0, "nnz": 0}
    told = {name: value for name, value in more.items() if name != "in place"}
    case = make_case(op.row, sizes, dtypes, np.random.default_rng(), **told)
    first, other = placed(case, more, 2)
    call = op.prepare(**first.values)
    call()
    call.update(**other.descs)
    call()
    assert not first.differs(Placed(case)) and not other.differs(first)


def test_what_it_says_of_itself():
    op = OPS["rmsnorm"]
    (first,) = placed(draw(op.row, {"T": "float16"}, {}, eps=0.5), {}, 1)
    call = op.prepare(**first.values)
    assert isinstance(call, Prepared)
    text = repr(call)
    assert text.startswith("<prepared rmsnorm(out=0x") and text.endswith("on cpu>")
    assert f"{first.addresses['out']:#x}" in text and "eps=0.5" in text
    call.update(eps=0.25)
    assert "eps=0.25" in repr(call)


@pytest.mark.parametrize("wrong", [len, 7, None, "rmsnorm", np.zeros(3), Prepared, fi_ffi,
                                   fi_ffi.FusedMoe, fi_ffi.module])  # fmt: skip
def test_what_cannot_be_prepared(wrong):
    with pytest.raises(fi_ffi.ArgumentTypeError, match="launches kernels, or a run"):
        fi_ffi.prepare(wrong)


def test_prepare_refuses_as_the_call_does():
    op = OPS["rmsnorm"]
    (first,) = placed(draw(op.row, {"T": "float16"}, {}), {}, 1)
    values = first.values | {"eps": -1.0}
    with pytest.raises(fi_ffi.ArgumentError) as caught:
        fi_ffi.prepare(op, **values)
    assert same_error(caught.value, refusal_of(op.row, values))
    with pytest.raises(TypeError, match="rmsnorm"):
        op.prepare(**first.values, temperature=1)


def test_updates_that_make_no_sense():
    op = OPS["append_paged_kv_cache"]
    case = draw(op.row, {"T": "float16"}, {})
    (first,) = placed(case, {}, 1)
    call = op.prepare(**first.values)
    before = frame_of(call)
    with pytest.raises(fi_ffi.ArgumentError, match="kv_layout.*prepare another call"):
        call.update(kv_layout="HND")
    with pytest.raises(TypeError, match="temperature"):
        call.update(temperature=1)
    with pytest.raises(TypeError, match="positional"):
        call.update(*[None] * (len(op.row.args) + 1))
    with pytest.raises(TypeError, match="multiple values"):
        call.update(first.arrays["append_key"], append_key=first.arrays["append_key"])
    assert frame_of(call) == before
    call.update()
    assert frame_of(call) == before
    call()


def test_tensors_of_other_layouts():
    """A tensor of equal sizes, strides, dtype and device is like it; any other is not."""
    op = OPS["rmsnorm"]
    case = draw(op.row, {"T": "float16"}, {})
    expected, first, other = placed(case, {}, 3)
    full(op.row, expected)
    call = op.prepare(**first.values)
    call.update(**other.descs)
    call()
    assert not other.differs(expected)
    before = frame_of(call)
    desc = other.descs["input"]
    (rows, columns), at = desc.shape, desc.ptr
    for wrong in (
        fi_ffi.TensorDesc(at, (rows - 1, columns), "float16", device="cpu"),
        fi_ffi.TensorDesc(at, desc.shape, "bfloat16", device="cpu"),
        fi_ffi.TensorDesc(at, desc.shape, "float16", strides=(2 * columns, 1), device="cpu"),
        fi_ffi.TensorDesc(at, desc.shape, "float16", device="cuda:0"),
        fi_ffi.TensorDesc(at, (rows, 1, columns), "float16", device="cpu"),
    ):
        with pytest.raises(fi_ffi.ArgumentError, match="as it was prepared") as caught:
            call.update(input=wrong)
        assert (caught.value.op, caught.value.argument) == ("rmsnorm", "input")
        assert frame_of(call) == before


def test_memory_that_is_only_read_may_be_read_only():
    op = OPS["rmsnorm"]
    case = draw(op.row, {"T": "float16"}, {})
    expected, first, other = placed(case, {}, 3)
    full(op.row, expected)
    for prepare_with, update_to in ((first, other), (other, first)):
        read_only = prepare_with.arrays["input"].view()
        read_only.flags.writeable = False
        call = op.prepare(**prepare_with.values | {"input": read_only})
        read_only = update_to.arrays["weight"].view()
        read_only.flags.writeable = False
        call.update(weight=read_only, input=update_to.arrays["input"], out=update_to.arrays["out"])
        call()
        assert not update_to.differs(expected)
    read_only = first.arrays["out"].view()
    read_only.flags.writeable = False
    with pytest.raises(fi_ffi.ArgumentError, match=r"`out`.*read-only"):
        call.update(out=read_only)


def test_optional_tensors_stay_as_they_were_prepared():
    op = OPS["gdn_prefill"]
    case = draw(op.row, {"T": "float16"}, {"without": ("alpha", "input_state")})
    expected, first = placed(case, {}, 2)
    full(op.row, expected)
    call = op.prepare(**first.values)
    before = frame_of(call)
    for given in (first.arrays["beta"], first.addresses["beta"]):
        with pytest.raises(fi_ffi.ArgumentError, match="None, as it was prepared"):
            call.update(alpha=given)
    with pytest.raises(fi_ffi.ArgumentError, match="beta"):
        call.update(beta=None)
    assert frame_of(call) == before
    call.update(alpha=None, input_state=None)  # as they are
    call()
    assert not first.differs(expected)


@pytest.mark.parametrize("rows", [-1, 1])
def test_an_address_inside_what_is_written(rows):
    op = OPS["rmsnorm"]
    (made,) = placed(draw(op.row, {"T": "float16"}, {}), {}, 1)
    call = op.prepare(**made.values)
    before, out = frame_of(call), made.descs["out"]
    with pytest.raises(fi_ffi.ArgumentError, match=r"overlaps `(input|out)`"):
        call.update(input=out.ptr + rows * out.strides[0] * out.dtype.itemsize)
    assert frame_of(call) == before
