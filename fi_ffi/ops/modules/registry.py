"""`fi_ffi.function` and `fi_ffi.object_type`: what libraries register instead of exporting.

A library registers while it is loaded: `fi_ffi.module(path)` loads it, also one that exports
nothing.
"""

from __future__ import annotations

import contextlib
from typing import Any

from fi_ffi.abi.function import Entry, library_function
from fi_ffi.abi.objects import Unique, find_global
from fi_ffi.abi.reflection import (
    Field,
    Method,
    TypeInfo,
    function_is_typed,
    global_names,
    registered_types,
    type_info,
)
from fi_ffi.errors import (
    AbiError,
    ArgumentTypeError,
    KernelNotFoundError,
    LoaderError,
    printed,
)
from fi_ffi.loader import runtime
from fi_ffi.ops.modules.entry import ModuleEntry, method_entry, unknown

_LOAD = "fi_ffi.module(path) loads a library, which registers its own"


def function(name: str, *, checked: bool | None = None) -> ModuleEntry:
    """A function of libtvm_ffi's global table, where libraries register them by name.

    It is called like a module's entry, and its arguments are checked against its signature
    where its library tells its types.  `checked=True` asks a function that does not: one that
    takes any number of arguments is run by that, with 512 of None.  `checked=False` does not ask.

    Raises `KernelNotFoundError` where there is none of that name, with the nearest there are, and
    for `checked=True` `AbiError` where it has no signature.
    """
    _check_name("function", name)
    runtime.ensure_tvm_ffi()
    try:
        entry = Entry.of(find_global(name), name)
    except LoaderError:
        what = f"no function is registered as {name!r:.100}"
        raise KernelNotFoundError(f"{unknown(what, name, global_names())}; {_LOAD}") from None
    made = ModuleEntry(name, lambda device: entry, None)
    if checked or (checked is None and function_is_typed(name)):
        with contextlib.nullcontext() if checked else contextlib.suppress(AbiError):
            made.probe()
    return made


def functions(prefix: str = "") -> tuple[str, ...]:
    """The names in libtvm_ffi's global table that begin with `prefix`, in order."""
    _check_name("functions", prefix)
    runtime.ensure_tvm_ffi()
    return tuple(sorted(name for name in global_names() if name.startswith(prefix)))


def object_types(prefix: str = "") -> tuple[str, ...]:
    """The names of the registered types of objects that begin with `prefix`, in order."""
    _check_name("object_types", prefix)
    runtime.ensure_tvm_ffi()
    return tuple(sorted(name for name in registered_types() if name.startswith(prefix)))


def object_type(key: str) -> ObjectType:
    """A type of objects that a library registered, by its name.

    Raises `KernelNotFoundError` where there is none of that name, with the nearest there are.
    """
    _check_name("object_type", key)
    runtime.ensure_tvm_ffi()
    known = registered_types()
    info = type_info(known[key]) if key in known else None
    if info is None:
        what = f"no type of objects is registered as {key!r:.100}"
        raise KernelNotFoundError(f"{unknown(what, key, known)}; {_LOAD}")
    return ObjectType(info)


def _check_name(op: str, name: object) -> None:
    if not isinstance(name, str):
        got = f"{type(name).__name__} {printed(name)}"
        raise ArgumentTypeError(op, "name", got=got, expected="a str")


class ObjectType(Unique):
    """A registered type: called, it makes an object; its static methods are attributes.

    Grammar = fi_ffi.object_type("xgrammar.tvm_ffi_binding.Grammar")
    grammar = Grammar.from_regex("[0-9]+", False)
    """

    __slots__ = ("_info",)

    def __init__(self, info: TypeInfo) -> None:
        self._info = info

    @property
    def key(self) -> str:
        """The name that it is registered under."""
        return self._info.key

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of its objects' fields."""
        return self._names(Field)

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of its methods, static ones too."""
        return self._names(Method)

    def _names(self, kind: type) -> tuple[str, ...]:
        members = self._info.members().items()
        return tuple(name for name, member in members if isinstance(member, kind))

    def __call__(self, *args: Any, stream: object = None, device: object = None, **by: Any) -> Any:
        """Make an object by the type's own constructor.

        `by` are values by the names of fields, for a type whose constructor was made of them.
        Raises `KernelNotFoundError` for a type that has none, and as an entry does.
        """
        made = self._info.constructor()
        if made is None:
            raise KernelNotFoundError(f"{self.key} has no constructor: its library makes objects")
        if by:
            args = (*args, library_function("ffi.GetKwargsObject")(), *sum(by.items(), ()))
        return method_entry(self._info, made)(*args, stream=stream, device=device)

    def method(self, name: str) -> ModuleEntry:
        """A static method by name; `AttributeError` where there is none."""
        found = self._info.member(name) if isinstance(name, str) else None
        if isinstance(found, Method) and found.is_static:
            return method_entry(self._info, found)
        if found is not None:
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
