"""DeepSeek's routing: groups and none, on the CPU and on a GPU, and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fi_ffi.cli.cases import Case
from fi_ffi.ops.functions import OPS
from fi_ffi.reference.routing import routed

from tests.helpers.calls import refused
from tests.helpers.cases import make_case
from tests.helpers.every_op import check_on
from tests.helpers.sampling_calls import run

OP = OPS["fused_topk_deepseek"]
DTYPES = ("float32", "bfloat16", "float16")
# Experts, groups, chosen groups, and chosen experts.
SHAPES = [
    (256, 8, 4, 8), (256, 8, 1, 8), (128, 4, 4, 8), (64, 8, 3, 1), (16, 8, 4, 8), (6, 3, 2, 4),
    (384, 1, 1, 8), (289, 1, 1, 8), (128, 1, 1, 8), (129, 1, 1, 8),
    (128, 1, 1, 5), (96, 1, 1, 8), (8, 1, 1, 8),
    (1, 1, 1, 1),
]  # fmt: skip


def make(rng, shape=(256, 8, 4, 8), n=130, of_scores="float32", of_bias="float32", **more) -> Case:
    experts, groups, kept, count = shape
    return make_case(OP.row, {"n": n, "experts": experts}, {"T": of_scores, "B": of_bias}, rng,
                     n_group=groups, topk_group=kept, topk=count, **more)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, machine, rng):
    for n in (1, 37):
        assert check_on(machine, make(rng, shape, n)) <= 1


@pytest.mark.parametrize("dtypes", [*itertools.product(DTYPES, repeat=2)], ids="-".join)
def test_dtypes(dtypes, machine, rng):
    for shape in ((256, 8, 4, 8), (384, 1, 1, 8)):
        assert check_on(machine, make(rng, shape, 37, *dtypes)) <= 1


@pytest.mark.parametrize("shape", [(256, 8, 4, 8), (384, 1, 1, 8)], ids=str)
def test_experts_and_their_weights_belong_together(shape, machine, rng):
    """Of most tokens rounding leaves no choice: these are exact, and in order."""
    case = make(rng, shape)
    found = run(machine, OP.__name__, case.arrays, **case.scalars)
    given = {name: case.arrays[name].astype(np.float64) for name in ("scores", "bias")}
    wanted = routed(**given, groups=shape[1], kept=shape[2], count=shape[3], factor=2.5)
    assert wanted.is_clear.mean() > 0.4
    chosen = found["topk_indices"].astype(np.int64)
    own = 1 / (1 + np.exp(-np.take_along_axis(given["scores"], chosen, axis=1)))
    own *= 2.5 / own.sum(axis=1, keepdims=True)
    assert (np.abs(found["topk_values"] - own) <= wanted.slack + 1e-6).all()
    kept = found["routing_replay_out"]
    assert (kept[: len(chosen)] == chosen).all()
    assert (kept[len(chosen) :] == case.arrays["routing_replay_out"][len(chosen) :]).all()


def test_of_equal_experts_the_first(machine, rng):
    scores, bias = np.zeros((2, 256)), np.zeros(256)
    scores[1, [250, 3, 40]] = 1
    case = make(rng, n=2, tables={"scores": scores, "bias": bias})
    found = run(machine, OP.__name__, case.arrays, **case.scalars)["topk_indices"]
    # Groups are of 32 experts: of equal ones too the first are chosen.
    assert found[0].tolist() == [*range(8)]
    assert found[1].tolist() == [3, 40, 250, 0, 1, 2, 4, 5]


def test_no_tokens(machine, rng):
    case = make(rng, n=0)
    found = run(machine, OP.__name__, case.arrays, **case.scalars)
    assert (found["routing_replay_out"] == case.arrays["routing_replay_out"]).all()


@pytest.mark.parametrize(
    ("shape", "argument"),
    [
        ((250, 8, 4, 8), "n_group"),  # groups of other sizes
        ((256, 16, 4, 8), "n_group"),  # more groups than warps
        ((8, 8, 4, 1), "scores"),  # no two best of one
        ((280, 7, 3, 8), "scores"),  # of 40 experts
        ((400, 1, 1, 8), "scores"),
        ((128, 8, 5, 8), "topk_group"),
        ((128, 2, 3, 8), "topk_group"),
        ((256, 8, 4, 9), "topk"),
        ((6, 3, 1, 3), "topk"),
        ((4, 1, 1, 5), "topk"),
        ((129, 1, 1, 5), "topk"),  # of which the kernel writes 5, and reads 8
    ],
    ids=str,
)  # fmt: skip
def test_what_the_kernel_gets_wrong_is_refused(shape, argument, rng):
    count = shape[3]
    arrays = {
        "scores": rng.standard_normal((3, shape[0])).astype(np.float32),
        "bias": np.zeros(shape[0], np.float32),
        "topk_values": np.full((3, count), np.nan, np.float32),
        "topk_indices": np.full((3, count), -7, np.int32),
    }
    refused(OP, arrays, argument, n_group=shape[1], topk_group=shape[2], topk=count,
            routed_scaling_factor=1.0)  # fmt: skip


def test_a_replay_of_too_few_rows(rng):
    case = make(rng, n=5)
    case.arrays["routing_replay_out"] = case.arrays["routing_replay_out"][:4]
    refused(OP, case.arrays, "routing_replay_out", **case.scalars)
