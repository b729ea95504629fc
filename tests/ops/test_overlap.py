"""Outputs that share memory with another tensor: refused, but for the pairs that a row lists.

Made from rows, for every op.  Some of what is tried is drawn, each time from the same seed: of
FI_FFI_SEED, if set.
"""

from __future__ import annotations

import itertools
import os
import zlib
from typing import Any

import numpy as np
import pytest

from fi_ffi.cli.cases import Case
from fi_ffi.comm.entries import OPS as OF_RANKS
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.call.row import Row, Tensor
from fi_ffi.ops.functions import OPS

from tests.helpers.cases import default_dtypes, make_case
from tests.helpers.inputs import inputs_of
from tests.helpers.overlapping import (
    Joined,
    axes,
    interleaved,
    is_listed,
    meet,
    moved,
    pairs,
    refused,
    shifts,
    span,
    steps_of,
)

_SEED = int(os.environ.get("FI_FFI_SEED", "0"))


def seeded(name: str) -> np.random.Generator:
    return np.random.default_rng([_SEED, zlib.crc32(name.encode())])


def usual(name: str, rng: np.random.Generator) -> tuple[Op, Case]:
    """An op, and a small call of it with everything that is optional."""
    op = OPS[name]
    return op, make_case(op.row, inputs_of(op.row).small, default_dtypes(op.row), rng)


def results(op: Op, case: Case) -> dict[str, bytes]:
    """What everything is after a call in memory of its own."""
    apart = Joined(case.arrays)
    op(**apart.arrays, **case.scalars)
    return {name: array.tobytes() for name, array in apart.arrays.items()}


class Ways:
    """An op's call, its `prepare`, and the update of a call that was prepared: like calls were
    made before, so that nothing that depends on layouts alone is looked at again."""

    def __init__(self, op: Op, case: Case) -> None:
        self.op, self.scalars = op, case.scalars
        self._apart = Joined(case.arrays)
        op(**self._apart.descs, **case.scalars)
        self._prepared = op.prepare(**self._apart.descs, **case.scalars)
        self.every = (self.call, self.prepare, self.update)

    def call(self, **tensors: Any) -> None:
        self.op(**tensors, **self.scalars)

    def prepare(self, **tensors: Any) -> None:
        self.op.prepare(**tensors, **self.scalars)

    def update(self, **tensors: Any) -> None:
        self._prepared.update(**tensors)

    def check_what_is_prepared(self) -> None:
        """No update that was refused has changed it."""
        before = self._apart.bytes()
        self._prepared()
        assert self._apart.bytes() == before


