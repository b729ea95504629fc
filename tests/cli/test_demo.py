"""`fi-ffi demo`: right results are "ok", and no others are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

from fi_ffi import reference
from fi_ffi.abi.function import Entry, register
from fi_ffi.abi.tensor import parse_device
from fi_ffi.cli import cuda, demo_calls, main
from fi_ffi.cli.cases import bound, within
from fi_ffi.cli.demo import Result
from fi_ffi.cli.demo_calls import arguments
from fi_ffi.loader import runtime
from fi_ffi.ops.functions import OPS
from fi_ffi.reference.arrays import over_arrays

from tests.helpers.benchmarks import noop
from tests.helpers.children import done

OPS_OF_DEMO = [*arguments(1, 8, np.random.default_rng())]
CALLS = [call.name for call in demo_calls.calls(1, 8, np.random.default_rng())]
OF_DEMO = CALLS[:-1]  # the last is a graph's, which needs a GPU
SMALL = ("--device", "cpu", "--tokens", "3", "--hidden", "64")


def demo(*options: str, code: int = 0) -> str:
    done = CliRunner().invoke(main, ["demo", *options], env={"FI_FFI_KERNELS": None})
    runtime.use_source(None)
    assert done.exit_code == code, done.output
    return done.output


def statuses(text: str) -> dict[str, str]:
    document, _ = json.JSONDecoder().raw_decode(text)
    return {result["op"]: result["status"] for result in document["results"]}


def test_how_large_its_tensors_are():
    words = " ".join(demo("--help").split())
    assert re.search(r"--tokens INTEGER RANGE Number of tokens\. \[default: 32;", words), words
    assert re.search(r"--hidden INTEGER RANGE Hidden size\. \[default: 4096;", words), words


def test_every_result_is_right_on_the_cpu():
    document = json.loads(demo("--device", "cpu", "--json"))
    assert document["device"] == "cpu" and 0 < document["seconds"] < 600
    assert [each["op"] for each in document["not_run"]] == CALLS[-1:]
    assert [result["op"] for result in document["results"]] == OF_DEMO
    for result in document["results"]:
        assert result["status"] == "ok" and result["provider"] == "reference"
        assert 0 <= result["error_of_bound"] <= 1
        assert (result["max_error"] == 0) == (result["op"] == "append_paged_kv_cache")
        assert result["microseconds"] > 0 and result["gigabytes_per_second"] is None
    families = {result["family"] for result in document["results"]}
    assert families >= {"attention", "caches", "experts", "norms"}
    assert len(CALLS) == demo_calls.COUNT == len({*CALLS})


def test_a_person_reads_what_judges_first():
    """A line for each result under its family's, and one that sums up; none over 80 columns."""
    lines = demo(*SMALL).splitlines()
    assert all(len(line) <= 80 and line == line.rstrip() for line in lines)
    found = [line for line in lines if line.startswith("  ok ")]
    assert [line.split()[-2] for line in found] == OF_DEMO
    for line in found:
        assert re.match(r"  ok  ( exact|  [01]\.\d\d of the allowed error) ", line), line
    assert lines[lines.index("attention") + 1].split()[-2:] == ["BatchPrefillPlan", "3x32x128"]
    assert "  not run: capture of two ops: a graph needs a GPU" in lines
    right = f"{len(OF_DEMO)} of {len(OF_DEMO)} results are right; 1 not run; "
    assert re.fullmatch(re.escape(right) + r"\d+\.\d s", lines[-1]), lines[-1]


def test_each_result_is_shown_as_it_comes():
    """The last is not made before the first is shown."""
    program = (
        "import sys; from fi_ffi.cli import demo, main\n"
        "def run(*given, before=demo._run):\n"
        "    if run.done: print('next', sys.stdout.flush())\n"
        "    run.done += 1\n"
        "    return before(*given)\n"
        "run.done = 0; demo._run = run; main()"
    )
    _, out, _ = done(program, "demo", *SMALL)
    kinds = [line.split()[0] for line in out.splitlines() if line.startswith(("  ok", "n"))]
    kinds = [kind for kind in kinds if kind in ("ok", "next")]
    assert kinds == ["ok", "next"] * len(OF_DEMO[1:]) + ["ok"]


