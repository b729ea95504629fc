"""A process with several libraries, imported and used in a given order; run as a program.

    python3 -m tests.helpers.coexisting "torch fi_ffi cupy" cpu|gpu [norm.so]

Each library computes something that is checked, on its own stream, and fails once on purpose.
Prints, as JSON, which copies of shared libraries were mapped after each step.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

GPU = sys.argv[2] == "gpu"
KERNELS = sys.argv[3] if len(sys.argv) > 3 else None
ROWS, SIZE = 16, 512
SEEN = {
    "libtvm_ffi": re.compile(r"/libtvm_ffi\.so"),
    "libcudart": re.compile(r"/libcudart(-\w+)?\.so"),
    "libcublas": re.compile(r"/libcublas\.so"),
}


def mapped() -> dict[str, list[str]]:
    """The files of each library in this process, one for each inode."""
    found: dict[str, dict[str, str]] = {name: {} for name in SEEN}
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        parts = line.split(maxsplit=5)
        for name, pattern in SEEN.items():
            if len(parts) == 6 and pattern.search(parts[5]):
                found[name][f"{parts[3]} {parts[4]}"] = parts[5]
    return {name: sorted(paths.values()) for name, paths in found.items()}


def normed(x: Any, weight: Any) -> Any:
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6) * np.asarray(weight, float)


def close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=4e-3, atol=4e-3)


@contextlib.contextmanager
def failing(*words: str, kind: type[BaseException] = Exception) -> Iterator[None]:
    """A library's own error, in its own words; a test where nothing is raised fails."""
    try:
        yield
    except kind as error:
        assert any(word in str(error) for word in words), error
    else:
        raise AssertionError(f"nothing was raised with {' or '.join(words)}")


def inputs() -> tuple[Any, Any]:
    rng = np.random.default_rng()
    return rng.standard_normal((ROWS, SIZE)).astype(np.float16), np.ones(SIZE, np.float16)


class Peer:
    """A library: `stream` is what it has current, None where it has no such thing."""

    def stream(self) -> int | None:
        return None

    def use(self) -> None:
        raise NotImplementedError

    def fail(self) -> None:
        """Its own error, in its own words."""


class Numpy(Peer):
    def use(self) -> None:
        assert (np.arange(4) + 1 == [1, 2, 3, 4]).all()


class Torch(Peer):
    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.device = "cuda" if GPU else "cpu"
        if GPU:
            self.own = torch.cuda.Stream()
            torch.cuda.set_stream(self.own)

    def stream(self) -> int | None:
        return int(self.torch.cuda.current_stream().cuda_stream) if GPU else None

    def use(self) -> None:
        a, b = (np.random.default_rng().standard_normal((64, 64)) for _ in "ab")
        there = [self.torch.from_numpy(x).to(self.device) for x in (a, b)]
        close((there[0] @ there[1]).cpu().numpy(), a @ b)

    def fail(self) -> None:
        with failing("size", "shape", kind=RuntimeError):
            self.torch.ones(3, device=self.device) @ self.torch.ones(4, device=self.device)


class Cupy(Peer):
    def __init__(self) -> None:
        import cupy

        self.cupy, self.own = cupy, cupy.cuda.Stream(non_blocking=True)
        self.own.use()

    def stream(self) -> int | None:
        return int(self.cupy.cuda.get_current_stream().ptr)

    def use(self) -> None:
        x = np.random.default_rng().standard_normal(1000)
        close(self.cupy.asnumpy(self.cupy.asarray(x) * 2 + 1), x * 2 + 1)

    def fail(self) -> None:
        with failing("broadcast", kind=ValueError):
            self.cupy.ones(3) + self.cupy.ones(4)


class Jax(Peer):
    def __init__(self) -> None:
        import jax
        import jax.numpy as jnp

        self.jax, self.jnp = jax, jnp
        self.add = jax.jit(lambda a: a + 1)
        if GPU:
            assert jax.devices()[0] in jax.devices("gpu"), jax.devices()

    def use(self) -> None:
        x = np.random.default_rng().standard_normal(1000).astype(np.float32)
        close(self.add(self.jnp.asarray(x)), x + 1)

    def fail(self) -> None:
        with failing("shape"):
            self.jnp.ones(3) + self.jnp.ones(4)