@pytest.mark.parametrize("name", OPS)
def test_part_of_another_tensor(name):
    """Shifted by an element, by a row, or by all but one of them."""
    rng = seeded(name)
    op, case = usual(name, rng)
    steps, ways = steps_of(op.row, case), Ways(op, case)
    tried = 0
    # Scratch has often 32 MiB: calls bring it where it is one of the two, and it is shifted least,
    # half and most.
    scratch = {arg.name for arg in op.row.tensors if arg.is_scratch}
    own = Joined({name: array for name, array in case.arrays.items() if name not in scratch})
    op(**own.descs, **case.scalars)
    for one, other in ((a.name, b.name) for a, b in pairs(op.row, case.arrays)):
        both = case.arrays[one], case.arrays[other]
        left_out = scratch - {one, other}
        given = {name: array for name, array in case.arrays.items() if name not in left_out}
        every = list(shifts(*both, (steps[one], steps[other]), rng))
        for shift in every[:: len(every) // 2] if {one, other} & scratch else every:
            joined = moved(given, one, other, shift, steps[one])
            refused(ways.every[tried % 3], joined, name, (one, other), **joined.descs)
            # And no less when it was refused before.
            refused(ways.call, joined, name, (one, other), **joined.descs)
            tried += 1
    assert tried
    if not any(arg.writes and arg.reads and not arg.is_scratch for arg in op.row.tensors):
        ways.check_what_is_prepared()


@pytest.mark.parametrize("name", OPS)
def test_the_very_memory_of_another_tensor(name):
    """Refused, unless the row lists it: then the result is that of memory apart."""
    rng = seeded(name)
    op, case = usual(name, rng)
    ways, expected = Ways(op, case), results(op, case)
    names = [(a.name, b.name) for a, b in pairs(op.row, case.arrays)]
    alike = [(a, b) for a, b in names if axes(case.arrays[a]) == axes(case.arrays[b])]
    if not alike:
        pytest.skip("no two of its tensors, of which one is written, are of one layout")
    for one, other in alike:
        joined = moved(case.arrays, one, other, 0, 1)
        if not is_listed(op.row, one, other):
            for way in ways.every:
                refused(way, joined, name, (one, other), **joined.descs)
            continue
        _check_in_place(op, case, {one: other}, expected)


def _check_in_place(op: Op, case: Case, joined: dict[str, str], expected: dict[str, bytes]) -> None:
    """Each output in the memory of an input, as often as a call becomes another kind of call."""
    for prepare in (False, True, False):
        apart = Joined({n: a for n, a in case.arrays.items() if n not in joined})
        tensors = apart.arrays | {out: apart.arrays[of] for out, of in joined.items()}
        if prepare:
            op.prepare(**tensors, **case.scalars)()
        else:
            op(**tensors, **case.scalars)
        written = {arg.name for arg in op.row.tensors if arg.writes}
        for name, array in tensors.items():
            if name in written:
                assert array.tobytes() == expected[name], name
            elif name not in joined.values():
                assert array.tobytes() == case.arrays[name].tobytes(), f"{name} was changed"


LISTED = [name for name, op in OPS.items() if op.row.in_place]
# Of these, tensors that need not be contiguous.
STRIDED = [
    name for name in LISTED
    if not any(arg.contiguous for arg in OPS[name].row.tensors
               if arg.name in {of for pair in OPS[name].row.in_place for of in pair})
]  # fmt: skip


# Each op's inputs in whose memory an output may be, by FlashInfer's sources: where a thread reads
# what it needs before it writes. On the CPU any would do.
EITHER = ("input", "residual")
ADDENDS = ("allreduce_in", "residual_in")
NORMS = ("rmsnorm", "gemma_rmsnorm", "qk_rmsnorm", "layernorm")
ROPES = ("apply_rope", "apply_rope_pos_ids", "apply_llama31_rope", "apply_llama31_rope_pos_ids",
         "apply_rope_pos_ids_cos_sin_cache")  # fmt: skip
FUSED = {"residual_out": ADDENDS, "norm_out": ADDENDS}
MAY_BE_IN_PLACE: dict[str, dict[str, tuple[str, ...]]] = {
    **{name: {"out": ("input",)} for name in NORMS},
    **{name: {"residual_out": EITHER, "norm_out": EITHER} for name in OPS if "fused_dit" in name},
    **{name: {"q_rope": ("q",), "k_rope": ("k",)} for name in ROPES},
    "gdn_prefill": {"output_state": ("input_state",)},
    "merge_state": {"v_merged": ("v_a", "v_b"), "s_merged": ("s_a", "s_b")},
    "softmax": {"output": ("logits",)},
    **{f"top_{of}_renorm_probs": {"renorm_probs": ("probs",)} for of in "kp"},
    "top_k_mask_logits": {"mask_logits": ("logits",)},
    "all_reduce": {"out": ("inp",)},
    "trtllm_allreduce_fusion": {"allreduce_out": ADDENDS, **FUSED},
    **{f"trtllm_allreduce_fusion_{kind}": FUSED for kind in ("fp4", "block_fp8", "dynamic_fp8")},
    **{f"trtllm_moe_{kind}allreduce_fusion": dict.fromkeys(FUSED, ("residual_in",))
       for kind in ("", "finalize_")},
}  # fmt: skip


@pytest.mark.parametrize("name", [*OPS, *OF_RANKS])
def test_what_may_be_in_place(name):
    wanted = {(out, of) for out, ins in MAY_BE_IN_PLACE.get(name, {}).items() for of in ins}
    for row in (OPS | OF_RANKS)[name].rows:
        assert {*row.in_place} == wanted


@pytest.mark.parametrize("name", LISTED)
def test_several_in_place_at_once(name):
    """All choices of an input for each output, no two outputs in the same one."""
    op, case = usual(name, seeded(name))
    expected = results(op, case)
    outs = sorted({out for out, _ in op.row.in_place})
    choices = [[None, *(of for out, of in op.row.in_place if out == o)] for o in outs]
    for chosen in itertools.product(*choices):
        given = {out: of for out, of in zip(outs, chosen, strict=True) if of}
        if len({*given.values()}) == len(given):
            _check_in_place(op, case, given, expected)


def outputs_of_one_input(row: Row) -> list[tuple[str, str, str]]:
    """Two outputs that may each be in the memory of an input, and that."""
    pairs_of = itertools.combinations(row.in_place, 2)
    return [(out, two, of) for (out, of), (two, too) in pairs_of if of == too and out != two]


@pytest.mark.parametrize("name", [name for name in LISTED if outputs_of_one_input(OPS[name].row)])
def test_two_outputs_in_one_input(name):
    op, case = usual(name, seeded(name))
    ways = Ways(op, case)
    for out, two, of in outputs_of_one_input(op.row):
        joined = Joined({n: a for n, a in case.arrays.items() if n not in (out, two)})
        tensors = joined.descs
        tensors |= {out: tensors[of], two: tensors[of]}
        for way in ways.every[:2]:
            refused(way, joined, name, (out, two), **tensors)


@pytest.mark.parametrize("name", STRIDED)
def test_in_place_with_other_strides(name):
    """From the same address on, but every second row: what one row writes is another's input."""
    op, case = usual(name, seeded(name))
    for out, of in op.row.in_place:
        for wide in (out, of):
            narrow = of if wide == out else out
            array = case.arrays[wide]
            strides = {wide: (2 * array.strides[0], *array.strides[1:]), narrow: None}
            room = 4096 + 2 * len(array) * array.strides[0]
            joined = Joined(case.arrays).put({n: (0, s) for n, s in strides.items()}, room)
            for call in (op, op.prepare):
                refused(call, joined, name, (out, of), **joined.descs, **case.scalars)


def can_be_sliced(arg: Tensor, array: np.ndarray) -> bool:
    """Whether a tensor may be a slice of a wider one, row by row."""
    is_free = not (arg.contiguous or arg.transposed or arg.as_object or arg.parts > 1)
    return is_free and array.ndim > 1


@pytest.mark.parametrize("name", OPS)
def test_slices_of_one_buffer(name):
    """Tensors that alternate, along any axis, and share no byte; and those that share a few."""
    op, case = usual(name, seeded(name))
    steps, expected = steps_of(op.row, case), results(op, case)
    is_sliced = False
    for one, other in pairs(op.row, case.arrays):
        arrays = [case.arrays[arg.name] for arg in (one, other)]
        if not all(map(can_be_sliced, (one, other), arrays)):
            continue
        same = {arg.name in op.row.same_strides for arg in (one, other)}
        if len(same) > 1 or (same == {True} and {one.name, other.name} != {*op.row.same_strides}):
            continue
        for axis in range(min(array.ndim for array in arrays) - 1):
            # Before the axis they are of the same size; on it, of which there is more than one.
            if arrays[0].shape[: axis + bool(axis)] != arrays[1].shape[: axis + bool(axis)]:
                continue
            step = np.lcm(steps[one.name], steps[other.name])
            for a, b in ((one.name, other.name), (other.name, one.name)):
                joined = interleaved(case.arrays, a, b, axis, int(step))
                assert joined is not None
                is_sliced, outside = True, joined.outside()
                op(**joined.arrays, **case.scalars)
                assert {n: x.tobytes() for n, x in joined.arrays.items()} == expected
                assert joined.outside() == outside
                joined = interleaved(case.arrays, a, b, axis, int(step), overlap=True)
                if joined is not None:
                    refused(op, joined, name, (a, b), **joined.descs, **case.scalars)
    if not is_sliced:
        pytest.skip("no two of its tensors can be slices of one")


@pytest.mark.parametrize("name", OPS)
def test_one_right_after_another(name):
    rng = seeded(name)
    op, case = usual(name, rng)
    steps, expected = steps_of(op.row, case), results(op, case)
    every = [*pairs(op.row, case.arrays)]
    for i in rng.permutation(len(every))[:12]:
        one, other = (arg.name for arg in every[i])
        for a, b in ((one, other), (other, one)):
            after = -(-span(case.arrays[b]) // steps[a]) * steps[a]
            assert not meet(case.arrays[a], case.arrays[b], after)
            joined = moved(case.arrays, a, b, after, steps[a])
            op(**joined.arrays, **case.scalars)
            assert {n: x.tobytes() for n, x in joined.arrays.items()} == expected
