"""Calls any function, and wraps the objects that functions return.

A call checks its arguments against the function's own signature, packs them, and calls on the
device of its tensors. Returned objects have methods, which are entries again.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar, overload

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import Entry, library_function, probe
from fi_ffi.abi.library import TypeIndex
from fi_ffi.abi.objects import (
    Array,
    CallArena,
    Function,
    Module,
    Object,
    Tensor,
    Unique,
)
from fi_ffi.abi.signature import Signature
from fi_ffi.abi.streams import current_handle, current_scope, stream_handle
from fi_ffi.abi.tensor import Device, DType, TensorDesc, parse_device
from fi_ffi.abi.values import pack_arguments
from fi_ffi.errors import AbiError, ArgumentError, ArgumentTypeError, KernelNotFoundError, with_type
from fi_ffi.export import Exported
from fi_ffi.modules.packing import call, ints_of, pack, packer_of
from fi_ffi.modules.reflection import Field, Method, TypeInfo, get_field, set_field, type_info
from fi_ffi.ops.call import cuda, hooks
from fi_ffi.ops.steps.stream import stream_context

if TYPE_CHECKING:
    import inspect

_NOTHING = contextlib.nullcontext()


class HandleGuard(Unique):
    """The handle through which a method or function object is called, until its owner is
    released."""

    __slots__ = ("_handle",)

    def __init__(self, handle: Any) -> None:
        self._handle = handle


class ModuleEntry(Unique):
    """A function of a module or an object, called with Python values.

        entry(*args, stream=None, device=None)

    `signature` is the function's own, and arguments are checked against it. If it is None,
    arguments are not checked, and are packed by their Python types.

    Raises `ArgumentError` and `ArgumentTypeError` before the function runs, naming an argument by
    its number and type, and `KernelError` with the function's message.
    """

    def __init__(
        self,
        name: str,
        find: Callable[[int | None], Entry],
        signature: Signature | None,
        *,
        guard: HandleGuard | None = None,
        home: Device | None = None,
        asks: bool = False,
        doc: str = "",
        is_method: bool = False,
    ) -> None:
        self.name = name
        self._find, self._guard, self._home, self._asks = find, guard, home, asks
        self._doc = doc
        # A method's first argument, set by `bound_to` and absent from the signature.
        self._is_method, self._bound = is_method, None
        self._declare(signature)

    def bound_to(self, owner: ReflectedObject) -> ModuleEntry:
        """Bind a method to an object, and keep the object alive with it."""
        method = object.__new__(ModuleEntry)
        method.__dict__.update(self.__dict__, _bound=owner, _home=owner.origin.home)
        return method

    def _declare(self, signature: Signature | None) -> None:
        if signature is not None and self._is_method:
            signature = Signature(signature.name, signature.params[1:], signature.result)
        self.signature = signature
        self._packers = (
            []
            if signature is None
            else list(zip(map(packer_of, signature.params), signature.spelled, strict=True))
        )
        # On the instance, for `help`.
        self.__doc__ = f"{self!r}\n\n{self._doc}".rstrip()

    @property
    def __name__(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def __signature__(self) -> inspect.Signature:
        from inspect import Parameter, Signature

        params = [Parameter("args", Parameter.VAR_POSITIONAL)]
        if self.signature is not None:
            params = [
                Parameter(f"_{i}", Parameter.POSITIONAL_ONLY, annotation=text)
                for i, text in enumerate(self.signature.params)
            ]
        params += [
            Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in ("stream", "device")
        ]
        result = Signature.empty if self.signature is None else self.signature.result
        return Signature(params, return_annotation=result)

    def __repr__(self) -> str:
        if self.signature is None:
            return f"{self.name}(*args), unchecked"
        return str(replace(self.signature, name=self.name))

    def probe(self) -> Signature:
        """Ask the function for its signature, and check later calls against it.

        The question is a call with 512 arguments of None. A typed function refuses the call and
        reports its signature. A function that accepts any arguments runs, and `AbiError` is raised.
        """
        held, find = self._hold(), self._find
        self._declare(probe(find(None)))
        del held
        assert self.signature is not None
        return self.signature

    def __call__(self, *args: Any, stream: object = None, device: object = None) -> Any:
        """Call with the arguments of `signature`, in order.

        Args:
            stream: a stream as for `fi_ffi.stream`; required if a tensor is on a GPU and no scope
                is open.
            device: the GPU of a call without a tensor on a GPU ("cuda:0").
        """
        held, find = self._hold(), self._find
        # The origin holds no entry: an entry keeps its object, and the callee may keep a Python
        # function that it was given.
        origin = Origin(self.name, self._home, self._asks)
        arena = CallArena(self.name, functools.partial(adopted, origin=origin))
        arena.keep.append(held)
        try:
            packed = self._pack(args, arena)
            place, needs_stream = _place_of(arena, device, self._home)
            if place is None:
                if stream is not None:
                    stream_handle(stream, self.name)
                return self._invoke(find(None), packed, args, arena, None)
            # Refuse a missing stream before the entry is looked up.
            on_stream = _stream_of(stream, place, needs_stream, self.name)
            entry = find(place.index)
            with cuda.current(place), on_stream or _NOTHING:
                return self._invoke(entry, packed, args, arena, place)
        finally:
            arena.end()

    def _hold(self) -> Any:
        """Return the handle that the call needs, so that `release` takes nothing from it."""
        guard: HandleGuard | ReflectedObject | None = self._guard
        if self._bound is not None:
            guard = self._bound
        handle = None if guard is None else guard._handle
        if guard is not None and handle is None:
            _refuse_released(self.name)
        return handle

    def _pack(self, args: tuple[Any, ...], arena: CallArena) -> Any:
        packers = self._packers
        if self.signature is None:
            packers = [(pack, str(i)) for i in range(len(args))]
        if len(args) != len(packers):
            got, expected = f"{len(args)} of them", f"{len(packers)}, for {self!r}"
            raise ArgumentTypeError(self.name, "*args", got=got, expected=expected)
        if self._bound is not None:
            # Numbers in errors count the caller's arguments, without the object.
            args, packers = (self._bound, *args), [(pack, "self"), *packers]
        try:
            return pack_arguments(args, arena, packers)
        except RecursionError:
            got, expected = "endlessly nested values", "values without cycles"
            raise ArgumentError(self.name, "*args", got=got, expected=expected) from None

    def _invoke(
        self,
        entry: Entry,
        packed: Any,
        args: tuple[Any, ...],
        arena: CallArena,
        place: Device | None,
    ) -> Any:
        count = len(args) + (self._bound is not None)
        invoke = functools.partial(entry.invoke, packed, count)
        with cuda.kernel_memory().installed():
            watcher = hooks.watcher
            if watcher is None:
                value = invoke()
            else:
                value = watcher.called(self.name, invoke, args, arena.descs, place)
        if not isinstance(value, Object):
            return value
        stream = None if place is None else current_handle(place)
        made = adopted(value, Origin(self.name, place or self._home, self._asks, stream))
        return _nested(made, arena)


def _refuse_released(name: str, device: object = None) -> NoReturn:
    expected = "an object still held"
    raise ArgumentError(name, "self", got="one that was released", expected=expected)


# Containers that libtvm_ffi frees by recursion, on a stack that is as small as a thread's may be.
_DEEPEST = 1000


def _nested(value: Any, arena: CallArena) -> Any:
    """Return a call's result, which may contain the arguments, unless it is nested too deep."""
    if isinstance(value, Object):
        value.depth = arena.depth + 1
        if value.depth > _DEEPEST:
            value.depth = _measured(value)
        if value.depth > _DEEPEST:
            value.release()
            got, expected = "containers nested deeper", f"containers nested {_DEEPEST} deep at most"
            raise ArgumentError(arena.op, "*args", got=got, expected=expected)
    return value


