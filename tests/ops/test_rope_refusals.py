"""What rope rows demand of sizes, numbers and memory together, and what calls that fit cost."""

from __future__ import annotations

import re

import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.notation import axis_size

from tests.helpers.cases import default_dtypes, make_case
from tests.helpers.inputs import inputs_of
from tests.helpers.prepared_calls import refusal_of, same_error
from tests.helpers.rope_calls import ANGLES, APPLY, COS_SIN, QUANTISE


def described(name, device="cpu", **more):
    """Tensors of these sizes at addresses apart that nothing is at, and the numbers."""
    row = OPS[name].row
    sizes = inputs_of(row).small | {"num_pages": 9, "num_indices": 7} | more
    descs, address = {}, 1 << 30
    for arg in row.tensors:
        shape = [axis_size(axis, sizes) for axis in arg.axis_names]
        dtype = row.dtypes.get(arg.dtype, (arg.dtype,))[0]
        desc = fi_ffi.TensorDesc(address, shape, dtype, device=device)
        descs[arg.name] = desc
        address += (desc.span_bytes + 4096) & ~255
    return descs | {arg.name: more[arg.name] for arg in row.given if arg.name in more}


def refused(name, **more):
    """A call is refused, also where one like it was fine, and when it is prepared or updated."""
    op, values = OPS[name], described(name, **more)
    error = refusal_of(op.row, values)
    assert error is not None
    for use in (op, op.prepare):
        with pytest.raises(fi_ffi.ArgumentError) as caught:
            use(**values)
        assert same_error(caught.value, error)
    return error


def fine(name, **more):
    """The call passes every check."""
    assert refusal_of(OPS[name].row, described(name, **more)) is None


@pytest.mark.parametrize("name", ANGLES)
def test_rotary_dims(name):
    for head_dim, interleave, step in (
        (64, False, 16), (64, True, 8), (256, True, 8), (512, False, 32), (512, True, 16),
    ):  # fmt: skip
        for rotary_dim in range(0, head_dim + 1, 4):
            more = {"head_dim": head_dim, "interleave": interleave, "rotary_dim": rotary_dim}
            if rotary_dim % step:
                error = refused(name, **more)
                assert "a multiple of 8 (of 16 where head_dim is 512)" in str(error.expected)
                assert f"rotary_dim = {rotary_dim}" in str(error.got)
            else:
                fine(name, **more)
    assert refused(name, rotary_dim=128).expected == "64 or less, the size of head_dim"
    assert refused(name, rotary_dim=-16).argument == "rotary_dim"


@pytest.mark.parametrize("name", ["apply_llama31_rope", "apply_llama31_rope_pos_ids"])
def test_factors_of_llama_31(name):
    for low, high in ((4.0, 4.0), (4.0, 1.0), (0.0, 0.0)):
        error = refused(name, low_freq_factor=low, high_freq_factor=high)
        assert error.argument == "high_freq_factor" and "more than low_freq" in str(error)
    fine(name, low_freq_factor=1.0, high_freq_factor=1.25)


def test_tables():
    for head_dim, rotary_dim, interleave in (
        (128, 8, False), (128, 4, True), (512, 16, False), (96, 16, False), (96, 8, True),
        (80, 80, False),
    ):  # fmt: skip
        more = {"head_dim": head_dim, "rotary_dim": rotary_dim, "interleave": interleave}
        assert refused(COS_SIN, **more).argument == "cos_sin_cache"
    for head_dim, rotary_dim, interleave in (
        (128, 16, False), (128, 8, True), (512, 32, False), (96, 32, False), (96, 16, True),
        (80, 80, True), (40, 32, False),
    ):  # fmt: skip
        fine(COS_SIN, head_dim=head_dim, rotary_dim=rotary_dim, interleave=interleave)
    assert "at least rotary_dim" in str(refused(COS_SIN, head_dim=64, rotary_dim=128))
    assert "multiple of 8" in str(refused(COS_SIN, head_dim=100, rotary_dim=32))
    assert "rotary_dim of at least 1" in str(refused(COS_SIN, rotary_dim=0))
    assert "at most 16384" in str(refused(COS_SIN, head_dim=2**15, rotary_dim=2**15))
    assert "max_seq_len of at least 1" in str(refused(COS_SIN, max_seq_len=0))
    assert "offsets below 4294967296" in str(refused(COS_SIN, max_seq_len=2**26 + 1))
    fine(COS_SIN, max_seq_len=2**26)


