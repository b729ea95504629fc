"""Memory that kernels ask libtvm_ffi for, on a GPU: from the pool, in the stream's order.

None of the ops' kernels allocates, so what asks here is libtvm_ffi's own function, which
is all that theirs call.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cuda.bindings import driver, runtime

import fi_ffi
from fi_ffi.abi import streams
from fi_ffi.cli.cuda import check
from fi_ffi.loader.runtime import ensure_tvm_ffi
from fi_ffi.ops.call import cuda
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.functions import OPS

from tests.helpers.allocating import CUDA, alloc, desc_of
from tests.helpers.cases import make_case


@pytest.fixture
def pool():
    """The device's pool, nothing of which is on its way back."""
    check(runtime.cudaSetDevice(0))
    check(runtime.cudaDeviceSynchronize())
    return check(runtime.cudaDeviceGetMemPool(0))


def used(pool):
    attribute = runtime.cudaMemPoolAttr.cudaMemPoolAttrUsedMemCurrent
    return int(check(runtime.cudaMemPoolGetAttribute(pool, attribute)))


@pytest.fixture
def installed(stream):
    """The allocator as a row's call has it: on the call's stream."""
    ensure_tvm_ffi()
    before = streams.swap(CUDA, stream)
    with cuda.kernel_memory().installed():
        yield
    assert streams.swap(CUDA, before) == stream


def on_gpu(shape, dtype="float32"):
    return alloc(shape, dtype, CUDA.type_code)


def test_memory_is_the_pool_s_and_goes_back(installed, pool, stream):
    before, tensors = used(pool), cuda.kernel_memory().count
    size = 64 * 2**20
    tensor = on_gpu((64, 2**20), "float8_e4m3fn")
    desc = desc_of(tensor)
    assert (desc.shape, desc.dtype.name, desc.device) == ((64, 2**20), "float8_e4m3fn", CUDA)
    assert desc.ptr % 256 == 0
    found = check(runtime.cudaPointerGetAttributes(desc.ptr))
    assert found.type == runtime.cudaMemoryType.cudaMemoryTypeDevice and found.device == 0
    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE
    assert int(check(driver.cuPointerGetAttribute(attribute, desc.ptr))) == int(pool)
    check(runtime.cudaStreamSynchronize(stream))
    assert used(pool) - before >= size
    assert cuda.kernel_memory().count == tensors + 1
    tensor.release()
    check(runtime.cudaStreamSynchronize(stream))
    assert used(pool) == before
    assert cuda.kernel_memory().count == tensors


def test_work_that_is_queued_still_has_its_memory(installed, to_gpu, stream, rng):
    """Released as soon as the work is queued, as a kernel's scratch memory is."""
    kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    given = [rng.standard_normal((512, 4096)).astype(np.float32) for _ in range(8)]
    sources = [to_gpu(array) for array in given]
    targets = [to_gpu(np.full_like(array, np.nan)) for array in given]
    check(runtime.cudaDeviceSynchronize())
    for source, target in zip(sources, targets, strict=True):
        scratch = on_gpu((512, 4096))
        ptr = desc_of(scratch).ptr
        for _ in range(20):
            check(runtime.cudaMemcpyAsync(ptr, source.ptr, source.nbytes, kind, stream))
        check(runtime.cudaMemcpyAsync(target.ptr, ptr, source.nbytes, kind, stream))
        scratch.release()
    check(runtime.cudaStreamSynchronize(stream))
    for array, target in zip(given, targets, strict=True):
        assert (target.get() == array).all()


def test_more_than_the_gpu_has(installed, pool):
    before = used(pool)
    for _ in range(2):
        with pytest.raises(fi_ffi.KernelError) as caught:
            on_gpu((2**44,), "uint8")
        assert caught.value.kind == "MemoryError"
        assert f"cudaMallocAsync of {2**44} bytes on cuda:0: CUDA error 2" in str(caught.value)
    assert used(pool) == before
    on_gpu((1024,)).release()  # and the next one is fine


def test_a_call_of_a_row_that_allocates(to_gpu, stream, rng):
    """The kernel's result is the same, and nothing stays installed."""
    row = replace(OPS["rmsnorm"].row, allocates=True)
    case = make_case(row, {"n": 33, "h": 1024}, {"T": "bfloat16"}, rng)
    arrays = {name: to_gpu(array) for name, array in case.arrays.items()}
    Op(row)(*(array.desc() for array in arrays.values()), stream=stream)
    check(runtime.cudaStreamSynchronize(stream))
    assert case.error("out", arrays["out"].get())[1] <= 1
    with pytest.raises(fi_ffi.KernelError):
        on_gpu((1,))


def test_host_memory_beside_it(installed):
    tensor = alloc((4,), "int32")
    assert desc_of(tensor).device.type == "cpu"
    tensor.release()