@pytest.mark.parametrize("device", ["gpu", "tpu:7", "cuda:", "cpu:1", "cuda_host", "GPU 0"])
def test_a_device_that_is_none(device):
    text = demo("--device", device, code=2)
    assert f"{device!r} is not a device: use cpu or cuda:N" in text and "result" not in text


def test_a_gpu_that_is_not_here():
    count = len(cuda.gpus())
    text = demo("--device", f"cuda:{count}", code=2).replace("\n", " ")
    assert f"cuda:{count} is not here" in text and "--device cpu" in text
    assert ("Install NVIDIA's driver" in text) == (cuda.driver_version() is None)
    assert "cudaError" not in text


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Puts another kernel in the place of an op's; one that does nothing, if none is given."""

    runtime.ensure_tvm_ffi()  # for what is put in, whichever test comes first

    def replace(name: str, other: Entry | None = None) -> None:
        row, right = OPS[name].row, reference.entry

        def entry(module: str, signature: Any, kernel: str, *rest: Any, **more: Any) -> Entry:
            if (module, str(signature)) == (row.module, str(row.signature)):
                return other or noop()
            return right(module, signature, kernel, *rest, **more)

        monkeypatch.setattr(reference, "entry", entry)
        OPS[name].forget()

    yield replace
    monkeypatch.undo()
    for name in OPS_OF_DEMO:
        OPS[name].forget()


@pytest.mark.parametrize("name", OPS_OF_DEMO)
def test_a_kernel_that_does_nothing_fails(replace, name):
    """What it should have written is poison, or what it was."""
    replace(name)
    text = demo(*SMALL, "--json", code=1)
    assert statuses(text) == {op: "fail" if op == name else "ok" for op in OF_DEMO}
    assert "Error: a result is further from float64 than its dtype allows" in text
    text = demo(*SMALL, code=1)
    (line,) = [line for line in text.splitlines() if f" {name} " in line]
    assert line.startswith("  fail")
    assert f"{len(OF_DEMO) - 1} of {len(OF_DEMO)} results are right, wrong: {name};" in text


@pytest.mark.parametrize("name", CALLS)
def test_what_is_not_written_is_wrong(name, rng):
    (call,) = [call for call in demo_calls.calls(3, 64, rng) if call.name == name]
    assert all(judge(call.arrays[name])[1] > 1 for name, judge in call.judges.items())


def test_one_of_two_results_is_not_enough(replace):
    def half(v_a, s_a, v_b, s_b, v_merged, s_merged):
        s_merged[...] = np.logaddexp2(s_a, s_b)

    signature = OPS["merge_state"].row.signature
    replace("merge_state", register("fi_ffi.tests.half", signature, over_arrays(half)))
    assert statuses(demo(*SMALL, "--json", code=1))["merge_state"] == "fail"


def test_the_worst_error_is_that_of_its_own_bound(replace):
    """Two results of different sizes: the wrong one's error is by far the smaller number."""
    off = 2e-4

    def nearly(v_a, s_a, v_b, s_b, v_merged, s_merged):
        s = np.logaddexp2(s_a.astype(np.float64), s_b)
        a, b = (np.exp2(each - s)[..., None] for each in (s_a, s_b))
        v_merged[...] = a * v_a + b * v_b
        s_merged[...] = s + off

    signature = OPS["merge_state"].row.signature
    replace("merge_state", register("fi_ffi.tests.nearly", signature, over_arrays(nearly)))
    document, _ = json.JSONDecoder().raw_decode(demo(*SMALL, "--json", code=1))
    (result,) = (each for each in document["results"] if each["op"] == "merge_state")
    assert result["status"] == "fail" and result["error_of_bound"] > 2
    assert result["max_error"] == pytest.approx(off, rel=0.1)
    off = 0.0
    document, _ = json.JSONDecoder().raw_decode(demo(*SMALL, "--json"))
    (result,) = (each for each in document["results"] if each["op"] == "merge_state")
    assert result["status"] == "ok" and result["max_error"] > 2e-4


