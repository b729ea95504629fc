"""Call logs and dumps on a GPU: those of tests/ops/test_call_log.py, captures, replays, a crash."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from cuda.bindings import runtime

import fi_ffi
from fi_ffi.cli import main
from fi_ffi.cli.cuda import check
from fi_ffi.ops.functions import OPS
from fi_ffi.watch.dump import BEFORE
from fi_ffi.watch.tensor_bytes import read as read_memory

from tests.helpers import children, kernels
from tests.helpers.bodies import bodies_of
from tests.helpers.cases import make_case
from tests.helpers.inputs import inputs_of
from tests.helpers.prepared_calls import OnGpu, or_skip, settle
from tests.ops import test_call_log
from tests.ops.test_call_log import _nothing_is_left, read  # noqa: F401  a fixture

globals().update(bodies_of(test_call_log), path=test_call_log.path)


@pytest.fixture
def placed(rng, to_gpu) -> OnGpu:
    """An rmsnorm on the GPU."""
    row = OPS["rmsnorm"].row
    return OnGpu(make_case(row, {"n": 33, "h": 1024}, {"T": "bfloat16"}, rng), to_gpu)


# ---------------------------------------------------------------- logs


def test_statistics_are_in_the_streams_order(placed, to_gpu, stream, tmp_path):
    """What is queued before the call is in them; it is waited for."""
    x = placed.arrays["input"]
    later = to_gpu(np.full_like(placed.case.arrays["input"], 3))
    check(runtime.cudaDeviceSynchronize())
    size = 1 << 28
    big = [check(runtime.cudaMalloc(size)) for _ in range(2)]
    kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    path = tmp_path / "log"
    with fi_ffi.call_log(5, path):
        for _ in range(50):
            check(runtime.cudaMemcpyAsync(big[0], big[1], size, kind, stream))
        check(runtime.cudaMemcpyAsync(x.ptr, later.ptr, later.nbytes, kind, stream))
        fi_ffi.rmsnorm(**placed.descs, stream=stream)
    for pointer in big:
        check(runtime.cudaFree(pointer))
    (said,) = read(path)
    assert said.under("before:")["input"] == "min 3, max 3, mean 3, 0 NaN, 0 Inf"


def test_nothing_is_read_while_a_graph_is_recorded(placed, stream, tmp_path):
    """It is recorded all the same, and its launches are told."""
    fi_ffi.rmsnorm(**placed.descs, stream=stream)
    settle(stream)
    path, folder = tmp_path / "log", tmp_path / "dumps"
    with fi_ffi.call_log(5, path, dump=folder):
        with fi_ffi.capture(stream) as graph:
            fi_ffi.rmsnorm(**placed.descs)
        placed.arrays["out"]._copy_to(placed.case.arrays["out"])
        graph.launch(stream)
    assert graph.nodes == 1
    settle(stream)
    assert placed.is_right()
    call, *graphs = read(path)
    assert call.heads[:2] == ["rmsnorm", "is recorded into a graph, and not run: nothing is read"]
    assert [said.name for said in graphs] == ["Graph was recorded", "Graph is launched"]
    assert [*folder.iterdir()] == []
    graph.launch(stream)
    settle(stream)


def test_an_address_that_cannot_be_read_leaves_no_error_behind(placed, stream):
    """Launchers ask CUDA for the last error: the next call must not be given the log's."""
    gone = check(runtime.cudaMalloc(1 << 28))
    check(runtime.cudaFree(gone))
    desc = fi_ffi.TensorDesc(int(gone), (64,), "float32")
    with pytest.raises(fi_ffi.KernelError, match="CUDA error"):
        read_memory(desc, stream)
    fi_ffi.rmsnorm(**placed.descs, stream=stream)
    settle(stream)
    assert placed.is_right()


