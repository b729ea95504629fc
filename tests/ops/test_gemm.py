"""Matrix products against float64: the same tests on the CPU, and (tests/gpu) on a GPU."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.cli.cases import bound
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.releases import fits
from fi_ffi.reference.gemm import fp8_products

from tests.helpers.calls import EVERY_CALL
from tests.helpers.cases import make_case
from tests.helpers.every_op import check_on, check_replayed

BF16, E4M3, E5M2 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
BMM = [call for call in EVERY_CALL if call.values[0].row.name == "bmm_fp8"]
TINY = [call for call in EVERY_CALL if call.values[0].row.module == "tinygemm2"]
ROUTERS = [call for call in EVERY_CALL if call.values[0].row.module == "dsv3_router_gemm"]


# The least of each, what is no power of two, and what models have.
BMM_SIZES = [
    (1, 1, 16, 16), (1, 1, 16, 64), (3, 5, 48, 48), (2, 17, 80, 112), (16, 48, 80, 64),
    (1, 128, 4096, 4096), (4, 200, 1008, 1024), (1, 33, 512, 16384),
]  # fmt: skip


@pytest.mark.parametrize("size", BMM_SIZES, ids=str)
@pytest.mark.parametrize(("op", "dtypes"), BMM)
def test_bmm_sizes(op, dtypes, size, machine, rng):
    if not machine.is_gpu and np.prod(size[1:]) > 2**24:
        size = (size[0], size[1] % 7 + 1, 64, size[3])
    sizes = dict(zip("bmnk", size, strict=True))
    assert check_on(machine, make_case(op.row, sizes, dtypes, rng)) <= 1


@pytest.mark.parametrize(("op", "dtypes"), BMM[:2])
def test_bmm_own_scratch_and_no_rows(op, dtypes, machine, rng):
    for m in (17, 0):
        sizes, without = {"b": 2, "m": m, "n": 80, "k": 112}, ("workspace_buffer",)
        assert check_on(machine, make_case(op.row, sizes, dtypes, rng, without=without)) <= 1


@pytest.mark.parametrize(("op", "dtypes"), BMM[:2])
def test_bmm_recorded_and_replayed(op, dtypes, machine, rng):
    case = make_case(op.row, {"b": 2, "m": 40, "n": 128, "k": 256}, dtypes, rng)
    assert check_replayed(machine, case) <= 1


def test_bmm_of_a_nan(machine, rng):
    """Its row is NaN, and no other is."""
    op = OPS["bmm_fp8"]
    dtypes = {"TA": "float8_e4m3fn", "TB": "float8_e4m3fn", "T": "bfloat16"}
    case = make_case(op.row, {"b": 1, "m": 6, "n": 16, "k": 64}, dtypes, rng)
    case.arrays["A"][0, 2, 5] = np.nan
    machine.need("gemm")
    placed = {name: machine.place(array) for name, array in case.arrays.items()}
    op(**{name: array.desc() for name, array in placed.items()}, stream=machine.stream)
    got = placed["D"].get().astype(float)
    assert np.isnan(got[0, 2]).all()
    assert np.isfinite(np.delete(got, 2, axis=1)).all()


def test_two_e5m2_are_refused():
    a, b = np.zeros((1, 4, 32), E5M2), np.zeros((1, 16, 32), E5M2).swapaxes(1, 2)
    d, one = np.zeros((1, 4, 16), np.float16), np.ones(1, np.float32)
    with pytest.raises(fi_ffi.ArgumentError, match="`A`: got float8_e5m2.* with such TB"):
        fi_ffi.bmm_fp8(a, b, d, one, one)


def test_a_row_major_right_factor_is_refused():
    a, b = np.zeros((1, 8, 32), E4M3), np.zeros((1, 32, 16), E4M3)
    d, one = np.zeros((1, 8, 16), np.float16), np.ones(1, np.float32)
    with pytest.raises(fi_ffi.ArgumentError, match=r"`B`.*transposed"):
        fi_ffi.bmm_fp8(a, b, d, one, one)


def test_many_large_matrices_are_refused():
    """The launcher counts the elements of one in an int, where there are several."""
    row = OPS["bmm_fp8"].row
    m = 2**31 // 16
    tensors = {
        "A": ((2, m, 16), "float8_e4m3fn", None), "D": ((2, m, 16), "float16", None),
        "B": ((2, 16, 16), "float8_e4m3fn", (256, 1, 16)), "A_scale": ((1,), "float32", None),
        "B_scale": ((1,), "float32", None), "workspace_buffer": ((2**20,), "uint8", None),
    }  # fmt: skip
    descs = {
        name: fi_ffi.TensorDesc((1 << 40) * i, shape, dtype, strides=strides, device="cpu")
        for i, (name, (shape, dtype, strides)) in enumerate(tensors.items(), 1)
    }
    with pytest.raises(fi_ffi.ArgumentError, match=r"`A`.*where there are several"):
        OPS[row.name](**descs)


def test_the_judge_sees_what_is_wrong(rng):
    """A scale 5 % off, 64 of 4096 terms left out, a row in another's place, one element."""
    a, b = rng.standard_normal((12, 4096)), rng.standard_normal((4096, 40))
    value = a @ b
    judge = fp8_products(value, abs(a) @ abs(b), 4096)
    assert judge(value.astype(BF16))[1] <= 1
    assert judge((1.05 * value).astype(BF16))[1] > 1
    assert judge((a[:, 64:] @ b[64:]).astype(BF16))[1] > 1
    assert judge(value[::-1].astype(BF16))[1] > 1
    wrong = value.copy()
    wrong[3, 4] += abs(value).max()
    assert judge(wrong.astype(BF16))[1] > 1


