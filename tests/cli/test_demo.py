"""`fi-ffi demo`: right results are "ok", and no others are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

from fi_ffi import reference
from fi_ffi.abi.function import Entry, register
from fi_ffi.cli import main
from fi_ffi.cli.cases import bound, case_of
from fi_ffi.cli.demo import Result, arguments
from fi_ffi.loader import runtime
from fi_ffi.ops.functions import OPS
from fi_ffi.reference.arrays import over_arrays

from tests.helpers.benchmarks import noop

OF_DEMO = [*arguments(1, 8, np.random.default_rng())]
SMALL = ("--device", "cpu", "--tokens", "3", "--hidden", "64")


def demo(*options: str, code: int = 0) -> str:
    done = CliRunner().invoke(main, ["demo", *options], env={"FI_FFI_KERNELS": None})
    runtime.use_source(None)
    assert done.exit_code == code, done.output
    return done.output


def statuses(text: str) -> dict[str, str]:
    document, _ = json.JSONDecoder().raw_decode(text)
    return {result["op"]: result["status"] for result in document["results"]}


def test_every_result_is_right_on_the_cpu():
    document = json.loads(demo("--device", "cpu", "--json"))
    assert document["device"] == "cpu" and document["missing"] == []
    assert [result["op"] for result in document["results"]] == OF_DEMO
    for result in document["results"]:
        assert result["status"] == "ok" and result["provider"] == "reference"
        assert 0 <= result["error_of_bound"] <= 1
        assert (result["max_error"] == 0) == (result["op"] == "append_paged_kv_cache")
        assert result["microseconds"] > 0


def test_a_table():
    text = demo(*SMALL)
    assert "3x64" in text and all(name in text for name in OF_DEMO)
    assert "fail" not in text.replace("above 1 fails", "")


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Puts another kernel in the place of an op's; one that does nothing, if none is given."""

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
    for name in OF_DEMO:
        OPS[name].forget()


@pytest.mark.parametrize("name", OF_DEMO)
def test_a_kernel_that_does_nothing_fails(replace, name):
    """What it should have written is poison, or what it was."""
    replace(name)
    text = demo(*SMALL, "--json", code=1)
    assert statuses(text) == {op: "fail" if op == name else "ok" for op in OF_DEMO}
    assert "Error: a result is further from float64 than its dtype allows" in text
    (line,) = [line for line in demo(*SMALL, code=1).splitlines() if line.startswith(f"{name} ")]
    assert line.split()[-1] == "fail"


def test_one_of_two_results_is_not_enough(replace):
    def half(v_a, s_a, v_b, s_b, v_merged, s_merged):
        s_merged[...] = np.logaddexp2(s_a, s_b)

    signature = OPS["merge_state"].row.signature
    replace("merge_state", register("fi_ffi.tests.half", signature, over_arrays(half)))
    assert statuses(demo(*SMALL, "--json", code=1))["merge_state"] == "fail"


@pytest.mark.parametrize("name", OF_DEMO)
def test_one_wrong_element_is_seen(name, rng):
    """In each tensor that is written, of the dtype that the op is run in."""
    case = case_of(OPS[name].row, *arguments(5, 64, rng)[name])
    assert case.expected
    for written, (value, magnitude) in case.expected.items():
        right = value.astype(case.arrays[written].dtype)
        assert case.error(written, right)[1] <= 1
        place = tuple(int(rng.integers(n)) for n in right.shape)
        if magnitude is None:  # random bits, NaN among them, of which each counts
            wrong = right.copy()
            wrong.view(f"u{right.itemsize}")[place] ^= 1
            assert not case.error(written, wrong)[1] <= 1
            continue
        for number in (np.nan, 2 * float(right[place]) + 1, 0.9 * float(right[place]) - 0.01):
            wrong = right.copy()
            wrong[place] = number
            assert not case.error(written, wrong)[1] <= 1


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


@pytest.mark.parametrize(("error", "status"), [(0, "ok"), (1, "ok"), (1.001, "fail"),
                                               (np.inf, "fail"), (np.nan, "fail")])  # fmt: skip
def test_what_is_ok(error, status):
    assert Result("op", "here", "1", "float16", 0.0, error, 1.0).status == status


def test_every_output_is_poisoned():
    for name, (arrays, _) in arguments(5, 64, np.random.default_rng()).items():
        for arg in OPS[name].row.tensors:
            if arg.writes and not arg.reads and not arg.is_scratch:
                assert np.isnan(arrays[arg.name].astype(np.float32)).all(), f"{name}: {arg.name}"


def test_kernels_that_are_not_there_are_named(tmp_path):
    missing = tmp_path / "no.whl"
    assert f"Error: {missing}: there is no such file" in demo("--kernels", str(missing), code=1)
