"""Adapters of a mixture of experts, on the CPU and on a GPU, and what is refused."""

from __future__ import annotations

import contextlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi.tensor import DTYPES
from fi_ffi.ops.moe import lora

from tests.helpers.calls import HostArray, refused

BF16 = ml_dtypes.bfloat16
# Half a step of the dtype, and float32's sum of products, of the sum of their magnitudes.
HALF, SUM = {"float16": 2.0**-11, "bfloat16": 2.0**-8}, 2.0**-16
SLICES, EXPERTS, ADAPTERS = 2, 4, 3


class Layer:
    """A call, and what it must give."""

    def __init__(self, rng, dtype="bfloat16", wide=384, columns=384, rank=8, tokens=3, top_k=2):
        kind = DTYPES[dtype].numpy
        pairs = tokens * top_k + (tokens > 0)
        self.dtype, self.columns = dtype, columns
        self.a = [rng.standard_normal((ADAPTERS, EXPERTS, rank, wide)).astype(kind)
                  for _ in range(SLICES)]  # fmt: skip
        self.b = [rng.standard_normal((ADAPTERS, EXPERTS, columns, rank)).astype(kind)
                  for _ in range(SLICES)]  # fmt: skip
        of_pair = np.append(np.repeat(np.arange(tokens), top_k), [tokens] * (tokens > 0))
        adapter = rng.integers(-1, ADAPTERS, tokens)
        adapter[:1] = 1
        self.arrays: dict[str, Any] = {
            "x": rng.standard_normal((tokens, wide)).astype(kind),
            "sorted_token_ids": of_pair.astype(np.int64),  # the last one has no token
            "expert_ids": rng.integers(0, EXPERTS, pairs),
            "lora_indices": adapter,
            "topk_weights": rng.uniform(0.1, 1, pairs).astype(np.float32),
            "out": np.full((tokens, SLICES * columns + 5), np.nan, np.float32),
        }

    def exact(self) -> tuple[np.ndarray, np.ndarray]:
        """The sums, and how far from them they may be."""
        given = self.arrays
        value, off = (np.zeros(given["out"].shape) for _ in range(2))
        x = given["x"].astype(np.float64)
        for pair, token in enumerate(given["sorted_token_ids"]):
            if not 0 <= token < len(x) or given["lora_indices"][token] < 0:
                continue
            at = given["lora_indices"][token], given["expert_ids"][pair]
            weight = float(given["topk_weights"][pair])
            for i in range(SLICES):
                down, up = self.a[i][at].astype(np.float64), self.b[i][at].astype(np.float64)
                middle, size = down @ x[token], np.abs(down) @ np.abs(x[token])
                error = HALF[self.dtype] * np.abs(middle) + SUM * size
                columns = slice(i * self.columns, (i + 1) * self.columns)
                value[token, columns] += weight * (up @ middle)
                off[token, columns] += weight * (np.abs(up) @ (error + SUM * np.abs(middle)))
        return value, off

    def run(self, machine, *, is_prepared: bool = False, is_recorded: bool = False) -> np.ndarray:
        machine.need("bgmv_moe")
        placed = {name: machine.place(array) for name, array in self.arrays.items()}
        lists = {"lora_a_weights": self.a, "lora_b_weights": self.b}
        weights = {name: [machine.place(each) for each in those] for name, those in lists.items()}
        descs = {name: array.desc() for name, array in placed.items()}
        descs |= {name: [one.desc() for one in those] for name, those in weights.items()}
        options = {"num_experts": EXPERTS, "stream": machine.stream}
        if is_prepared:  # for another x, which is then exchanged
            other = machine.place(np.zeros_like(self.arrays["x"]))
            call = fi_ffi.bgmv_moe.prepare(**descs | {"x": other.desc()}, **options)
            call()
            call.update(x=descs["x"])
            call()
        elif is_recorded:  # and replayed, its output poisoned
            fi_ffi.bgmv_moe(**descs, **options)
            machine.synchronize()
            replay = machine.capture(lambda: fi_ffi.bgmv_moe(**descs, **options))
            for _ in range(2):
                machine.poison(placed["out"], machine.stream)
                replay()
        else:
            fi_ffi.bgmv_moe(**descs, **options)
        machine.synchronize()
        assert all(array.intact() for array in placed.values())
        return placed["out"].get()

    def worst(self, machine) -> float:
        value, off = self.exact()
        got = self.run(machine).astype(np.float64)
        error = np.where(np.isfinite(got), np.abs(got - value), np.inf)
        assert (error[off == 0] == 0).all(), "0 where nothing is added"
        if not (off > 0).any():
            return 0.0
        assert (np.abs(0.05 * value)[off > 0] / off[off > 0]).max() > 1, "a scale 5 % off is seen"
        return float((error[off > 0] / off[off > 0]).max())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("wide", "columns", "rank"),
    [(384, 768, 8), (736, 384, 16), (1344, 736, 32), (2048, 1472, 64)],
)
def test_layers(dtype, wide, columns, rank, machine, rng):
    """Few pairs, which blocks share, and more than 32."""
    for tokens in (1, 3, 20):
        assert Layer(rng, dtype, wide, columns, rank, tokens).worst(machine) <= 1