def _measured(value: Object) -> int:
    """Return how deep the arrays and mappings of an object are nested, up to a few too many."""
    level = {0: value}
    for depth in range(1, _DEEPEST + 2):
        parts = (
            part
            for one in level.values()
            if isinstance(one, (ArrayObject, MapObject))
            for part in (one if isinstance(one, ArrayObject) else (*one, *one.values()))
        )
        level = {
            library.address_of(part.handle): part for part in parts if isinstance(part, Object)
        }
        if not level:
            return depth
    return depth


def _of(owner: Object, part: Any) -> Any:
    """Return a part of an object, which is nested no deeper."""
    if isinstance(part, Object):
        part.depth = owner.depth
    return part


def _place_of(arena: CallArena, told: object, home: Device | None) -> tuple[Device | None, bool]:
    """Return the GPU of a call, or None, and whether the call needs a stream.

    All tensors on GPUs must be on one. Without any, the GPU is `told`, the call's `device`, or
    `home`, the GPU on which the method's object was made.
    """
    on_gpu = [(where, desc.device) for where, desc in arena.descs if desc.device.is_cuda]
    is_managed = any(desc.device.type == "cuda_managed" for _, desc in arena.descs)  # of any GPU
    first, place = on_gpu[0] if on_gpu else ("device", None)
    expected = f"{place}, the device of `{first}`"
    for where, device in on_gpu:
        if device is not place:
            raise ArgumentError(arena.op, where, got=device, expected=expected)
    if told is not None:
        chosen = parse_device(told, op=arena.op, argument="device")
        if on_gpu and chosen is not place:
            raise ArgumentError(arena.op, "device", got=chosen, expected=expected)
        place = chosen if chosen.is_cuda else None
    if home is not None and place is not None and place is not home:
        expected = f"{home}, where the object was made"
        raise ArgumentError(arena.op, first, got=place, expected=expected)
    place = place or home
    if is_managed and place is None:
        expected = "the GPU that uses the managed memory"
        raise ArgumentError(arena.op, "device", got=None, expected=expected)
    return place, is_managed or bool(on_gpu)


