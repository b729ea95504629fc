"""benchmarks/host.py without a GPU: rows with reference kernels, and peers that stand in."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import fi_ffi

from tests.helpers import compiler
from tests.helpers.benchmarks import BENCHMARKS, kernels_replaced, noop

ON_CPU = functools.partial(fi_ffi.TensorDesc, device="cpu")


class HostArray:
    """What a `DeviceArray` is to the rows, on the host."""

    def __init__(self, host):
        self.host, self.memory = host, host.copy()
        self.ptr = self.memory.ctypes.data

    def desc(self):
        return ON_CPU(self.ptr, self.host.shape, self.host.dtype)

    def get(self):
        return self.memory.copy()


class Host:
    """What `Gpu` is to the rows."""

    device, stream = "cpu", 77

    def put(self, host):
        return HostArray(host)

    def nothing(self, shape):
        return HostArray(np.full(shape, np.nan, np.float16))

    def tensor(self, array):
        return pytest.importorskip("torch").from_numpy(array.memory)

    def poison(self, array):
        array.memory.view(np.uint8)[...] = 0xFF

    def settle(self):
        pass

    free = settle


def rmsnorm(x, weight, eps, out, enable_pdl):
    fi_ffi.rmsnorm(out.numpy(), x.numpy(), weight.numpy(), eps)


class Wrapper:
    """FlashInfer's wrapper, as far as the rows use it."""

    def __init__(self, buffer, layout):
        assert (buffer.shape, layout) == ((128 * 2**20,), "NHD")

    def plan(self, indptr, indices, last, *sizes):
        heads = dict(
            zip(("num_qo_heads", "num_kv_heads", "head_dim", "page_size"), sizes, strict=True)
        )
        tables = (table.numpy() for table in (indptr, indices, last))
        self.planned = fi_ffi.BatchDecodePlan(*tables, device="cpu", **heads)

    def run(self, q, cache, *, out, enable_pdl):
        self.planned.run(q.numpy(), *(part.numpy() for part in cache), out.numpy())


class StandIns:
    """What `Peers` is to the rows."""

    def need(self, name):
        return pytest.importorskip(name)

    def flashinfer(self, *names):
        return SimpleNamespace(rmsnorm=rmsnorm, BatchDecodeWithPagedKVCacheWrapper=Wrapper)


