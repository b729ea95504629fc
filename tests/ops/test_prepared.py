"""Prepared calls on the CPU: the same bits as calls in full, whatever was updated, and how."""

from __future__ import annotations

import contextlib
import gc
import threading
import tracemalloc
import weakref

import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi.tensor import make_desc
from fi_ffi.cli.cases import Case
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.prepared import Prepared
from fi_ffi.ops.quick import KEEP
from fi_ffi.ops.row import KvLayout, Scalar

from prepared_calls import (
    EVERY_OP,
    EVERY_WAY,
    Placed,
    draw,
    frame_of,
    full,
    refusal_of,
    same_error,
    tensors,
)

INT64 = 2**63


def placed(case, more, count):
    return [Placed(case, more.get("in place", False)) for _ in range(count)]


@pytest.mark.parametrize(("op", "dtypes", "more"), EVERY_WAY)
def test_the_same_bits(op, dtypes, more):
    """Prepared; updated by address, tensor, place and keyword; and back to what it was."""
    case = draw(op.row, dtypes, more)
    expected, first, *others = placed(case, more, 7)
    full(op.row, expected)
    call = op.prepare(**first.values)
    call()
    assert not first.differs(expected)
    # By place; what is no tensor nor number stays as it is.
    ordered = [
        others[3].values.get(arg.name, KEEP if hasattr(arg, "bytes_per_multiprocessor") else None)
        for arg in op.row.args
    ]
    ordered = [KEEP if isinstance(value, str) else value for value in ordered]
    changes = [
        ((), others[0].addresses), ((), others[1].descs), ((), others[2].arrays), (ordered, {}),
    ]  # fmt: skip
    for other, (args, kwargs) in zip(others, changes, strict=False):
        call.update(*args, **kwargs)
        call()
        assert not other.differs(expected)
        assert not first.differs(expected)
    # Some by address and some by tensor, one update each.
    for i, name in enumerate(others[4].arrays):
        call.update(**{name: (others[4].addresses if i % 2 else others[4].arrays)[name]})
    call()
    assert not others[4].differs(expected)


@pytest.mark.parametrize(("op", "dtypes", "more"), EVERY_OP)
def test_scalars(op, dtypes, more):
    """Prepared with other numbers, and updated to these."""
    case, numbers = draw(op.row, dtypes, more), draw(op.row, dtypes, more).scalars
    names = [arg.name for arg in op.row.args if isinstance(arg, Scalar)]
    expected, got = placed(case, more, 2)
    full(op.row, expected)
    call = op.prepare(**got.descs, **{**case.scalars, **{name: numbers[name] for name in names}})
    call.update(**{name: case.scalars[name] for name in names})
    call()
    assert not got.differs(expected)


@pytest.mark.parametrize("value", [1, np.float32(1), np.float64(1), np.int64(1), 1.0])
def test_numbers_of_other_types(value):
    op = OPS["rmsnorm"]
    case = draw(op.row, {"T": "float16"}, {}, eps=1.0)
    expected, got = placed(case, {}, 2)
    full(op.row, expected)
    call = op.prepare(**got.descs, eps=0.25)
    call.update(eps=value)
    call()
    assert not got.differs(expected)


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
    others = {} if op.row.apart else other.addresses
    for arg in op.row.args:
        if getattr(arg, "bytes_per_multiprocessor", 0) and arg.name not in first.arrays:
            continue  # memory of the prepared call's own
        for value in candidates(arg):
            now, expected, comparable = frame_of(call), *refusal(op.row, first, arg, value)
            try:
                call.update(**others | {arg.name: value})
            except fi_ffi.ArgumentError as error:
                assert frame_of(call) == now, f"{arg.name}={value!r} failed and changed something"
                assert error.op == op.row.name
                assert error.argument == arg.name or error.argument in op.row.together
                assert not comparable or same_error(error, expected), (error, expected)
            else:
                assert expected is None, f"{arg.name}={value!r} was accepted: {expected}"
                call.update(**{n: v for n, v in first.values.items() if n != "kv_layout"})
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
            values[arg.name] = make_desc(value, first.descs[arg.name].layout)
            is_right = True
    expected = refusal_of(row, values)
    return expected, expected is not None and is_right