def test_prepared(machine, rng):
    layer = Layer(rng)
    value, off = layer.exact()
    got = layer.run(machine, is_prepared=True).astype(np.float64)
    assert (np.abs(got - value) <= off).all()


def test_recorded(machine, rng):
    """In a graph, where the kernels run on the stream that they get; others are refused."""
    layer = Layer(rng, tokens=5)
    value, off = layer.exact()
    if machine.is_gpu and lora.on_default_stream(fi_ffi.parse_device("cuda:0")):
        with pytest.raises(fi_ffi.ArgumentError, match=r"<0\.7\.2\.post1 run on") as caught:
            layer.run(machine, is_recorded=True)
        assert caught.value.argument == "stream"
        return
    got = layer.run(machine, is_recorded=True).astype(np.float64)
    assert (np.abs(got - value) <= off).all() and np.abs(got).max() > 0


def test_in_the_order_of_the_stream(machine, rng):
    """The kernels may run on another stream: not before what is queued on the call's, and what is
    queued after it sees their sums."""
    machine.need("bgmv_moe")
    layer = Layer(rng, tokens=5)
    layer.run(machine)  # loads the kernels
    value, off = layer.exact()
    right = layer.arrays["x"]
    layer.arrays["x"] = np.zeros_like(right)
    placed = {name: machine.place(array) for name, array in layer.arrays.items()}
    weights = [[machine.place(each) for each in those] for those in (layer.a, layer.b)]
    descs = {name: array.desc() for name, array in placed.items()}
    lists = [[one.desc() for one in those] for those in weights]
    source, copied = machine.place(right), machine.place(np.zeros_like(layer.arrays["out"]))
    machine.synchronize()
    machine.delay(machine.stream)
    _copy(machine, placed["x"], source)
    fi_ffi.bgmv_moe(descs.pop("x"), *lists, **descs, stream=machine.stream)
    _copy(machine, copied, placed["out"])
    machine.synchronize()
    got = copied.get().astype(np.float64)
    assert (np.abs(got - value) <= off + 1e-30).all() and np.abs(got).max() > 0


@pytest.mark.parametrize("release", ["0.6.13", "0.7.2", "0.7.2.post1", "0.7.3"])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("stream", [0, 1, 0x51])
def test_what_waits_for_the_default_stream(stream, fails, release, gpu, put_release):
    """Launches on it come after the stream's work and before what follows, and wait for nothing
    where the stream is the default one, or the kernels run on the stream; a launch that fails
    leaves what follows in order too."""
    put_release(release)
    log, device = gpu.runtime.log, fi_ffi.parse_device("cuda:0")
    log.clear()
    with contextlib.suppress(OSError), lora._in_order(device, stream):
        log.append(("launched",))
        if fails:
            raise OSError
    if stream < 2 or release in ("0.7.2.post1", "0.7.3"):
        assert log == [("launched",)]
        return
    assert [entry[0] for entry in log] == ["record", "wait", "launched", "record", "wait"]
    (_, first, a), (_, same, b), _, (_, last, c), (_, also, d) = log
    assert first == same != last == also
    assert (a, b, c, d) == (stream, 0, 0, stream)


def test_the_cpu_waits_for_no_stream(gpu):
    with lora._in_order(fi_ffi.parse_device("cpu"), 0x51):
        pass
    assert not [entry for entry in gpu.runtime.log if entry[0] in ("record", "wait")]


