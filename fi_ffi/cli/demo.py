"""`fi-ffi demo`: some ops on what this machine has, checked against float64."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, TypeAlias

import click
import ml_dtypes
import numpy as np

import fi_ffi
from fi_ffi.cli import output
from fi_ffi.cli.cases import Case, case_of
from fi_ffi.errors import FiFfiError, KernelNotFoundError, LoaderError
from fi_ffi.loader import progress, search
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.functions import OPS
from fi_ffi.reference.arrays import Array

_TIMED_CALLS = 20
_HEADS, _KV_HEADS, _HEAD_DIM, _PAGE = 32, 8, 128, 16

Arguments: TypeAlias = "tuple[dict[str, Array], dict[str, Any]]"


def arguments(tokens: int, hidden: int, rng: np.random.Generator) -> dict[str, Arguments]:
    """Random arguments of each op that is run, by its name; what is only written is poison.

    They stand for what a language model calls: a norm, the residual, an activation, positions,
    the cache, states of attention, and a softmax over its vocabulary.
    """

    def normal(*shape: int, dtype: Any = np.float16) -> Array:
        # Rows of different sizes, so that a row normalised by another's scale is seen.
        spread = np.exp(rng.uniform(-2, 2, [*shape[:-1], 1])) if len(shape) > 1 else 1.0
        values: Array = (rng.standard_normal(shape) * spread).astype(dtype)
        return values

    def poison(*shape: int, dtype: Any = np.float16) -> Array:
        return np.full(shape, np.nan, dtype)

    eps = {"eps": 1e-6, "enable_pdl": False}
    norm = {"out": poison(tokens, hidden), "input": normal(tokens, hidden)}
    residual = {"input": normal(tokens, hidden), "residual": normal(tokens, hidden)}
    gate = normal(tokens, 2 * hidden, dtype=ml_dtypes.bfloat16)
    of_gate = {"out": poison(tokens, hidden, dtype=ml_dtypes.bfloat16), "input": gate}
    heads = {"q": (tokens, _HEADS, _HEAD_DIM), "k": (tokens, _KV_HEADS, _HEAD_DIM)}
    rope = {name: normal(*shape) for name, shape in heads.items()}
    rope |= {f"{name}_rope": poison(*shape) for name, shape in heads.items()}
    states = {f"v_{of}": normal(*heads["q"]) for of in "ab"}
    states |= {f"s_{of}": normal(tokens, _HEADS, dtype=np.float32) for of in "ab"}
    merged = {"v_merged": poison(*heads["q"])}
    merged["s_merged"] = poison(tokens, _HEADS, dtype=np.float32)
    logits = normal(tokens, hidden, dtype=np.float32)
    return {
        "rmsnorm": (norm | {"weight": normal(hidden)}, eps),
        "fused_add_rmsnorm": (residual | {"weight": normal(hidden)}, eps),
        "silu_and_mul": (of_gate, {"enable_pdl": False}),
        "apply_rope_pos_ids": (
            rope | {"pos_ids": rng.integers(0, 4096, tokens).astype(np.int32)},
            {"rotary_dim": _HEAD_DIM, "interleave": False, "rope_scale": 1.0, "rope_theta": 1e4},
        ),
        "append_paged_kv_cache": (_cache(tokens, rng), {"kv_layout": "NHD"}),
        "merge_state": (states | merged, {}),
        "softmax": (
            {
                "workspace_buffer": np.zeros(2**20, np.uint8), "logits": logits,
                "output": np.full_like(logits, np.nan),
            },
            {"temperature_val": 0.7, "enable_pdl": False},
        ),
    }  # fmt: skip


def _cache(tokens: int, rng: np.random.Generator) -> dict[str, Array]:
    """Random bits for a paged cache, of which one request gets all tokens in random order."""

    def bits(*shape: int) -> Array:
        return rng.integers(0, 2**16, shape, np.uint16).view(np.float16)

    pages = -(-tokens // _PAGE)
    tables = {
        "batch_indices": np.zeros(tokens), "positions": rng.permutation(tokens),
        "kv_indices": rng.permutation(pages + 3)[:pages], "kv_indptr": np.array([0, pages]),
        "kv_last_page_len": np.array([(tokens - 1) % _PAGE + 1]),
    }  # fmt: skip
    return {
        "append_key": bits(tokens, _KV_HEADS, _HEAD_DIM),
        "append_value": bits(tokens, _KV_HEADS, _HEAD_DIM),
        "paged_k_cache": bits(pages + 3, _PAGE, _KV_HEADS, _HEAD_DIM),
        "paged_v_cache": bits(pages + 3, _PAGE, _KV_HEADS, _HEAD_DIM),
        **{name: table.astype(np.int32) for name, table in tables.items()},
    }


@dataclass(frozen=True)
class Result:
    """One op's run; `error_of_bound` at most 1 means right."""

    op: str
    provider: str
    shape: str
    dtype: str
    max_error: float
    error_of_bound: float
    microseconds: float

    @property
    def status(self) -> str:
        return "ok" if self.error_of_bound <= 1 else "fail"


