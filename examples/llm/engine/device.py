"""Where the model runs: memory by address, copies, matrix products and the small kernels.

`Gpu` is cuda-python and cuBLAS, `Cpu` the same in numpy.  All tensors are `fi_ffi.TensorDesc`s.
"""

import contextlib
import functools

import ml_dtypes
import numpy as np

import fi_ffi

from . import glue
from .glue import check
from .products import Products

TYPES = {"bfloat16": ml_dtypes.bfloat16}


def rows(x, start, stop):
    """Rows `start` to `stop` of a tensor."""
    ptr = x.ptr + start * x.strides[0] * x.dtype.itemsize
    shape = (stop - start, *x.shape[1:])
    return fi_ffi.TensorDesc(ptr, shape, x.dtype, strides=x.strides, device=x.device)


# Of scratch memory, which is described once: for all layers the same.
@functools.lru_cache(1024)
def columns(x, start, *shape):
    """Columns of a matrix from `start` on, as (rows, *shape)."""
    ptr = x.ptr + start * x.dtype.itemsize
    inner = fi_ffi.TensorDesc(ptr, shape, x.dtype, device=x.device).strides
    strides = (x.strides[0], *inner)
    return fi_ffi.TensorDesc(ptr, (x.shape[0], *shape), x.dtype, strides=strides, device=x.device)


@functools.lru_cache(1024)
def view(x, *shape):
    """The same contiguous memory as another shape."""
    return fi_ffi.TensorDesc(x.ptr, shape, x.dtype, device=x.device)


def default():
    """ "cuda:0" where there is a GPU, or else "cpu"."""
    from cuda.bindings import runtime

    try:
        error, count = runtime.cudaGetDeviceCount()
    except RuntimeError:  # no driver
        return "cpu"
    return "cpu" if int(error) or not count else "cuda:0"


class Host:
    """Host memory as numpy sees it, from an address (numpy's array interface)."""

    def __init__(self, x):
        steps = tuple(step * x.dtype.itemsize for step in x.strides)
        kind = np.dtype(TYPES.get(x.dtype.name, x.dtype.name))
        typestr = f"|V{kind.itemsize}" if x.dtype.name in TYPES else kind.str
        self.kind = kind
        self.__array_interface__ = {
            "data": (x.ptr, False), "shape": x.shape, "strides": steps, "typestr": typestr,
            "version": 3,
        }  # fmt: skip


def array(x):
    """A tensor in host memory as a numpy array; no copy."""
    host = Host(x)
    return np.asarray(host).view(host.kind)


