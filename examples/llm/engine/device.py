"""Where the model runs: memory by address, copies, matrix products and the small kernels.

`Gpu` is cuda-python and cuBLAS, `Cpu` the same in numpy.  All tensors are `fi_ffi.TensorDesc`s.
"""

import contextlib
import functools
import itertools
import struct
import time

import numpy as np

import fi_ffi

from . import glue
from .glue import check
from .loading import FEW, Loader
from .products import Norm, Products
from .weights import Blocks, Parts

POLLING_S = 5e-5  # between looks at a stream that may never end
FEW_BYTES = 16 << 10  # that a kernel copies; more take a copy engine
CPU_PAGES = 1024  # of the cache, where nobody says how many
# Of a GPU's memory what stays free of the cache: for steps, plans, graphs and the CUDA context.
KEPT, KEPT_PART = 2 << 30, 0.1
ENDING_S = 5.0  # how long it may take to end after a rank was lost
# How arguments of kernels are passed.
FORMATS = {fi_ffi.TensorDesc: "Q", int: "i4x", np.int64: "q", np.uint64: "Q", np.float32: "f4x"}
MOST_ARGUMENTS = 32


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


@functools.cache
def _packed(kinds):
    return struct.Struct("".join(["<", *map(FORMATS.__getitem__, kinds)]))


class Device:
    def __init__(self):
        self.named, self.memory = {}, {}  # `memory` by address: what it is of, or what frees it

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

    def in_turn(self, shape, dtype):
        """Two arrays of host memory in turn: one is used while the other's copy may still run."""
        return itertools.cycle([self.pinned(shape, dtype) for _ in "ab"])

    def take(self, out, table, index, start=0, latest=None):
        """As the kernel of that name; rows are contiguous, and multiples of 4 bytes."""
        words, step = _words(out), np.int64(_words(table))
        latest = np.uint64(0) if latest is None else latest
        self.launch("take", (words, index.shape[0]), out, table, index, latest, step, words, start,
                    table.shape[0])  # fmt: skip

    def give(self, table, values, index):
        words, step = _words(values), np.int64(_words(table))
        self.launch("give", (words, index.shape[0]), table, values, index, step, words)

    def zeros(self, shape, dtype):
        x = self.empty(shape, dtype)
        self.zero(x)
        return x

    def put(self, host):
        """A copy of a numpy array, or of both of `Blocks` or `Fours`."""
        if isinstance(host, tuple):
            return type(host)(*map(self.put, host))
        out = self.empty(host.shape, str(host.dtype))
        self.write(out, host)
        return out


def _words(x):
    """From one row of x to the next, in words of 4 bytes."""
    return x.strides[0] * x.dtype.itemsize // 4


class Cpu(Device):
    """numpy and fi_ffi's reference kernels; what is launched has been done on return."""

    name, stream, is_gpu, is_frozen, has_pdl = "cpu", None, False, False, False

    def __init__(self, dtype):
        super().__init__()
        self.wide = {}  # by address: a weight in float32, in which numpy multiplies

    def empty(self, shape, dtype):
        x = fi_ffi.TensorDesc(0, shape, dtype, device="cpu")
        memory = np.empty(x.span_bytes + 64, np.uint8)
        at = (memory.ctypes.data + 63) & ~63
        self.memory[at] = memory
        return x.at(at)

    pinned = empty

    def fitting(self, size):
        """How many pages of so many bytes there is memory for."""
        return CPU_PAGES

    def zero(self, x):
        np.asarray(x)[...] = 0

    def copy(self, target, source):
        np.asarray(target)[...] = np.asarray(source)

    write = copy

    scope = loading = contextlib.nullcontext

    def get(self, x):
        return np.array(x)

    def linear(self, out, x, weight, is_last=False, adds=False):
        """out = x @ weight.T, or out + that; row by row, so that none depends on another."""
        norm, x = (x, x.x) if isinstance(x, Norm) else (None, x)
        x, out = np.asarray(x), np.asarray(out)
        if norm:
            exact, kind = x.astype(np.float32), x.dtype
            exact /= np.sqrt((exact * exact).mean(1, keepdims=True) + norm.eps)
            x = (exact * np.asarray(norm.weight)).astype(kind)
        if weight.ptr not in self.wide:
            self.wide[weight.ptr] = np.asarray(weight).astype(np.float32)
        product = x.astype(np.float32)[:, None] @ self.wide[weight.ptr].T
        out[...] = product[:, 0] + (out.astype(np.float32) if adds else 0)

    def is_few(self, x, weight):
        return False  # there is no kernel of its own for few rows

    def can_norm(self, x, weight):
        return not isinstance(weight, Blocks)

    def launch(self, name, threads, *args, block=256):
        tensors = (np.asarray(x) if isinstance(x, fi_ffi.TensorDesc) else x for x in args)
        glue.ON_CPU[name](*tensors)

    def mark(self, *_):
        """A point in the stream of work, to be waited for: here it is over."""

    wait = mark

    def close(self, is_lost=False):
        self.memory.clear()
        self.wide.clear()


