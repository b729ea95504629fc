"""Matrix products on a GPU: the tests of three files of tests/ops, and what only a GPU has."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.loader import machine as of_loader
from fi_ffi.ops.call.cuda import own_handle
from fi_ffi.ops.functions import OPS
from fi_ffi.reference.gemm import fp8_products

from tests.attention.machines import Gpu
from tests.helpers.bodies import bodies_of
from tests.helpers.cases import make_case
from tests.helpers.prepared_calls import OnGpu
from tests.ops import test_block_scale_gemm as blocks
from tests.ops import test_gemm, test_launching, test_segment_gemm
from tests.ops.test_threads import at_once

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn

globals().update(bodies_of(test_gemm, test_segment_gemm, blocks, test_launching))

DTYPES = {"TA": "float8_e4m3fn", "TB": "float8_e4m3fn", "T": "bfloat16"}


def hopper(machine: Gpu, module: str) -> None:
    machine.need(module)
    if of_loader.capability(0)[0] != 9:
        pytest.skip("its kernels are for Hopper GPUs")


def test_a_handle_of_the_callers(machine, rng):
    """0 is fi_ffi's own; another, of either library, is used as it is."""
    machine.need("gemm")
    row = OPS["bmm_fp8"].row
    if "cublas_handle" not in [arg.name for arg in row.args]:
        pytest.skip("the kernels of this release make their own handle")
    case = make_case(row, {"b": 2, "m": 9, "n": 32, "k": 64}, DTYPES, rng)
    on_gpu = OnGpu(case, machine.place)
    own = own_handle("cublasLt", fi_ffi.parse_device("cuda:0"))
    assert own and own == own_handle("cublasLt", fi_ffi.parse_device("cuda:0"))
    assert of_loader.load_library(f"libcublasLt.so.{of_loader.cuda_major()}")[1]
    scalars = {name: value for name, value in case.scalars.items() if name != "cublas_handle"}
    for handle in (own, 0):
        machine.poison(on_gpu.arrays["D"], machine.stream)
        fi_ffi.bmm_fp8(**on_gpu.descs, **scalars, cublas_handle=handle, stream=machine.stream)
        machine.synchronize()
        assert on_gpu.is_right()


def test_bmm_of_two_e5m2_is_refused_by_cublas_too(machine, rng):
    """Why the row refuses it: the launcher does, in words."""
    machine.need("gemm")
    entry = fi_ffi.module("gemm").bmm_fp8
    a, b = (machine.place(np.zeros((1, 16, 16), ml_dtypes.float8_e5m2)) for _ in range(2))
    d, one = machine.place(np.zeros((1, 16, 16), BF16)), machine.place(np.ones(1, np.float32))
    room = machine.place(np.zeros(1 << 20, np.uint8))
    own = own_handle("cublasLt", fi_ffi.parse_device("cuda:0"))
    arguments = [array.desc() for array in (a, b, d, one, one, room)]
    if len(entry.signature.params) > len(arguments):  # before 0.7 the handle is the caller's
        arguments.append(own)
    with pytest.raises(fi_ffi.KernelError, match="e5m2"):
        entry(*arguments, stream=machine.stream)


def test_bmm_captured_without_a_call_before(machine, rng):
    """What is made for the first call is made in a capture as well."""
    machine.need("gemm")
    case = make_case(OPS["bmm_fp8"].row, {"b": 3, "m": 24, "n": 48, "k": 96}, DTYPES, rng)
    on_gpu = OnGpu(case, machine.place)

    def launch() -> None:
        fi_ffi.bmm_fp8(**on_gpu.descs, **case.scalars, stream=machine.stream)

    replay = machine.capture(launch)
    replay()
    machine.synchronize()
    assert on_gpu.is_right()


