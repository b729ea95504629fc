"""What a prepared call can be updated to, and what not."""

from __future__ import annotations

import pytest

import fi_ffi
from fi_ffi.ops.functions import OPS

from tests.helpers.prepared_calls import Placed, draw, frame_of, full, placed


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


def test_what_goes_together_stays_together():
    op = OPS["gdn_prefill"]
    (first,) = placed(draw(op.row, {"T": "float16"}, {}), {}, 1)
    call = op.prepare(**first.values)
    before = frame_of(call)
    with pytest.raises(fi_ffi.ArgumentError, match="they go together"):
        call.update(checkpoint_every_n_tokens=0)
    assert frame_of(call) == before


def test_memory_stays_apart():
    op = OPS["gdn_prefill"]
    (first,) = placed(draw(op.row, {"T": "float16"}, {}), {}, 1)
    call = op.prepare(**first.values)
    before = frame_of(call)
    for name, other in (("output", "v"), ("v", "output"), ("output_state", "state_checkpoints")):
        with pytest.raises(fi_ffi.ArgumentError, match="memory apart"):
            call.update(**{name: first.addresses[other]})
        assert frame_of(call) == before
    call.update(output_state=first.addresses["input_state"])  # in place
    call()
    # What is told of is how things are after the whole update.
    room = Placed(draw(op.row, {"T": "float16"}, {}))
    call.update(output_state=room.addresses["output_state"])
    call()


@pytest.mark.parametrize("rows", [-1, 1])
def test_an_address_inside_what_is_written(rows):
    op = OPS["rmsnorm"]
    (made,) = placed(draw(op.row, {"T": "float16"}, {}), {}, 1)
    call = op.prepare(**made.values)
    before, out = frame_of(call), made.descs["out"]
    with pytest.raises(fi_ffi.ArgumentError, match=r"overlaps `(input|out)`"):
        call.update(input=out.ptr + rows * out.strides[0] * out.dtype.itemsize)
    assert frame_of(call) == before
