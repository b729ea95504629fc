"""What a kernel's `alloc_tensor` does: ask libtvm_ffi for a tensor."""

from __future__ import annotations

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.dlpack import desc_from_dl_tensor
from fi_ffi.abi.failure import check
from fi_ffi.abi.objects import Tensor
from fi_ffi.abi.tensor import DTYPES, TensorDesc, parse_device

CPU, CUDA = parse_device("cpu"), parse_device("cuda:0")


def alloc(
    shape: tuple[int, ...] = (3, 5), dtype: str = "float32", device_type: int = CPU.type_code
) -> Tensor:
    """A tensor on device 0 of a type; `KernelError` in the words of whoever refused."""
    kind = DTYPES[dtype]
    dims, prototype = ffi.new("int64_t[]", shape), ffi.new("DLTensor *")
    prototype.device.device_type = device_type
    prototype.dtype.code, prototype.dtype.bits = kind.code, kind.bits
    prototype.dtype.lanes = kind.lanes
    prototype.ndim, prototype.shape = len(shape), dims
    slot = ffi.new("TVMFFIObjectHandle *")
    check(library.lib.TVMFFIEnvTensorAlloc(prototype, slot), "alloc_tensor")
    return Tensor(slot[0])


def desc_of(tensor: Tensor) -> TensorDesc:
    """The tensor by address; it is valid as long as `tensor` is held."""
    return desc_from_dl_tensor(ffi.cast("FiFfiTensorObject *", tensor.handle).cell)