CRASH = """
    import os

    import numpy as np
    from cuda.bindings import runtime

    import fi_ffi
    from fi_ffi.cli.cuda import DeviceArray, check

    x = DeviceArray(np.ones((8, 512), np.float16))
    out = DeviceArray(np.full((8, 512), np.nan, np.float16))
    weight = DeviceArray(np.ones(512, np.float16))
    gone = 1 << 20  # where nothing ever is: freed memory may be somebody else's by now
    stream = int(check(runtime.cudaStreamCreate()))
    bad = fi_ffi.TensorDesc(int(gone), (8, 512), "float16")
    fi_ffi.rmsnorm(out.desc(), x.desc(), weight.desc(), eps=0.125, stream=stream)
    check(runtime.cudaStreamSynchronize(stream))
    print(f"{int(gone):#x}", flush=True)
    fi_ffi.rmsnorm(out.desc(), bad, weight.desc(), eps=0.25, stream=stream)
    (code,) = runtime.cudaStreamSynchronize(stream)
    print(int(code), flush=True)
    if int(code):
        os.abort()
"""


@pytest.mark.parametrize("level", [3, 5])
def test_a_kernel_that_crashes_leaves_its_arguments(tmp_path, level):
    given = {"FI_FFI_LOG_LEVEL": str(level), "FI_FFI_LOG_DEST": str(tmp_path / "%i.log"),
             "FI_FFI_DUMP_DIR": str(tmp_path / "dumps")}  # fmt: skip
    status, out, err = children.done(CRASH, seconds=300, **given)
    assert status == -signal.SIGABRT, out + err
    address, code = out.split()
    assert code == "700", "an illegal address"
    (log,) = tmp_path.glob("*.log")
    first, last = read(log)
    assert first.values["eps"] == "0.125" and last.values["eps"] == "0.25"
    assert last.values["input"] == f"float16[8, 512] on cuda:0 at {address}"
    assert "stream 0x" in last.values["entry"]
    if level == 5:
        assert "no statistics: KernelError" in last.under("before:")["input"]
        # Each call is waited for, so that it is this one that failed.
        assert "700" in last.under("after:")["out"]
    assert any(head.startswith("not dumped: ") for head in last.heads), last.heads
    dumps = [file for file in (tmp_path / "dumps").iterdir() if file.name.endswith(BEFORE)]
    assert len(dumps) == 1, "the first call's"


# ---------------------------------------------------------------- replays


def dumped(folder: Path, call: Callable[[], object]) -> list[Path]:
    with fi_ffi.call_log(0, dump=folder):
        call()
    return sorted(folder.glob(f"*{BEFORE}"))


def replayed(path: Path, *options: str) -> dict[str, Any]:
    done = CliRunner().invoke(main, ["replay", str(path), "--json", *options])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check_replays(path: Path) -> None:
    """Bit by bit on the GPU, within bounds by the reference on the CPU, and with a hash."""
    found = replayed(path, "--bits")
    assert "the same file" in found["now"] and found["now"].startswith("cuda:0")
    of_dump = [of for of in found["compared"] if of["to"] == "the dump"]
    assert of_dump and all(of["is_same"] for of in of_dump)
    assert len(found["compared"]) > len(of_dump), "compared with nothing else"
    replayed(path, "--device", "cpu")


@pytest.mark.parametrize("name", ["rmsnorm", "fused_add_rmsnorm", "rmsnorm_quant", "layernorm",
                                  "append_paged_kv_cache", "gdn_prefill", "silu_and_mul",
                                  "merge_states"])  # fmt: skip
def test_ops_replay(rng, to_gpu, stream, tmp_path, name):
    op = OPS[name]
    kernels.need(op.row.module)
    dtypes = {variable: of[0] for variable, of in op.row.dtypes.items()}
    sizes = {"n": 33, "h": 1024} if op.row.module == "norm" else inputs_of(op.row).small
    placed = OnGpu(make_case(op.row, sizes, dtypes, rng), to_gpu)
    (path,) = dumped(tmp_path, lambda: op(**placed.descs, **placed.case.scalars, stream=stream))
    settle(stream)
    if op.row.module == "norm":
        assert placed.is_right()
    check_replays(path)


def test_a_strided_call_replays(rng, to_gpu, stream, tmp_path):
    """Rows apart and in place, as heads of a fused tensor are."""
    fused = to_gpu(rng.standard_normal((9, 3, 128)).astype(np.float16))
    weight = to_gpu(np.ones(128, np.float16))
    runtime.cudaDeviceSynchronize()
    part = fi_ffi.TensorDesc(fused.ptr, (9, 2, 128), "float16", strides=(384, 128, 1))
    call = lambda: fi_ffi.qk_rmsnorm(part, part, weight.desc(), stream=stream)  # noqa: E731
    (path,) = dumped(tmp_path, call)
    check_replays(path)