@click.command()
@click.option("--kernels", help="Directory or wheel of kernels (default: FI_FFI_KERNELS).")
@click.option("--device", help="cpu, or cuda:N (default: a GPU if kernels for it are here).")
@click.option("--tokens", default=32, show_default=True, type=click.IntRange(1, 1 << 20))
@click.option("--hidden", default=4096, show_default=True, type=click.IntRange(8, 1 << 16))
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def demo(kernels: str | None, device: str | None, tokens: int, hidden: int, as_json: bool) -> None:
    """Run some ops on what this machine has and check them against float64.

    On a machine with a GPU and kernels these run; on any other, the numpy reference
    kernels do, through the same calls.
    """
    if kernels:
        fi_ffi.use_kernels(kernels)
    where, reason = (device, "as asked") if device else _choose_device()
    results, missing = _run_all(where, tokens, hidden)
    if as_json:
        rows = [asdict(result) | {"status": result.status} for result in results]
        document = {"device": where, "reason": reason, "results": rows, "missing": missing}
        output.print_json(document)
    else:
        _print(results, missing, where, reason)
    if any(result.status != "ok" for result in results):
        raise FiFfiError("a result is further from float64 than its dtype allows")


def _choose_device() -> tuple[str, str]:
    """The device to run on, and why."""
    from fi_ffi.cli import cuda

    found = cuda.gpus()
    if not found:
        return "cpu", "no GPU here: numpy reference kernels"
    try:
        search.find_module("norm", 0)
    except LoaderError:
        return "cpu", f"no kernels for {found[0].name} here: `fi-ffi doctor` tells why"
    return "cuda:0", found[0].name


def _run_all(device: str, tokens: int, hidden: int) -> tuple[list[Result], list[str]]:
    """Each op's run, and the ops that the kernels here lack."""
    results, missing = [], []
    given = arguments(tokens, hidden, np.random.default_rng())
    # On a GPU it may fetch kernels first.
    with progress.counter("ops", len(given), quiet=device == "cpu") as count:
        for name, (arrays, scalars) in given.items():
            count(name)
            try:
                results.append(_run(OPS[name], device, arrays, scalars))
            except KernelNotFoundError:
                if not results:
                    raise
                missing.append(name)
    return results, missing


def _run(op: Op, device: str, arrays: dict[str, Array], scalars: dict[str, Any]) -> Result:
    case = case_of(op.row, arrays, scalars)
    on = _on_gpu if device.startswith("cuda") else _on_cpu
    with on(case, device) as (call, read, timed):
        call(op)
        errors = [case.error(name, read(name)) for name in case.expected]
        seconds = timed(op)
    first = next(case.arrays[arg.name] for arg in op.row.tensors if not arg.is_scratch)
    shape = "x".join(str(n) for n in first.shape)
    provider = f"FlashInfer {search.release()}" if on is _on_gpu else "reference"
    worst = max(errors, key=lambda error: error[1])
    return Result(op.row.name, provider, shape, first.dtype.name, *worst, seconds * 1e6)


_Use = tuple[Callable[[Op], None], Callable[[str], Array], Callable[[Op], float]]


@contextmanager
def _on_cpu(case: Case, device: str) -> Iterator[_Use]:
    def call(op: Op) -> None:
        op(**case.arrays, **case.scalars)

    def timed(op: Op) -> float:
        seconds = []
        for _ in range(_TIMED_CALLS):
            start = time.perf_counter()
            call(op)
            seconds.append(time.perf_counter() - start)
        return median(seconds)

    yield call, case.arrays.__getitem__, timed


@contextmanager
def _on_gpu(case: Case, device: str) -> Iterator[_Use]:
    from cuda.bindings import runtime

    from fi_ffi.cli import cuda

    index = fi_ffi.parse_device(device).index
    arrays = {name: cuda.DeviceArray(a, device=index) for name, a in case.arrays.items()}
    descs = {name: array.desc() for name, array in arrays.items()}
    with cuda.on_device(index):
        stream: Any = cuda.check(runtime.cudaStreamCreate())

    def call(op: Op) -> None:
        op(**descs, **case.scalars, stream=stream)

    def timed(op: Op) -> float:
        with cuda.on_device(index):
            start, end = (cuda.check(runtime.cudaEventCreate()) for _ in range(2))
            cuda.check(runtime.cudaEventRecord(start, stream))
            for _ in range(_TIMED_CALLS):
                call(op)
            cuda.check(runtime.cudaEventRecord(end, stream))
            cuda.check(runtime.cudaEventSynchronize(end))
        milliseconds: float = cuda.check(runtime.cudaEventElapsedTime(start, end))
        return milliseconds / 1e3 / _TIMED_CALLS

    try:
        yield call, lambda name: arrays[name].get(), timed
    finally:
        cuda.check(runtime.cudaStreamDestroy(stream))
        for array in arrays.values():
            array.free()


def _print(results: list[Result], missing: list[str], device: str, reason: str) -> None:
    rows = [
        (
            result.op,
            result.provider,
            result.shape,
            result.dtype,
            f"{result.max_error:.2e}",
            f"{result.error_of_bound:.2f}",
            f"{result.microseconds:,.1f}",
            result.status,
        )
        for result in results
    ]
    columns = ("op", "provider", "shape", "dtype", "max error", "of bound", "us a call", "")
    output.print_table(f"fi_ffi on {device} ({reason})", columns, rows, numbers=columns[4:7])
    output.console().print(
        "max error: against float64. of bound: 1 is half a step of the dtype (2^-16 of the\n"
        "magnitude added for float32 arithmetic), 0 the same bits; above 1 fails.",
        style="dim",
    )
    if missing:
        output.console().print(f"Not in the kernels here: {', '.join(missing)}.")
