"""libtvm_ffi's tables of functions and object types.

A library registers its functions by name in the global table, and each object type with its name,
ancestors, fields and methods. Registration happens while the library loads and lasts as long as the
process.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.failure import check
from fi_ffi.abi.function import Entry, array_values, library_function
from fi_ffi.abi.library import TypeIndex
from fi_ffi.abi.objects import CallArena, Function, Object
from fi_ffi.abi.values import unpack
from fi_ffi.errors import LoaderError
from fi_ffi.modules.packing import pack

# TVMFFIFieldFlagBitMask
_WRITABLE, _IS_STATIC, _SETTER_IS_FUNCTION = 1 << 0, 1 << 2, 1 << 11
_INIT = "__ffi_init__"


class Field(NamedTuple):
    """A field of a type: its offset in an object, its getter and its setter."""

    name: str
    doc: str
    offset: int
    getter: Any
    setter: Any  # NULL if the field is read-only
    setter_is_function: bool


class Method(NamedTuple):
    """A method of a type; unless it is static, its function takes the object first."""

    name: str
    doc: str
    is_static: bool
    is_typed: bool
    function: Function


class TypeInfo:
    """A registered object type; `type_info` returns the one instance for each type."""

    __slots__ = ("_counts", "_members", "_numbers", "_tables", "index", "key")

    def __init__(self, index: int) -> None:
        with library.tables:
            own = library.lib.TVMFFIGetTypeInfo(index)
            # Ancestors from ffi.Object on, then the type itself; the entries never move.
            self._tables = [*own.type_ancestors[0 : own.type_depth], own]
            self.index, self.key = index, _text(own.type_key)
        # `num_fields` and `num_methods` of each table, read at each access to a member.
        self._numbers = [ffi.buffer(ffi.addressof(each, "num_fields"), 8) for each in self._tables]
        self._counts: list[bytes] = []
        self._members: dict[str, Field | Method] = {}

    def members(self) -> dict[str, Field | Method]:
        """Return fields and methods by name; a type's own members override its ancestors'."""
        with library.tables:
            # A library loaded later may register more members.
            counts = [numbers[:] for numbers in self._numbers]
            if counts != self._counts:
                members: dict[str, Field | Method] = {}
                for table in self._tables:
                    for field in table.fields[0 : table.num_fields]:
                        members[_text(field.name)] = _field(field)
                    for method in table.methods[0 : table.num_methods]:
                        members[_text(method.name)] = _method(method)
                self._members, self._counts = members, counts
        return self._members

    def member(self, name: str) -> Field | Method | None:
        """Return the field or method called `name`, or None."""
        return self.members().get(name)

    def constructor(self) -> Method | None:
        """Return the function that constructs this type, not an ancestor's; None if it has none."""
        with library.tables:
            own = self._tables[-1]
            for method in own.methods[0 : own.num_methods]:
                if _text(method.name) == _INIT:
                    return _method(method)
            name, _buffer = library.byte_array(_INIT.encode())
            column = library.lib.TVMFFIGetTypeAttrColumn(name)
            at = self.index - column.begin_index if column != ffi.NULL else -1
            if not 0 <= at < (column.size if at >= 0 else 0):
                return None
            constructor = column.data[at]
            if constructor.type_index != TypeIndex.FUNCTION:
                return None
            # libtvm_ffi generated the function from the fields; it takes any number of arguments,
            # and keywords.
            return Method(_INIT, "", True, False, unpack(constructor, owned=False))


def _text(array: Any) -> str:
    return library.read_bytes(array).decode(errors="replace")


def _field(field: Any) -> Field:
    setter = field.setter if field.flags & _WRITABLE else ffi.NULL
    is_function = bool(field.flags & _SETTER_IS_FUNCTION)
    return Field(
        _text(field.name), _text(field.doc), field.offset, field.getter, setter, is_function
    )


def _method(method: Any) -> Method:
    is_static, is_typed = bool(method.flags & _IS_STATIC), tells_types(_text(method.metadata))
    function = unpack(method.method, owned=False)
    return Method(_text(method.name), _text(method.doc), is_static, is_typed, function)


def tells_types(metadata: str) -> bool:
    """Return whether a function's metadata (JSON) lists its types; a packed function's does not."""
    try:
        schema = json.loads(json.loads(metadata)["type_schema"])
        return "args" in schema or "named_args" in schema
    except (ValueError, TypeError, LookupError, RecursionError):
        return False


_TYPES: dict[int, TypeInfo] = {}
_INDICES: dict[str, int] = {}


def registered_types() -> dict[str, int]:
    """Return the type index of every registered type, by name."""
    with library.tables, library_function("ffi.GetRegisteredTypeKeys")() as keys:
        for key in array_values(keys):
            if key not in _INDICES:
                array, _buffer = library.byte_array(key.encode())
                slot = ffi.new("int32_t *")
                check(library.lib.TVMFFITypeKeyToIndex(array, slot), key)
                _INDICES[key] = slot[0]
    return _INDICES


def type_info(index: int) -> TypeInfo | None:
    """Return a type's table entry; None if it has none, for which libtvm_ffi itself would abort."""
    info = _TYPES.get(index)
    if info is None and index in registered_types().values():
        info = _TYPES.setdefault(index, TypeInfo(index))
    return info


def get_field(value: Object, field: Field, where: str) -> Any:
    """Return the value of an object's field: a Python value or an owned object."""
    handle, result = value.handle, ffi.new("TVMFFIAny *")
    check(field.getter(_address_of(handle, field), result), where)
    return unpack(result, owned=True)


def set_field(value: Object, field: Field, content: object, where: str) -> None:
    """Write an object's writable field; the field's setter converts or refuses the value."""
    arena, slot = CallArena(where), ffi.new("TVMFFIAny *")
    handle = value.handle
    address = _address_of(handle, field)
    try:
        pack(slot[0], content, arena, "value")
        if field.setter_is_function:
            packed, result = ffi.new("TVMFFIAny[2]"), ffi.new("TVMFFIAny *")
            packed[0].type_index, packed[0].v_ptr = TypeIndex.OPAQUE_PTR, address
            packed[1] = slot[0]
            check(library.lib.TVMFFIFunctionCall(field.setter, packed, 2, result), where)
            unpack(result, owned=True)
        else:
            check(ffi.cast("TVMFFIFieldSetter", field.setter)(address, slot), where)
    finally:
        arena.end()


def _address_of(handle: Any, field: Field) -> Any:
    return ffi.cast("char *", handle) + field.offset


def function_is_typed(name: str) -> bool:
    """Return whether a function of the global table is known to be typed."""
    try:
        metadata = library_function("ffi.GetGlobalFuncMetadata")(name)
    except LoaderError:  # an older libtvm_ffi without this function
        return False
    return tells_types(metadata if isinstance(metadata, str) else "")


def global_names() -> list[str]:
    """Return the names of all functions in libtvm_ffi's global table."""
    with library.tables:
        item = Entry.of(library_function("ffi.FunctionListGlobalNamesFunctor")(), "names")
        return [item(i) for i in range(item(-1))]