# cuBLASLt's algorithms


@pytest.mark.parametrize("room", [1, 3, 100])
def test_algorithms_that_cublaslt_has(room, machine, rng):
    machine.need("gemm")
    dtypes = {"TA": "float8_e4m3fn", "TB": "float8_e5m2", "T": "float16"}
    sizes = {"b": 2, "m": 20, "n": 64, "k": 128}
    case = make_case(OPS["bmm_fp8"].row, sizes, dtypes, rng)
    placed = {name: machine.place(array) for name, array in case.arrays.items()}
    descs = {name: array.desc() for name, array in placed.items()}
    algos = np.full(64 * room, 0xFF, np.uint8)
    count = fi_ffi.bmm_fp8_get_algos(**descs, algo_buffer=algos, stream=machine.stream)
    assert 1 <= count <= room
    for i in range(count):
        machine.poison(placed["D"], machine.stream)
        fi_ffi.bmm_fp8_run_with_algo(**descs, algo_buffer=algos, algo_idx=i, stream=machine.stream)
        machine.synchronize()
        assert case.error("D", placed["D"].get())[1] <= 1
    with pytest.raises(fi_ffi.KernelError, match="out of range"):
        fi_ffi.bmm_fp8_run_with_algo(
            **descs, algo_buffer=algos, algo_idx=room, stream=machine.stream
        )
    with pytest.raises(fi_ffi.ArgumentError, match="algo_idx"):
        fi_ffi.bmm_fp8_run_with_algo(**descs, algo_buffer=algos, algo_idx=-1, stream=machine.stream)
    assert all(array.intact() for array in placed.values())


def test_algorithms_are_kept_on_the_host(machine, rng):
    """The buffer is read before anything is launched."""
    dtypes = {"TA": "float8_e4m3fn", "TB": "float8_e4m3fn", "T": "float16"}
    case = make_case(OPS["bmm_fp8"].row, {"b": 1, "m": 4, "n": 16, "k": 16}, dtypes, rng)
    algos = fi_ffi.TensorDesc(1 << 30, (64,), "uint8", device="cuda:0")
    with pytest.raises(fi_ffi.ArgumentError, match=r"algo_buffer.*on the host"):
        fi_ffi.bmm_fp8_get_algos(**case.arrays, algo_buffer=algos)


# For few rows


TINY_SIZES = [
    (1, 16, 64), (8, 16, 256), (9, 48, 320), (2, 1024, 960), (37, 256, 1024), (2, 1024, 2880),
    (37, 256, 4096), (3, 4096, 14336), (16, 28672, 1088),
]  # fmt: skip


@pytest.mark.parametrize("use_pdl", [False, True])
@pytest.mark.parametrize("size", TINY_SIZES, ids=str)
@pytest.mark.parametrize(("op", "dtypes"), TINY)
def test_few_rows(op, dtypes, size, use_pdl, machine, rng):
    """Until 0.6.14 only as far as a warp needs one stage."""
    sizes = dict(zip("nmk", size, strict=True))
    if size[2] <= op.row.limits("<=").get("k", (size[2],))[0]:
        assert check_on(machine, make_case(op.row, sizes, dtypes, rng, use_pdl=use_pdl)) <= 1
        return
    a, b = (np.zeros((count, size[2]), BF16) for count in size[:2])
    out = np.full(size[:2], np.nan, BF16)
    bias = [np.zeros(size[1], BF16)] if op.row.name == "tinygemm2" else []
    with pytest.raises(fi_ffi.ArgumentError, match=f"k = {size[2]} of at most 1024"):
        op(a, b, *bias, out)
    assert np.isnan(out.astype(np.float32)).all()