def test_bmm_on_many_threads(machine, rng):
    """They share a handle, and each stream has scratch of its own."""
    machine.need("gemm")
    streams = machine.streams(4)
    calls = [
        OnGpu(make_case(OPS["bmm_fp8"].row, {"b": 2, "m": 64, "n": 256, "k": 1024}, DTYPES, rng,
                        without=("workspace_buffer",)), machine.place)
        for _ in streams
    ]  # fmt: skip

    def work(i: int) -> None:
        for _ in range(50):
            fi_ffi.bmm_fp8(**calls[i].descs, **calls[i].case.scalars, stream=streams[i])

    at_once(work, 4)
    machine.synchronize()
    assert all(call.is_right() for call in calls)


@pytest.mark.parametrize(
    ("n", "scales"),
    [
        (64, [1, 2]),
        (64, [2, 1]),
        (256, [1, 2, 4]),
        (256, [8, 1, 2]),
    ],
)
@pytest.mark.parametrize("m", [1, 40])
def test_a_scale_for_each_row_of_a_weight_is_not_read_so(m, n, scales, machine):
    """docs/gemm.md: of [n, k / 128] the kernels take row i for columns 128 * i to 128 * i + 127."""
    hopper(machine, blocks.MODULE)
    k = 128
    of_w = np.full((n, 1), scales[-1], np.float32)
    of_w[: len(scales), 0] = scales
    arrays = {
        "input": np.ones((m, k), E4M3), "weight": np.ones((n, k), E4M3),
        "out": np.full((m, n), np.nan, BF16),
        "input_scale": np.ones((1, -(-m // 4) * 4), np.float32), "weight_scale": of_w,
    }  # fmt: skip
    placed = {name: machine.place(array) for name, array in arrays.items()}
    descs = [placed[name].desc() for name in arrays]
    runner = fi_ffi.module(blocks.MODULE).init(device="cuda:0")
    room = machine.place(np.zeros(max(runner.get_workspace_size(m, n, k), 256), np.uint8))
    runner.configure_workspace(room.desc(), stream=machine.stream)
    runner.run_gemm(*descs, stream=machine.stream)
    machine.synchronize()
    got = placed["out"].get().astype(float)
    assert (got == k * np.repeat(of_w[: -(-n // 128), 0], 128)[:n]).all()
    assert (got != k * of_w[:, 0]).any(axis=1).all(), "it is right, and need not be refused"
    given = dict(zip(arrays, descs, strict=True))
    with pytest.raises(fi_ffi.ArgumentError, match="weight_scale"):
        fi_ffi.fp8_blockscale_gemm_sm90(**given, stream=machine.stream)


def test_block_scales_on_many_threads(machine, rng):
    """One object serves them all, one after the other."""
    hopper(machine, blocks.MODULE)
    streams = machine.streams(4)
    calls = [blocks.Blocks(machine, rng, 8 * (i + 1), 128, 512, False, False) for i in range(4)]
    machine.synchronize()

    def work(i: int) -> None:
        for _ in range(50):
            calls[i].call(stream=streams[i])

    at_once(work, 4)
    machine.synchronize()
    assert max(made.worst() for made in calls) <= 1


@pytest.mark.parametrize("backend", ["sm80", "sm90"])
def test_a_large_batch_of_segments(backend, machine, rng):
    test_segment_gemm.need(machine, backend)
    lengths = [int(n) for n in rng.integers(0, 40, 300)]
    made = test_segment_gemm.Segments(machine, rng, lengths, BF16, BF16, True, d_in=512, d_out=256,
                            weights=16)  # fmt: skip
    made.call(backend=backend)
    assert made.worst() <= 1


def test_what_flashinfer_says_of_scales_is_not_what_its_kernels_read(machine, rng):
    """The trap that docs/gemm.md names: scales as FlashInfer's documentation has them, [m, k /
    128] and [n, k / 128], in the kernel's own words; the products are others."""
    hopper(machine, blocks.MODULE)
    m, n, k = 64, 128, 512
    x, w = (rng.standard_normal(shape).astype(E4M3) for shape in ((m, k), (n, k)))
    of_x, of_w = (np.exp(rng.uniform(-2, 2, (rows, k // 128))) for rows in (m, n))
    runner = fi_ffi.module(blocks.MODULE).init(device="cuda:0")
    out = machine.place(np.full((m, n), np.nan, BF16))
    placed = [machine.place(array) for array in (x, w)]
    scales = [machine.place(array.astype(np.float32)) for array in (of_x, of_w)]
    room = machine.place(np.zeros(1 << 22, np.uint8))
    tensors = [array.desc() for array in (*placed, out, *scales)]
    runner.get_workspace_size(m, n, k)
    runner.configure_workspace(room.desc(), stream=machine.stream)
    runner.run_gemm(*tensors, stream=machine.stream)
    machine.synchronize()
    a = x.astype(float) * of_x.repeat(128, 1)
    b = w.astype(float) * of_w.repeat(128, 1)
    judge = fp8_products(a @ b.T, abs(a) @ abs(b.T), 128)
    fraction = judge(out.get())[1]
    print(f"{fraction:.1f} of what is allowed")
    assert fraction > 1


@pytest.mark.parametrize(("k", "m"), [(1024, 6144), (1088, 6144), (2880, 32), (2880, 6144),
                                      (4096, 6144)])  # fmt: skip
def test_how_often_tinygemm_is_wrong(k, m, machine, rng, record_property):
    """docs/gemm.md: before 0.6.14 now and then of more than 1024 columns, and never of those that
    are allowed.  The entry itself is called, which refuses no size."""
    machine.need("tinygemm2")
    if of_loader.capability(0)[0] not in OPS["tinygemm2_nobias"].row.capabilities:
        pytest.skip("its kernels are for Hopper and later GPUs")
    entry = fi_ffi.module("tinygemm2").tinygemm2_nobias_op
    wrong = 0
    for _ in range(20):
        x, weight = (rng.standard_normal(shape).astype(BF16) for shape in ((4, k), (m, k)))
        placed = [machine.place(array) for array in (x, weight, np.full((4, m), np.nan, BF16))]
        a, b = x.astype(float), weight.astype(float).T
        value, allowed = a @ b, abs(a) @ abs(b) * 2.0**-12 + 2.0**-8 * abs(a @ b) + 1e-3
        for i in range(10):
            machine.poison(placed[2], machine.stream)
            entry(*(array.desc() for array in placed), bool(i % 2), stream=machine.stream)
            machine.synchronize()
            error = abs(placed[2].get().astype(float) - value)
            wrong += not (error <= allowed).all()
    print(f"{wrong} of 200 products of {k} columns and {m} outputs are wrong")
    record_property("wrong", wrong)
    may_be_wrong = any(rule.argument == "input" for rule in OPS["tinygemm2_nobias"].row.rules)
    assert wrong == 0 or (may_be_wrong and k > 1024)


def test_products_of_other_gpus_are_refused(machine, rng):
    """Nothing is launched, and nothing written."""
    if of_loader.capability(0)[0] in (10, 12):
        pytest.skip("runs on this GPU")
    out = machine.place(np.full((8, 128), np.nan, BF16))
    a, b = machine.place(np.ones((8, 128), E4M3)), machine.place(np.ones((128, 128), E4M3))
    of_a, of_b = (machine.place(np.ones(s, np.float32)) for s in ((1, 8), (1, 1)))
    tensors = [array.desc() for array in (a, b, of_a, of_b)]
    told = r"gemm_fp8_nt_groupwise is written .* 10\.x or 12\.x"
    with pytest.raises(fi_ffi.ArchitectureError, match=told):
        fi_ffi.gemm_fp8_nt_groupwise(*tensors, "MN", out=out.desc(), stream=machine.stream)
    of_b, groups = machine.place(np.ones((1, 1, 1), np.float32)), np.array([0, 8], np.int32)
    b, groups = machine.place(np.ones((1, 128, 128), E4M3)), machine.place(groups)
    tensors = [array.desc() for array in (a, b, of_a, of_b, groups)]
    with pytest.raises(fi_ffi.ArchitectureError, match="group_gemm_fp8_nt_groupwise is written"):
        fi_ffi.group_gemm_fp8_nt_groupwise(*tensors, out=out.desc(), stream=machine.stream)
    assert np.isnan(out.get().astype(float)).all()
