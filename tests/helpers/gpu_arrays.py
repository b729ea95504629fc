"""Stand-ins of cupy's, torch's and numba's arrays on GPUs that are not there.

They have the attributes that those libraries document for their arrays, and no memory behind their
addresses: a test installs the module under the library's name and describes its arrays.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import numpy as np

ALONE = 1 << 40  # the GPUs' addresses lie so far apart


def library(name: str, **members: Any) -> Any:
    """A module that has the classes of a library, each at home there under its own name."""
    made = types.ModuleType(name)
    for member, value in members.items():
        if isinstance(value, type):
            value.__module__, value.__qualname__, value.__name__ = name, member, member
        setattr(made, member, value)
    return made


@dataclass(frozen=True)
class MemoryPointer:
    """cupy.cuda.MemoryPointer."""

    ptr: int
    device_id: int


def cupy() -> Any:
    """cupy, whose strides are in bytes, and whose array names its GPU at its memory."""

    class Array:
        def __init__(self, ptr: int, shape: Any, dtype: Any, device: int, strides: Any = None):
            self.data, self.shape = MemoryPointer(ptr, device), shape
            self.dtype = np.dtype(dtype)
            self.itemsize = self.dtype.itemsize
            steps = np.cumprod((1, *shape[:0:-1]))[::-1] * self.itemsize
            self.strides = tuple(map(int, steps[: len(shape)])) if strides is None else strides

        def __dlpack__(self, **_: Any) -> object:
            raise AssertionError("cupy's arrays are read by their attributes")

        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, self.data.device_id

    return library("cupy", ndarray=Array)


class TorchDevice:
    """torch.device: one that is equal to others of its kind and index."""

    def __init__(self, kind: str, index: int | None) -> None:
        self.type, self.index = kind, index

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TorchDevice) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.type, self.index))

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"


class TorchDtype:
    """torch.dtype: one object for each, which prints as the module's attribute."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"torch.{self.name}"


TORCH_DTYPES = {name: TorchDtype(name) for name in ("float16", "float32", "int32", "int64")}


def torch(cuda: str | None = "13.0") -> Any:
    """torch, built for a CUDA or (None) for another kind of device."""

    class Tensor:
        is_quantized = False

        def __init__(
            self, ptr: int, shape: Any, dtype: str, device: int, strides: Any = None,
            kind: str = "cuda", is_neg: bool = False,
        ) -> None:  # fmt: skip
            self.ptr, self.shape, self.dtype = ptr, shape, TORCH_DTYPES[dtype]
            self.device = TorchDevice(kind, None if kind == "cpu" else device)
            self.steps, self.layout, self.negative = strides, made.strided, is_neg

        __torch_dispatch__ = staticmethod(lambda *_: None)

        def get_device(self) -> int:
            return -1 if self.device.index is None else self.device.index

        def stride(self) -> tuple[int, ...]:
            if self.steps is not None:
                return tuple(self.steps)
            return tuple(map(int, np.cumprod((1, *self.shape[:0:-1]))[::-1][: len(self.shape)]))

        def data_ptr(self) -> int:
            return self.ptr

        def dim(self) -> int:
            return len(self.shape)

        def is_conj(self) -> bool:
            return False

        def is_neg(self) -> bool:
            return self.negative

        def __dlpack__(self, **_: Any) -> object:
            raise AssertionError("torch's tensors are read by their attributes")

        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, self.get_device()

    made = library("torch", Tensor=Tensor, strided="torch.strided")
    made.version = types.SimpleNamespace(cuda=cuda)
    return made


def numba() -> Any:
    """numba's array by the CUDA array interface, which names no GPU."""

    class DeviceNDArrayBase:
        def __init__(
            self, ptr: int, shape: Any, dtype: Any, device: int, strides: Any = None,
            readonly: bool = False,
        ) -> None:  # fmt: skip
            del device  # the driver knows whose an address is
            self.__cuda_array_interface__ = {
                "version": 3, "data": (ptr, readonly), "shape": shape, "strides": strides,
                "typestr": np.dtype(dtype).str,
            }  # fmt: skip

    return library("numba.cuda.cudadrv.devicearray", DeviceNDArrayBase=DeviceNDArrayBase)