def _stream_of(stream: object, place: Device, is_needed: bool, op: str) -> stream_context | None:
    """Return a context that makes the stream current during a call on a GPU, or None."""
    if is_needed or stream is not None:
        return stream_context(stream, place, op)
    scope = current_scope()
    if scope is None or scope.device not in (None, place):
        return None
    return stream_context(None, place, op)


class Origin(NamedTuple):
    """The origin of an object: the call that returned it, the GPU, and whether its methods report
    their signatures."""

    name: str
    home: Device | None
    asks: bool
    stream: int | None = None  # of the call, on a GPU

    def entry_of(
        self, function: Function, name: str, guard: HandleGuard, owner: object
    ) -> ModuleEntry:
        """Make an entry of a function, unchecked until it was asked for its signature."""
        entry = Entry(name, function.safe_call, function.handle, owner)
        return ModuleEntry(
            name, lambda device: entry, None, guard=guard, home=self.home, asks=self.asks
        )


def adopted(value: Any, origin: Origin) -> Any:
    """Wrap the result of a call: objects become those of this module."""
    if not isinstance(value, Object):
        return value
    index = library.type_index_of(value.handle)
    if index == TypeIndex.SHAPE:
        with value:
            return ints_of(value)
    kind = _KINDS.get(index)
    if kind is None:
        if type(value) is not Object or type_info(index) is None:
            return value
        kind = ReflectedObject
    adopted_object = value.moved_to(kind)
    adopted_object._begin(origin)
    return adopted_object


