"""What ranks do in tests of groups, on the CPU and on GPUs: bodies for `tests.helpers.ranks.run`.

A body is of one rank: it makes its group, its arrays and its results.  Ranks have GPUs by their
numbers, all the same one where `gpus` is 1.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import ml_dtypes
import numpy as np

from fi_ffi import comm
from fi_ffi.errors import HangError

from tests.helpers import ranks
from tests.helpers.rounding import step

DTYPES = tuple(map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16)))
P = comm.AllReduceFusionPattern
# op, elements, number of the dtype, in place, algorithm
Calls = list[tuple[str, int, int, bool, str]]


class Host:
    """Arrays of a rank on the CPU."""

    device, stream = "cpu", None

    def put(self, array: np.ndarray) -> Any:
        return array.copy()

    def of(self, array: Any) -> Any:
        return array

    def get(self, array: Any) -> np.ndarray:
        return np.array(array)

    def poison(self, array: Any, start: int = 0, count: int | None = None) -> None:
        array.reshape(-1).view(np.uint8)[start : None if count is None else start + count] = 0xFF

    def close(self) -> None:
        pass


class Gpu:
    """Arrays and the stream of a rank on a GPU."""

    def __init__(self, index: int) -> None:
        from cuda.bindings import runtime

        from fi_ffi.cli.cuda import check

        self.index, self.device, self._made = index, f"cuda:{index}", []
        check(runtime.cudaSetDevice(index))
        self.stream = self.new_stream()

    def new_stream(self) -> int:
        from cuda.bindings import runtime

        from fi_ffi.cli.cuda import check

        flags = runtime.cudaStreamNonBlocking
        return int(check(runtime.cudaStreamCreateWithFlags(flags)))

    def put(self, array: np.ndarray) -> Any:
        from fi_ffi.cli.cuda import DeviceArray

        self._made.append(DeviceArray(array, device=self.index))
        return self._made[-1]

    def of(self, array: Any) -> Any:
        return array.desc()

    def get(self, array: Any) -> np.ndarray:
        """Once this rank's stream is done: a whole device may wait for other ranks' calls.

        A copy that waits for kernels would keep other threads of this GPU from calling CUDA.
        """
        from cuda.bindings import runtime

        from fi_ffi.cli.cuda import check

        check(runtime.cudaStreamSynchronize(self.stream))
        got = np.empty(array.host.shape, array.host.dtype)
        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        address = got.ctypes.data
        check(runtime.cudaMemcpyAsync(address, array.ptr, array.nbytes, kind, self.stream))
        check(runtime.cudaStreamSynchronize(self.stream))
        return got

    def poison(self, array: Any, start: int = 0, count: int | None = None) -> None:
        from cuda.bindings import runtime

        from fi_ffi.cli.cuda import check

        count = array.nbytes - start if count is None else count
        check(runtime.cudaMemsetAsync(array.ptr + start, 0xFF, count, self.stream))

    def close(self) -> None:
        for array in self._made:
            array.free()


def place_of(rank: int, gpus: int) -> Any:
    return Gpu(rank % gpus) if gpus else Host()


def addend(seed: int, call: int, rank: int, n: int, dtype: np.dtype[Any]) -> np.ndarray:
    rng = np.random.default_rng([seed, call, rank])
    return (rng.standard_normal(n) * 10.0 ** rng.integers(-2, 3)).astype(dtype)


def array_of(data: bytes, kind: int) -> np.ndarray:
    return np.frombuffer(data, DTYPES[kind])


def poisoned(shape: Any, dtype: Any) -> np.ndarray:
    return np.full(shape, np.nan, dtype)


# --------------------------------------------------------------------------------- one call each


def calls(
    rank: int, given: Any, gpus: int, options: dict[str, Any], seed: int, made: Calls
) -> list[Any]:
    """What a rank gets of each call of a group."""
    place, size = place_of(rank, gpus), given[rank].size
    arrays, found = [], []  # nothing is allocated while another rank may wait
    for number, (op, n, kind, in_place, _) in enumerate(made):
        x = place.put(addend(seed, number, rank, n, DTYPES[kind]))
        count = {"all_gather": n * size, "reduce_scatter": n // size}.get(op, n)
        is_in_place = in_place and op == "all_reduce"
        arrays.append((x, x if is_in_place else place.put(poisoned(count, DTYPES[kind]))))
    with comm.Group(given[rank], device=place.device, **options) as group:
        for (op, n, kind, _, algorithm), (x, out) in zip(made, arrays, strict=True):
            more = {"algorithm": algorithm} if op == "all_reduce" else {}
            getattr(group, op)(place.of(x), place.of(out), stream=place.stream, **more)
            if n * DTYPES[kind].itemsize > 1 << 24:
                group.synchronize(place.stream)
            found.append(place.get(out))
    place.close()
    return found


def check(op: str, seed: int, number: int, n: int, kind: int, found: list[np.ndarray]) -> None:
    """Every rank's result against float64; of all-reduces the same bits on all ranks."""
    dtype, size = DTYPES[kind], len(found)
    given = [addend(seed, number, rank, n, dtype).astype(np.float64) for rank in range(size)]
    if op == "all_gather":
        for each in found:
            assert (each.astype(np.float64) == np.concatenate(given)).all()
        return
    total, magnitude = np.sum(given, axis=0), np.sum(np.abs(given), axis=0)
    whole = np.concatenate(found) if op == "reduce_scatter" else found[0]
    assert (np.abs(whole.astype(np.float64) - total) <= bound(total, magnitude, dtype, size)).all()
    if op == "all_reduce":
        for each in found:
            assert (each.view(np.uint8) == found[0].view(np.uint8)).all()


