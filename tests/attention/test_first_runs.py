"""The first run after a replan checks what another batch changes, and refuses all that is wrong.

Each is compared with the same run that checks everything.  No kernel is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi import TensorDesc
from fi_ffi.ops.attention.run import Packing

from tests.helpers.plan_calls import DIM, KINDS, KV_HEADS, Case

ROOM = 40  # keys that lie side by side, of any batch
LIMIT = 2**31  # elements that fa2 and decode count, and those of MLA's queries
_KEYS = ("k", "v", "paged_k_cache", "paged_v_cache")
LAYOUTS = [(kind, "NHD") for kind in KINDS] + [("ragged", "HND"), ("paged", "HND")]


def drawn(kind: str, rng: np.random.Generator) -> Case:
    """A batch of another number of requests, with as many pages as any."""
    count = int(rng.integers(2, 6))
    kv_lens = rng.integers(1, 9, count)
    return Case(kind, np.minimum(kv_lens, rng.integers(1, 9, count)), kv_lens)


def descs_of(case: Case, layout: str, keys: int = 0) -> dict[str, TensorDesc]:
    """The tensors of a run, in memory that is nobody's; keys in this layout, with some room."""
    descs = {}
    for number, name in enumerate(case.run_names, 1):
        shape, array = case.memory[name].shape, case.memory[name]
        if keys and name in ("k", "v"):
            shape = (keys, *shape[1:])
        if layout == "HND" and name in _KEYS:
            shape = (*shape[:-3], shape[-2], shape[-3], shape[-1])
        descs[name] = TensorDesc(number << 44, shape, array.dtype, device="cpu")
    return descs


def others(desc: TensorDesc, rng: np.random.Generator) -> Iterator[TensorDesc]:
    """Tensors like this one, some of which no run takes."""
    shape, strides = desc.shape, desc.strides

    def like(shape: tuple[int, ...], strides: tuple[int, ...] | None = None) -> TensorDesc:
        return TensorDesc(desc.ptr, shape, desc.dtype, strides=strides, device="cpu")

    for axis in range(len(shape)):
        for more in (-1, 1, int(rng.integers(2, 9))):
            yield like((*shape[:axis], max(shape[axis] + more, 0), *shape[axis + 1 :]))
        for step in (1, int(rng.integers(1, 65)), 8 * int(rng.integers(1, 9))):
            yield like(shape, (*(stride + step for stride in strides[: axis + 1]),
                               *strides[axis + 1 :]))  # fmt: skip
    far = (LIMIT + 64) // max(shape[0] - 1, 1) // 64 * 64
    yield from (like(shape, (far + by, *strides[1:])) for by in (-64, 0, 64, 2**32))
    inside = 64 * int(rng.integers(1, 2 + desc.span_bytes // 64))
    for ptr in (0, desc.ptr + int(rng.integers(1, 16)), *((n << 44) + inside for n in (1, 3, 4))):
        yield desc.at(ptr)


def outcome(run: Callable[..., None], given: dict[str, Any], layout: str) -> Any:
    """What a run would launch, or the text of its refusal."""
    packing = Packing()
    options = {} if layout == "NHD" else {"kv_layout": layout}
    try:
        run(**given, **options, stream=packing)
    except fi_ffi.ArgumentError as error:
        return type(error), str(error)
    frame = packing.frame
    if frame is None:
        return None
    addresses = [frame.addresses[at] for at in frame.layout.tensors.values()]
    frame.give_back(frame)
    return bytes(frame.dims), addresses


def forget(plan: Any) -> None:
    """Have the next run check everything."""
    for bound in plan._runs.bound.values():
        bound.memo = (None,)
        for variant in bound.compiled.variants.values():
            variant.memo_of_plan = (None,)


@pytest.mark.parametrize(("kind", "layout"), LAYOUTS, ids=map(" ".join, LAYOUTS))
def test_it_refuses_what_a_run_refuses_that_checks_everything(kind, layout, rng):
    plan: Any = drawn(kind, rng).plan(workspace=None)
    seen = {"packed": 0, "refused": 0}
    for _ in range(6):
        before, after = drawn(kind, rng), drawn(kind, rng)
        keys = int(rng.choice([0, ROOM]))
        right = descs_of(after, layout, keys)
        run = after.run_of(plan)
        wrong = [{**right, name: other} for name in right for other in others(right[name], rng)]
        some = [wrong[i] for i in rng.permutation(len(wrong))[:30]]
        far = descs_of(after, layout, LIMIT // DIM // KV_HEADS + int(rng.integers(-1, 2)))
        for given in (*some, {**right, "lse": None}, far, right):
            forget(plan)
            before.replan(plan)
            assert type(outcome(run, descs_of(before, layout, keys), layout)[0]) is bytes
            after.replan(plan)
            first = outcome(run, given, layout)
            forget(plan)
            assert first == outcome(run, given, layout), given
            seen["packed" if type(first[0]) is bytes else "refused"] += 1
    assert seen["packed"] > 12 and seen["refused"] > 60, seen


@pytest.mark.parametrize("kind", KINDS)
def test_it_keeps_what_no_batch_changes(kind, rng):
    """All but the sizes of a batch stays as it was checked, until a tensor differs in more."""
    one, other = drawn(kind, rng), drawn(kind, rng)
    while len(one.kv_lens) == len(other.kv_lens):  # or nothing may change
        other = drawn(kind, rng)
    plan: Any = one.plan(workspace=None)
    packing = Packing()
    one.run_of(plan)(**descs_of(one, "NHD"), stream=packing)
    assert packing.frame is not None
    variant, bound = packing.frame.variant, packing.bound
    kept, last = variant.memo_of_plan, bound.memo
    other.replan(plan)
    outcome(other.run_of(plan), descs_of(other, "NHD"), "NHD")
    assert variant.memo_of_plan is kept and bound.memo is not last
    apart = descs_of(other, "NHD")
    name, desc = next(iter(apart.items()))
    strides = (2 * desc.strides[0], *desc.strides[1:])
    apart[name] = TensorDesc(desc.ptr, desc.shape, desc.dtype, strides=strides, device="cpu")
    outcome(other.run_of(plan), apart, "NHD")
    assert variant.memo_of_plan is not kept