class ModuleObject(Module):
    """An object with methods, looked up by name.

        runner.method("run_moe")(...)  # or runner.run_moe(...)

    It lives while it or one of its methods is referred to, or until `release`.
    """

    __slots__ = ("_guard", "_methods", "origin")

    def _begin(self, origin: Origin) -> None:
        self.origin = origin
        self._guard = HandleGuard(self._handle)
        self._methods: dict[tuple[str, bool | None], ModuleEntry] = {}

    @property
    def device(self) -> Device | None:
        """The GPU that the creating call named, or None; the methods' calls use it."""
        return self.origin.home

    @property
    def kind(self) -> str:
        """The name that the library gives to objects of this class."""
        return str(library_function("ffi.ModuleGetKind")(self))

    def release(self) -> None:
        """Release the object now; its methods can no longer be called."""
        self._guard._handle = None
        super().release()

    def method(self, name: str, *, checked: bool | None = None) -> ModuleEntry:
        """Return a method by name; raise `KernelNotFoundError` if there is none.

        A method is asked for its signature if its library has typed functions, or with
        `checked=True`. The question is a call with 512 arguments of None, so a method that accepts
        any arguments runs, at its first lookup. `checked=False` does not ask.
        """
        entry = self._methods.get((name, checked))
        if entry is None:
            entry = self._methods[name, checked] = self._look_up(name, checked)
        return entry

    def _look_up(self, name: str, checked: bool | None) -> ModuleEntry:
        if not isinstance(name, str):
            got = with_type(name)
            raise ArgumentTypeError(f"{self.origin.name}.method", "name", got=got, expected="a str")
        function = library_function("ffi.ModuleGetFunction")(self, name, False)
        if not isinstance(function, Function):
            raise KernelNotFoundError(f"{self!r} has no method {name!r}")
        # The entry keeps the function, and its owner by `_guard`, without a cycle: an object
        # without references is released at once.
        entry = self.origin.entry_of(
            function, f"{self.origin.name}().{name}", self._guard, function
        )
        if checked or (checked is None and self.origin.asks):
            with contextlib.nullcontext() if checked else contextlib.suppress(AbiError):
                entry.probe()
        return entry

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


class ReflectedObject(Object):
    """An object of a type that a library registered; its fields and methods are attributes.

        matcher.accept_token(5, False)
        point.x = 3.0

    Names that this class already has (`release`, `handle`, `method`, ...) hide the library's.
    `field`, `set_field` and `method` reach any name.
    """

    __slots__ = ("_type", "origin")
    _type: TypeInfo
    origin: Origin

    def _begin(self, origin: Origin) -> None:
        self.origin = origin
        info = type_info(library.type_index_of(self._handle))
        assert info is not None
        self._type = info

    @property
    def type_key(self) -> str:
        """The name under which its type is registered."""
        return self._type.key

    @property
    def device(self) -> Device | None:
        """The GPU that the creating call named, or None; the methods' calls use it."""
        return self.origin.home

    def field(self, name: str) -> Any:
        """Read the value of a field; raise `AttributeError` if there is none of that name."""
        return self._value(self._member(name, Field))

    def _value(self, member: Field) -> Any:
        where = f"{self.type_key}.{member.name}"
        value = get_field(self, member, where)
        return _of(self, adopted(value, self.origin._replace(name=where, asks=False)))

    def set_field(self, name: str, value: object) -> None:
        """Set a field; raise `AttributeError` if it is read-only or does not exist.

        The library converts the value, or refuses it with a `KernelError`.
        """
        member = self._member(name, Field)
        if member.setter == ffi.NULL:
            raise AttributeError(f"`{name}` of a {self.type_key} is read-only")
        set_field(self, member, value, f"{self.type_key}.{name}")

    def method(self, name: str) -> ModuleEntry:
        """Return a method by name; raise `AttributeError` if there is none.

        Calls are checked against the method's signature if its library reports one.
        """
        return self._bound(self._member(name, Method))

    def _bound(self, member: Method) -> ModuleEntry:
        return method_entry(self._type, member).bound_to(self)

    def _member(self, name: str, kind: type[_Member]) -> _Member:
        member = self._type.member(name) if isinstance(name, str) else None
        if isinstance(member, kind):
            return member
        names = [known for known, one in self._type.members().items() if isinstance(one, kind)]
        what = kind.__name__.lower()
        raise AttributeError(unknown(f"a {self.type_key} has no {what} {name!r}", name, names))

    def __getattr__(self, name: str) -> Any:
        # Python's protocols must not reach the library, and `_type` is unset before `_begin`.
        if name.startswith("__") or name in ReflectedObject.__slots__:
            raise AttributeError(name)
        member = self._type.member(name)
        if isinstance(member, Field):
            return self._value(member)
        if isinstance(member, Method):
            return self._bound(member)
        names = self._type.members()
        raise AttributeError(unknown(f"a {self.type_key} has no {name!r}", name, names))

    def __setattr__(self, name: str, value: object) -> None:
        if hasattr(ReflectedObject, name):
            object.__setattr__(self, name, value)
        else:
            self.set_field(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._type.members()})

    def __repr__(self) -> str:
        released = "released " if self._handle is None else ""
        return f"<{released}{self.type_key} of {self.origin.name}()>"


