"""Calls any function of any TVM-FFI library: docs/modules.md."""

from fi_ffi.modules.entry import (
    ArrayObject,
    FunctionObject,
    MapObject,
    ModuleEntry,
    ModuleObject,
    ReflectedObject,
    TensorObject,
)
from fi_ffi.modules.module import Module, module
from fi_ffi.modules.registry import (
    ObjectType,
    function,
    functions,
    object_type,
    object_types,
)

__all__ = [
    "ArrayObject",
    "FunctionObject",
    "MapObject",
    "Module",
    "ModuleEntry",
    "ModuleObject",
    "ObjectType",
    "ReflectedObject",
    "TensorObject",
    "function",
    "functions",
    "module",
    "object_type",
    "object_types",
]