@pytest.mark.parametrize("name", OF_DEMO)
def test_one_wrong_element_is_seen(name, rng):
    """In each tensor that is written, of the dtype that the call is made in."""
    (call,) = [call for call in demo_calls.calls(5, 64, rng) if call.name == name]
    call.bind(call.arrays, parse_device("cpu"), None)()
    assert call.judges
    for written, judge in call.judges.items():
        right = call.arrays[written]
        assert judge(right)[1] <= 1
        place = tuple(int(rng.integers(n)) for n in right.shape)
        wrong = right.copy()
        if right.dtype.kind == "i":  # another expert twice: one with as great a score is right
            wrong[place] = right[place[0], place[1] - 1]
            assert not judge(wrong)[1] <= 1
            continue
        if name == "append_paged_kv_cache":  # each bit counts
            wrong.view(f"u{right.itemsize}")[place] ^= 1
            assert not judge(wrong)[1] <= 1
            continue
        at = float(right[place])
        for number in (np.nan, at + abs(at) + 1, at - 0.1 * abs(at) - 0.1):
            wrong = right.copy()
            wrong[place] = number
            assert not judge(wrong)[1] <= 1


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_the_bound_is_half_a_step(dtype):
    """And the arithmetic's slack, where there is a magnitude; a step away is wrong."""
    value = np.float64([1.0, 1.5, -1.75])
    exact = bound(value, 0 * value, np.dtype(dtype))
    eps = float(ml_dtypes.finfo(dtype).eps)
    assert np.allclose(exact, abs(value) * eps / 2, rtol=2e-3)
    assert (bound(value, abs(value), np.dtype(dtype)) > exact).all()
    step = float(np.finfo(np.float16).eps) * abs(value)
    assert (bound(value, abs(value), np.dtype(np.float16)) < step).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_each_element_has_its_own_bound(dtype):
    """A small element's error counts by what it may be, not by what the largest may."""
    value = np.float64([[1024.0, 1.0], [1.0, 2.0**-6]])
    allowed = bound(value, 0 * value, np.dtype(dtype))
    judge = within(value, 0 * value, 0.0)
    for place in np.ndindex(value.shape):
        for steps, is_right in ((0, True), (2, False)):
            got = value.astype(dtype)
            got[place] += np.asarray(2 * steps * allowed[place], dtype)
            error, fraction = judge(got)
            assert (fraction <= 1) == is_right
            assert error == pytest.approx(2 * steps * allowed[place], rel=0.01)


@pytest.mark.parametrize(("error", "status"), [(0, "ok"), (1, "ok"), (1.001, "fail"),
                                               (np.inf, "fail"), (np.nan, "fail")])  # fmt: skip
def test_what_is_ok(error, status):
    assert Result("family", "op", "here", "1", "float16", 0.0, error, 1.0).status == status


def test_every_output_is_poisoned():
    for name, (arrays, _) in arguments(5, 64, np.random.default_rng()).items():
        for arg in OPS[name].row.tensors:
            if arg.writes and not arg.reads and not arg.is_scratch:
                array = arrays[arg.name]
                poison = array == -1 if array.dtype.kind == "i" else np.isnan(array)
                assert poison.all(), f"{name}: {arg.name}"


def test_kernels_that_are_not_there_are_named(tmp_path):
    missing = tmp_path / "no.whl"
    assert f"Error: {missing}: there is no such file" in demo("--kernels", str(missing), code=1)