class Device:
    """What both have: named scratch memory."""

    def __init__(self):
        self.named = {}

    def scratch(self, name, shape, dtype):
        """Memory of that name, the same each time; what was in it may be anything."""
        held = self.named.get(name)
        if held is None:
            if self.is_frozen:
                raise MemoryError(f"{name} is new, and a graph is recorded")
            held = self.named[name] = self.empty(shape, dtype)
        if (held.shape, held.dtype.name) != (tuple(shape), dtype):
            raise ValueError(f"{name} is {held.shape} {held.dtype.name}, not {shape} {dtype}")
        return held

    def take(self, out, table, index):
        """out[i] = table[index[i]]; rows are contiguous, and multiples of 4 bytes."""
        self._by_index("take", out, table, index, out)

    def give(self, table, values, index):
        """table[index[i]] = values[i]"""
        self._by_index("give", table, values, index, values)

    def _by_index(self, kernel, target, source, index, packed):
        table = source if packed is target else target
        size = packed.dtype.itemsize
        words = packed.strides[0] * size // 4
        step = np.int64(table.strides[0] * size // 4)
        grid = (min(-(-words // 256), 64), index.shape[0])
        self.launch(kernel, grid, 256, target, source, index, step, words)

    def put(self, host):
        """A copy of a numpy array."""
        out = self.empty(host.shape, str(host.dtype))
        self.write(out, host)
        return out


class Cpu(Device):
    """numpy and fi_ffi's reference kernels; what is launched has been done on return."""

    name, stream, is_gpu, is_frozen, has_pdl = "cpu", None, False, False, False

    def __init__(self, dtype):
        super().__init__()
        self.memory = []

    def empty(self, shape, dtype):
        raw = np.empty(int(np.prod(shape)) * np.dtype(TYPES.get(dtype, dtype)).itemsize + 64, "u1")
        self.memory.append(raw)
        return fi_ffi.TensorDesc((raw.ctypes.data + 63) & ~63, shape, dtype, device="cpu")

    pinned = empty

    def zero(self, x):
        array(x)[...] = 0

    def write(self, x, host):
        array(x)[...] = host

    def get(self, x):
        return array(x).copy()

    def upload(self, x, pinned):
        array(x)[...] = array(pinned)

    download = upload

    def linear(self, out, x, weight):
        """out = x @ weight.T; row by row, so that a row's result does not depend on others."""
        product = array(x).astype(np.float32)[:, None] @ array(weight).astype(np.float32).T
        array(out)[...] = product[:, 0]

    def is_few(self, x, weight):
        return False  # there is no kernel of its own for few rows

    def launch(self, name, grid, block, *args):
        tensors = (array(x) if isinstance(x, fi_ffi.TensorDesc) else x for x in args)
        glue.ON_CPU[name](*tensors)

    def scope(self):
        return contextlib.nullcontext()

    def mark(self):
        """A point in the stream of work, to be waited for."""
        return

    def wait(self, mark):
        pass

    def close(self):
        self.memory.clear()


class Gpu(Device):
    """cuda:0 through cuda-python, with one stream and one cuBLAS handle."""

    name, is_gpu = "cuda:0", True

    def __init__(self, dtype):
        super().__init__()
        from cuda.bindings import driver, runtime

        self.cuda, self.driver = runtime, driver
        self.is_frozen = False
        check(runtime.cudaSetDevice(0))
        self.stream = int(check(runtime.cudaStreamCreate()))
        self.memory, self.host = [], []
        capability = self._compute_capability()
        self.kernels = glue.compiled(dtype, capability)
        # Kernels that may begin while the one before ends (programmatic dependent launch).
        self.has_pdl = capability[0] >= 9
        self.early = driver.CUlaunchAttribute()
        which = driver.CUlaunchAttributeID
        self.early.id = which.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        self.early.value.programmaticStreamSerializationAllowed = 1
        self.products = Products(self)
        self.is_few, self.linear = self.products.is_few, self.products.linear
        self.linear_silu = self.products.linear_silu

    def _compute_capability(self):
        which = self.cuda.cudaDeviceAttr
        major, minor = (
            which.cudaDevAttrComputeCapabilityMajor,
            which.cudaDevAttrComputeCapabilityMinor,
        )
        return [check(self.cuda.cudaDeviceGetAttribute(part, 0)) for part in (major, minor)]

    def empty(self, shape, dtype):
        x = fi_ffi.TensorDesc(0, shape, dtype)
        ptr = check(self.cuda.cudaMalloc(max(x.numel, 1) * x.dtype.itemsize))
        self.memory.append(ptr)
        return fi_ffi.TensorDesc(ptr, shape, dtype, device=self.name)

    def pinned(self, shape, dtype):
        """Page-locked host memory, which copies read and write while the program goes on."""
        x = fi_ffi.TensorDesc(0, shape, dtype, device="cpu")
        ptr = check(self.cuda.cudaMallocHost(max(x.numel, 1) * x.dtype.itemsize))
        self.host.append(ptr)
        return fi_ffi.TensorDesc(ptr, shape, dtype, device="cpu")

    def zero(self, x):
        size = x.numel * x.dtype.itemsize
        check(self.cuda.cudaMemsetAsync(x.ptr, 0, size, self.stream))

    def _copy(self, target, source, size):
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDefault
        check(self.cuda.cudaMemcpyAsync(target, source, size, kind, self.stream))

    def write(self, x, host):
        host = np.ascontiguousarray(host)
        self._copy(x.ptr, host.ctypes.data, host.nbytes)
        self.wait(self.mark())

    def get(self, x):
        host = np.empty(x.shape, TYPES.get(x.dtype.name, x.dtype.name))
        self._copy(host.ctypes.data, x.ptr, host.nbytes)
        self.wait(self.mark())
        return host

    def upload(self, x, pinned):
        self._copy(x.ptr, pinned.ptr, pinned.numel * pinned.dtype.itemsize)

    download = upload

    def launch(self, name, grid, block, *args, early=False):
        """A kernel by name; ints are passed as 32 bits, numpy numbers as what they are.

        `early`: it may be put in place while the kernel before still runs, and waits for that.
        """
        held = [
            np.array(x.ptr, np.uint64) if isinstance(x, fi_ffi.TensorDesc)
            else np.array(x, np.int32) if isinstance(x, int) else np.array(x)
            for x in args
        ]  # fmt: skip
        pointers = np.array([x.ctypes.data for x in held], np.uint64)
        config = self.driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.hStream = self.stream
        if early and self.has_pdl:
            config.attrs, config.numAttrs = [self.early], 1
        kernel = self.kernels[name]
        check(self.driver.cuLaunchKernelEx(config, kernel, pointers.ctypes.data, 0))

    def scope(self):
        check(self.cuda.cudaSetDevice(0))  # a thread's first call
        return fi_ffi.stream(self.stream)

    def mark(self):
        event = check(self.cuda.cudaEventCreateWithFlags(self.cuda.cudaEventDisableTiming))
        check(self.cuda.cudaEventRecord(event, self.stream))
        return event

    def wait(self, mark):
        check(self.cuda.cudaEventSynchronize(mark))
        check(self.cuda.cudaEventDestroy(mark))

    def close(self):
        check(self.cuda.cudaStreamSynchronize(self.stream))
        self.products.close()
        for ptr in self.memory:
            check(self.cuda.cudaFree(ptr))
        for ptr in self.host:
            check(self.cuda.cudaFreeHost(ptr))
        check(self.cuda.cudaStreamDestroy(self.stream))
        self.memory.clear()
        self.host.clear()
