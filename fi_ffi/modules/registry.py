"""`fi_ffi.function` and `fi_ffi.object_type`: functions and types that libraries register.

A library registers while it is loaded: `fi_ffi.module(path)` loads it, even if it exports nothing.
"""

from __future__ import annotations

import contextlib
from typing import Any

from fi_ffi.abi.function import Entry, library_function
from fi_ffi.abi.objects import Unique, find_global
from fi_ffi.errors import (
    AbiError,
    ArgumentTypeError,
    KernelNotFoundError,
    LoaderError,
    with_type,
)
from fi_ffi.loader import tvm_ffi
from fi_ffi.modules.entry import ModuleEntry, method_entry, unknown
from fi_ffi.modules.reflection import (
    Field,
    Method,
    TypeInfo,
    function_is_typed,
    global_names,
    registered_types,
    type_info,
)

_LOAD = "fi_ffi.module(path) loads a library, which registers its own"


def function(name: str, *, checked: bool | None = None) -> ModuleEntry:
    """Return a function that a library has registered by name with libtvm_ffi.

    Call it like an entry of a module.  If its library tells the types of its arguments, they are
    checked.  `checked=True` asks any other function for its signature; a function that takes any
    number of arguments is run by the question, with 512 of None.  `checked=False` does not ask.

    Raises `KernelNotFoundError` with the nearest names and, for `checked=True`, `AbiError` if the
    function has no signature.
    """
    _check_name("function", name)
    tvm_ffi.ensure_tvm_ffi()
    try:
        entry = Entry.of(find_global(name), name)
    except LoaderError:
        what = f"no function is registered as {name!r:.100}"
        raise KernelNotFoundError(f"{unknown(what, name, global_names())}; {_LOAD}") from None
    module_entry = ModuleEntry(name, lambda device: entry, None)
    if checked or (checked is None and function_is_typed(name)):
        with contextlib.nullcontext() if checked else contextlib.suppress(AbiError):
            module_entry.probe()
    return module_entry


def functions(prefix: str = "") -> tuple[str, ...]:
    """Return the names of the registered functions that begin with `prefix`, in order."""
    _check_name("functions", prefix)
    tvm_ffi.ensure_tvm_ffi()
    return tuple(sorted(name for name in global_names() if name.startswith(prefix)))


def object_types(prefix: str = "") -> tuple[str, ...]:
    """Return the names of the registered types of objects that begin with `prefix`, in order."""
    _check_name("object_types", prefix)
    tvm_ffi.ensure_tvm_ffi()
    return tuple(sorted(name for name in registered_types() if name.startswith(prefix)))


def object_type(key: str) -> ObjectType:
    """Return a type of objects that a library has registered by name.

    Raises `KernelNotFoundError` with the nearest names.
    """
    _check_name("object_type", key)
    tvm_ffi.ensure_tvm_ffi()
    known = registered_types()
    info = type_info(known[key]) if key in known else None
    if info is None:
        what = f"no type of objects is registered as {key!r:.100}"
        raise KernelNotFoundError(f"{unknown(what, key, known)}; {_LOAD}")
    return ObjectType(info)


def _check_name(op: str, name: object) -> None:
    if not isinstance(name, str):
        got = with_type(name)
        raise ArgumentTypeError(op, "name", got=got, expected="a str")


class ObjectType(Unique):
    """A registered type: call it to make an object; its static methods are attributes.

        Grammar = fi_ffi.object_type("xgrammar.tvm_ffi_binding.Grammar")
        grammar = Grammar.from_regex("[0-9]+", False)

    `method` also reaches a static method whose name is an attribute of this class.
    """

    __slots__ = ("_info",)

    def __init__(self, info: TypeInfo) -> None:
        self._info = info

    @property
    def key(self) -> str:
        """The name under which it is registered."""
        return self._info.key

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of its objects' fields."""
        return self._names(Field)

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of its methods, including static ones."""
        return self._names(Method)

    def _names(self, kind: type) -> tuple[str, ...]:
        members = self._info.members().items()
        return tuple(name for name, member in members if isinstance(member, kind))

    def __call__(self, *args: Any, stream: object = None, device: object = None, **by: Any) -> Any:
        """Make an object with the type's own constructor.

        `by` has values by field name, for a type whose constructor is generated from its fields.
        Raises `KernelNotFoundError` for a type without a constructor, and otherwise as an entry
        does.
        """
        value = self._info.constructor()
        if value is None:
            raise KernelNotFoundError(f"{self.key} has no constructor: its library makes objects")
        if by:
            args = (*args, library_function("ffi.GetKwargsObject")(), *sum(by.items(), ()))
        return method_entry(self._info, value)(*args, stream=stream, device=device)

    def method(self, name: str) -> ModuleEntry:
        """Return a static method by name; raise `AttributeError` if there is none."""
        member = self._info.member(name) if isinstance(name, str) else None
        if isinstance(member, Method) and member.is_static:
            return method_entry(self._info, member)
        if member is not None:
            raise AttributeError(f"`{name}` is of the objects of {self.key}, and not static")
        what = f"{self.key} has no static method {name!r}"
        raise AttributeError(unknown(what, name, self.methods))

    def __getattr__(self, name: str) -> ModuleEntry:
        if name.startswith("__") or name == "_info":
            raise AttributeError(name)
        return self.method(name)

    def __dir__(self) -> list[str]:
        members = self._info.members().items()
        static = [name for name, one in members if isinstance(one, Method) and one.is_static]
        return sorted({*super().__dir__(), *static})

    def __repr__(self) -> str:
        return f"<type {self.key}>"
