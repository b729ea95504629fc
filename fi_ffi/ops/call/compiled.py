"""Rows compiled for calling, and their variants: one for each combination of tensor kinds."""

from __future__ import annotations

import functools
import linecache
import math
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fi_ffi.abi.function import ARRAY, Entry, Frame, Slot, c_text
from fi_ffi.abi.interop import READERS, Fields, described, read
from fi_ffi.abi.streams import handle_for
from fi_ffi.abi.tensor import (
    DTYPES,
    Device,
    TensorDesc,
    TensorKind,
    as_vector,
    parse_device,
    tensor_kind,
)
from fi_ffi.loader import generation, machine
from fi_ffi.ops.call import cuda, memory, notation
from fi_ffi.ops.call.checks import CompileOptions, call_text
from fi_ffi.ops.call.codegen import FUNCTIONS, Writer
from fi_ffi.ops.call.launch import LaunchTarget, launch
from fi_ffi.ops.call.refuse import DEVICE_TYPES, MAPPED, Refusals
from fi_ffi.ops.call.releases import GUARDED, entry_for
from fi_ffi.ops.call.row import (
    KV_LAYOUTS,
    REQUIRED,
    Absent,
    Arg,
    KvLayout,
    Required,
    Row,
    Scalar,
    Tensor,
    TensorArray,
    Text,
    exchanged,
)

# The file name of compiled code in tracebacks, inside the package.
_FILE = __file__.removesuffix("compiled.py") + "<{}>"
_CPU = parse_device("cpu")
_NUMBERS: dict[str, Slot] = {"int": int, "bool": bool, "float": float}
_MAX_VARIANTS = 4096


class _Keep:
    def __repr__(self) -> str:
        return "(as it is)"


KEEP: Any = _Keep()  # an argument of an update that stays as it is


Kinds = Mapping[str, TensorKind | None]  # of tensors by name; None for a missing one


class Variant:
    """A row's calls with tensors of these kinds: everything that does not depend on sizes."""

    def __init__(self, compiled: CompiledRow, kinds: Kinds, layout: str, device: Device) -> None:
        row = compiled.row
        self.compiled, self.device, self.is_nhd = compiled, device, layout == "NHD"
        self.kinds = dict(kinds)
        # Of the tensors that are not missing; bound ones come last.
        every = {**kinds, **compiled.options.bound}
        dtypes = {arg.name: arg.dtype for arg in row.tensors}
        self.dtypes = {dtypes[name]: kind.dtype.name for name, kind in every.items() if kind}
        # Missing tensors get any allowed dtype.
        some = {name: names[0] for name, names in row.dtypes.items() if names} | self.dtypes
        self.itemsizes = {name: DTYPES[dtype].itemsize for name, dtype in some.items()}
        for tensor in row.tensors:
            if tensor.is_scratch:
                self.kinds[tensor.name] = tensor_kind(DTYPES[tensor.dtype], self.device, 1)
        self._slots = [self._slot(arg, some) for arg in row.slots]
        # Words that calls do not write: index in the frame, and value.
        place = compiled.layout.value
        self._values = list[tuple[int, int]]()
        for i, arg in enumerate(row.args):
            if isinstance(arg, KvLayout):
                self._values.append((place(i), 0 if arg.strided else KV_LAYOUTS[layout]))
            elif isinstance(arg, Absent) and arg.abi_type in _NUMBERS:
                self._values.append((place(i), arg.value))
        # The layouts of the last call that passed, and what was computed from them. A plan's runs
        # have theirs in the plan, and here the same of all that no batch changes.
        self.memo: tuple[Any, ...] = (None,)
        self.memo_of_pack: tuple[Any, ...] = (None,)
        self.memo_of_check: tuple[Any, ...] = (None,)
        self.memo_of_plan: tuple[Any, ...] = (None,)
        # Found at the first call.
        self.entry: Entry | None = None
        self.target: LaunchTarget | None = None
        # Free frames. list.pop and append are atomic, so concurrent calls get different frames.
        self.frames: list[Frame] = []

    # What checks ask of the GPU, on first use: errors in arguments come before a missing GPU. Rules
    # find no limits on the CPU.

    @functools.cached_property
    def multiprocessors(self) -> int:
        return machine.multiprocessors(self.device.index) if self.device.is_cuda else sys.maxsize

    @functools.cached_property
    def shared_memory(self) -> int:
        return machine.shared_memory(self.device.index) if self.device.is_cuda else sys.maxsize

    @functools.cached_property
    def scratch(self) -> dict[str, int]:
        """The bytes that scratch arguments need independent of sizes."""
        args = [arg for arg in self.compiled.row.tensors if arg.is_scratch]
        return {arg.name: memory.scratch_bytes(arg, self.device) for arg in args}

    def _slot(self, arg: Arg, some: Mapping[str, str]) -> Slot:
        if isinstance(arg, Tensor):
            kind = self.kind_of(arg)
            if kind is not None:
                return kind, arg.as_object
            if not arg.empty:
                return None
            # Some entries look at the dtype of a tensor without elements.
            arg = Absent(arg.name, dtype=some.get(arg.dtype, arg.dtype))
        if isinstance(arg, Absent):
            if arg.entry_rank is None:
                return _NUMBERS.get(arg.abi_type)
            return tensor_kind(DTYPES[arg.dtype], self.device, arg.entry_rank), False
        if isinstance(arg, TensorArray):
            slots = self.compiled.row.slots
            first = slots.index(arg.items[0])
            return range(first, first + len(arg.items))
        if isinstance(arg, Scalar):
            return arg.type
        if isinstance(arg, Text):
            return str
        return int if isinstance(arg, KvLayout) else ARRAY

    def kind_of(self, arg: Tensor) -> TensorKind | None:
        """Return the kind of a tensor argument as the entry gets it; None if it is missing."""
        kind = self.kinds.get(arg.name) or self.compiled.options.bound.get(arg.name)
        if kind is None or not arg.view:
            return kind
        return tensor_kind(kind.dtype, kind.device, arg.entry_rank, kind.readonly)

    def start(self) -> None:
        """Find the entry, once."""
        if self.entry is None:
            compiled, row = self.compiled, self.compiled.row
            if compiled.find_entry is not None:
                entry = compiled.find_entry(row, self.device)
            elif row.compiled_for is not None and self.device.is_cuda:
                dtypes = {name: kind.dtype.name for name, kind in self.kinds.items() if kind}
                entry = entry_for(row.compiled_for(row, dtypes), self.device)
            else:
                entry = entry_for(row, self.device, compiled.module)
            self.target = LaunchTarget(self.device, compiled.refuse.op, row.source in GUARDED)
            self.entry = entry

    def new_frame(self, *stream: object) -> Frame:
        """Make a frame; a missing `stream` is refused before the entry is looked up."""
        if stream:
            handle_for(stream[0], self.device, self.compiled.refuse.op)
        self.start()
        assert self.entry is not None
        frame = Frame(self.compiled.layout, self._slots, self.entry)
        frame.variant, frame.target = self, self.target
        frame.give_back = giving_back(frame, self.frames)
        for word, value in self._values:
            frame.words[word] = value
        return frame

    def run(self, frame: Frame, stream: object) -> Any:
        """Launch a frame whose call needs more than a stream: memory, or Tensor objects."""
        frame.place_objects()
        if self.compiled.row.allocates:
            with cuda.kernel_memory().installed():
                launch(frame, stream)
        else:
            launch(frame, stream)
        return frame.take_result()