def bound(total: Any, magnitude: Any, dtype: Any, size: int, steps: float = 0.5001) -> Any:
    """What a sum in float32 that is rounded once may be off.

    NCCL rounds each of its partial sums: `steps` is more there.
    """
    of = np.maximum(np.abs(total), magnitude) if steps > 1 else total
    return steps * step(of, dtype) + magnitude * size * 2.0**-23


# ------------------------------------------------------------------------------- random calls


def descriptors(rank: int, given: Any, gpus: int, count: int) -> list[int]:
    """The process's open descriptors after the first group, and after others."""
    place, found = place_of(rank, gpus), []
    for number in range(count):
        with comm.Group(given[rank], device=place.device) as group:
            group.all_reduce(place.put(np.ones(16, np.float32)), stream=place.stream)
        if number in (0, count - 1):
            found.append(len(os.listdir("/proc/self/fd")))
    return found


def many(
    rank: int,
    given: Any,
    gpus: int,
    options: dict[str, Any],
    seed: int,
    count: int,
    most: int,
    length: int,
) -> str:
    """Calls on pieces of one array, at any address: every result against the sum of the whole.

    Results are looked at when some are there; "" or what was wrong.
    """
    place = place_of(rank, gpus)
    ranks = given[rank]
    rng = np.random.default_rng(seed)  # of the same calls on all ranks
    wholes, totals, outs, bounds = [], [], [], []
    for kind, dtype in enumerate(DTYPES):
        parts = [addend(seed, kind, i, length, dtype).astype(np.float64) for i in range(ranks.size)]
        wholes.append(place.put(parts[rank].astype(dtype)))
        outs.append(place.put(poisoned(length, dtype)))
        totals.append(np.sum(parts, axis=0))
        magnitude = np.sum(np.abs(parts), axis=0)
        bounds.append(bound(totals[-1], magnitude, dtype, ranks.size))
    with comm.Group(ranks, device=place.device, **options) as group:
        done = 0
        while done < count:
            batch, at = [], [0, 0, 0]
            for out in outs:
                place.poison(out)
            while done < count and len(batch) < 200:
                kind = int(rng.integers(3))
                n = int(2 ** rng.uniform(0, np.log2(most // DTYPES[kind].itemsize)))
                start, to = int(rng.integers(0, length - n)), at[kind] + int(rng.integers(0, 9))
                if to + n > length:
                    break
                at[kind] = to + n
                x, out = (
                    piece(place, array, first, n)
                    for array, first in ((wholes[kind], start), (outs[kind], to))
                )
                group.all_reduce(x, out, stream=place.stream)
                batch.append((kind, n, start, to))
                done += 1
            arrays = [place.get(out) for out in outs]
            for kind, n, start, to in batch:
                got = arrays[kind][to : to + n].astype(np.float64)
                error = np.abs(got - totals[kind][start : start + n])
                if not (error <= bounds[kind][start : start + n]).all():
                    return f"rank {rank}: {n} of {DTYPES[kind]} from {start} to {to}"
    place.close()
    return ""


def piece(place: Any, array: Any, start: int, count: int) -> Any:
    if isinstance(place, Host):
        return array[start : start + count]
    from fi_ffi import TensorDesc

    itemsize = array.host.itemsize
    dtype = array.host.dtype
    return TensorDesc(array.ptr + start * itemsize, (count,), dtype, device=place.device)


# -------------------------------------------------------------------------------------- fusion

F8 = np.dtype(ml_dtypes.float8_e4m3fn)
Fused = list[tuple[str, int, int, int, bool]]  # pattern, tokens, hidden, dtype, oneshot


def fused(
    rank: int, given: Any, gpus: int, options: dict[str, Any], seed: int, made: Fused
) -> list[Any]:
    """What a rank gets of each fused call: the arrays that it wrote, by name."""
    place = place_of(rank, gpus)
    tensors = [fused_tensors(place, seed, number, rank, call) for number, call in enumerate(made)]
    found = []
    with comm.Group(given[rank], device=place.device, **options) as group:
        for i, ((name, *_, oneshot), (x, inputs, outs)) in enumerate(
            zip(made, tensors, strict=True)
        ):
            group.allreduce_fusion(
                place.of(x), pattern=name, use_oneshot=oneshot, stream=place.stream, rms_eps=1e-5,
                trigger_completion_at_end=bool(i % 2),
                **{key: place.of(array) for key, array in (inputs | outs).items()},
            )  # fmt: skip
            found.append({out: place.get(array) for out, array in outs.items()})
    place.close()
    return found


def fused_tensors(place: Any, seed: int, number: int, rank: int, call: Any) -> Any:
    """The addend of a call, its other inputs, and what it writes."""
    name, tokens, hidden, kind, _ = call
    dtype = DTYPES[kind]
    x, residual, gamma = fused_inputs(seed, number, rank, tokens, hidden, dtype)
    outs = {out: poisoned((tokens, hidden), dtype) for out in OUTS[name]}
    inputs = {}
    if name != "kAllReduce":
        inputs = {"residual_in": residual, "rms_gamma": gamma}
    if "quant_out" in outs:
        outs["quant_out"] = np.zeros((tokens, hidden), F8)
        inputs["scale_factor"] = np.array([0.25], np.float32)
    put = ({key: place.put(array) for key, array in each.items()} for each in (inputs, outs))
    return place.put(x), *put


OUTS = {
    "kAllReduce": ("allreduce_out",),
    "kARResidualRMSNorm": ("residual_out", "norm_out"),
    "kARResidualRMSNormFP8Quant": ("residual_out", "quant_out"),
    "kARResidualRMSNormOutFP8Quant": ("residual_out", "norm_out", "quant_out"),
}


def fused_inputs(seed: int, number: int, rank: int, tokens: int, hidden: int, dtype: Any) -> Any:
    """The addend is the rank's own, the residual and the scales are everybody's."""
    common = np.random.default_rng([seed, number, 1 << 20])
    residual = common.standard_normal((tokens, hidden)).astype(dtype)
    gamma = (1 + 0.1 * common.standard_normal(hidden)).astype(dtype)
    return addend(seed, number, rank, tokens * hidden, dtype).reshape(tokens, -1), residual, gamma


def check_fused(seed: int, number: int, call: Any, found: list[dict[str, np.ndarray]]) -> None:
    """Against float64: each step rounds to the dtype, as the kernels store what comes next."""
    name, tokens, hidden, kind, _ = call
    dtype, size = DTYPES[kind], len(found)
    inputs = [fused_inputs(seed, number, rank, tokens, hidden, dtype) for rank in range(size)]
    given = [x.astype(np.float64) for x, _, _ in inputs]
    total, magnitude = np.sum(given, axis=0), np.sum(np.abs(given), axis=0)
    off = bound(total, magnitude, dtype, size)
    for each in found:
        for out, array in each.items():
            assert (array.view(np.uint8) == found[0][out].view(np.uint8)).all()
    got = {out: array.astype(np.float64) for out, array in found[0].items()}
    if name == "kAllReduce":
        assert (np.abs(got["allreduce_out"] - total) <= off).all()
        return
    residual, gamma = (each.astype(np.float64) for each in inputs[0][1:])
    eps = float(ml_dtypes.finfo(dtype).eps)
    added = total + residual
    # The sum is rounded, and what is added to it once more.
    off = off + 0.5001 * step(added, dtype) + eps * off
    assert (np.abs(got["residual_out"] - added) <= off).all()
    # From here on of what was stored, which is exact for what follows.
    stored = got["residual_out"]
    norm = stored / np.sqrt((stored**2).mean(-1, keepdims=True) + 1e-5) * gamma
    if "norm_out" in got:
        bound_of_norm = 0.51 * step(norm, dtype) + 2.0**-16 * np.abs(norm)
        assert (np.abs(got["norm_out"] - norm) <= bound_of_norm).all()
    if "quant_out" in got:
        base = got.get("norm_out", norm)
        scaled = np.clip(base / 0.25, -448, 448)
        # A step of float8 is an eighth; at a boundary the norm's own rounding decides.
        of_scaled = np.maximum(np.abs(scaled) * 2.0**-3, 2.0**-9)
        slack = 0.0 if "norm_out" in got else np.abs(scaled) * eps
        assert (np.abs(got["quant_out"] - scaled) <= 0.5001 * of_scaled + slack).all()


# ---------------------------------------------------------------------------------------- endings


def endings(rank: int, given: Any) -> tuple[tuple[float, float], list[str], str]:
    """When a rank closed a group and was done with it, what of its memory is open then, and the
    error with which the block of another ends."""
    x = np.ones(8, np.float32)
    with comm.Group(given[rank], device="cpu", max_bytes=1 << 12) as group:
        group.all_reduce(np.ones(1 << 16, np.float32))  # more than there is memory for at once
        time.sleep(0.5 * rank)
        closing = time.monotonic()
    times = closing, time.monotonic()
    with open("/proc/self/maps") as maps:
        left = [line for line in maps if "fi_ffi.comm" in line]
    left += [name for name in map(_target, os.listdir("/proc/self/fd")) if "fi_ffi.comm" in name]
    try:
        with comm.Group(given[rank], device="cpu", timeout_s=1.0) as group:
            if rank == 0:
                raise ZeroDivisionError
            group.all_reduce(x)
    except (ZeroDivisionError, HangError) as error:
        return times, left, type(error).__name__
    return times, left, ""


def _target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:  # that of the list itself
        return ""


# -------------------------------------------------------------------------------- what goes wrong


def until_somebody_is_gone(
    rank: int, given: Any, gpus: int, options: dict[str, Any], results: Any, how: str
) -> None:
    """Calls without end; once a rank is killed, what the error says, and what goes on."""
    place = place_of(rank, gpus)
    group = comm.Group(given[rank], device=place.device, **options)
    x = place.put(np.zeros(1 << 13, np.float16))
    out = place.put(np.zeros(1 << 13, np.float16))
    graph = recorded(group, place, x, out) if how == "graph" else None
    if how == "nccl":  # which connects in the first call, and tells by itself who is gone then
        group.all_reduce(place.of(x), place.of(out), algorithm=how, stream=place.stream)
        group.synchronize(place.stream)
    results.send(os.getpid())
    try:
        while True:
            if graph is not None:
                graph.launch(place.stream)
            else:
                group.all_reduce(place.of(x), place.of(out), algorithm=how, stream=place.stream)
            group.synchronize(place.stream)
    except HangError as error:
        begun = time.monotonic()
        words = f"{error.op}: {error}"
        group.close()
        closed = time.monotonic() - begun
        again = place.put(np.arange(5, dtype=np.float32))
        with comm.Group(comm.threads(1)[0], device=place.device) as alone:
            alone.all_reduce(place.of(again), stream=place.stream)
        results.send((words, closed, place.get(again).tolist()))


def recorded(group: comm.Group, place: Any, x: Any, out: Any) -> Any:
    """A graph of calls by each of the kernels, one after the other."""
    import fi_ffi

    with fi_ffi.capture(place.stream, device=place.device) as graph:
        for algorithm in ("vllm", "oneshot", "vllm", "twoshot", "oneshot"):
            if algorithm == "vllm" or group.fusion is not None:
                group.all_reduce(
                    place.of(x), place.of(out), algorithm=algorithm, stream=place.stream
                )
    return graph


def after_a_kill(victim: int, gpus: int, options: dict[str, Any], how: str, size: int = 2) -> Any:
    """What each of the other processes tells once one is killed.

    Each has a pipe of its own: of a queue, one that is killed may hold the lock.
    """
    context = ranks.processes()
    given, pipes = comm.processes(size), [context.Pipe() for _ in range(size)]
    children = [
        context.Process(
            target=until_somebody_is_gone, args=(rank, given, gpus, options, pipes[rank][1], how)
        )
        for rank in range(size)
    ]
    for child in children:
        child.start()
    found = []
    try:
        assert all(pipe.poll(300) for pipe, _ in pipes)
        pids = [pipe.recv() for pipe, _ in pipes]
        os.kill(pids[victim], signal.SIGKILL)
        for rank in {*range(size)} - {victim}:
            mine = pipes[rank][0]
            assert mine.poll(120), f"rank {rank} was not told"
            found.append(mine.recv())
            children[rank].join(60)
            assert children[rank].exitcode == 0  # it went on, and closed its group
    finally:
        for child in children:
            child.kill()
            child.join()
    return found


def two_groups(
    rank: int, working: Any, others: list[Any], gpus: int, options: dict[str, Any], seed: int,
    done: threading.Event,
) -> int:  # fmt: skip
    """The first half of the ranks, threads, calls until the other half has made and closed all of
    its groups; how many calls this rank has made, of which each result was right.
    """
    place, size, n, made = place_of(rank, gpus), len(working), 512, 0
    x = place.put(addend(seed, 0, rank % size, n, DTYPES[0]))
    out = place.put(poisoned(n, DTYPES[0]))

    def call(group: comm.Group) -> None:
        place.poison(out)
        group.all_reduce(place.of(x), place.of(out), stream=place.stream)
        check("all_reduce", seed, 0, n, 0, [place.get(out)] * size)

    if rank >= size:
        try:
            for meeting in others:
                with comm.Group(meeting[rank - size], device=place.device, **options) as group:
                    call(group)
        finally:
            done.set()
        return len(others)
    with comm.Group(working[rank], device=place.device, **options) as group:
        said = [b"0"]
        while b"1" not in said:  # all know of the end in the same round
            call(group)
            made += 1
            said = working[rank].all_gather(b"1" if done.is_set() else b"0")
    return made
