"""Rows in segments times matrices, against float64: on the CPU, and (tests/gpu) on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi import reference
from fi_ffi.cli.cases import bound
from fi_ffi.ops.matmul import segment
from fi_ffi.reference.gemm import KERNELS, fp8_products

from tests.helpers.calls import padded

BF16, E4M3, E5M2 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


def segments_of(kind: str, rng: np.random.Generator) -> list[int]:
    return {
        "one": [7], "empty": [0, 5, 0, 0, 3], "ones": [1] * 9, "nothing": [0, 0],
        "many": [int(n) for n in rng.integers(0, 9, 40)], "long": [130, 1, 300, 64],
    }[kind]  # fmt: skip


class Segments:
    """A call of `segment_gemm`, and what it must give."""

    def __init__(self, machine, rng, lengths, dtype, out_dtype, column_major, *, d_in=64,
                 d_out=40, weights=None, apart=0):  # fmt: skip
        self.machine, self.lengths, self.column_major = machine, lengths, column_major
        rows, count = sum(lengths), weights or len(lengths)
        shape = (count, d_out, d_in) if column_major else (count, d_in, d_out)
        self.x = padded(rng.standard_normal((rows, d_in)).astype(dtype), apart)
        self.weights = rng.standard_normal(shape).astype(dtype)
        self.out = padded(np.full((rows, d_out), np.nan, out_dtype), apart)
        self.indices = None if weights is None else rng.integers(0, count, len(lengths))
        self.placed = [machine.place(array) for array in (self.x, self.weights, self.out)]

    def call(self, **more):
        x, weights, out = (array.desc() for array in self.placed)
        more = {"seg_lens": self.lengths, "weight_indices": self.indices} | more
        fi_ffi.segment_gemm(
            x, weights, len(self.lengths), self.column_major, out, stream=self.machine.stream,
            **more,
        )  # fmt: skip

    def worst(self) -> float:
        """The largest error as a fraction of its bound; the memory around is as it was."""
        got = self.placed[2].get()
        assert all(array.intact() for array in self.placed)
        chosen = range(len(self.lengths)) if self.indices is None else self.indices
        starts = np.cumsum([0, *self.lengths])
        worst = 0.0
        for i, start, end in zip(chosen, starts, starts[1:], strict=False):
            x = self.x[start:end].astype(float)
            w = self.weights[i].astype(float)
            w = w.T if self.column_major else w
            if self.x.dtype.itemsize == 1:
                judge = fp8_products(x @ w, abs(x) @ abs(w), w.shape[0])
                worst = max(worst, judge(got[start:end])[1])
            elif end > start:
                allowed = bound(x @ w, abs(x) @ abs(w), got.dtype)
                error = abs(got[start:end].astype(float) - x @ w)
                worst = max(worst, float((np.nan_to_num(error, nan=np.inf) / allowed).max()))
        return worst


KINDS = ("one", "empty", "ones", "nothing", "many", "long")
# Dtypes of rows and of results, whether weights are column-major, and the backend.
WAYS = [(dtype, dtype, column, backend) for dtype in (np.float16, BF16) for column in (True, False)
        for backend in ("auto", "sm80", "sm90")]  # fmt: skip
WAYS += [(dtype, out, True, "auto") for dtype in (E4M3, E5M2) for out in (np.float16, BF16)]


def need(machine, backend: str) -> None:
    machine.need({"sm80": "gemm"}.get(backend, "gemm_sm90"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "out_dtype", "column_major", "backend"), WAYS)
def test_segments(dtype, out_dtype, column_major, backend, kind, machine, rng):
    need(machine, backend)
    made = Segments(machine, rng, segments_of(kind, rng), dtype, out_dtype, column_major)
    made.call(backend=backend)
    assert made.worst() <= 1


@pytest.mark.parametrize("backend", ["sm80", "sm90"])
@pytest.mark.parametrize("size", [(8, 8), (24, 136), (128, 128), (1000, 520), (4096, 1024)])
def test_widths_of_segments(size, backend, machine, rng):
    need(machine, backend)
    for column_major in (True, False):
        made = Segments(machine, rng, [3, 0, 40, 17], np.float16, np.float16, column_major,
                        d_in=size[0], d_out=size[1])  # fmt: skip
        made.call(backend=backend)
        assert made.worst() <= 1


@pytest.mark.parametrize("backend", ["sm80", "sm90"])
def test_chosen_weights_rows_apart_and_where_segments_start(backend, machine, rng):
    need(machine, backend)
    lengths = [4, 1, 0, 9, 2]
    made = Segments(machine, rng, lengths, BF16, BF16, True, weights=3, apart=16)
    starts = [0, *np.cumsum(lengths).tolist()]
    # The lengths are not looked at then.
    made.call(seg_lens=[1], seg_indptr=np.array(starts, np.int64), backend=backend)
    assert made.worst() <= 1


@pytest.mark.parametrize("backend", ["sm80", "sm90"])
@pytest.mark.parametrize("step", [0, 1, 3, 8, 67, 2**37])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_one_row_of_any_stride(device, step, backend, gpu, rng, monkeypatch):
    """There is no other row that it leads to, and the kernels are not told of it: they could not
    load rows so far apart."""
    told = []
    kernels = KERNELS["gemm" if backend == "sm80" else "gemm_sm90"]
    name = "cutlass_segment_gemm" + "_sm90" * (backend == "sm90")
    run = kernels[name]

    def kernel(*values):
        at = 2 if backend == "sm80" else 3
        told.extend(array.tolist() for array in values[at + 3 : at + 6])
        run(*values)

    monkeypatch.setitem(kernels, name, kernel)
    monkeypatch.setattr(reference, "_entries", {})
    x, out = rng.standard_normal((1, 64)).astype(np.float16), np.full((1, 40), np.nan, np.float16)
    weights = rng.standard_normal((1, 40, 64)).astype(np.float16)
    # numpy's own arrays of one row tell no stride.
    given = [
        fi_ffi.TensorDesc(a.ctypes.data, a.shape, "float16", strides=steps, device=device)
        for a, steps in ((x, (step, 1)), (weights, (64 * 40, 64, 1)), (out, (step, 1)))
    ]
    compiled = segment.SM80 if backend == "sm80" else segment.SM90
    compiled.forget()
    try:
        of_weights = {"batch_size": 1, "weight_column_major": True, "seg_lens": [1]}
        names = dict(zip(("x", "weights", "out"), given, strict=True))
        fi_ffi.segment_gemm(**names, **of_weights, backend=backend, stream=5)
    finally:
        compiled.forget()
    assert told == [[64], [64], [40]]
    assert np.allclose(out.astype(float), x.astype(float) @ weights[0].T.astype(float), rtol=1e-2,
                       atol=1e-2)  # fmt: skip


@pytest.mark.parametrize("backend", ["sm80", "sm90"])
def test_many_calls_of_segments_in_a_row(backend, machine, rng):
    """Tables of one call are not those of the next, though nothing waits in between."""
    need(machine, backend)
    calls = [
        Segments(machine, rng, [int(n) for n in rng.integers(0, 6, 20)], np.float16, np.float16,
                 True, d_in=16, d_out=16)
        for _ in range(20)
    ]  # fmt: skip
    machine.delay(machine.stream)
    for made in calls:
        made.call(backend=backend)
    machine.synchronize()
    assert max(made.worst() for made in calls) <= 1


@pytest.mark.parametrize("backend", ["sm80", "sm90"])
def test_segments_recorded_and_replayed(backend, machine, rng):
    need(machine, backend)
    made, other = (
        Segments(machine, rng, [3, 8, 0, 5], np.float16, np.float16, True) for _ in range(2)
    )
    replay = machine.capture(lambda: made.call(backend=backend))
    for _ in range(2):
        machine.poison(made.placed[2], machine.stream)
        other.call(backend=backend)  # on the same stream, with other tables
        replay()
        machine.synchronize()
        assert made.worst() <= 1 and other.worst() <= 1


REFUSED: dict[str, tuple[Callable[[dict], object], str]] = {
    "lengths": (lambda a: a.update(seg_lens=None), "seg_indptr or seg_lens"),
    "too many rows": (lambda a: a.update(seg_lens=[1, 2, 4]), "3 as many|the rows of `x`"),
    "too few rows": (lambda a: a.update(seg_lens=[1, 2, 2]), "the rows of `x`"),
    "batch_size": (lambda a: a.update(batch_size=4), "as many segments"),
    "a negative length": (lambda a: a.update(seg_lens=[1, -1, 6]), "seg_lens"),
    "falling": (lambda a: a.update(seg_indptr=[0, 4, 2, 6]), "do not decrease"),
    "not from 0": (lambda a: a.update(seg_indptr=[1, 2, 3, 6]), "0 and an end"),
    "index": (lambda a: a.update(weight_indices=[0, 3, 1]), "0 to 2"),
    "few indices": (lambda a: a.update(weight_indices=[0, 1]), "3 elements"),
    "few weights": (lambda a: a.update(weights=a["weights"][:2]), "one for each of 3"),
    "layout": (lambda a: a.update(weight_column_major=1), "True or False"),
    "wrong layout": (lambda a: a.update(weight_column_major=False), "d_in|d_out"),
    "width": (
        lambda a: a.update(x=a["x"][:, :12], weights=a["weights"][..., :12]), "multiple of 8"),
    "dtype": (lambda a: a.update(x=a["x"].astype(np.float32)), "float16 or bfloat16"),
    "out": (lambda a: a.update(out=a["out"].astype(BF16)), "float16, the T"),
    "backend": (lambda a: a.update(backend="sm100"), "'auto' or 'sm80' or 'sm90'"),
    "fp8 rows": (
        lambda a: a.update({n: a[n].astype(E4M3) for n in ("x", "weights")},
                           weight_column_major=False), "no other kernels"),
    "fp8 sm80": (
        lambda a: a.update({n: a[n].astype(E4M3) for n in ("x", "weights")}, backend="sm80"),
        "sm80 has float16's"),
    "aliasing": (lambda a: a.update(out=a["x"][:, :8], weights=a["weights"][:, :8]), "apart"),
    "overlapping": (
        lambda a: a.update(x=np.lib.stride_tricks.as_strided(a["x"], (6, 16), (16, 2))),
        "do not overlap"),
    "on the GPU": (
        lambda a: a.update(seg_lens=fi_ffi.TensorDesc(4096, (3,), "int64", device="cuda:0")),
        "host array"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_segments_that_are_refused(what, rng):
    change, told = REFUSED[what]
    arguments = {
        "x": rng.standard_normal((6, 16)).astype(np.float16), "batch_size": 3,
        "weights": rng.standard_normal((3, 24, 16)).astype(np.float16), "seg_lens": [1, 3, 2],
        "weight_column_major": True, "out": np.full((6, 24), np.nan, np.float16),
    }  # fmt: skip
    fi_ffi.segment_gemm(**arguments)
    assert np.isfinite(arguments["out"]).all()
    arguments["out"][...] = np.nan
    kept = arguments["out"]
    change(arguments)
    with pytest.raises(fi_ffi.ArgumentError, match=told) as caught:
        fi_ffi.segment_gemm(**arguments)
    assert caught.value.op == "segment_gemm"
    assert np.isnan(kept).all()