class Gpu(Device):
    """A GPU through cuda-python, with one stream and one cuBLAS handle."""

    is_gpu = True

    def __init__(self, dtype, index=0):
        super().__init__()
        from cuda.bindings import driver, runtime

        self.cuda, self.driver, self.index, self.name = runtime, driver, index, f"cuda:{index}"
        self.is_frozen = False
        check(runtime.cudaSetDevice(index))
        self.stream = int(check(runtime.cudaStreamCreate()))
        about = check(runtime.cudaGetDeviceProperties(index))
        self.multiprocessors = about.multiProcessorCount
        self.loader, self.of_kernels = None, (dtype, (about.major, about.minor))
        # Kernels that may begin while the one before ends (programmatic dependent launch).
        self.has_pdl = about.major >= 9
        early, which = driver.CUlaunchAttribute(), driver.CUlaunchAttributeID
        early.id = which.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        # Of every launch: CUDA reads the arguments, each in 8 bytes, before it returns.
        self.config = driver.CUlaunchConfig()
        self.config.gridDimZ = self.config.blockDimY = self.config.blockDimZ = 1
        self.config.hStream = self.stream
        self.config.attrs = [early]
        self.latest = None  # in a graph: the node of its own kernel that was launched last
        self.arguments = np.zeros(MOST_ARGUMENTS, np.uint64)
        self.pointers = self.arguments.ctypes.data + 8 * np.arange(MOST_ARGUMENTS, dtype=np.uint64)
        self.products = Products(self)
        self.is_few, self.linear = self.products.is_few, self.products.linear
        self.linear_silu, self.can_norm = self.products.linear_silu, self.products.can_norm

    @functools.cached_property
    def kernels(self):
        return glue.loaded(glue.cubin(*self.of_kernels))

    def empty(self, shape, dtype):
        return self._allocated(shape, dtype, self.name, self.cuda.cudaMalloc, self.cuda.cudaFree)

    def pinned(self, shape, dtype):
        """Page-locked host memory, which copies read and write while the program goes on."""
        cuda = self.cuda
        return self._allocated(shape, dtype, "cpu", cuda.cudaMallocHost, cuda.cudaFreeHost)

    def fitting(self, size):
        self.wait(self.mark())
        free, total = check(self.cuda.cudaMemGetInfo())
        return int(max(free - max(KEPT, KEPT_PART * total), 0) // size)

    def _allocated(self, shape, dtype, device, allocate, free):
        x = fi_ffi.TensorDesc(0, shape, dtype, device=device)
        ptr = int(check(allocate(max(x.span_bytes, 1))))
        self.memory[ptr] = free
        return x.at(ptr)

    def free(self, x):
        """What is no longer needed; all else is freed at the end."""
        check(self.memory.pop(x.ptr)(x.ptr))

    def zero(self, x):
        check(self.cuda.cudaMemsetAsync(x.ptr, 0, x.span_bytes, self.stream))

    def copy_bytes(self, target, source, size):
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDefault
        check(self.cuda.cudaMemcpyAsync(target, source, size, kind, self.stream))

    def copy(self, target, source):
        """Of contiguous tensors, on the device or pinned."""
        size = source.span_bytes
        if 0 < size <= FEW_BYTES and size % 4 == 0:
            self.launch("moved", (size // 4, 1), target, source, size // 4)
        else:
            self.copy_bytes(target.ptr, source.ptr, size)

    def write(self, x, host):
        """Copy host memory; while weights are loaded, large parts are there at the end only."""
        at = x.ptr
        for part in host.parts if isinstance(host, Parts) else (host,):
            part = np.ascontiguousarray(part)
            if self.loader and part.nbytes > FEW:
                self.loader.write(at, part)
            else:
                self.copy_bytes(at, part.ctypes.data, part.nbytes)
                self.wait(self.mark())
            at += part.nbytes

    @contextlib.contextmanager
    def loading(self):
        """A block in which `put` does not wait: what it has put is there at the end."""
        self.loader = Loader(self)
        code = self.loader.pool.submit(glue.cubin, *self.of_kernels)
        try:
            yield
            self.loader.finish()
            self.kernels = glue.loaded(code.result())
        finally:
            self.loader.pool.shutdown(wait=False)  # what its threads still do goes on
            self.loader = None

    def get(self, x):
        host = np.empty(x.shape, x.dtype.numpy)
        # A copy to pageable memory waits with the driver's lock, without which nothing can end
        # kernels that wait for a lost rank.
        self.wait(self.mark())
        self.copy_bytes(host.ctypes.data, x.ptr, host.nbytes)
        self.wait(self.mark())
        return host

    def launch(self, name, threads, *args, block=256):
        """A kernel by name; ints are passed as 32 bits, numpy numbers as what they are.

        `threads`: at least so many along x, in whole blocks, and rows of them.
        """
        values = [x.ptr if isinstance(x, fi_ffi.TensorDesc) else x for x in args]
        _packed(tuple(map(type, args))).pack_into(self.arguments, 0, *values)
        config = self.config
        config.gridDimX, config.gridDimY = -(-threads[0] // block), threads[1]
        config.blockDimX = block
        kernel = self.kernels[name]
        config.numAttrs = int(self.has_pdl and not (self.is_frozen and self._hasten()))
        check(self.driver.cuLaunchKernelEx(config, kernel, self.pointers.ctypes.data, 0))
        if self.is_frozen:
            self.latest = self._before()

    def _before(self):
        """The nodes of the graph that is recorded which the next one would follow."""
        # In cuda-python for CUDA 12 the plain name is that of an older function.
        told = getattr(self.cuda, "cudaStreamGetCaptureInfo_v3", self.cuda.cudaStreamGetCaptureInfo)
        return check(told(self.stream))[3]

    def _hasten(self):
        """Have a graph put the next kernel in place when all blocks of the one before have begun,
        if that is another library's, which makes way at its end or never; whether it is.
        """
        cuda, nodes = self.cuda, self._before()
        kinds = [check(cuda.cudaGraphNodeGetType(node)) for node in nodes]
        if nodes == self.latest or kinds != [cuda.cudaGraphNodeType.cudaGraphNodeTypeKernel]:
            return False
        edge = cuda.cudaGraphEdgeData()
        edge.from_port = cuda.cudaGraphKernelNodePortLaunchCompletion
        edge.type = cuda.cudaGraphDependencyType.cudaGraphDependencyTypeProgrammatic
        flags = cuda.cudaStreamUpdateCaptureDependenciesFlags.cudaStreamSetCaptureDependencies
        name = "cudaStreamUpdateCaptureDependencies"
        change = getattr(cuda, f"{name}_v2", getattr(cuda, name))
        check(change(self.stream, nodes, [edge], 1, int(flags)))
        return True

    def scope(self):
        check(self.cuda.cudaSetDevice(self.index))  # a thread's first call
        return fi_ffi.stream(self.stream)

    def mark(self):
        event = check(self.cuda.cudaEventCreateWithFlags(self.cuda.cudaEventDisableTiming))
        check(self.cuda.cudaEventRecord(event, self.stream))
        return event

    def wait(self, mark, is_over=None):
        """Until the stream was there, or `is_over()`; whether it was there."""
        state = pending = self.cuda.cudaError_t.cudaErrorNotReady
        if is_over is None:
            (state,) = self.cuda.cudaEventSynchronize(mark)
        else:
            while (state := self.cuda.cudaEventQuery(mark)[0]) == pending and not is_over():
                time.sleep(POLLING_S)
            self.cuda.cudaGetLastError()  # or who launches next would be told of `pending`
        if state != pending:
            check((state,))
        check(self.cuda.cudaEventDestroy(mark))
        return state != pending

    def close(self, is_lost=False):
        """Free everything; nothing if a rank is lost and what waits for it does not end."""
        until = time.monotonic() + ENDING_S
        if not self.wait(self.mark(), (lambda: time.monotonic() > until) if is_lost else None):
            return
        self.products.close()
        for ptr, free in self.memory.items():
            check(free(ptr))
        check(self.cuda.cudaStreamDestroy(self.stream))
        self.memory.clear()