@pytest.mark.parametrize(("op", "dtypes", "more"), EVERY_OP)
def test_random_updates(op, dtypes, more):
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
    return rng.permutation(array.ravel()).reshape(array.shape)


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
    """A layout that was interned twice is the same; one that differs in anything is not."""
    from fi_ffi.abi import tensor

    op = OPS["rmsnorm"]
    case = draw(op.row, {"T": "float16"}, {})
    expected, first, other = placed(case, {}, 3)
    full(op.row, expected)
    call = op.prepare(**first.values)
    tensor._LAYOUTS.clear()
    call.update(**other.descs)
    call()
    assert not other.differs(expected)
    before = frame_of(call)
    desc = other.descs["input"]
    for wrong in (
        fi_ffi.TensorDesc(desc.ptr, (2, 64), "float16", device="cpu"),
        fi_ffi.TensorDesc(desc.ptr, (3, 64), "bfloat16", device="cpu"),
        fi_ffi.TensorDesc(desc.ptr, (3, 64), "float16", strides=(128, 1), device="cpu"),
        fi_ffi.TensorDesc(desc.ptr, (3, 64), "float16", device="cuda:0"),
        fi_ffi.TensorDesc(desc.ptr, (3, 1, 64), "float16", device="cpu"),
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


@pytest.mark.parametrize(("op", "dtypes", "more"), EVERY_OP)
def test_nothing_to_do(op, dtypes, more):
    """A call that writes nothing is prepared, launched and updated like any other."""
    if more:
        return
    nothing = {"n": 0, "nnz": 0} if op.row.module != "gdn_prefill_sm90" else {}
    if not nothing:
        return
    from prepared_calls import SIZES

    from fi_ffi.cli.cases import make_case

    case = make_case(op.row, SIZES | nothing, dtypes, np.random.default_rng())
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


@pytest.mark.parametrize("wrong", [len, 7, None, "rmsnorm", np.zeros(3), Prepared, fi_ffi])
def test_what_cannot_be_prepared(wrong):
    with pytest.raises(fi_ffi.ArgumentTypeError, match="an op, single_prefill"):
        fi_ffi.prepare(wrong)


def test_prepare_refuses_as_the_call_does():
    op = OPS["rmsnorm"]
    (first,) = placed(draw(op.row, {"T": "float16"}, {}), {}, 1)
    for wrong in ({"eps": -1.0}, {"out": None}, {"input": first.arrays["weight"]}, {"eps": "1"}):
        values = first.values | wrong
        for prepare in (lambda values=values: op.prepare(**values),
                        lambda values=values: fi_ffi.prepare(op, **values)):  # fmt: skip
            with pytest.raises(fi_ffi.ArgumentError) as caught:
                prepare()
            assert same_error(caught.value, refusal_of(op.row, values))
    with pytest.raises(TypeError, match="rmsnorm"):
        op.prepare(**first.values, temperature=1)


class Tensor:
    """A tensor whose end is seen."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.__array_interface__ = array.__array_interface__


@pytest.mark.parametrize(("op", "dtypes", "more"), EVERY_OP)
def test_owners(op, dtypes, more):
    """A tensor lives as long as the prepared call is of it, and no longer."""
    case = draw(op.row, dtypes, more)
    first, other = placed(case, more, 2)

    def given(made):
        # Of bfloat16 and fp8 an array interface does not tell: numpy's own arrays do.
        return {n: made.arrays[n].view(Watched) for n in made.arrays}

    def alive(refs):
        gc.collect()
        return {name for name, ref in refs.items() if ref() is not None}

    tensors_of = given(first)
    refs = {name: weakref.ref(tensor) for name, tensor in tensors_of.items()}
    call = op.prepare(**tensors_of, **first.scalars)
    names = set(tensors_of)
    del tensors_of
    assert alive(refs) == names
    call()
    assert alive(refs) == names
    # By address: each is let go when it is replaced.
    for name in sorted(names):
        if (op.row.apart and more.get("in place")) and name in sum(op.row.in_place, ()):
            continue
        call.update(**{name: other.addresses[name]})
        assert name not in alive(refs)
        names.remove(name)
    tensors_of = given(other)
    refs = {name: weakref.ref(tensor) for name, tensor in tensors_of.items()}
    call.update(**tensors_of)
    names = set(tensors_of)
    del tensors_of
    assert alive(refs) == names
    call()
    with pytest.raises(fi_ffi.ArgumentError):
        call.update(**{next(iter(names)): -1})
    assert alive(refs) == names
    del call
    assert alive(refs) == set()


class Watched(np.ndarray):
    """An array that can be referred to weakly."""


def test_no_growth():
    """Launches and updates leave nothing behind."""
    op = OPS["rmsnorm"]
    case = draw(op.row, {"T": "float16"}, {})
    sets = placed(case, {}, 2)
    call = op.prepare(**sets[0].values)

    def work(times: int) -> None:
        for i in range(times):
            call.update(**sets[i % 2].addresses, eps=float(i))
            call()
            call.update(**sets[i % 2].arrays)
            op.prepare(**sets[i % 2].values)()
            with pytest.raises(fi_ffi.ArgumentError):
                call.update(eps=-1.0)
            op(**sets[i % 2].values)

    work(50)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        work(300)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 50_000, f"{grown} bytes in 300 rounds"


def test_frames_are_given_back():
    """Of calls that are done with, the next ones use the memory."""
    op = OPS["rmsnorm"]
    (first,) = placed(draw(op.row, {"T": "float16"}, {}), {}, 1)
    op(**first.values)
    (settled,) = [s for s in op._form._settled.values() if s.frames][-1:]
    for _ in range(20):
        op(**first.values)
        with pytest.raises(fi_ffi.ArgumentError):
            op(**first.values | {"eps": -1.0})
        with pytest.raises(fi_ffi.ArgumentError):
            op(**first.values | {"eps": "1"})
    assert len(settled.frames) <= 2


def test_two_threads_at_once_are_refused_and_in_turns_served(mine):
    entered, leave = threading.Event(), threading.Event()
    call = mine.op.prepare(mine.y, mine.x, factor=2.0)

    def block():
        entered.set()
        assert leave.wait(30)

    mine.work = block
    failed: list[BaseException] = []

    def launch():
        try:
            call()
        except BaseException as error:
            failed.append(error)

    other = threading.Thread(target=launch)
    other.start()
    assert entered.wait(30)
    try:
        for use in (call, lambda: call.update(factor=3.0), lambda: call.update(x=mine.x)):
            with pytest.raises(fi_ffi.ArgumentError, match="in use, by another thread") as caught:
                use()
            assert (caught.value.op, caught.value.argument) == ("mine_too", "self")
    finally:
        leave.set()
        other.join()
    assert not failed
    assert mine.is_done(2)
    mine.work = lambda: None
    call.update(factor=4.0)
    threads = [threading.Thread(target=launch) for _ in range(3)]
    for thread in threads:
        thread.start()
        thread.join()
    assert not failed and mine.is_done(4)


def test_a_call_inside_of_itself(mine):
    """Its kernel launches it again: refused there, and the outer one is fine."""
    call = mine.op.prepare(mine.y, mine.x, factor=2.0)
    mine.work = call
    with pytest.raises(fi_ffi.KernelError, match="in use"):
        call()
    mine.work = lambda: None
    call()
    assert mine.is_done(2)


def test_a_kernel_that_fails_leaves_it_usable(mine):
    call = mine.op.prepare(mine.y, mine.x, factor=2.0)
    words = []
    for error in (ValueError("no"), KeyboardInterrupt(), SystemExit(3)):

        def work(error=error):
            raise error

        mine.work = work
        with pytest.raises(fi_ffi.KernelError) as caught:
            call()
        assert caught.value.kind == type(error).__name__
        words.append(str(caught.value))
        before = frame_of(call)
        with pytest.raises(fi_ffi.KernelError) as caught:
            mine.op(mine.y, mine.x, factor=2.0)
        told = caught.value
        with pytest.raises(fi_ffi.KernelError) as caught:  # the quick way, now
            mine.op(fi_ffi.as_desc(mine.y), fi_ffi.as_desc(mine.x), factor=2.0)
        assert told.op == caught.value.op
        assert frame_of(call) == before
    mine.work = lambda: None
    call()
    assert mine.is_done(2)


def test_a_watchdog_sees_it(mine):
    from fi_ffi.ops import watching

    call = mine.op.prepare(mine.y, mine.x, factor=2.0)
    call.update(factor=3.0)
    seen = []

    def look():
        seen.extend(inbox for inbox in watching.inboxes)

    mine.work = look
    with fi_ffi.watchdog(30):
        call()
        assert mine.is_done(3)
        with fi_ffi.watchdog(30):
            call.update(factor=2.0)
            call()
    assert len(seen) == 3
    assert mine.is_done(2)
    call.update(factor=4.0)
    mine.work = lambda: None
    call()
    assert mine.is_done(4)


def test_a_watchdog_reports_it(mine):
    """A prepared call that hangs is told of with the arguments that it has by then."""
    call = mine.op.prepare(mine.y, mine.x, factor=2.0)
    call.update(factor=2.75)
    leave = threading.Event()
    mine.work = lambda: leave.wait(30)
    reports = []

    def tell(text):
        reports.append(text)
        leave.set()

    with fi_ffi.watchdog(0.2, on_hang=tell):
        call()
    assert len(reports) == 1 and "mine" in reports[0] and "2.75" in reports[0], reports


def test_kernels_that_change(mine):
    """A prepared call is of the kernels that it was prepared with, until it is prepared anew."""
    call = mine.op.prepare(mine.y, mine.x, factor=2.0)
    mine.op.forget()
    call()
    assert mine.is_done(2)
    mine.op.settle("0.6.13")
    call.update(factor=3.0)
    call()
    assert mine.is_done(3)
    mine.op.settle(None)
    mine.op.prepare(mine.y, mine.x, factor=2.0)()
    assert mine.is_done(2)
