"""Prepared calls over time: what they keep alive, who has them, kernels that fail."""

from __future__ import annotations

import gc
import sys
import weakref

import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.functions import OPS

from tests.helpers.prepared_calls import EVERY_OP, draw, frame_of, placed


@pytest.mark.parametrize(("op", "dtypes", "more"), EVERY_OP)
def test_owners(op, dtypes, more):
    """A tensor lives as long as the prepared call is of it, and no longer."""
    first, other = placed(draw(op.row, dtypes, more), more, 2)
    refs, names = {}, {*first.arrays}

    def given(made):
        # Of bfloat16 and fp8 an array interface does not tell: numpy's own arrays do.
        tensors = {n: array.view(Watched) for n, array in made.arrays.items()}
        refs.update({name: weakref.ref(tensor) for name, tensor in tensors.items()})
        return tensors

    def alive(expected):
        """Whether these live alone; collections take long in a process with many tests."""
        for _ in range(2):
            found = {name for name, ref in refs.items() if ref() is not None}
            if found == expected:
                return True
            gc.collect()
        return False

    call = op.prepare(**given(first), **first.scalars)
    assert alive(names)
    call()
    assert alive(names)
    # By address: each is let go when it is replaced.
    left = set(names)
    for name in sorted(names):
        if more.get("in place") and name in sum(op.row.in_place, ()):
            continue
        call.update(**{name: other.addresses[name]})
        left.remove(name)
        assert alive(left)
    call.update(**given(other))
    assert alive(names)
    call.update(**first.addresses)  # all at once
    assert alive(set())
    call.update(**given(other))
    with pytest.raises(fi_ffi.ArgumentError):
        call.update(**{next(iter(names)): -1})
    assert alive(names)
    del call
    assert alive(set())


class Watched(np.ndarray):
    """An array that can be referred to weakly."""


def test_frames_are_given_back():
    """Of calls that are done with, the next ones use the memory."""
    op = OPS["rmsnorm"]
    (first,) = placed(draw(op.row, {"T": "float16"}, {}), {}, 1)
    op(**first.values)
    (variant,) = [v for v in op.compiled.variants.values() if v.frames][-1:]
    for _ in range(20):
        op(**first.values)
        with pytest.raises(fi_ffi.ArgumentError):
            op(**first.values | {"eps": -1.0})
        with pytest.raises(fi_ffi.ArgumentError):
            op(**first.values | {"eps": "1"})
    assert len(variant.frames) <= 2
    call = op.prepare(**first.values)
    before = call.frame
    call.change({"eps": 0.5})  # an update that packs it anew
    assert call.frame is not before and call.variant.frames[-1] is before


with_gil = pytest.mark.skipif(
    not getattr(sys, "_is_gil_enabled", lambda: True)(), reason="counts of references are not exact"
)


@with_gil
def test_what_an_interrupt_lost_is_found_again(mine):
    """Ctrl-C between taking the call and the block that gives it back: nobody has it then."""
    call = mine.op.prepare(mine.y, mine.x, factor=2.0)
    for use in (call, lambda: call.update(factor=2.0)):
        call.take()
        use()
        call()
        assert mine.is_done(2)
    held = call.take()
    for use in (call, lambda: call.update(factor=3.0), lambda: call.update(x=mine.x)):
        with pytest.raises(fi_ffi.ArgumentError, match="in use, by another thread") as caught:
            use()
        assert (caught.value.op, caught.value.argument) == ("mine_too", "self")
    call.give(held)
    call()
    assert mine.is_done(2)


def test_a_call_inside_of_itself(mine):
    """Its kernel launches it again: refused there, and the outer one is fine."""
    call = mine.op.prepare(mine.y, mine.x, factor=2.0)
    mine.work = call
    with pytest.raises(fi_ffi.KernelError, match="in use"):
        call()
    mine.work = lambda: None
    call()
    assert mine.is_done(2)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_a_kernel_that_fails_leaves_it_usable(error, mine):
    """Ctrl-C and an exit come out as themselves, caused by what the kernel told."""
    call = mine.op.prepare(mine.y, mine.x, factor=2.0)

    def work():
        raise error

    mine.work = work
    kind = fi_ffi.KernelError if isinstance(error, Exception) else type(error)
    before = frame_of(call)
    for way in (call, lambda: mine.op(mine.y, mine.x, factor=2.0)):
        with pytest.raises(kind) as caught:
            way()
        told = caught.value.__cause__ or caught.value
        assert told.kind == type(error).__name__ and told.op.endswith("mine_too")
        assert frame_of(call) == before
    mine.work = lambda: None
    call()
    assert mine.is_done(2)


def test_kernels_that_change(mine):
    """A prepared call is of the kernels that it was prepared with, until it is prepared anew."""
    call = mine.op.prepare(mine.y, mine.x, factor=2.0)
    mine.op.forget()
    call()
    assert mine.is_done(2)
    mine.op.select_release("0.6.13")
    call.update(factor=3.0)
    call()
    assert mine.is_done(3)
    mine.op.forget()
    mine.op.prepare(mine.y, mine.x, factor=2.0)()
    assert mine.is_done(2)