@pytest.fixture
def host(monkeypatch):
    """The benchmark, with rows so small that the reference kernels are quick."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("host_benchmark", BENCHMARKS / "host.py")
    main = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, main)
    spec.loader.exec_module(main)
    for part in (main.lengths, main.steps, main.norms):
        monkeypatch.setattr(part, "TensorDesc", ON_CPU)
    for name, value in (("MOST", 40), ("HIDDEN", 16), ("_CHECKED", (1, 7, 40)), ("SHAPES", 12),
                        ("_CHUNK", 20), ("_WARM", 60)):  # fmt: skip
        monkeypatch.setattr(main.lengths, name, value)
    for name, value in (("LEAST", 2), ("MOST", 4), ("RUNS", 3), ("_PAGES", 64)):
        monkeypatch.setattr(main.steps, name, value)
    return main


@pytest.fixture
def bench(host):
    made = host.Bench(host.Effort(rounds=3, calls=40, chunk=10))
    made.__dict__.update(gpu=Host(), peers=StandIns())  # as their cached properties keep them
    return made


@pytest.mark.parametrize(
    ("row", "marks", "others"),
    [("lengths", 2, 0), ("lengths-torch", 2, 2), ("tensordesc", 1, 1), ("lengths-memory", 1, 0),
     ("decode-step", 3, 4)],
)  # fmt: skip
def test_a_row_has_its_marks(host, bench, row, marks, others):
    pytest.importorskip("torch")
    entries = [*host.entries(row, bench)]
    assert [entry.status for entry in entries] == ["ok"] * (marks + others)
    assert sum(entry.met is not None for entry in entries) == marks
    of_row = {mark.what for mark in host.MARKS.values() if mark.row == row}
    assert of_row <= {entry.what for entry in entries}
    for entry in entries:
        assert host.report.shown(entry).count("|") == 8


def past_its_rows(x, weight, eps, out, enable_pdl):
    rmsnorm(x, weight, eps, out, enable_pdl)
    ctypes.memset(out.data_ptr() + out.nbytes, 0, 1)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [(None, "missing: flashinfer-python"),
     (lambda x, weight, eps, out, enable_pdl: None, "FAILED: rmsnorm of 1 x 16 is off by nan"),
     (lambda x, weight, eps, out, pdl: rmsnorm(x, weight, 0.5, out, pdl), "FAILED: rmsnorm of 1"),
     (past_its_rows, "FAILED: rmsnorm of 1 x 16 wrote past its rows")],
)  # fmt: skip
def test_a_wrong_result_has_no_figure(host, bench, monkeypatch, wrong, told):
    pytest.importorskip("torch")

    def peers(*_):
        if wrong is None:
            raise host.Missing("flashinfer-python")
        return SimpleNamespace(rmsnorm=wrong)

    monkeypatch.setattr(bench.peers, "flashinfer", peers)
    entries = [*host.entries("lengths", bench)]
    assert [entry.met for entry in entries] == [None, None]
    assert all(entry.status.startswith(told) for entry in entries), entries[0].status


def test_lengths_are_drawn_for_each_call(host):
    """The calls between two waits have lengths of their own, and other ones than those before."""
    seen = []
    run = importlib.import_module("marks.timing").with_drawn(seen.extend, host.lengths.draw())
    assert all(run(1000) > 0 for _ in range(3)) and {*seen} == {*range(1, 41)}
    assert seen[:1000] != seen[1000:2000] != seen[2000:]


def test_marks(host):
    mark, entry = host.Mark, host.report.entry
    figure = importlib.import_module("marks.timing").Figure
    line = host.Line("key", figure("", (90.0,)), figure("", (100.0,)), grown_bytes=3_000_000)
    for limits, met, told in (
        ({"most": 0.9}, True, "≤ 0.90"),
        ({"most": 0.055}, False, "≤ 0.055"),
        ({"most": 0.95, "least": 0.92}, False, "0.92 to 0.95"),
        ({"most_ns": 89, "told": "≤ 89 ns"}, False, "≤ 89 ns"),
        ({"most": 1, "most_ns": 90, "told": "≤ 90 ns"}, True, "≤ 1.00, ≤ 90 ns"),
        ({"most_bytes": 2_999_999, "told": "≤ 3 MB"}, False, "≤ 3 MB"),
        ({"most_bytes": 3_000_000, "told": "≤ 3 MB"}, True, "≤ 3 MB"),
    ):
        made = entry("row", line, {"key": mark("row", "what", "", **limits)})
        assert (made.met, made.mark) == (met, told)
        assert host.report.shown(made).endswith(f"| {'yes' if met else 'NO'} (3.0 MB) |")
    alone = host.Line("key", figure("", (90.0,)))
    assert not entry("row", alone, {"key": mark("row", "what", "", 1)}).met


# Returns 0 if it is given a 2 x 3 float16 tensor at 4096, nothing, 7, true, and 0.5.
PROBE = """
#include <cstdint>
struct Tensor { void *data; int32_t device, id, ndim; uint8_t code, bits; uint16_t lanes;
                int64_t *shape, *strides; uint64_t offset; };