def _copy(machine, target, source) -> None:
    """Queued on the machine's stream."""
    if isinstance(target, HostArray):
        target.array[...] = source.array
        return
    from cuda.bindings import runtime

    from fi_ffi.cli.cuda import check

    kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    count = target.desc().numel * target.desc().dtype.itemsize
    check(
        runtime.cudaMemcpyAsync(target.desc().ptr, source.desc().ptr, count, kind, machine.stream)
    )


def test_nothing(machine, rng):
    assert Layer(rng, tokens=0).worst(machine) == 0
    layer = Layer(rng, tokens=3)
    for name in ("sorted_token_ids", "expert_ids", "topk_weights"):
        layer.arrays[name] = layer.arrays[name][:0]
    assert layer.worst(machine) == 0


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("x", {"x": np.zeros((3, 400), BF16)}),
        ("x", {"x": np.zeros((3, 384), np.float32)}),
        ("expert_ids", {"expert_ids": np.zeros(6, np.int64)}),
        ("sorted_token_ids", {"sorted_token_ids": np.zeros(7, np.int32)}),
        ("lora_indices", {"lora_indices": np.zeros(2, np.int64)}),
        ("topk_weights", {"topk_weights": np.zeros(7, np.float64)}),
        ("out", {"out": np.zeros((3, 767), np.float32)}),
        ("out", {"out": np.zeros((3, 800), BF16)}),
        ("lora_a_weights", {"lora_a_weights": np.zeros((3, 4, 8, 384), BF16)}),
        ("lora_a_weights", {"lora_a_weights": []}),
        ("lora_a_weights[0]", {"lora_a_weights": [np.zeros((3, 4, 12, 384), BF16)] * 2}),
        ("lora_a_weights[1]", {"lora_a_weights": [np.zeros((n, 4, 8, 384), BF16) for n in (3, 4)]}),
        ("lora_a_weights[0]", {"num_experts": 5}),
        ("lora_b_weights", {"lora_b_weights": [np.zeros((3, 4, 384, 8), BF16)]}),
        ("lora_b_weights[0]", {"lora_b_weights": [np.zeros((3, 4, 400, 8), BF16)] * 2}),
        ("lora_b_weights[0]", {"lora_b_weights": [np.zeros((3, 4, 8, 384), BF16).mT] * 2}),
        ("lora_b_weights[0]", {"lora_b_weights": [np.zeros((3, 4, 384, 8), np.float16)] * 2}),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)  # fmt: skip
def test_refusals(argument, change, rng):
    layer = Layer(rng)
    given = {"lora_a_weights": layer.a, "lora_b_weights": layer.b, **change}
    refused(fi_ffi.bgmv_moe, layer.arrays, argument, **given)


@pytest.mark.parametrize(("name", "value"), [("expert_ids", EXPERTS), ("expert_ids", -1),
                                             ("expert_ids", 2**62), ("lora_indices", ADAPTERS),
                                             ("lora_indices", 2**62)])  # fmt: skip
def test_weights_that_there_are_not(name, value, rng):
    """The CPU refuses to read past the weights, as a GPU does not."""
    layer = Layer(rng)
    before = layer.arrays["out"].copy()
    layer.arrays[name][0] = value  # of the first token, which has an adapter
    error = refused(fi_ffi.bgmv_moe, layer.arrays, name, lora_a_weights=layer.a,
                    lora_b_weights=layer.b)  # fmt: skip
    assert error.got == f"{value} in element 0"
    assert layer.arrays["out"].tobytes() == before.tobytes()


def test_experts_of_pairs_that_are_skipped(rng):
    """Of no token, or of a token without an adapter: nothing is read."""
    layer = Layer(rng)
    layer.arrays["lora_indices"][2] = -(2**62)
    tokens = layer.arrays["sorted_token_ids"]
    tokens[-1] = -(2**62)
    layer.arrays["expert_ids"][(tokens < 0) | (tokens == 2)] = 2**62
    value, off = layer.exact()
    fi_ffi.bgmv_moe(**layer.arrays, lora_a_weights=layer.a, lora_b_weights=layer.b)
    assert (np.abs(layer.arrays["out"] - value) <= off + 1e-30).all()


def test_an_output_in_the_weights(rng):
    layer = Layer(rng, dtype="float16")
    layer.arrays["out"] = layer.a[1].view(np.float32).reshape(-1)[: 3 * 800].reshape(3, 800)
    with pytest.raises(fi_ffi.ArgumentError, match="overlaps"):
        fi_ffi.bgmv_moe(**layer.arrays, lora_a_weights=layer.a, lora_b_weights=layer.b)