@pytest.mark.parametrize("name", ["tinygemm2", "tinygemm2_nobias"])
def test_few_rows_of_many_columns(name, rng):
    """The row of releases from 0.6.14 on, on the CPU."""
    row = OPS[name].rows[1]
    assert fits(row, "0.6.14") and not fits(row, "0.6.13")
    case = make_case(row, {"n": 2, "m": 32, "k": 5120}, {"T": "bfloat16"}, rng)
    Op(row)(**case.arrays, **case.scalars)
    out = row.tensors[-1].name
    assert case.error(out, case.arrays[out])[1] <= 1


@pytest.mark.parametrize(("op", "dtypes"), TINY)
def test_few_rows_recorded_and_replayed(op, dtypes, machine, rng):
    case = make_case(op.row, {"n": 4, "m": 64, "k": 512}, dtypes, rng)
    assert check_replayed(machine, case) <= 1


@pytest.mark.parametrize("with_bias", [False, True])
def test_flashinfers_function_for_few_rows(with_bias, machine, rng):
    machine.need("tinygemm2")
    x, weight = (rng.standard_normal(shape).astype(BF16) for shape in ((5, 128), (32, 128)))
    bias = rng.standard_normal(32).astype(BF16) if with_bias else None
    out = np.full((5, 32), np.nan, BF16)
    placed = [machine.place(array) for array in (x, weight, out)]
    of_bias = machine.place(bias).desc() if with_bias else None
    fi_ffi.tinygemm_bf16(*(array.desc() for array in placed), of_bias, stream=machine.stream)
    value = x.astype(float) @ weight.T.astype(float) + (bias.astype(float) if with_bias else 0)
    sizes = abs(x.astype(float)) @ abs(weight.T.astype(float)) + 4
    assert (abs(placed[2].get().astype(float) - value) <= bound(value, sizes, x.dtype)).all()


@pytest.mark.parametrize("n", [1, 2, 7, 15, 16])
@pytest.mark.parametrize(("op", "dtypes"), ROUTERS)
def test_routers(op, dtypes, n, machine, rng):
    for pdl in (True, False):
        case = make_case(op.row, {"n": n}, dtypes, rng, launch_with_pdl=pdl)
        assert check_on(machine, case) <= 1


@pytest.mark.parametrize(("op", "dtypes"), ROUTERS[:1])
def test_routers_of_more_tokens_are_refused(op, dtypes):
    case = make_case(op.row, {"n": 17}, dtypes, np.random.default_rng())
    with pytest.raises(fi_ffi.ArgumentError, match="n = 17 of at most 16"):
        op(**case.arrays)


# Quantising rows


@pytest.mark.parametrize("k128", [1, 3, 56])
@pytest.mark.parametrize("n", [1, 3, 4, 5, 130])
def test_quantised_rows(n, k128, machine, rng):
    sizes = {"n": n, "k128": k128}
    assert check_on(machine, make_case(OPS["fp8_quantize_1x128"].row, sizes, {"T": "bfloat16"},
                                       rng)) <= 1  # fmt: skip


def test_rows_of_zeros_and_of_extremes(machine, rng):
    """Pieces of zeros, one element, the least and the largest numbers, and signs."""
    rows = np.zeros((8, 256), BF16)
    rows[1, 200] = -3
    rows[2] = np.where(rng.random(256) < 0.5, -1, 1).astype(BF16)
    rows[3] = 8e37  # below 2^126: docs/gemm.md
    rows[4, ::2], rows[4, 1::2] = 2.0**-110, -(2.0**-112)
    rows[5] = np.linspace(-7, 7, 256)
    rows[6, :128], rows[6, 128:] = 1e-20, 1e20
    row = OPS["fp8_quantize_1x128"].row
    case = make_case(row, {"n": 8, "k128": 2}, {"T": "bfloat16"}, rng, {"input": rows})
    assert check_on(machine, case) <= 1
    assert check_replayed(machine, case) <= 1


def test_room_for_scales_is_rounded_up():
    x = np.zeros((5, 128), BF16)
    values = np.zeros((5, 128), E4M3)
    for room in (4, 5, 12):
        with pytest.raises(fi_ffi.ArgumentError, match="rounded up to a multiple of 4"):
            fi_ffi.fp8_quantize_1x128(x, values, np.zeros((1, room), np.float32))
