"""What functions return that is no Python value: owned objects, read and called from here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, overload

from fi_ffi.abi import types
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.containers import function_of
from fi_ffi.abi.device import Device
from fi_ffi.abi.dtypes import DType
from fi_ffi.abi.function import Entry
from fi_ffi.abi.objects import Array, Function, Module, Object, Tensor
from fi_ffi.abi.signature import Signature
from fi_ffi.abi.tensor import TensorDesc, make_desc
from fi_ffi.abi.values import desc_from_dl_tensor, ints_of
from fi_ffi.errors import AbiError, ArgumentTypeError, KernelNotFoundError, printed
from fi_ffi.ops.modules.entry import Life, ModuleEntry

_Kind = TypeVar("_Kind", bound=Object)


class Origin(NamedTuple):
    """Where an object comes from: who returned it, on which GPU, and whether its methods
    are known to tell their signatures."""

    name: str
    home: Device | None
    asks: bool


def adopted(value: Any, origin: Origin) -> Any:
    """The result of a call: objects become those of this module."""
    if not isinstance(value, Object):
        return value
    index = ffi.cast("TVMFFIObject *", value.handle).type_index
    if index == types.SHAPE:
        with value:
            return ints_of(ffi.cast("FiFfiShapeObject *", value.handle).cell)
    kind = _KINDS.get(index)
    return value if kind is None else _take(kind, value, origin)


def _take(kind: type[_Kind], value: Object, origin: Origin) -> _Kind:
    """`value`'s reference as an object of another class; `value` has it no more."""
    made = object.__new__(kind)
    made._handle, value._handle = value._handle, None
    made._begin(origin)  # type: ignore[attr-defined]
    return made


class ModuleObject(Module):
    """An object with methods, looked up by name.

        runner.method("run_moe")(...)  # or runner.run_moe(...)

    It lives as long as it or one of its methods is referred to, or until `release`.
    """

    __slots__ = ("_life", "_methods", "origin")

    def _begin(self, origin: Origin) -> None:
        self.origin = origin
        self._life = Life(self._handle)
        self._methods: dict[tuple[str, bool | None], ModuleEntry] = {}

    @property
    def device(self) -> Device | None:
        """The GPU it was made on, if its call named one: that of its methods' calls."""
        return self.origin.home

    @property
    def kind(self) -> str:
        """What its makers call objects of its class."""
        return str(function_of("ffi.ModuleGetKind")(self))

    def release(self) -> None:
        """Give it back now: its methods cannot be called any more."""
        self._life.handle = None
        super().release()

    def method(self, name: str, *, checked: bool | None = None) -> ModuleEntry:
        """A method by name; `KernelNotFoundError` where it has none of that name.

        It is asked for its signature where its library has typed functions, or for
        `checked=True`.  One that takes any arguments is run by that, with 512 of None, the
        first time that it is looked up; `checked=False` does not ask.
        """
        found = self._methods.get((name, checked))
        if found is None:
            found = self._methods[name, checked] = self._look_up(name, checked)
        return found

    def _look_up(self, name: str, checked: bool | None) -> ModuleEntry:
        if not isinstance(name, str):
            got = f"{type(name).__name__} {printed(name)}"
            raise ArgumentTypeError(f"{self.origin.name}.method", "name", got=got, expected="a str")
        function = function_of("ffi.ModuleGetFunction")(self, name, False)
        if not isinstance(function, Function):
            raise KernelNotFoundError(f"{self!r} has no method {name!r}")
        made = _entry_of(function, f"{self.origin.name}().{name}", self._life, self.origin)
        if checked or (checked is None and self.origin.asks):
            with contextlib.nullcontext() if checked else contextlib.suppress(AbiError):
                made.probe()
        return made

    def __getattr__(self, name: str) -> ModuleEntry:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self.method(name)
        except KernelNotFoundError as error:
            raise AttributeError(str(error)) from None

    def __repr__(self) -> str:
        if self._handle is None:
            return f"<released object of {self.origin.name}()>"
        return f"<{self.kind} of {self.origin.name}()>"


def _entry_of(function: Function, name: str, life: Life, origin: Origin) -> ModuleEntry:
    # The entry keeps the function, and its owner by `life`, without a cycle: what nobody
    # refers to is released at once.
    entry = Entry.of(function, name)
    return ModuleEntry(
        name, lambda device: entry, None, life=life, home=origin.home, asks=origin.asks
    )


