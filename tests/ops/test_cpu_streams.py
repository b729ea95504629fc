"""`stream=` on the CPU: a stream of any library is allowed and ignored, anything else refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi import comm
from fi_ffi.errors import ArgumentError, ArgumentTypeError

from tests.helpers.remains import allowed
from tests.modules.conftest import compiled


class Stream:
    """A stream of a library that follows cuda.core's protocol."""

    def __init__(self, handle: object) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, object]:
        return 0, self.handle


class Destroyed:
    def __cuda_stream__(self) -> tuple[int, int]:
        raise RuntimeError("this stream was destroyed")


GOOD: dict[str, Any] = {
    "none": None, "legacy": 0, "default": 1, "per thread": 2, "handle": 0x51, "last": 2**64 - 1,
    "numpy": np.uint64(7), "object": Stream(0x51),
}  # fmt: skip
BAD: dict[str, tuple[Any, type[ArgumentError]]] = {
    "text": ("0", ArgumentTypeError), "float": (1.5, ArgumentTypeError),
    "bool": (True, ArgumentTypeError), "list": ([0], ArgumentTypeError),
    "array": (np.zeros(1, np.int64), ArgumentTypeError),
    "any object": (object(), ArgumentTypeError),
    "object without a handle": (Stream(None), ArgumentTypeError),
    "negative": (-1, ArgumentError), "too large": (2**64, ArgumentError),
    "destroyed": (Destroyed(), ArgumentError),
}  # fmt: skip


def tensors() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng()
    x = rng.standard_normal((3, 64)).astype(np.float16)
    return np.full_like(x, np.nan), x, rng.standard_normal(64).astype(np.float16)


def attempt(call: Callable[[], object], *outputs: np.ndarray) -> None:
    """Make a call, which must leave its poisoned outputs alone if it raises."""
    before = [output.tobytes() for output in outputs]
    try:
        call()
    except ArgumentError:
        assert [output.tobytes() for output in outputs] == before
        raise


def typed(stream: Any) -> np.ndarray:
    out, x, weight = tensors()
    attempt(lambda: fi_ffi.rmsnorm(out, x, weight, stream=stream), out)
    return out


def settled(stream: Any) -> np.ndarray:
    """The same after a good call, whose frame is there."""
    fi_ffi.rmsnorm(*tensors(), stream=3)
    return typed(stream)


def prepared(stream: Any) -> np.ndarray:
    out, x, weight = tensors()
    attempt(lambda: fi_ffi.rmsnorm.prepare(out, x, weight, stream=stream)(), out)
    return out


def by_prepare(stream: Any) -> np.ndarray:
    out, x, weight = tensors()
    attempt(lambda: fi_ffi.prepare(fi_ffi.rmsnorm, out, x, weight, stream=stream)(), out)
    return out


def with_scratch(stream: Any) -> np.ndarray:
    logits = np.random.default_rng().standard_normal((2, 100), np.float32)
    out = np.full_like(logits, np.nan)
    attempt(lambda: fi_ffi.softmax(None, logits, out, stream=stream), out)
    return out


def _plan() -> tuple[Any, tuple[np.ndarray, ...]]:
    rng = np.random.default_rng()
    indptr, pages, last = (np.array(v, np.int32) for v in ([0, 1], [0], [3]))
    plan = fi_ffi.BatchDecodePlan(
        indptr, pages, last, num_qo_heads=4, num_kv_heads=2, head_dim=64, page_size=4, device="cpu"
    )
    q = rng.standard_normal((1, 4, 64)).astype(np.float16)
    k, v = (rng.standard_normal((1, 4, 2, 64)).astype(np.float16) for _ in range(2))
    return plan, (q, k, v, np.full_like(q, np.nan))


def plan_run(stream: Any) -> np.ndarray:
    plan, given = _plan()
    attempt(lambda: plan.run(*given, stream=stream), given[3])
    return given[3]


def plan_prepared(stream: Any) -> np.ndarray:
    plan, given = _plan()
    attempt(lambda: fi_ffi.prepare(plan.run, *given, stream=stream)(), given[3])
    return given[3]


def single(stream: Any) -> np.ndarray:
    rng = np.random.default_rng()
    q = rng.standard_normal((4, 64)).astype(np.float16)
    k, v = (rng.standard_normal((5, 2, 64)).astype(np.float16) for _ in range(2))
    out, tmp = np.full_like(q, np.nan), np.zeros(1 << 16, np.uint8)
    attempt(lambda: fi_ffi.single_decode(q, k, v, tmp, out, stream=stream), out)
    return out


def group(stream: Any) -> np.ndarray:
    x, out = np.ones(16, np.float32), np.full(16, np.nan, np.float32)
    with comm.Group(comm.threads(1)[0], device="cpu") as made:
        attempt(lambda: made.all_reduce(x, out, stream=stream), out)
    return out


WAYS = (
    typed, settled, prepared, by_prepare, with_scratch, plan_run, plan_prepared,
    single, group,
)  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("good", GOOD)
def test_a_stream_is_allowed(way: Callable[[Any], np.ndarray], good: str) -> None:
    assert np.isfinite(way(GOOD[good])).all()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("bad", BAD)
def test_what_is_no_stream_is_refused(way: Callable[[Any], np.ndarray], bad: str) -> None:
    stream, kind = BAD[bad]
    refused = pytest.raises(kind, match="argument `stream`: got ")
    # A prepared call's frame is its own, and goes with it.
    with allowed("free frames"), refused as caught:
        way(stream)
    assert type(caught.value) is kind and caught.value.argument == "stream"


@pytest.mark.parametrize("bad", BAD)
def test_scopes_and_captures_take_streams_only(bad: str) -> None:
    stream, kind = BAD[bad]
    for make in (fi_ffi.stream, fi_ffi.capture):
        with pytest.raises(kind, match="argument `stream`: got "):
            make(stream)


@pytest.mark.parametrize("bad", BAD)
def test_entries_of_modules_take_streams_only(bad: str) -> None:
    stream, kind = BAD[bad]
    entry = fi_ffi.module(compiled("every_kind.cc")).entry("add_all")
    with pytest.raises(kind, match="argument `stream`: got "):
        entry(np.zeros(3, np.float32), [np.ones(3, np.float32)], None, stream=stream)
    for good in GOOD.values():
        out = np.full(3, np.nan, np.float32)
        entry(out, [np.ones(3, np.float32)], None, stream=good)
        assert (out == 1).all()
