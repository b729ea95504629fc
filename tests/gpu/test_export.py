"""Returned tensors and descriptors of a GPU in other libraries' hands, in the order of streams."""

from __future__ import annotations

import numpy as np
import pytest
from cuda.bindings import runtime

import fi_ffi
from fi_ffi.abi.dlpack import open_capsule

from tests.helpers.pinned import testing_library, tvm_ffi_loaded

__all__ = ["testing_library", "tvm_ffi_loaded"]


@pytest.fixture
def echo(testing_library):
    fi_ffi.module(testing_library)
    return fi_ffi.function("testing.echo")


class Interface:
    """No more than the CUDA array interface."""

    def __init__(self, tensor):
        self.tensor = tensor

    @property
    def __cuda_array_interface__(self):
        return self.tensor.__cuda_array_interface__


def test_a_returned_tensor_s_interface(echo, to_gpu, stream, rng):
    placed = to_gpu(rng.standard_normal((4, 6)).astype(np.float32))
    made = echo(placed.desc(), stream=stream)
    told = made.__cuda_array_interface__
    assert (told["data"], told["shape"], told["typestr"]) == ((placed.ptr, False), (4, 6), "<f4")
    assert told["stream"] == stream and made.__dlpack_device__() == (2, 0)
    assert echo(placed.desc(), stream=0).__cuda_array_interface__["stream"] == 1
    assert fi_ffi.as_desc(Interface(made)).ptr == fi_ffi.as_desc(made).ptr == placed.ptr
    with pytest.raises(fi_ffi.ArgumentTypeError, match="expected memory of the host"):
        np.asarray(made)
    assert not hasattr(made, "__array_interface__")


def is_done(stream):
    (error,) = runtime.cudaStreamQuery(stream)
    assert int(error) in (0, 600)
    runtime.cudaGetLastError()
    return int(error) == 0


@pytest.mark.parametrize("asks", [True, False], ids=["its stream", "no order"])
def test_a_consumer_s_stream_waits(asks, echo, to_gpu, stream, machine, gate):
    """For the stream that the tensor was made on; with -1 it does not."""
    placed = to_gpu(np.zeros(8, np.float32))
    made = echo(placed.desc(), stream=stream)
    (other,) = machine.streams(1)
    machine.synchronize()
    gate.hold(stream)
    capsule = made.__dlpack__(stream=other if asks else -1)
    assert is_done(other) == (not asks)
    gate.open()
    machine.synchronize()
    assert is_done(other)
    assert int(open_capsule(capsule)[0].device.device_type) == 2


@pytest.mark.parametrize("way", ["cupy", "torch", "torch's dlpack", "cupy's dlpack"])
def test_other_libraries_read_it(way, echo, to_gpu, stream, rng):
    host = rng.standard_normal((4, 6)).astype(np.float32)
    placed = to_gpu(host)
    made = echo(placed.desc(), stream=stream)
    name = way.partition("'")[0]
    library = pytest.importorskip(name, reason=f"{name} is not installed")
    if way == "cupy":
        found = library.asarray(made)
    elif way == "torch":
        found = library.as_tensor(made, device="cuda")
    else:
        found = library.from_dlpack(made)
    made.release()  # the array has its own reference
    got = found.get() if name == "cupy" else found.cpu().numpy()
    assert (got == host).all()
    pointer = found.data.ptr if name == "cupy" else found.data_ptr()
    assert pointer == placed.ptr


def test_torch_reads_bfloat16(echo, to_gpu, stream, rng):
    import ml_dtypes

    torch = pytest.importorskip("torch", reason="torch is not installed")
    host = rng.standard_normal((4, 6)).astype(ml_dtypes.bfloat16)
    placed = to_gpu(host)
    found = torch.from_dlpack(echo(placed.desc(), stream=stream))
    assert found.dtype == torch.bfloat16 and found.data_ptr() == placed.ptr
    assert found.view(torch.int16).cpu().numpy().tobytes() == host.tobytes()
