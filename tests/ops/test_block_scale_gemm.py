"""fp8 products with scales of blocks, against float64: on the CPU, and (tests/gpu) on a GPU."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi.function import register
from fi_ffi.loader import machine
from fi_ffi.ops.call import memory
from fi_ffi.ops.matmul import products, rows
from fi_ffi.reference.gemm import fp8_products

from tests.helpers.calls import refused
from tests.helpers.remains import allowed

BF16, E4M3, E5M2 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


def rounded(values: np.ndarray) -> np.ndarray:
    return np.clip(values, -448, 448).astype(E4M3).astype(float)


def in_fp8(x: np.ndarray, largest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values as fp8 has them with a scale of `largest / 448`, and how much they may be off:
    where one lies between two of fp8's, a kernel's quick division may make it either."""
    scale = np.where(largest > 0, largest / 448, 1.0)
    exact = x.astype(float) / scale
    low, high = (rounded(exact * (1 + step)) for step in (-(2.0**-20), 2.0**-20))
    return rounded(exact) * scale, abs(high - low) * scale


def quantised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows in fp8, in pieces of 128 columns."""
    pieces = x.astype(float).reshape(len(x), -1, 128)
    values, doubt = in_fp8(pieces, abs(pieces).max(-1, keepdims=True))
    return values.reshape(x.shape), doubt.reshape(x.shape)


def clipped_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As the kernels quantise a bfloat16 weight: block by block, and what is seen of each."""
    n, k = weight.shape
    values, doubt = np.empty((n, k)), np.empty((n, k))
    for i in range(0, n, 128):
        for j in range(0, k, 128):
            at = np.s_[i : i + 128, j : j + 128]
            block = weight[at].astype(float)
            values[at], doubt[at] = in_fp8(block, abs(block[: (k - j) // 32]).max())
    return values, doubt


def spread(scales: np.ndarray, shape: tuple[int, int], rows: int) -> np.ndarray:
    return scales.repeat(rows, 0).repeat(128, 1)[: shape[0], : shape[1]]


class Blocks:
    """A call of `fp8_blockscale_gemm_sm90`, and what it must give."""

    def __init__(self, machine, rng, m, n, k, input_fp8, weight_fp8, weight=None):
        self.machine, self.doubt_a, self.doubt_b = machine, np.zeros((m, k)), np.zeros((n, k))
        x = rng.standard_normal((m, k)).astype(BF16)
        w = rng.standard_normal((n, k)).astype(BF16) if weight is None else weight
        room = -(-m // 4) * 4
        if input_fp8:  # scales that differ from row to row and from piece to piece
            x = x.astype(E4M3)
            of_x = np.exp(rng.uniform(-3, 1, (m, k // 128)))
            self.a = x.astype(float) * of_x.astype(np.float32).repeat(128, 1)
            scales = np.full((k // 128, room), np.nan, np.float32)
            scales[:, :m] = of_x.T
        else:
            (self.a, self.doubt_a), scales = quantised(x), None
        if weight_fp8:
            w = w.astype(E4M3)
            of_w = np.exp(rng.uniform(-3, 1, (-(-n // 128), k // 128))).astype(np.float32)
            self.b = w.astype(float) * spread(of_w, (n, k), 128)
        else:
            (self.b, self.doubt_b), of_w = clipped_weight(w), None
        out = np.full((m, n), np.nan, BF16)
        arrays = {"input": x, "weight": w, "input_scale": scales, "weight_scale": of_w, "out": out}
        self.arrays = {name: array for name, array in arrays.items() if array is not None}
        self.placed = {name: machine.place(array) for name, array in self.arrays.items()}

    def call(self, stream=None, **more):
        descs = {name: array.desc() for name, array in self.placed.items()}
        stream = self.machine.stream if stream is None else stream
        fi_ffi.fp8_blockscale_gemm_sm90(**descs | more, stream=stream)

    def worst(self) -> float:
        got = self.placed["out"].get()
        assert all(array.intact() for array in self.placed.values())
        a, b = abs(self.a), abs(self.b.T)
        doubt = self.doubt_a @ b + a @ self.doubt_b.T
        return fp8_products(self.a @ self.b.T, a @ b, 128, doubt)(got)[1]


MODULE = "fp8_blockscale_gemm_90"
COMBINATIONS = [(False, False), (False, True), (True, True)]
BLOCK_SIZES = [(1, 64, 128), (3, 128, 256), (5, 192, 640), (31, 64, 1024), (32, 320, 512),
               (64, 128, 4096), (130, 576, 384), (257, 1024, 1280), (4, 64, 20480)]  # fmt: skip


@pytest.mark.parametrize("size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize(("input_fp8", "weight_fp8"), COMBINATIONS)
def test_block_scales(input_fp8, weight_fp8, size, machine, rng):
    machine.need(MODULE)
    made = Blocks(machine, rng, *size, input_fp8, weight_fp8)
    made.call()
    assert made.worst() <= 1


def test_a_bfloat16_weight_is_clipped(machine, rng):
    """Of the last block of columns the kernels look at four rows for the largest value."""
    machine.need(MODULE)
    weight = rng.uniform(-1, 1, (128, 256)).astype(BF16)
    weight[100, 200] = 64
    made = Blocks(machine, rng, 64, 128, 256, False, False, weight)
    made.call()
    assert made.worst() <= 1
    ideal = made.arrays["input"].astype(float) @ weight.T.astype(float)
    off = abs(made.placed["out"].get().astype(float) - ideal)
    assert (off[:, 100] > 10 * np.delete(off, 100, 1).max(1)).mean() > 0.5


def test_what_is_quantised_first_gives_the_same(machine, rng):
    """An input that `fp8_quantize_1x128` quantised is as good as one that the product does."""
    machine.need(MODULE)
    m, n, k = 9, 128, 512
    made = Blocks(machine, rng, m, n, k, False, True)
    made.call()
    values, scales = np.zeros((m, k), E4M3), np.full((k // 128, 12), np.nan, np.float32)
    values, scales = machine.place(values), machine.place(scales)
    fi_ffi.fp8_quantize_1x128(
        made.placed["input"].desc(), values.desc(), scales.desc(), stream=machine.stream
    )
    other = machine.place(np.full((m, n), np.nan, BF16))
    fi_ffi.fp8_blockscale_gemm_sm90(
        values.desc(), made.placed["weight"].desc(), scales.desc(),
        made.placed["weight_scale"].desc(), other.desc(), stream=machine.stream,
    )  # fmt: skip
    assert other.get().tobytes() == made.placed["out"].get().tobytes()


@pytest.mark.parametrize("m", [1, 7, 30, 32, 129])
def test_scales_without_their_room(m, machine, rng):
    """The first m columns of those that there are, as FlashInfer's tests slice them."""
    machine.need(MODULE)
    made = Blocks(machine, rng, m, 128, 384, True, True)
    placed = made.placed["input_scale"]
    whole = placed.desc()
    room = whole.shape[1]
    sliced = fi_ffi.TensorDesc(
        whole.ptr, (3, m), "float32", strides=(room, 1), device=whole.device
    )  # fmt: skip
    made.call(input_scale=sliced)
    assert made.worst() <= 1
    if m % 4:
        apart = fi_ffi.TensorDesc(
            whole.ptr, (2, m), "float32", strides=(room + 4, 1), device=whole.device
        )  # fmt: skip
        with pytest.raises(fi_ffi.ArgumentError, match="input_scale"):
            made.call(input_scale=apart)


def test_block_scales_recorded_and_replayed(machine, rng):
    machine.need(MODULE)
    for input_fp8, weight_fp8 in COMBINATIONS:
        made = Blocks(machine, rng, 12, 128, 256, input_fp8, weight_fp8)
        made.call()
        machine.synchronize()
        replay = machine.capture(made.call)
        for _ in range(2):
            machine.poison(made.placed["out"], machine.stream)
            replay()
            machine.synchronize()
            assert made.worst() <= 1


def test_block_scales_on_streams_of_their_own(machine, rng):
    machine.need(MODULE)
    streams = machine.streams(3)
    calls = [Blocks(machine, rng, 16, 128, 512, False, False) for _ in range(9)]
    machine.synchronize()
    for i, made in enumerate(calls):
        made.call(stream=streams[i % 3])
    machine.synchronize()
    assert max(made.worst() for made in calls) <= 1


def test_block_scales_with_memory_of_the_callers(machine, rng):
    machine.need(MODULE)
    made = Blocks(machine, rng, 16, 64, 256, False, False)
    # For as many rows as any test here has: what the object is laid out for.
    size = fi_ffi.fp8_blockscale_gemm_workspace_size(512, 64, 256, "bfloat16", "bfloat16")
    scratch = machine.place(np.zeros(size, np.uint8))
    made.call(workspace_buffer=scratch.desc())
    assert made.worst() <= 1 and scratch.intact()
    if machine.is_gpu:
        small = machine.place(np.zeros(256, np.uint8))
        with pytest.raises(fi_ffi.ArgumentError, match=r"workspace_buffer.*bytes or more"):
            made.call(workspace_buffer=small.desc())
    with pytest.raises(fi_ffi.ArgumentError, match="`m`"):
        fi_ffi.fp8_blockscale_gemm_workspace_size(-1, 64, 256)


EDGES = [1, 3, 4, 5, 63, 64, 127, 128, 129, 192, 255, 256, 257]


def test_memory_for_sizes_at_each_edge():
    """Values of a byte, and a float32 for each 128 of a row, or for each block that there is a part
    of; of what comes in fp8, nothing."""
    size = fi_ffi.fp8_blockscale_gemm_workspace_size
    for m, n, k in itertools.product([0, *EDGES], EDGES, EDGES):
        pieces, whole_rows = len(range(0, k, 128)), m + -m % 4
        of_input = whole_rows * (k + 4 * pieces)
        of_weight = n * k + 4 * len(range(0, n, 128)) * pieces
        assert size(m, n, k, "bfloat16", "float8_e4m3fn") == 256 + of_input
        assert size(m, n, k, "float8_e4m3fn", "float8_e4m3fn") == 256
        assert size(m, n, k, "bfloat16", "bfloat16") == 256 + of_input + of_weight


# For GPUs that are not here: the references, and refusals


GROUPED = [("MN", 1), ("K", 1), ("MN", 128), ("K", 128)]


def block_scales(rng, rows: int, k: int, granularity: int) -> np.ndarray:
    shape = (-(-rows // granularity), k // 128)
    return np.exp(rng.uniform(-3, 1, shape)).astype(np.float32)


def of_sm120(forms):
    """The form of GPUs of compute capability 12.x, whose reference runs here as the other's."""
    (form,) = (form for row, form in forms.items() if row.capabilities == (12,))
    return form


@pytest.mark.parametrize("sm", [100, 120])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize(("mode", "gm"), GROUPED)
def test_groupwise(mode, gm, dtype, sm, rng):
    m, n, k = (260, 136, 384) if sm == 100 else (256 if gm == 128 else 257, 256, 384)
    a, b = (rng.standard_normal((rows, k)).astype(dtype) for rows in (m, n))
    of_a, of_b = block_scales(rng, m, k, gm), block_scales(rng, n, k, 128)
    out = np.full((m, n), np.nan, BF16)
    scales = (of_a, of_b) if mode == "K" else tuple(map(np.ascontiguousarray, (of_a.T, of_b.T)))

    def product(mode):
        if sm == 100:
            fi_ffi.gemm_fp8_nt_groupwise(a, b, *scales, mode, 1, (gm, 128, 128), out)
        else:
            of_sm120(products.GROUPWISE).call(None, None, a, b, *scales, out, gm, 128, 128, mode)

    product(mode)
    left = a.astype(float) * spread(of_a, a.shape, gm)
    right = b.astype(float) * spread(of_b, b.shape, 128)
    judge = fp8_products(left @ right.T, abs(left) @ abs(right.T), 128)
    assert judge(out)[1] <= 1
    other = "K" if mode == "MN" else "MN"
    with pytest.raises(fi_ffi.ArgumentError, match="[ab]_scale"):
        product(other)


@pytest.mark.parametrize("mode", ["MN", "K"])
def test_groupwise_in_groups(mode, rng):
    starts = np.array([0, 8, 8, 20], np.int32)
    m, n, k, groups = 20, 128, 256, 3
    a, b = (rng.standard_normal(shape).astype(E4M3) for shape in ((m, k), (groups, n, k)))
    of_a = block_scales(rng, m, k, 1)
    of_b = np.stack([block_scales(rng, n, k, 128) for _ in range(groups)])
    out = np.full((m, n), np.nan, np.float16)
    scales = (of_a, of_b)
    if mode == "MN":
        scales = np.ascontiguousarray(of_a.T), np.ascontiguousarray(of_b.swapaxes(1, 2))
    fi_ffi.group_gemm_fp8_nt_groupwise(a, b, *scales, starts, scale_major_mode=mode, out=out)
    left = a.astype(float) * spread(of_a, a.shape, 1)
    for i in range(groups):
        rows = np.s_[starts[i] : starts[i + 1]]
        right = b[i].astype(float) * spread(of_b[i], (n, k), 128)
        judge = fp8_products(left[rows] @ right.T, abs(left[rows]) @ abs(right.T), 128)
        assert judge(out[rows])[1] <= 1


@pytest.mark.parametrize("mode", ["MN", "K"])
def test_one_group_on_sm120(mode, rng):
    m, n, k = 20, 256, 256
    a, b = (rng.standard_normal(shape).astype(E4M3) for shape in ((m, k), (1, n, k)))
    of_a, of_b = block_scales(rng, m, k, 1), block_scales(rng, n, k, 128)
    scales, starts = (of_a, of_b[None]), np.array([4, 20], np.int32)
    if mode == "MN":
        scales = np.ascontiguousarray(of_a.T), np.ascontiguousarray(of_b.T)[None]
    out = np.full((m, n), np.nan, np.float16)
    form = of_sm120(products.GROUP_GROUPWISE)
    form.call(None, None, None, a, b, *scales, out, starts, None, None, 1, 128, 128, mode)
    left, right = a.astype(float) * spread(of_a, a.shape, 1), b[0].astype(float)
    left, right = left[4:], right * spread(of_b, (n, k), 128)
    assert fp8_products(left @ right.T, abs(left) @ abs(right.T), 128)(out[4:])[1] <= 1
    assert np.isnan(out[:4].astype(float)).all()


SM120_REFUSES = [
    # m, n, k, groups (0: not in groups), gm, mode; the argument, and words.
    ((8, 136, 128, 0, 1, "K"), "b", "multiple of 128"),
    ((8, 64, 128, 0, 1, "K"), "b", "multiple of 128"),
    ((136, 128, 128, 0, 128, "K"), "a", "whole blocks"),
    ((8, 136, 128, 1, 1, "K"), "b", "multiple of 128"),
    ((136, 128, 128, 1, 128, "K"), "a", "whole blocks"),
    ((8, 128, 128, 2, 1, "K"), "b", "one matrix"),
    ((256, 128, 256, 1, 128, "MN"), "a_scale", "scale_major_mode='K'"),
]


@pytest.mark.parametrize(("sizes", "argument", "told"), SM120_REFUSES)
def test_what_sm120_refuses(sizes, argument, told):
    """Where a block is not whole its kernels compute nothing and say nothing."""
    m, n, k, groups, gm, mode = sizes
    several = (groups,) * bool(groups)

    def scales(*size: int) -> np.ndarray:
        return np.ones(size if mode == "K" else size[::-1], np.float32)

    of_b = scales(-(-n // 128), k // 128)
    given = [
        np.ones((m, k), E4M3), np.ones((*several, n, k), E4M3), scales(-(-m // gm), k // 128),
        np.tile(of_b, (*several, 1, 1)), np.zeros((m, n), np.float16),
    ]  # fmt: skip
    form, scratch, more = of_sm120(products.GROUPWISE), (None,), ()
    if groups:
        form, scratch = of_sm120(products.GROUP_GROUPWISE), (None, None)
        more = np.linspace(0, m, groups + 1).astype(np.int32), None, None
    with pytest.raises(fi_ffi.ArgumentError, match=told) as caught:
        form.call(None, *scratch, *given, *more, gm, 128, 128, mode)
    assert caught.value.argument == argument
    assert (given[4] == 0).all()


@pytest.mark.parametrize("k", [128, 256])
def test_scales_of_many_rows_in_groups(k):
    """In mode MN the kernels of either find only the first of several rows of such scales."""
    a, b, starts = np.ones((256, k), E4M3), np.ones((1, 128, k), E4M3), np.array([0, 256], np.int32)
    of_a, of_b = np.ones((k // 128, 2), np.float32), np.ones((1, k // 128, 1), np.float32)
    out = np.zeros((256, 128), np.float16)
    call = functools.partial(
        fi_ffi.group_gemm_fp8_nt_groupwise, a, b, of_a, of_b, starts, (128, 128, 128), out=out
    )
    if k == 128:
        call()
        assert (out == 128).all()
    else:
        with pytest.raises(fi_ffi.ArgumentError, match="first alone"):
            call()
        assert (out == 0).all()


@pytest.mark.parametrize(("groups", "n"), [(1, 136), (2, 256), (2, 136)])
def test_columns_of_several_groups(groups, n):
    """The kernels of SM100 find no scales of a second matrix whose last block is not whole."""
    a, b = np.ones((8, 128), E4M3), np.ones((groups, n, 128), E4M3)
    of_a, of_b = np.ones((8, 1), np.float32), np.ones((groups, 2, 1), np.float32)
    starts, out = np.linspace(0, 8, groups + 1).astype(np.int32), np.zeros((8, n), np.float16)
    call = functools.partial(
        fi_ffi.group_gemm_fp8_nt_groupwise, a, b, of_a, of_b, starts, scale_major_mode="K", out=out
    )
    if groups == 1 or n % 128 == 0:
        call()
        assert (out == 128).all()
    else:
        with pytest.raises(fi_ffi.ArgumentError, match="several matrices"):
            call()
        assert (out == 0).all()


@pytest.fixture
def forgotten():
    """Nothing of a pretended GPU stays."""
    yield
    for form in (*products.GROUPWISE.values(), *products.GROUP_GROUPWISE.values()):
        form.forget()


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("capability", "told"), [((10, 3), 1), ((12, 0), 0), ((12, 1), 0)])
def test_a_gpu_has_a_form(grouped, capability, told, gpu, forgotten, monkeypatch):
    """On a GPU that is pretended: what its entry is given, with `mma_sm` last or without it."""
    monkeypatch.setattr(machine, "capability", lambda index: capability)
    monkeypatch.setattr(memory, "_owned", {})
    got = []
    for row, form in (products.GROUP_GROUPWISE if grouped else products.GROUPWISE).items():
        name = f"tests.form.{capability}.{row.symbol}.{len(row.args)}"
        entry = register(name, row.signature, lambda *values: got.append(values))
        monkeypatch.setattr(form, "find_entry", lambda row, _, entry=entry: entry)
    several = (1,) * grouped
    shapes = [(8, 128), (*several, 128, 128), (8, 1), (*several, 1, 1), (8, 128), (2,)]
    dtypes = ["float8_e4m3fn"] * 2 + ["float32"] * 2 + ["float16", "int32"]
    descs = [
        fi_ffi.TensorDesc((i + 1) << 24, shape, dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    names = ["a", "b", "a_scale", "b_scale", "out", "m_indptr"][: 5 + grouped]
    given = dict(zip(names, descs, strict=False), scale_major_mode="K", mma_sm=2)
    function = fi_ffi.group_gemm_fp8_nt_groupwise if grouped else fi_ffi.gemm_fp8_nt_groupwise
    function(**given, stream=5)
    function.prepare(**given, stream=5)()
    for values in got:
        assert values[len(values) - 4 - told :] == (1, 128, 128, "K", 2)[: 4 + told]
    assert len(got) == 2
    with pytest.raises(fi_ffi.ArgumentError, match="mma_sm"):
        function(**given | {"mma_sm": 3}, stream=5)


# Ops, a call of ones that is right and its results, what is changed, the argument, and words.
RIGHT: dict[str, tuple[dict[str, Any], int]] = {
    "fp8_blockscale_gemm_sm90": ({
        "input": np.ones((6, 256), E4M3), "weight": np.ones((64, 256), E4M3),
        "input_scale": np.ones((2, 8), np.float32), "weight_scale": np.ones((1, 2), np.float32),
        "out": np.full((6, 64), np.nan, BF16)}, 256),
    "gemm_fp8_nt_groupwise": ({
        "a": np.ones((8, 128), E4M3), "b": np.ones((128, 128), E4M3),
        "a_scale": np.ones((1, 8), np.float32), "b_scale": np.ones((1, 1), np.float32),
        "scale_major_mode": "MN", "out": np.zeros((8, 128), np.float16)}, 128),
}  # fmt: skip
_DEEP = 20480 + 128
REFUSED: dict[str, list[tuple[dict[str, Any], str, str]]] = {
    "fp8_blockscale_gemm_sm90": [
        ({"input_scale": None}, "input_scale", "shape (2, 8), as fp8_quantize"),
        ({"input_scale": np.ones((6, 2), np.float32)}, "input_scale", "k128 = 2"),
        ({"input_scale": np.ones((2, 6), np.float32)}, "input_scale", "(2, 8)"),
        ({"weight_scale": np.ones((64, 2), np.float32)}, "weight_scale", "(1, 2)"),
        ({"input": np.ones((6, 256), BF16), "input_scale": None,
          "weight": np.ones((64, 256), BF16)}, "weight_scale", "None: the"),
        ({"weight": np.ones((64, 256), BF16), "weight_scale": None}, "input", "another dtype"),
        ({"weight": np.ones((64, 256), np.float16), "weight_scale": None}, "weight",
         "bfloat16 or float8"),
        ({"weight": np.ones((72, 256), E4M3), "out": np.ones((6, 72), BF16)}, "weight",
         "multiple of 64"),
        ({"weight": np.ones((64, 384), E4M3)}, "weight", "256"),
        ({"out": np.ones((6, 64), np.float16)}, "out", "bfloat16"),
        ({"input": np.ones((1, 6, 256), E4M3)}, "input", "rank 2"),
        ({"input": np.ones((6, _DEEP), BF16), "weight": np.ones((64, _DEEP), BF16),
          "input_scale": None, "weight_scale": None}, "input", "k128 = 161 of at most 160"),
    ],
    "gemm_fp8_nt_groupwise": [
        ({"scale_granularity_mnk": (1, 1, 128)}, "scale_granularity_mnk", ""),
        ({"scale_major_mode": "M"}, "scale_major_mode", ""),
        ({"mma_sm": 3}, "mma_sm", ""),
        ({"a": np.ones((6, 128), E4M3), "out": np.zeros((6, 128), np.float16)}, "a", ""),
        ({"a_scale": np.ones((8, 1), np.float32)}, "a_scale", ""),
        ({"b": np.ones((128, 256), E4M3), "b_scale": np.ones((1, 1), np.float32)}, "b", ""),
        ({"b": np.ones((128, 128), E5M2)}, "b", ""),
        ({"out": None}, "out", ""),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changed", "argument", "told"),
    [
        pytest.param(name, *row, id=f"{name} {', '.join(row[0])}")
        for name, rows in REFUSED.items()
        for row in rows
    ],
)
def test_what_is_refused(name, changed, argument, told):
    right, value = RIGHT[name]
    call = getattr(fi_ffi, name)
    call(**right)
    assert (right["out"] == value).all()
    refused(call, right, argument, told, op=name, **changed)


# What is done around the object, on a GPU that is pretended: no kernel runs.


class Object:
    """Writes down what it is told, as `run_gemm` and its other methods."""

    def __init__(self, monkeypatch) -> None:
        self.told: list[tuple] = []
        run, tell = rows.RUN_GEMM.signature, rows.CONFIGURE.signature
        entries = {
            declared.name: register(f"tests.{id(self)}.{declared.name}", declared, self.method(
                declared.name))
            for declared in (run, tell, products._SIZE)
        }  # fmt: skip
        self.entry = lambda declared: entries[declared.name]
        monkeypatch.setattr("fi_ffi.loader.methods.made_by", self.made_by)
        monkeypatch.setattr(products, "check_available", lambda *_: None)
        monkeypatch.setattr(products, "_rows", {})
        for compiled in (products.RUN_GEMM, products.CONFIGURE):
            monkeypatch.setattr(compiled, "find_entry", lambda row, _: entries[row.symbol])
        monkeypatch.setattr(memory, "_owned", {})

    def made_by(self, module, factory, releases, device):
        row = rows.RUN_GEMM
        assert (module, factory, releases, device) == (row.module, row.factory, row.releases, 0)
        return self

    def method(self, name):
        def call(*values):
            self.told.append((name, *values))
            return 0 if name == "get_workspace_size" else None

        return call


@pytest.fixture
def told(gpu, monkeypatch):
    made = Object(monkeypatch)
    yield made.told
    for compiled in (products.RUN_GEMM, products.CONFIGURE):
        compiled.forget()


def on_gpu(m, n, k, **more):
    shapes = {"input": ((m, k), "bfloat16"), "weight": ((n, k), "bfloat16"), "out": ((m, n),
              "bfloat16")}  # fmt: skip
    descs = {
        name: fi_ffi.TensorDesc((i + 1) << 24, shape, dtype)
        for i, (name, (shape, dtype)) in enumerate(shapes.items())
    }
    fi_ffi.fp8_blockscale_gemm_sm90(**{**descs, **more, "stream": more.get("stream", 5)})


def test_the_object_is_told_of_its_memory_before_each_product(told):
    on_gpu(10, 64, 128)
    assert [what[0] for what in told] == ["get_workspace_size", "configure_workspace", "run_gemm"]
    assert told[0][1:] == (10, 64, 128)
    size = fi_ffi.fp8_blockscale_gemm_workspace_size
    first = told[1][1]
    assert first.numel >= size(10, 64, 128, "bfloat16", "bfloat16")
    told.clear()
    on_gpu(3, 64, 128)  # it makes room for the most rows that it was asked about
    assert told[1][1].ptr == first.ptr
    on_gpu(3, 64, 128, stream=6)
    assert told[4][1].ptr != first.ptr
    given = fi_ffi.TensorDesc(1 << 30, (size(3, 64, 128, "bfloat16", "bfloat16"),), "uint8")
    refused = pytest.raises(fi_ffi.ArgumentError, match=r"workspace_buffer.*bytes or more")
    with allowed("told["), refused:  # the size is asked for
        on_gpu(3, 64, 128, workspace_buffer=given)
    told.clear()
    given = fi_ffi.TensorDesc(1 << 30, (size(10, 64, 128, "bfloat16", "bfloat16"),), "uint8")
    on_gpu(3, 64, 128, workspace_buffer=given)
    assert told[1][1].ptr == 1 << 30


@pytest.mark.parametrize("n", [64, 128, 192])
@pytest.mark.parametrize("m", [1, 3, 4, 5])
def test_the_least_memory_of_a_product(m, n, told):
    need = fi_ffi.fp8_blockscale_gemm_workspace_size(m, n, 128, "bfloat16", "bfloat16")
    for have in (need - 1, need):
        given = fi_ffi.TensorDesc(1 << 30, (have,), "uint8")
        told.clear()
        if have < need:
            refused = pytest.raises(fi_ffi.ArgumentError, match=rf"expected {need} bytes or more")
            with allowed("told["), refused:  # the size is asked for
                on_gpu(m, n, 128, workspace_buffer=given)
            assert [what[0] for what in told] == ["get_workspace_size"]
        else:
            on_gpu(m, n, 128, workspace_buffer=given)
            assert [what[0] for what in told][1:] == ["configure_workspace", "run_gemm"]


@pytest.mark.parametrize(
    ("more", "argument"),
    [
        ({"stream": None}, "stream"),
        ({"workspace_buffer": fi_ffi.TensorDesc((1 << 30) + 8, (1 << 20,), "uint8")},
         "workspace_buffer"),
        ({"workspace_buffer": fi_ffi.TensorDesc(1 << 30, (1 << 20,), "int8")}, "workspace_buffer"),
        ({"workspace_buffer": fi_ffi.TensorDesc(1 << 30, (1 << 20,), "uint8", device="cpu")},
         "workspace_buffer"),
        ({"workspace_buffer": fi_ffi.TensorDesc(1 << 24, (1 << 20,), "uint8")},
         "workspace_buffer"),
        ({"out": fi_ffi.TensorDesc(1 << 24, (3, 64), "bfloat16")}, "out"),
    ],
)  # fmt: skip
def test_the_object_is_told_of_no_product_that_is_refused(more, argument, told):
    with pytest.raises(fi_ffi.ArgumentError) as caught:
        on_gpu(3, 64, 128, **more)
    assert (caught.value.op, caught.value.argument) == ("fp8_blockscale_gemm_sm90", argument)
    assert not told