@pytest.mark.parametrize("rotary_dim", [32, 64, 96, 128, 160, 192, 256, 512, 544, 1024])
def test_in_place_where_warps_would_race(rotary_dim):
    """Halves of a head that are in two warps: 32 threads of 16 elements are one."""
    values = described(COS_SIN, head_dim=1088, rotary_dim=rotary_dim)
    row = OPS[COS_SIN].row
    for pairs in (("q",), ("k",), ("q", "k")):
        same = values | {f"{name}_rope": values[name] for name in pairs}
        error = refusal_of(row, same)
        if rotary_dim in (32, 64, 128, 256, 512):
            assert error is None
        else:
            assert error.argument == "q_rope" and "warp" in str(error)
        assert refusal_of(row, same | {"interleave": True}) is None
    assert refusal_of(row, values) is None


@pytest.mark.parametrize("name", APPLY)
def test_memory_that_overlaps(name):
    values, row = described(name), OPS[name].row
    q, k = values["q"], values["k"]

    def at(ptr, shape, strides=None):
        return fi_ffi.TensorDesc(ptr, shape, "float16", strides=strides, device="cpu")

    turned = (q.shape[2], q.shape[0] * q.shape[2], 1)
    for wrong in (
        {"q_rope": at(q.ptr + 16, q.shape)}, {"q_rope": at(q.ptr - 16, q.shape)},
        {"q_rope": at(q.ptr, q.shape, turned)}, {"q_rope": at(k.ptr, q.shape)},
        {"k_rope": at(q.ptr, k.shape)}, {"k_rope": at(values["q_rope"].ptr + 256, k.shape)},
    ):  # fmt: skip
        error = refusal_of(row, values | wrong)
        assert "overlaps" in str(error.got)
    for right in ({"q_rope": q}, {"q_rope": q, "k_rope": k}, {"k_rope": k}):
        assert refusal_of(row, values | right) is None


@pytest.mark.parametrize("name", APPLY)
def test_more_heads_than_a_grid_has(name):
    if "pos_ids" in name:
        error = refused(name, num_qo_heads=2**16, nnz=1)
        assert "65535" in str(error) or "32767" in str(error)
    else:
        assert "b * num_qo_heads" in str(refused(name, num_qo_heads=2**20, b=2**10))
    fine(name, num_qo_heads=2**14)


@pytest.mark.parametrize("name", QUANTISE)
def test_parts_that_are_quantised(name):
    appends = "append" in name
    for more in (
        {"rope_dim": 16}, {"rope_dim": 48}, {"rope_dim": 24, "interleave": True}, {"rope_dim": 0},
        {"no_rope_dim": 40}, {"no_rope_dim": 8}, {"num_qo_heads": 30_000},
        *([{"no_rope_dim": 48}, {"page_size": 3, "interleave": "page"}] if appends else []),
    ):  # fmt: skip
        if more.pop("interleave", None) == "page":
            values = described(name) | more
            assert refusal_of(OPS[name].row, values).argument == "page_size"
            continue
        refused(name, **more, **({"interleave": True} if more.get("rope_dim") == 24 else {}))
    for more in ({"rope_dim": 16, "interleave": True}, {"no_rope_dim": 128}):
        fine(name, **more)
    if "mla" in name:
        assert "no_rope_dim of at least 1" in str(refused(name, no_rope_dim=0))
    else:
        fine(name, no_rope_dim=0)
    fine(name, no_rope_dim=48) if not appends else fine(name, page_size=4)


@pytest.mark.parametrize("name", QUANTISE)
def test_arguments_that_an_op_does_not_have(name):
    """Those of the other kind of cache are no parameters, and the entry gets nothing for them."""
    op = OPS[name]
    absent = [arg.name for arg in op.row.args if arg not in op.row.given]
    assert (
        absent
        == {
            "rope_quantize": [],
            "rope_quantize_append_paged_kv_cache": ["ckv_cache", "kpe_cache"],
            "rope_quantize_append_paged_mla_kv_cache": ["v_in", "k_cache", "v_cache", "kv_layout"],
        }[name]
    )
    case = make_case(op.row, inputs_of(op.row).small, default_dtypes(op.row),
                     np.random.default_rng())  # fmt: skip
    for argument in absent:
        with pytest.raises(TypeError, match=argument):
            op(**case.arrays, **{argument: case.arrays["q_rope_in"]})
    told = str(op.prepare(**case.arrays))
    assert not [argument for argument in absent if re.search(rf"\b{argument}=", told)]
