"""Calls of the rope family that tests make: apart, in place, and inside fused buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fi_ffi.cli.cases import Case
from fi_ffi.ops.functions import OPS

from tests.helpers.calls import bits
from tests.helpers.cases import make_case

APPLY = (
    "apply_rope", "apply_llama31_rope", "apply_rope_pos_ids", "apply_llama31_rope_pos_ids",
    "apply_rope_pos_ids_cos_sin_cache",
)  # fmt: skip
QUANTISE = (
    "rope_quantize", "rope_quantize_append_paged_kv_cache",
    "rope_quantize_append_paged_mla_kv_cache",
)  # fmt: skip
COS_SIN = APPLY[-1]
SIZES = {
    "nnz": 9, "num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 128, "b": 3, "rotary_dim": 128,
    "max_seq_len": 70,
}  # fmt: skip
LLAMA_31 = [name for name in APPLY if "llama31" in name]
ANGLES = [name for name in APPLY if name != COS_SIN]
F16 = {"T": "float16", "I": "int32"}


def a_case(name, dtypes, rng, tables=None, **more) -> Case:
    """A call; what is no size is an argument, and `rotary_dim` may be both."""
    row = OPS[name].row
    sizes = SIZES | {"rotary_dim": more.get("head_dim", SIZES["head_dim"])}
    sizes |= {axis: value for axis, value in more.items() if axis in sizes}
    arguments = {arg.name: more[arg.name] for arg in row.given if arg.name in more}
    return make_case(row, sizes, dtypes, rng, tables, **arguments)


def judged(case: Case, got: Mapping[str, np.ndarray]) -> float:
    """The worst error of what a case writes, as a fraction of its bound."""
    return max(case.error(name, got[name])[1] for name in case.expected)


def changed(case: Case, arrays: Mapping[str, np.ndarray]) -> list[str]:
    """The names of tensors that the op only reads and whose bits are other ones now."""
    written = {arg.name for arg in case.row.tensors if arg.writes}
    return [
        name
        for name, array in arrays.items()
        if name not in written and bits(array).tobytes() != bits(case.arrays[name]).tobytes()
    ]


def check_in_place(machine: Any, case: Case) -> float:
    """q_rope is q, and k_rope is k."""
    machine.need(case.row.module)
    placed = {name: machine.place(array) for name, array in case.arrays.items()}
    for out, into in case.row.in_place:
        placed[out] = placed[into]
    descs = {name: array.desc() for name, array in placed.items()}
    OPS[case.row.name](**descs, **case.scalars, stream=machine.stream)
    assert all(array.intact() for array in placed.values())
    got = {name: array.get() for name, array in placed.items()}
    others = {name: array for name, array in got.items() if name not in ("q", "k")}
    assert not changed(case, others)
    return judged(case, got)