class TvmFfi(Peer):
    def __init__(self) -> None:
        import tvm_ffi

        self.tvm_ffi = tvm_ffi
        self.add = tvm_ffi.convert(lambda x: x + 1)
        tvm_ffi.register_global_func("coexisting.double", lambda x: 2 * x, override=True)

        def broken() -> None:
            raise ValueError("of tvm_ffi's function")

        self.broken = tvm_ffi.convert(broken)
        self.norm = tvm_ffi.load_module(KERNELS) if KERNELS else None

    def stream(self) -> int | None:
        return int(self.tvm_ffi.get_raw_stream(self.tvm_ffi.device("cuda:0")))

    def use(self) -> None:
        assert self.add(41) == 42
        if GPU and self.norm is not None and "torch" in sys.modules:
            import torch

            x, weight = inputs()
            there = [torch.from_numpy(a).cuda() for a in (x, weight)]
            out = torch.empty_like(there[0])
            torch.cuda.synchronize()
            with self.tvm_ffi.use_torch_stream():
                self.norm.rmsnorm(out, *there, 1e-6, False)
            close(out.cpu().numpy(), normed(x, weight))

    def fail(self) -> None:
        with failing("of tvm_ffi's function", kind=ValueError):
            self.broken()
        if self.norm is not None:
            with failing("Expected 5 but got 1", kind=TypeError):
                self.norm.rmsnorm(1)


class Flashinfer(Peer):
    """On the CPU there is nothing of its that could be called, but for its imports."""

    def __init__(self) -> None:
        import flashinfer

        self.flashinfer = flashinfer

    def use(self) -> None:
        assert self.flashinfer.__version__
        if GPU:
            import torch

            x, weight = inputs()
            there = [torch.from_numpy(a).cuda() for a in (x, weight)]
            out = self.flashinfer.norm.rmsnorm(*there)
            close(out.cpu().numpy(), normed(x, weight))

    def fail(self) -> None:
        if GPU:
            import torch

            x = torch.ones(2, 8, device="cuda", dtype=torch.float16)
            try:
                self.flashinfer.norm.rmsnorm(x, torch.ones(9, device="cuda", dtype=torch.float16))
            except Exception as error:
                assert "fi_ffi" not in type(error).__module__, error
            else:
                raise AssertionError("flashinfer took a weight of another size")


