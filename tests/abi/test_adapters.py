"""Arrays of other libraries on several GPUs, by stand-ins that obey the libraries' protocols."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver

from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.tensor import DTYPES, parse_device, tensor_kind
from fi_ffi.errors import ArgumentError, DeviceError

from tests.helpers import gpu_arrays

Make = Callable[..., Any]
LIBRARIES: dict[str, tuple[Callable[[], Any], str]] = {
    "cupy": (gpu_arrays.cupy, "ndarray"),
    "torch": (gpu_arrays.torch, "Tensor"),
    "torch, another build": (lambda: gpu_arrays.torch(None), "Tensor"),
    "numba": (gpu_arrays.numba, "DeviceNDArrayBase"),
}
IN_BYTES = ("cupy", "numba")  # their strides
NAMES = ("float16", "float32", "int32", "int64")
SHAPES = ((), (5,), (3, 5), (5, 3), (2, 3, 5), (2, 1, 3, 5))
GPUS = (0, 1, 3)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Make]:
    """Installs a library's stand-in and returns what makes its arrays; and a driver of GPUs."""

    def owner_of(_: Any, ptr: int) -> tuple[Any, int]:
        index = ptr // gpu_arrays.ALONE - 1
        fine = 0 <= index <= max(GPUS)
        results = driver.CUresult
        return (results.CUDA_SUCCESS if fine else results.CUDA_ERROR_INVALID_VALUE), index

    monkeypatch.setattr(driver, "cuInit", lambda _: (driver.CUresult.CUDA_SUCCESS,))
    monkeypatch.setattr(driver, "cuPointerGetAttribute", owner_of)

    def install(name: str) -> Make:
        make, array = LIBRARIES[name]
        library = make()
        monkeypatch.setitem(sys.modules, library.__name__, library)
        made: Make = getattr(library, array)
        return made

    return install


def at_gpu(device: int, offset: int = 0) -> int:
    return (1 + device) * gpu_arrays.ALONE + offset


@pytest.mark.parametrize("library", LIBRARIES)
def test_arrays_of_several_gpus(
    library: str, installed: Callable[[str], Make], rng: np.random.Generator
) -> None:
    """Each is what it is, in whatever order kinds are seen first, and when they are seen again."""
    make = installed(library)
    kinds = [*itertools.product(NAMES, SHAPES, GPUS)] * 2
    for at in rng.permutation(len(kinds)):
        name, shape, device = kinds[at]
        ptr = at_gpu(device, 64 * int(at))
        array = make(ptr, shape, name, device)
        desc = as_desc(array)
        assert (desc.ptr, desc.shape, desc.is_contiguous) == (ptr, shape, True)
        assert desc.kind is tensor_kind(DTYPES[name], parse_device(f"cuda:{device}"), len(shape))
        assert desc.owner is array or desc.owner[0] is array  # type: ignore[index]


@pytest.mark.parametrize("step", [3, 2**31 - 1, 2**31, 2**32 + 1, 2**40])
@pytest.mark.parametrize("library", LIBRARIES)
def test_strides_of_arrays(library: str, step: int, installed: Callable[[str], Make]) -> None:
    """In elements, whatever the library counts, and past 2 GiB; each array has its own."""
    make = installed(library)
    for name, steps in itertools.product(NAMES, [(step, 1), (1, step), (step, 0), (-step, 2)]):
        width = DTYPES[name].itemsize if library in IN_BYTES else 1
        told = tuple(width * each for each in steps)
        assert as_desc(make(at_gpu(1), (2, 3), name, 1, told)).strides == steps


@pytest.mark.parametrize("library", IN_BYTES)
def test_strides_within_an_element(library: str, installed: Callable[[str], Make]) -> None:
    make = installed(library)
    for _ in range(2):
        for name, steps in (("float32", (12, 2)), ("float16", (7, 2)), ("int64", (24, -4))):
            with pytest.raises(ArgumentError, match=rf"strides of \({steps[0]}, {steps[1]}\)"):
                as_desc(make(at_gpu(0), (2, 3), name, 0, steps))
            as_desc(make(at_gpu(0), (2, 3), name, 0))


def test_torch_tensors_that_are_no_gpu_s(installed: Callable[[str], Make]) -> None:
    """Not by the kind of a tensor seen before, which had the same dtype, rank and index."""
    for library in ("torch", "torch, another build"):
        make = installed(library)
        for _ in range(2):
            assert str(as_desc(make(at_gpu(0), (3,), "float16", 0)).device) == "cuda:0"
            assert str(as_desc(make(64, (3,), "float16", 0, kind="cpu")).device) == "cpu"
            with pytest.raises(ArgumentError, match="a negative view"):
                as_desc(make(at_gpu(0), (3,), "float16", 0, is_neg=True))
    for _ in range(2):  # of this build an index may be another kind's
        with pytest.raises(ArgumentError, match="got xpu:0, expected a CPU or CUDA tensor"):
            as_desc(make(at_gpu(0), (3,), "float16", 0, kind="xpu"))


@pytest.mark.parametrize("library", ["torch", "torch, another build"])
def test_a_torch_tensor_that_changes(
    library: str, installed: Callable[[str], Make], rng: np.random.Generator
) -> None:
    """Address, shape, strides, dtype and device are read in every call: the object is the same."""
    make = installed(library)
    tensor = make(at_gpu(0), (2, 3), "float16", 0)
    for _ in range(40):
        ptr, rank = at_gpu(0, 64 * int(rng.integers(1, 99))), int(rng.integers(0, 5))
        shape, steps = (tuple(rng.integers(1, 9, rank).tolist()) for _ in range(2))
        name, device = str(rng.choice(NAMES)), int(rng.choice(GPUS))
        vars(tensor).update(vars(make(ptr, shape, name, device, steps)))
        desc = as_desc(tensor)
        got = desc.ptr, desc.shape, desc.strides, desc.dtype.name, str(desc.device)
        assert got == (ptr, shape, steps, name, f"cuda:{device}")
        assert desc.owner is tensor


def test_whose_an_address_is(
    installed: Callable[[str], Make], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CUDA array interface names no GPU: the driver is asked, except of no address."""
    make = installed("numba")
    for readonly in (True, False, True):
        desc = as_desc(make(at_gpu(3), (3,), "float16", 3, readonly=readonly))
        assert (str(desc.device), desc.readonly) == ("cuda:3", readonly)
    assert str(as_desc(make(0, (0,), "float16", 0)).device) == "cuda:0"
    with pytest.raises(ArgumentError, match="does not know address 0x40"):
        as_desc(make(0x40, (3,), "float16", 0))
    lost = driver.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    monkeypatch.setattr(driver, "cuPointerGetAttribute", lambda *_: (lost, 0))
    with pytest.raises(DeviceError):
        as_desc(make(at_gpu(0), (3,), "float16", 0))