class FunctionObject(Function):
    """A function that a call returned.  It may take any arguments: it is called unchecked,
    until `probe` has asked for its signature."""

    __slots__ = ("_entry", "_life", "origin")

    def _begin(self, origin: Origin) -> None:
        self.origin = origin
        self._life = Life(self._handle)
        name = f"{origin.name}()"
        entry = Entry(name, self.safe_call, self._handle)
        self._entry = ModuleEntry(
            name, lambda device: entry, None, life=self._life, home=origin.home, asks=origin.asks
        )

    @property
    def signature(self) -> Signature | None:
        return self._entry.signature

    def probe(self) -> Signature:
        """Ask for the signature, and check calls against it: `ModuleEntry.probe`."""
        return self._entry.probe()

    def __call__(self, *args: Any, stream: object = None, device: object = None) -> Any:
        return self._entry(*args, stream=stream, device=device)

    def release(self) -> None:
        self._life.handle = None
        super().release()

    def __repr__(self) -> str:
        return f"<{'released ' if self._handle is None else ''}function {self._entry!r}>"


class ArrayObject(Array, Sequence[Any]):
    """A sequence that a call returned, read like a list."""

    __slots__ = ("_names", "origin")

    def _begin(self, origin: Origin) -> None:
        self.origin = origin
        index = ffi.cast("TVMFFIObject *", self._handle).type_index
        self._names = "ffi.List" if index == types.LIST else "ffi.Array"

    def __len__(self) -> int:
        return int(function_of(f"{self._names}Size")(self))

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        positions = range(len(self))[index]
        if isinstance(positions, range):
            return [self._item(i) for i in positions]
        return self._item(positions)

    def _item(self, index: int) -> Any:
        return adopted(function_of(f"{self._names}GetItem")(self, index), self.origin)

    def __repr__(self) -> str:
        return repr(list(self)) if self._handle is not None else "<released array>"


class MapObject(Object, Mapping[Any, Any]):
    """A mapping that a call returned, read like a dict."""

    __slots__ = ("_names", "origin")

    def _begin(self, origin: Origin) -> None:
        self.origin = origin
        index = ffi.cast("TVMFFIObject *", self._handle).type_index
        self._names = "ffi.Dict" if index == types.DICT else "ffi.Map"

    def __len__(self) -> int:
        return int(function_of(f"{self._names}Size")(self))

    def __getitem__(self, key: Any) -> Any:
        try:
            is_there = function_of(f"{self._names}Count")(self, key)
        except ArgumentTypeError:
            is_there = False
        if not is_there:
            raise KeyError(key)
        return adopted(function_of(f"{self._names}GetItem")(self, key), self.origin)

    def __iter__(self) -> Iterator[Any]:
        if not len(self):
            return
        step = Entry.of(function_of(f"{self._names}ForwardIterFunctor")(self), "iterate")
        yield adopted(step(0), self.origin)
        while step(2):
            yield adopted(step(0), self.origin)

    def __repr__(self) -> str:
        return repr(dict(self)) if self._handle is not None else "<released mapping>"


class TensorObject(Tensor):
    """A tensor that a call returned; `desc` is what ops and entries take."""

    __slots__ = ("_desc", "origin")

    def _begin(self, origin: Origin) -> None:
        self.origin = origin
        found = desc_from_dl_tensor(ffi.cast("FiFfiTensorObject *", self._handle).cell)
        # It keeps the reference, which is given back when both are gone.
        self._desc = make_desc(found.ptr, found.layout, self._handle)

    @property
    def desc(self) -> TensorDesc:
        """Its address and layout, valid until `release`, or as long as this is referred to."""
        _ = self.handle
        return self._desc

    @property
    def shape(self) -> tuple[int, ...]:
        return self._desc.shape

    @property
    def dtype(self) -> DType:
        return self._desc.dtype

    @property
    def device(self) -> Device:
        return self._desc.device

    def __del__(self) -> None:
        """No release, as other tensors have: descriptors may still hold the reference."""

    def tobytes(self) -> bytes:
        """The bytes of a contiguous tensor in host memory."""
        desc = self.desc
        if desc.device.type != "cpu" or not desc.layout.is_contiguous:
            got, expected = str(desc.layout), "a contiguous tensor on the cpu"
            raise ArgumentTypeError("TensorObject.tobytes", "self", got=got, expected=expected)
        return bytes(ffi.buffer(ffi.cast("char *", desc.ptr), desc.layout.span_bytes))

    def __repr__(self) -> str:
        return f"<tensor {self._desc.layout}{', released' if self._handle is None else ''}>"


_KINDS: dict[int, type[Any]] = {
    types.MODULE: ModuleObject,
    types.FUNCTION: FunctionObject,
    types.ARRAY: ArrayObject,
    types.LIST: ArrayObject,
    types.MAP: MapObject,
    types.DICT: MapObject,
    types.TENSOR: TensorObject,
}
