"""XLA's foreign functions, which read a call frame by hand: xla/ffi/api/c_api.h.

XLA calls a handler with the addresses of a call's buffers and, on a GPU, a stream. Which op it is
for, and which buffer is which argument, is an attribute of the call: text that `CallText` writes
and reads. An executable may be kept on disk and run in another process, so the text has all of it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NamedTuple

import cffi

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi as of_library
from fi_ffi.abi.failure import message_of, signal_again
from fi_ffi.abi.tensor import Device, TensorDesc, c_strides, parse_device
from fi_ffi.errors import AbiError, ArgumentError, KernelNotFoundError

ffi = cffi.FFI()
ffi.cdef(
    """
typedef struct Extension { size_t struct_size; int type; struct Extension *next; } Extension;
typedef struct {
    size_t struct_size; Extension *extension_start; int major_version; int minor_version;
} Version;
typedef struct {
    size_t struct_size; Version api_version; uint32_t traits; int64_t state_type_id;
} Metadata;
typedef struct { Extension extension_base; Metadata *metadata; } MetadataExtension;
typedef struct {
    size_t struct_size; Extension *extension_start; int dtype; void *data; int64_t rank;
    int64_t *dims;
} Buffer;
typedef struct {
    size_t struct_size; Extension *extension_start; int64_t size; int *types; Buffer **buffers;
} Buffers;
typedef struct { const char *ptr; size_t len; } Span;
typedef struct {
    size_t struct_size; Extension *extension_start; int64_t size; int *types; Span **names;
    Span **attrs;
} Attributes;
typedef struct {
    size_t struct_size; Extension *extension_start; void *ctx; void *stream;
} StreamGet;
typedef struct {
    size_t struct_size; Extension *extension_start; void *ctx; int32_t device_ordinal;
} OrdinalGet;
typedef struct {
    size_t struct_size; Extension *extension_start; const char *message; int errc;
} ErrorCreate;
typedef struct {
    size_t struct_size; Extension *extension_start; Version api_version; const void *internal_api;
    void *(*Error_Create)(ErrorCreate *);
    void *before[3];
    void *(*Stream_Get)(StreamGet *);
    void *between[12];
    void *(*DeviceOrdinal_Get)(OrdinalGet *);
} Api;
typedef struct {
    size_t struct_size; Extension *extension_start; const Api *api; void *ctx; int stage;
    Buffers args; Buffers rets; Attributes attrs; void *future;
} CallFrame;
"""
)

# The interfaces that these structures are of: jax 0.10 and 0.11. A new minor version may change
# them; 0.4 added to their ends.
VERSIONS = ((0, 3), (0, 4))
_METADATA = 1  # XLA_FFI_Extension_Metadata
_RECORDABLE = 1  # XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE
_QUIET_S = 0.02  # between two looks
_EXECUTE = 3  # XLA_FFI_ExecutionStage_EXECUTE
_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (ArgumentError, 3),  # XLA_FFI_Error_Code_INVALID_ARGUMENT
    (KernelNotFoundError, 12),  # XLA_FFI_Error_Code_UNIMPLEMENTED
    (MemoryError, 8),  # XLA_FFI_Error_Code_RESOURCE_EXHAUSTED
    (Exception, 13),  # XLA_FFI_Error_Code_INTERNAL
    (BaseException, 1),  # XLA_FFI_Error_Code_CANCELLED
)
# XLA_FFI_DataType_*
DTYPES = {
    1: "bool", 2: "int8", 3: "int16", 4: "int32", 5: "int64",
    6: "uint8", 7: "uint16", 8: "uint32", 9: "uint64",
    10: "float16", 11: "float32", 12: "float64", 16: "bfloat16",
    19: "float8_e5m2", 20: "float8_e4m3fn", 33: "float8_e8m0fnu",
}  # fmt: skip
# Targets by whether XLA may record their launches in a command buffer.
TARGETS = {False: "fi_ffi.call", True: "fi_ffi.recorded_call"}


class CallText(NamedTuple):
    """What a call is of: an op or a plan, the names of its buffers, and its scalars.

    A result with an argument's name is that argument's memory. In the arguments that are
    `transposed`, the last two axes are exchanged in memory.
    """

    function: str
    arguments: tuple[str, ...]
    results: tuple[str, ...]
    scalars: dict[str, Any]
    transposed: tuple[str, ...] = ()

    def written(self) -> str:
        return json.dumps(self, separators=(",", ":"))

    @classmethod
    @functools.lru_cache(maxsize=4096)
    def read(cls, text: bytes) -> CallText:
        function, arguments, results, scalars, transposed = json.loads(text)
        return cls(function, tuple(arguments), tuple(results), scalars, tuple(transposed))


def _size(kind: str, last: str) -> int:
    """Return a structure's size as XLA tells it: up to the end of the last field that counts."""
    fields = dict(ffi.typeof(kind).fields)
    return int(fields[last].offset + ffi.sizeof(fields[last].type))