struct Any { int32_t type; uint32_t padding; union { int64_t i; double f; Tensor *t; }; };
extern "C" int __tvm_ffi_probe(void *, const Any *a, int32_t count, Any *) {
  const Tensor &t = *a[0].t;
  return !(count == 5 && a[0].type == 7 && (int64_t)t.data == 4096 && t.device == 2 && !t.id
    && t.ndim == 2 && t.code == 2 && t.bits == 16 && t.lanes == 1 && t.shape[0] == 2
    && t.shape[1] == 3 && t.strides[0] == 3 && t.strides[1] == 1 && !t.offset && a[1].type == 0
    && a[2].type == 1 && a[2].i == 7 && a[3].type == 2 && a[3].i == 1 && a[4].type == 3
    && a[4].f == 0.5);
}
"""


def test_an_entry_is_called_from_cpp(host, tmp_path):
    native = importlib.import_module("marks.native")
    source, library = tmp_path / "probe.cpp", tmp_path / "probe.so"
    source.write_text(PROBE)
    compiler.library(source, library)
    values = fi_ffi.TensorDesc(4096, (2, 3), "float16"), None, 7, True, 0.5
    assert native.entry_loop(library, "probe", values, 0)(100) > 0
    with pytest.raises(RuntimeError, match="the entry called from C\\+\\+ returned 1"):
        native.entry_loop(library, "probe", (*values[:4], 0.25), 0)(1)


def test_function_calls_leave_kernels_out(monkeypatch):
    """A kernel in numpy adds nothing to what a call is counted to call."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    counting = importlib.import_module("function_calls")
    x, weight = np.ones((4, 64), np.float16), np.ones(64, np.float16)

    def counted():
        tensors = [fi_ffi.as_desc(array) for array in (x, x, weight)]
        call = functools.partial(fi_ffi.rmsnorm, *tensors)
        call()
        return counting.profiled(lambda: call())

    fi_ffi.rmsnorm.forget()  # a row that another test has put in force is called by a shorter way
    with_kernel = counted()
    with kernels_replaced(noop):
        without = counted()
    assert with_kernel.python == without.python
    assert with_kernel.in_c == without.in_c
    assert 0 < with_kernel.python.total() < 50


# ------------------------------------------------------- benchmarks/visible.py: its judgement


@pytest.fixture
def visible():
    spec = importlib.util.spec_from_file_location("visible", BENCHMARKS / "visible.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize(
    ("one", "every", "is_met"),
    [([(5000, None)], [(5299, None)], True),  # 1.06
     ([(5000, None)], [(5351, None)], False),
     ([(9000, 6000.0)], [(9541, 6000.0)], False),
     ([(9000, 6000.0)], [(13000, 8700.0)], True),  # the peer too takes longer
     ([(9000, 6000.0), (12000, 5000.0)], [(9300, 6100.0), (20000, 9000.0)], True),  # the quickest
     ([(3000, None)], [(3349, None)], True),  # 0.35 us
     ([(3000, None)], [], False)],
)  # fmt: skip
def test_a_row_with_all_gpus_beside_one(visible, one, every, is_met):
    documents = [
        {"entries": [{"what": "w", "peer": "p", "fi_ffi_ns": mine, "peer_ns": peer}]}
        for mine, peer in (*one, *every)
    ]
    documents.append({"entries": [{"what": "no figure", "peer": "", "fi_ffi_ns": None}]})
    few, many = {}, {}
    for i, document in enumerate(documents):
        visible.add(few if i < len(one) else many, document)
    line, found = visible.shown(("w", "p"), few, many)
    assert found == is_met and line.endswith("| yes |" if is_met else "| NO |")
    assert {*few, *many} == {("w", "p")}


def test_a_run_sees_one_gpu_or_all(visible, tmp_path, monkeypatch):
    """The child process is a real one, which writes what it sees."""
    program = tmp_path / "host.py"
    program.write_text(
        "import json, os, sys\n"
        "folder = sys.argv[sys.argv.index('--output') + 1]\n"
        "seen = os.environ.get('CUDA_VISIBLE_DEVICES')\n"
        "json.dump([seen, sys.argv[3:]], open(folder + '/host.json', 'w'))\n"
    )
    monkeypatch.setattr(visible, "_HOST", program)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert visible.run(tmp_path / "a", True, ["--quick"]) == ["0", ["--quick"]]
    assert visible.run(tmp_path / "b", False, []) == [None, []]
