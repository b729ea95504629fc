"""Any function of any TVM-FFI library: docs/modules.md."""

from fi_ffi.ops.modules.entry import (
    ArrayObject,
    FunctionObject,
    MapObject,
    ModuleEntry,
    ModuleObject,
    TensorObject,
)
from fi_ffi.ops.modules.module import Module, module

__all__ = [
    "ArrayObject",
    "FunctionObject",
    "MapObject",
    "Module",
    "ModuleEntry",
    "ModuleObject",
    "TensorObject",
    "module",
]