def _descs(
    buffers: Any, names: tuple[str, ...], device: Device, transposed: tuple[str, ...] = ()
) -> dict[str, TensorDesc]:
    found = {}
    for i, name in enumerate(names):
        buffer = buffers.buffers[i]
        ptr, shape = int(ffi.cast("uintptr_t", buffer.data)), tuple(buffer.dims[0 : buffer.rank])
        strides = None
        if name in transposed:
            strides = exchanged_last(c_strides(exchanged_last(shape)))
        dtype = DTYPES[buffer.dtype]
        found[name] = TensorDesc(ptr, shape, dtype, strides=strides, device=device)
    return found


def exchanged_last(axes: tuple[int, ...]) -> tuple[int, ...]:
    """Exchange the last two of some axes."""
    return (*axes[:-2], axes[-1], axes[-2])


def _place(frame: Any, is_cuda: bool) -> tuple[Device, int | None]:
    """Return a call's device and stream."""
    if not is_cuda:
        return parse_device("cpu"), None
    stream = ffi.new("StreamGet *", {"struct_size": ffi.sizeof("StreamGet"), "ctx": frame.ctx})
    ordinal = ffi.new("OrdinalGet *", {"struct_size": ffi.sizeof("OrdinalGet"), "ctx": frame.ctx})
    for get, given in (
        (frame.api.Stream_Get, stream),
        (frame.api.DeviceOrdinal_Get, ordinal),
    ):
        if get(given) != ffi.NULL:
            raise AbiError("XLA tells neither the stream nor the GPU of a call")
    return parse_device(f"cuda:{ordinal.device_ordinal}"), int(ffi.cast("uintptr_t", stream.stream))


@contextlib.contextmanager
def _subnormal_numbers() -> Iterator[None]:
    """Compute with numbers below the smallest normal one, which XLA's threads take for 0."""
    before = ffi.new("char[64]")
    get, put = _of_environment("fegetenv"), _of_environment("fesetenv")
    get(before)
    put(ffi.cast("void *", -1))  # FE_DFL_ENV
    try:
        yield
    finally:
        put(before)


@functools.cache
def _of_environment(name: str) -> Any:
    """Return a function of libm, which Python itself has loaded."""
    found = library.c_library.dlsym(of_library.NULL, name.encode())
    return ffi.cast("int(*)(void *)", library.address_of(found))