class FiFfi(Peer):
    def __init__(self) -> None:
        import fi_ffi
        from fi_ffi.loader.runtime import ensure_tvm_ffi

        self.fi_ffi = fi_ffi
        ensure_tvm_ffi()
        self.own = self._own_stream() if GPU else 0

    def _own_stream(self) -> int:
        from cuda.bindings import runtime

        from fi_ffi.cli.cuda import check

        flags = runtime.cudaStreamNonBlocking
        return int(check(runtime.cudaStreamCreateWithFlags(flags)))

    def stream(self) -> int | None:
        from fi_ffi.abi import library
        from fi_ffi.abi._cffi import ffi

        return int(ffi.cast("uintptr_t", library.lib.TVMFFIEnvGetStream(2, 0)))

    def use(self) -> None:
        x, weight = inputs()
        if not GPU:
            out = np.full_like(x, np.nan)
            self.fi_ffi.rmsnorm(out, x, weight)
            close(out, normed(x, weight))
        else:
            self._on_own_stream(x, weight)
            if "torch" in sys.modules:
                self._on_torch_s(x, weight)
            if "cupy" in sys.modules:
                self._on_cupy_s(x, weight)
            self._decode()
        if KERNELS:
            entry = self.fi_ffi.module(Path(KERNELS)).rmsnorm
            assert len(entry.signature.params) == 5
        if "tvm_ffi" in sys.modules:
            self._shared()

    def _on_own_stream(self, x: Any, weight: Any) -> None:
        from fi_ffi.cli.cuda import DeviceArray

        arrays = [DeviceArray(a) for a in (np.full_like(x, np.nan), x, weight)]
        self.fi_ffi.rmsnorm(*(array.desc() for array in arrays), stream=self.own)
        close(arrays[0].get(), normed(x, weight))
        for array in arrays:
            array.free()

    def _on_torch_s(self, x: Any, weight: Any) -> None:
        import torch

        there = [torch.from_numpy(a).cuda() for a in (x, weight)]
        out = torch.full_like(there[0], float("nan"))
        self.fi_ffi.rmsnorm(out, *there, stream=torch.cuda.current_stream())
        close((out + 0).cpu().numpy(), normed(x, weight))  # torch's own work goes on behind it

    def _on_cupy_s(self, x: Any, weight: Any) -> None:
        import cupy

        there = [cupy.asarray(a) for a in (x, weight)]
        out = cupy.full_like(there[0], float("nan"))
        self.fi_ffi.rmsnorm(out, *there, stream=cupy.cuda.get_current_stream())
        close(cupy.asnumpy(out + 0), normed(x, weight))

    def _decode(self) -> None:
        """One request of 20 keys, on the current stream of whoever is there."""
        from fi_ffi.cli.cuda import DeviceArray

        stream: Any = self.own
        if "torch" in sys.modules:
            import torch

            stream = torch.cuda.current_stream()
        elif "cupy" in sys.modules:
            import cupy

            stream = cupy.cuda.get_current_stream()
        rng = np.random.default_rng()
        q = rng.standard_normal((1, 8, 128)).astype(np.float16)
        k, v = rng.standard_normal((2, 2, 16, 8, 128)).astype(np.float16)
        try:
            plan = self.fi_ffi.BatchDecodePlan(
                np.array([0, 2], np.int32), np.arange(2, dtype=np.int32), np.array([4], np.int32),
                num_qo_heads=8, num_kv_heads=8, head_dim=128, page_size=16,
                q_data_type="float16", stream=stream,
            )  # fmt: skip
        except self.fi_ffi.KernelNotFoundError:
            return
        arrays = [DeviceArray(a) for a in (q, k, v, np.full_like(q, np.nan))]
        plan.run(*(array.desc() for array in arrays), stream=stream)
        keys, values = (a.reshape(32, 8, 128)[:20].astype(float) for a in (k, v))
        logits = np.einsum("hd,khd->hk", q[0].astype(float), keys) * 128**-0.5
        weights = np.exp(logits - logits.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        close(arrays[3].get()[0], np.einsum("hk,khd->hd", weights, values))
        for array in arrays:
            array.free()

    def _shared(self) -> None:
        """One libtvm_ffi: streams and functions of either are there for the other."""
        import tvm_ffi

        from fi_ffi.abi.function import global_function, register
        from fi_ffi.abi.signature import Signature

        if not hasattr(self, "half"):
            of = Signature("coexisting.half", ("int",), "int")
            self.half = register("coexisting.half", of, lambda x: x // 2)
        assert tvm_ffi.get_global_func("coexisting.half")(84) == 42
        with contextlib.suppress(self.fi_ffi.LoaderError):  # until tvm_ffi's turn has come
            assert global_function("coexisting.double")(21) == 42
        before = self.stream()
        with tvm_ffi.use_raw_stream(tvm_ffi.device("cuda:0"), 0x7770):
            assert self.stream() == 0x7770
            if not GPU:
                x, weight = inputs()
                self.fi_ffi.rmsnorm(np.empty_like(x), x, weight)
            assert self.stream() == 0x7770
        assert self.stream() == before

    def fail(self) -> None:
        from fi_ffi.abi.function import global_function

        x, weight = inputs()
        with failing("rmsnorm: argument", kind=self.fi_ffi.ArgumentError):
            self.fi_ffi.rmsnorm(np.empty_like(x), x, weight[:-1])
        with failing("Mismatched", kind=self.fi_ffi.KernelError):
            global_function("ffi.ArrayGetItem")(1, 2, 3)


PEERS: dict[str, type[Peer]] = {
    "numpy": Numpy, "torch": Torch, "cupy": Cupy, "jax": Jax, "tvm_ffi": TvmFfi,
    "flashinfer": Flashinfer, "fi_ffi": FiFfi,
}  # fmt: skip


def main() -> None:
    peers: dict[str, Peer] = {}
    steps = []

    def streams() -> dict[str, int | None]:
        return {name: peer.stream() for name, peer in peers.items()}

    for name in sys.argv[1].split():
        before = streams()
        made = PEERS[name]()
        made.use()
        after = streams()
        assert after == before, f"{name} changed current streams: {before}, {after}"
        peers[name] = made
        steps.append({"after": name, "mapped": mapped()})
    for _ in range(2):
        for name in random.sample(sorted(peers), len(peers)):
            before = streams()
            peers[name].fail()
            peers[name].use()
            peers[name].fail()
            assert streams() == before, f"{name} changed current streams: {before}, {streams()}"
    versions = {}
    for name in ("torch", "cupy-cuda13x", "jax", "apache-tvm-ffi", "flashinfer-python", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    steps.append({"after": "all", "mapped": mapped(), "versions": versions})
    print(json.dumps(steps))


if __name__ == "__main__":
    main()