_Member = TypeVar("_Member", Field, Method)
# By type and name, with the method for which the entry was made: registering again changes it.
_METHODS: dict[tuple[int, str], tuple[Method, ModuleEntry]] = {}


def method_entry(kind: TypeInfo, method: Method) -> ModuleEntry:
    """Return a method of a type's objects as an entry, with its signature if the library reports
    one."""
    known, cached = _METHODS.get((kind.index, method.name), (None, None))
    if cached is None or known is not method:
        name = f"{kind.key}.{method.name}"
        entry = Entry.of(method.function, name)
        cached = ModuleEntry(
            name, lambda device: entry, None, doc=method.doc, is_method=not method.is_static
        )
        if method.is_typed:
            with contextlib.suppress(AbiError):  # such as an overloaded method
                cached.probe()
        _METHODS[kind.index, method.name] = method, cached
    return cached


def unknown(what: str, name: object, names: Iterable[str]) -> str:
    """Say that a name does not exist, with the nearest names."""
    near = difflib.get_close_matches(name, [*names]) if isinstance(name, str) else ()
    return f"{what}{'; the nearest: ' if near else ''}{', '.join(near)}"


class FunctionObject(Function):
    """A function that a call returned, called unchecked until `probe` asks for its signature."""

    __slots__ = ("_entry", "_guard", "origin")

    def _begin(self, origin: Origin) -> None:
        self.origin = origin
        self._guard = HandleGuard(self._handle)
        # No owner, to avoid a reference cycle: this object holds the reference.
        self._entry = origin.entry_of(self, f"{origin.name}()", self._guard, None)

    @property
    def signature(self) -> Signature | None:
        return self._entry.signature

    def probe(self) -> Signature:
        """Ask for the signature, and check later calls against it, as `ModuleEntry.probe`."""
        return self._entry.probe()

    def __call__(self, *args: Any, stream: object = None, device: object = None) -> Any:
        return self._entry(*args, stream=stream, device=device)

    def release(self) -> None:
        self._guard._handle = None
        self._entry._find = functools.partial(_refuse_released, self._entry.name)
        super().release()

    def __repr__(self) -> str:
        return f"<{'released ' if self._handle is None else ''}function {self._entry!r}>"


class ArrayObject(Array, Sequence[Any]):
    """A sequence that a call returned; read it like a list."""

    __slots__ = ("_names", "origin")

    def _begin(self, origin: Origin) -> None:
        self.origin = origin
        is_list = library.type_index_of(self._handle) == TypeIndex.LIST
        self._names = "ffi.List" if is_list else "ffi.Array"

    def __len__(self) -> int:
        return int(library_function(f"{self._names}Size")(self))

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
        item = library_function(f"{self._names}GetItem")(self, index)
        return _of(self, adopted(item, self.origin))

    def __repr__(self) -> str:
        return repr(list(self)) if self._handle is not None else "<released array>"


