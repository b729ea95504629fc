"""Transfers to and from host memory: test_every_op.py calls tokenspeed-kernel's ops on a GPU's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from cuda.bindings import runtime

import fi_ffi
from fi_ffi.abi._cffi import ffi
from fi_ffi.cli.cuda import check
from fi_ffi.ops.functions import OPS

from tests.helpers import kernels
from tests.helpers.every_op import draw

TRANSFERS = [name for name in OPS if name.startswith("transfer_kv_")]


@pytest.fixture
def page_locked() -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    """Copies of arrays in memory that the GPU reads and writes over the bus."""
    made = []

    def copy(array: np.ndarray) -> np.ndarray:
        made.append(int(check(runtime.cudaHostAlloc(array.nbytes, 0))))
        memory = np.frombuffer(ffi.buffer(ffi.cast("char *", made[-1]), array.nbytes), array.dtype)
        there = memory.reshape(array.shape)
        there[...] = array
        return there

    yield copy
    check(runtime.cudaDeviceSynchronize())
    for address in made:
        check(runtime.cudaFreeHost(address))


def on_host(array: np.ndarray) -> fi_ffi.TensorDesc:
    return fi_ffi.TensorDesc(array.ctypes.data, array.shape, array.dtype, device="cuda_host")


@pytest.mark.parametrize("sizes", ["small", "usual"])
@pytest.mark.parametrize("hosts", [("src",), ("dst",), ("src", "dst")], ids="-".join)
@pytest.mark.parametrize("name", TRANSFERS)
def test_transfers_of_host_memory(name, hosts, sizes, rng, to_gpu, page_locked, stream):
    """From the host, to it, and within it; an array that is not page-locked is refused."""
    op = OPS[name]
    kernels.need(op.row)
    case = draw(op, {}, sizes, {}, rng)
    there = {n: page_locked(a) for n, a in case.arrays.items() if n[:3] in hosts and a.ndim > 1}
    here = {n: to_gpu(a) for n, a in case.arrays.items() if n not in there}
    descs = {n: a.desc() for n, a in here.items()} | {n: on_host(a) for n, a in there.items()}
    for wrong in there:
        with pytest.raises(fi_ffi.ArgumentError, match=f"`{wrong}`.*page-locked"):
            op(**descs | {wrong: case.arrays[wrong]}, **case.scalars, stream=stream)
    op(**descs, **case.scalars, stream=stream)
    check(runtime.cudaStreamSynchronize(stream))
    for result in case.expected:
        got = there[result] if result in there else here[result].get()
        assert case.error(result, got)[1] <= 1
    assert all(array.intact() for array in here.values())
