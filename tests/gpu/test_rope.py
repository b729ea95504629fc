"""Rotary embeddings on a GPU: the tests of tests/ops/test_rope.py."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi
from fi_ffi.loader.runtime import kernel_entry
from fi_ffi.ops.functions import OPS

from tests.helpers.bodies import bodies_of
from tests.helpers.rope_calls import ANGLES, COS_SIN, F16, a_case, check_in_place
from tests.ops import test_rope

globals().update(bodies_of(test_rope))


def raw(name, machine):
    """The entry itself, which nobody asks whether its arguments are right."""
    machine.need("rope")
    row = OPS[name].row
    return kernel_entry(row.module, row.signature, row.releases)


@pytest.mark.parametrize("head_dim", [65, 96, 1024])
def test_head_dims_that_the_kernels_do_not_have(head_dim, machine, rng):
    """Their own word for what is refused before."""
    case = a_case("apply_rope_pos_ids", F16, rng, head_dim=64)
    shape = (9, 1, head_dim)
    x, y = (machine.place(np.zeros(shape, np.float16)) for _ in range(2))
    entry = raw("apply_rope_pos_ids", machine)
    tensors = [x.desc(), y.desc(), x.desc(), y.desc(), machine.place(case.arrays["pos_ids"]).desc()]
    with pytest.raises(fi_ffi.KernelError, match="head_dim"):
        entry(*tensors, 64, False, 1.0, 1e4)
    with pytest.raises(fi_ffi.ArgumentError, match="head_dim of 64 or 128"):
        fi_ffi.apply_rope_pos_ids(*tensors, stream=machine.stream)


def test_in_place_where_warps_may_race(machine, rng):
    """rotary_dim 96 in place: refused, and what the kernel makes of it is printed.  With
    interleave a thread has whole pairs."""
    entry = raw(COS_SIN, machine)
    sizes = {"head_dim": 96, "rotary_dim": 96, "nnz": 20_000, "num_qo_heads": 32}
    assert check_in_place(machine, a_case(COS_SIN, F16, rng, **sizes, interleave=True)) <= 1
    case = a_case(COS_SIN, F16, rng, **sizes)
    placed = {n: machine.place(a) for n, a in case.arrays.items() if not n.endswith("_rope")}
    q, k, table, positions = (tensor.desc() for tensor in placed.values())
    with pytest.raises(fi_ffi.ArgumentError, match="a warp may overwrite"):
        OPS[COS_SIN](q, k, q, k, table, positions, stream=machine.stream)
    entry(q, k, q, k, table, positions, False)
    machine.synchronize()
    value = case.expected["q_rope"][0]
    wrong = np.abs(placed["q"].get().astype(np.float64) - value) > 0.05 * (1 + np.abs(value))
    print(f"in place, pairs in two warps: {wrong.sum()} of {wrong.size} elements are wrong")


@pytest.mark.parametrize("name", ANGLES)
def test_how_far_off_angles_are(name, machine, rng, record_property):
    """The largest error where pairs are (1, 0), by position: printed, and recorded."""
    machine.need("rope")
    q = np.zeros((512, 1, 128))
    q[..., :64] = 1
    for power in (10, 13, 15, 17, 20):
        most = 1 << power
        tables = {"q": q, "pos_ids": rng.integers(most // 2, most, 512)}
        tables |= {"indptr": np.array([0, 512]), "offsets": np.array([most - 512])}
        case = a_case(name, F16, rng, tables, nnz=512, num_qo_heads=1, num_kv_heads=1)
        placed = {n: machine.place(array) for n, array in case.arrays.items()}
        descs = {n: tensor.desc() for n, tensor in placed.items()}
        OPS[name](**descs, **case.scalars, stream=machine.stream)
        error, of_bound = case.error("q_rope", placed["q_rope"].get())
        record_property(f"2^{power}", error)
        print(f"{name}, positions below 2^{power}: {error:.2e}, {of_bound:.2f} of the bound")
        assert of_bound <= 1