def giving_back(frame: Frame, free: list[Frame]) -> Callable[[Frame], None]:
    """Return what puts a frame into its pool, unless a callee kept one of its Tensor objects."""
    if not frame.has_objects:
        return free.append

    def give_back(frame: Frame) -> None:
        if frame.is_referred_to:
            memory.keep(frame)
        else:
            free.append(frame)

    return give_back


class CompiledRow:
    """A row with the functions compiled from it.

    `module` is another of its family's, `options` are those of `CompileOptions`, and `device` is
    that of a plan's memory. `find_entry` finds an entry in an object of the caller's. A row
    `follows` the kernels in use, unless its owner keeps those that it was made with, as plans do.
    """

    def __init__(
        self,
        row: Row,
        module: str | None = None,
        *,
        op: str = "",
        device: Device | None = None,
        find_entry: Callable[[Row, Device], Entry] | None = None,
        follows: bool = True,
        **options: Any,
    ) -> None:
        self.row, self.module = row, module or row.module
        self.device, self.find_entry = device, find_entry
        self.options = CompileOptions(row, op or row.name, **options)
        bound, names = self.options.bound, self.options.names
        self.layout = self.options.layout
        self.refuse = Refusals(row, self.options.op, names, self.options.known)
        self.tensors = [arg for arg in row.tensors if arg.name not in bound]
        self.variants: dict[object, Variant] = {}
        if follows:
            generation.follow(self)

    # A method for ops, with the op's parameters, that launches.
    call: Callable[..., Any]
    # A function that packs the same call without launching it: see `Writer.pack`.
    pack: Callable[..., Any]
    # A function that only checks a call; it returns the tensors by name (None for missing ones) and
    # the axes' sizes.
    check: Callable[..., tuple[dict[str, Any], dict[str, int]]]
    # A function that returns the arguments of a call by name, and its stream.
    arguments: Callable[..., tuple[dict[str, Any], object]]
    # The `update` of prepared calls.
    update: Callable[..., None]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Compile one of the functions at its first use."""
        if name not in FUNCTIONS:
            raise AttributeError(name)
        row, (header, lines) = self.row, getattr(Writer(self.options, name), name)()
        source = "\n".join([header, *(f"    {line}" for line in lines)])
        called = call_text(row)
        namespace: dict[str, Any] = {
            "KEEP": KEEP,
            "KV_LAYOUTS": KV_LAYOUTS,
            "TensorDesc": TensorDesc,
            "gcd": math.gcd,
            "handle_for": handle_for,
            "add_variant": self._add_variant,
            "as_vector": as_vector,
            "described": described,
            "exchanged": exchanged,
            "inf": math.inf,
            "launch": launch,
            "own_handle": cuda.own_handle,
            "read": read,
            "readers": READERS,
            "refuse": self.refuse,
            "scratch_for": memory.scratch_for,
            "variants": self.variants,
            REQUIRED: Required(called),
            "zeros": memory.zeros,
        }
        namespace |= notation.FUNCTIONS
        for rule in row.rules:
            for own, helper in rule.using.items():
                assert namespace.setdefault(own, helper) is helper, f"{row.name}: {own}"
        for i, arg in enumerate(row.slots):
            if isinstance(arg, Text):
                namespace[f"texts{i}"] = {word: c_text(word) for word in arg.words}
            elif isinstance(arg, Tensor) and arg.is_scratch:
                namespace[f"scratch{i}"] = arg
        count = self.layout.last_dims - self.layout.first_dims
        namespace["pack_dims"] = struct.Struct(f"{count}q").pack
        file = _FILE.format(f"{row.name}, {name}, {id(self):#x}")
        # Lets tracebacks show the source line.
        linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
        exec(compile(source, file, "exec"), namespace)
        function: Callable[..., Any] = namespace[name]
        # Python's own TypeError for missing and unknown arguments begins with the second.
        function.__name__, function.__qualname__ = row.name, f"{called}: {self.refuse.op}"
        setattr(self, name, function)
        return function

    def _add_variant(self, tensors: Sequence[TensorDesc | Fields | None], layout: str) -> Variant:
        """Make the variant for tensors of these kinds; raise if the row does not allow them."""
        if self.row.kv_layout is not None and layout not in KV_LAYOUTS:
            self.refuse.word(self.row.kv_layout.name, layout, KV_LAYOUTS)
        descs: list[TensorDesc | None] = [*map(described, tensors)]
        pairs = [*zip(self.tensors, descs, strict=True)]
        device = self._check_kinds([(arg, desc) for arg, desc in pairs if desc is not None], layout)
        kinds = {arg.name: None if desc is None else desc.kind for arg, desc in pairs}
        variant = Variant(self, kinds, layout, device)
        if len(self.variants) >= _MAX_VARIANTS:
            self.variants.clear()
        key = (*kinds.values(),) if self.row.kv_layout is None else (layout, *kinds.values())
        return self.variants.setdefault(key, variant)

    def _check_kinds(self, present: Sequence[tuple[Tensor, TensorDesc]], layout: str) -> Device:
        """Refuse ranks, dtypes, devices and read-only memory for which the row has no kernel.

        Returns the device of all tensors except those that are read on the host.
        """
        row, error, dtypes = self.row, self.refuse.error, dict[str, Any]()
        for arg, desc in present:
            if desc.kind.rank != len(arg.axis_names):
                axes = arg.axes_in(layout)
                raise error(arg.name, desc.layout, f"rank {len(axes)} ({' '.join(axes)})")
        for arg, desc in present:
            dtype, allowed = desc.kind.dtype, row.dtypes.get(arg.dtype, (arg.dtype,))
            if dtype.name not in allowed:
                raise error(arg.name, dtype, " or ".join(allowed))
            same = dtypes.setdefault(arg.dtype, dtype)
            if dtype is not same:
                raise error(arg.name, dtype, f"{same}, the {arg.dtype} of this call")
        for lacking in row.lacks:
            if all(
                name in dtypes and dtypes[name].name == dtype for name, dtype in lacking.items()
            ):
                arg = next(arg for arg in row.tensors if arg.dtype in lacking)
                others = " and ".join(name for name in lacking if name != arg.dtype)
                raise error(arg.name, dtypes[arg.dtype], f"another dtype beside this {others}")
        device = self._device_of(present)
        for arg, desc in present:
            if arg.writes and desc.kind.readonly:
                raise error(arg.name, "read-only memory", "writable")
        return device

    def _device_of(self, present: Sequence[tuple[Tensor, TensorDesc]]) -> Device:
        first, of = (self.device if self.options.bound else None), ""
        for arg, desc in sorted(present, key=lambda pair: pair[0].mapped):
            device, expected = desc.kind.device, ""
            if arg.host:
                if device.type != "cpu":
                    expected = "an array on the host: it is read before anything is launched"
            elif arg.mapped and first is not None and first.is_cuda and device is not first:
                if device.type not in MAPPED:
                    expected = f"{first}, or page-locked memory: a TensorDesc on cuda_host"
            elif device.type not in DEVICE_TYPES:
                expected = " or ".join(DEVICE_TYPES)
            elif first is None:
                first, of = device, arg.name
            elif device is not first:
                whose = f"the device of `{self.refuse.name(of)}`" if of else "as planned"
                expected = f"{first}, {whose}"
            if expected:
                raise self.refuse.error(arg.name, device, expected)
        return first or self.device or _CPU

    def forget(self) -> None:
        """Drop what earlier calls cached, after the source of kernels changed."""
        self.variants.clear()