class Handlers:
    """The handlers that a process has registered; they live as long as it does.

    `find` returns the function of a name that `CallText` has.
    """

    def __init__(self, find: Callable[[str], Callable[..., Any]]) -> None:
        self._find = find
        self._callbacks: list[Any] = []
        self._numbers, self._latest, self._running = itertools.count(), -1, set[int]()
        self._refusal: BaseException | None = None

    def register(self, platform: str) -> None:
        """Register the targets of a platform; raise `AbiError` for another interface of XLA."""
        import jax

        jax.devices()  # XLA asks a handler what it is once there are devices
        is_cuda = platform == "CUDA"
        for is_recorded, name in TARGETS.items():
            traits = _RECORDABLE if is_recorded and is_cuda else 0
            handle = functools.partial(self._handle, is_cuda, traits)
            callback = ffi.callback("void *(CallFrame *)", handle, onerror=_escaped)
            self._callbacks.append(callback)
            address = int(ffi.cast("uintptr_t", callback))
            self._refusal = None
            try:
                jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(address), platform=platform)
            except Exception as error:
                if "Duplicate" in str(error):
                    raise AbiError(
                        "jax has the handlers of an earlier import of fi_ffi.jax, which a process "
                        "can import once; importlib.reload is fine"
                    ) from error
                raise self._refusal or error from None
            if self._refusal is not None:
                raise self._refusal

    def wait_until_quiet(self) -> None:
        """Return once no call has been running for a while; XLA does not tell what is queued."""
        before = None
        while self._running or self._latest != before:
            before = self._latest
            time.sleep(_QUIET_S)

    def _handle(self, is_cuda: bool, traits: int, frame: Any) -> Any:
        extension = frame.extension_start
        if extension != ffi.NULL and extension.type == _METADATA:
            return self._describe(frame, traits)
        self._call(frame, is_cuda)
        return ffi.NULL

    def _describe(self, frame: Any, traits: int) -> Any:
        metadata = ffi.cast("MetadataExtension *", frame.extension_start).metadata
        known = {
            "XLA_FFI_CallFrame": (frame.struct_size, _size("CallFrame", "attrs")),
            "XLA_FFI_Metadata": (metadata.struct_size, _size("Metadata", "traits")),
        }
        wrong = [
            f"{name} of {got} bytes, not {want}"
            for name, (got, want) in known.items()
            if got != want
        ]
        version = VERSIONS[-1]
        if frame.api != ffi.NULL:
            given = frame.api.api_version
            version = given.major_version, given.minor_version
        if wrong or version not in VERSIONS:
            theirs, *ours = (".".join(map(str, each)) for each in (version, *VERSIONS))
            told = "; ".join([f"XLA's foreign functions are of version {theirs}", *wrong])
            reads = " and ".join(ours)
            self._refusal = AbiError(f"{told}. fi_ffi.jax reads {reads}: use another jax")
        metadata.api_version.major_version, metadata.api_version.minor_version = version
        metadata.traits = traits
        return ffi.NULL

    def _call(self, frame: Any, is_cuda: bool) -> None:
        if frame.stage != _EXECUTE:
            return
        self._latest = number = next(self._numbers)
        self._running.add(number)
        try:
            self._find_and_call(frame, is_cuda)
        finally:
            self._running.discard(number)

    def _find_and_call(self, frame: Any, is_cuda: bool) -> None:
        span = frame.attrs.attrs[0]
        call = CallText.read(ffi.buffer(span.ptr, span.len)[:])
        device, stream = _place(frame, is_cuda)
        descs = _descs(frame.args, call.arguments, device, call.transposed)
        # A result with an argument's name is that argument, which the op writes.
        descs |= _descs(frame.rets, call.results, device)
        function = self._find(call.function)
        if is_cuda:
            function(**descs, **call.scalars, stream=stream)
        else:
            with _subnormal_numbers():
                function(**descs, **call.scalars)


def _escaped(_: object, error: BaseException, traceback: TracebackType) -> Any:
    """Return XLA's error for an exception that leaves a handler; without one, the call succeeds.

    A signal that came while XLA computed is raised where the handler begins, before a `try` of its
    could catch it.
    """
    # An exception of a signal handler is raised again in Python's main thread.
    again = signal_again(BaseException.with_traceback(error, traceback))
    return _error(traceback.tb_frame.f_locals["frame"], error, again)


def _error(frame: Any, error: BaseException, again: object) -> Any:
    code = next(code for kind, code in _CODES if isinstance(error, kind))
    text = f"{type(error).__name__}: {message_of(error)}".encode(errors="replace")
    message = ffi.new("char[]", text)
    size = ffi.sizeof("ErrorCreate")
    given = ffi.new("ErrorCreate *", {"struct_size": size, "message": message, "errc": code})
    return frame.api.Error_Create(given)