class MapObject(Object, Mapping[Any, Any]):
    """A mapping that a call returned; read it like a dict."""

    __slots__ = ("_names", "origin")

    def _begin(self, origin: Origin) -> None:
        self.origin = origin
        is_dict = library.type_index_of(self._handle) == TypeIndex.DICT
        self._names = "ffi.Dict" if is_dict else "ffi.Map"

    def __len__(self) -> int:
        return int(library_function(f"{self._names}Size")(self))

    def __getitem__(self, key: Any) -> Any:
        try:
            is_there = call(library_function(f"{self._names}Count"), self, key)
        except ArgumentTypeError:
            is_there = False
        if not is_there:
            raise KeyError(key)
        item = call(library_function(f"{self._names}GetItem"), self, key)
        return _of(self, adopted(item, self.origin))

    def __iter__(self) -> Iterator[Any]:
        if not len(self):
            return
        step = Entry.of(library_function(f"{self._names}ForwardIterFunctor")(self), "iterate")
        yield _of(self, adopted(step(0), self.origin))
        while step(2):
            yield _of(self, adopted(step(0), self.origin))

    def __repr__(self) -> str:
        return repr(dict(self)) if self._handle is not None else "<released mapping>"


class TensorObject(Tensor, Exported):
    """A tensor that a call returned; ops and entries take it, or its `desc`.

    numpy, cupy, torch and others read it in place, and keep its memory alive.
    """

    __slots__ = ("_desc", "_held", "origin")

    def _begin(self, origin: Origin) -> None:
        self.origin = origin
        desc = super().described()
        self._desc = desc.at(desc.ptr)
        self._held: Any = None

    def described(self) -> TensorDesc:
        # Owned by a second object of the same handle, which nobody releases.
        owner = object.__new__(TensorObject)
        owner._handle, owner._number = self.handle, None
        owner.origin, owner._desc, owner._held = self.origin, self._desc, None
        owner.depth = 0
        return self._desc.at(self._desc.ptr, owner)

    @property
    def desc(self) -> TensorDesc:
        """Its address and layout; the memory lives as long as the descriptor."""
        return self.described()

    def _to_export(self) -> tuple[TensorDesc, object, int | None]:
        if self._held is None:
            self._held = self.handle  # which outlives `release` for the importer
        return self._desc, self, self.origin.stream

    @property
    def shape(self) -> tuple[int, ...]:
        return self._desc.shape

    @property
    def dtype(self) -> DType:
        return self._desc.dtype

    @property
    def device(self) -> Device:
        return self._desc.device

    def tobytes(self) -> bytes:
        """Return the bytes of a contiguous tensor in host memory."""
        desc = self.desc
        if desc.device.type != "cpu" or not desc.is_contiguous:
            expected = "a contiguous tensor on the cpu"
            raise ArgumentTypeError(
                "TensorObject.tobytes", "self", got=desc.layout, expected=expected
            )
        return bytes(ffi.buffer(ffi.cast("char *", desc.ptr), desc.dtype.bytes_of(desc.numel)))

    def __repr__(self) -> str:
        return f"<tensor {self._desc.layout}{', released' if self._handle is None else ''}>"


_KINDS: dict[int, type[Any]] = {
    TypeIndex.MODULE: ModuleObject,
    TypeIndex.FUNCTION: FunctionObject,
    TypeIndex.ARRAY: ArrayObject,
    TypeIndex.LIST: ArrayObject,
    TypeIndex.MAP: MapObject,
    TypeIndex.DICT: MapObject,
    TypeIndex.TENSOR: TensorObject,
}