def _paged(rng: np.random.Generator, lengths: tuple[int, ...], size: int) -> dict[str, np.ndarray]:
    pages = [-(-length // size) for length in lengths]
    indptr = np.cumsum([0, *pages]).astype(np.int32)
    return {
        "indptr": indptr,
        "indices": rng.permutation(int(indptr[-1]) + 3)[: indptr[-1]].astype(np.int32),
        "last": np.array([(length - 1) % size + 1 for length in lengths], np.int32),
    }


def test_a_decode_plan_replays(rng, to_gpu, stream, tmp_path):
    lengths, size, heads, kv_heads, dim = (700, 33, 1, 290), 16, 8, 2, 128
    tables = _paged(rng, lengths, size)
    pages = int(tables["indptr"][-1]) + 3
    q = to_gpu(rng.standard_normal((4, heads, dim)).astype(np.float16))
    k, v = (to_gpu(rng.standard_normal((pages, size, kv_heads, dim)).astype(np.float16))
            for _ in range(2))  # fmt: skip
    o = to_gpu(np.full((4, heads, dim), np.nan, np.float16))
    lse = to_gpu(np.full((4, heads), np.nan, np.float32))
    runtime.cudaDeviceSynchronize()

    def make() -> Any:
        return fi_ffi.BatchDecodePlan(
            tables["indptr"], tables["indices"], tables["last"], num_qo_heads=heads,
            num_kv_heads=kv_heads, head_dim=dim, page_size=size, stream=stream,
        )  # fmt: skip

    or_skip(make)

    def call() -> None:
        make().run(q.desc(), k.desc(), v.desc(), o.desc(), lse.desc(), stream=stream)

    plan, run = dumped(tmp_path, call)
    settle(stream)
    assert np.isfinite(o.get().astype(np.float32)).all()
    found = replayed(plan)
    assert [of["name"] for of in found["compared"]] == ["(result)"]
    check_replays(run)


@pytest.mark.parametrize("backend", ["fa2", "fa3"])
def test_a_prefill_plan_replays(rng, to_gpu, stream, tmp_path, backend):
    qo, kv, heads, kv_heads, dim = (0, 65, 66, 200), (0, 200, 210, 500), 8, 2, 128
    q = to_gpu(rng.standard_normal((qo[-1], heads, dim)).astype(np.float16))
    k, v = (to_gpu(rng.standard_normal((kv[-1], kv_heads, dim)).astype(np.float16))
            for _ in range(2))  # fmt: skip
    o = to_gpu(np.full((qo[-1], heads, dim), np.nan, np.float16))
    lse = to_gpu(np.full((qo[-1], heads), np.nan, np.float32))
    runtime.cudaDeviceSynchronize()

    def make() -> Any:
        try:
            return fi_ffi.BatchPrefillPlan(
                np.int32(qo), kv_indptr=np.int32(kv), num_qo_heads=heads, num_kv_heads=kv_heads,
                head_dim_qk=dim, causal=True, backend=backend, stream=stream,
            )  # fmt: skip
        except fi_ffi.ArgumentError as error:
            pytest.skip(str(error))

    or_skip(make)

    def call() -> None:
        make().ragged_run(q.desc(), k.desc(), v.desc(), o.desc(), lse.desc(), stream=stream)

    _, run = dumped(tmp_path, call)
    settle(stream)
    check_replays(run)


def test_single_decode_replays(rng, to_gpu, stream, tmp_path):
    heads, kv_heads, dim, length = 8, 2, 128, 1500
    q = to_gpu(rng.standard_normal((heads, dim)).astype(np.float16))
    k, v = (to_gpu(rng.standard_normal((length, kv_heads, dim)).astype(np.float16))
            for _ in range(2))  # fmt: skip
    o = to_gpu(np.full((heads, dim), np.nan, np.float16))
    need = fi_ffi.single_decode_workspace_size(length, heads, kv_heads, dim)
    tmp = to_gpu(np.zeros(max(need, 16), np.uint8))
    runtime.cudaDeviceSynchronize()

    def call() -> None:
        fi_ffi.single_decode(q.desc(), k.desc(), v.desc(), tmp.desc(), o.desc(), stream=stream)

    or_skip(call)
    (path,) = dumped(tmp_path, call)
    settle(stream)
    check_replays(path)
