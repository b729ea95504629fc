"""tvm_ffi's call of the entry that does nothing: what fi_ffi's calls are compared with."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import Any, NamedTuple

import numpy as np

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import register
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.cli.benching.nothing import nothing
from fi_ffi.cli.benching.rounds import Call
from fi_ffi.loader import tvm_ffi as libtvm_ffi
from fi_ffi.ops.functions import OPS

PEER = "tvm_ffi call, its own tensors"
_STATEMENT = "f(o, x, w, 1e-6, False)"
_SHAPES = {"o": (4, 64), "x": (4, 64), "w": (64,)}


class Peer(NamedTuple):
    """tvm_ffi where it can be measured; else why it cannot."""

    module: Any
    told: str


def find() -> Peer:
    """Import tvm_ffi if it is installed and its libtvm_ffi can be the one of this process.

    Before fi_ffi loads one: two of them in a process abort.
    """
    here, installed = libtvm_ffi.in_process(), libtvm_ffi.installed()
    if installed is None:
        return Peer(None, "apache-tvm-ffi is not installed, or not in a version fi_ffi works with")
    if here is not None and here.path != installed.path:
        return Peer(None, f"this process has another libtvm_ffi: {here.path}")
    try:
        module = importlib.import_module("tvm_ffi")
    except ImportError as error:
        return Peer(None, f"tvm_ffi does not import: {error}")
    return Peer(module, f"apache-tvm-ffi {importlib.metadata.version('apache-tvm-ffi')}")


def peer_calls(tvm_ffi: Any) -> list[Call]:
    """The same entry called by tvm_ffi, with each kind of tensor that is here."""
    arrays = {name: np.zeros(shape, np.float16) for name, shape in _SHAPES.items()}
    own = {name: tvm_ffi.from_dlpack(array) for name, array in arrays.items()}
    calls = [
        _call(PEER, tvm_ffi, own, arrays),
        _call("tvm_ffi call, numpy arrays", tvm_ffi, arrays, arrays),
    ]
    if importlib.util.find_spec("torch") is not None:
        from_numpy = importlib.import_module("torch").from_numpy
        of_torch = {name: from_numpy(array) for name, array in arrays.items()}
        calls.append(_call("tvm_ffi call, torch tensors", tvm_ffi, of_torch, arrays))
    return calls


def _call(name: str, tvm_ffi: Any, tensors: dict[str, Any], arrays: dict[str, Any]) -> Call:
    address = int(ffi.cast("uintptr_t", nothing().address))
    idle = tvm_ffi.Function.__from_extern_c__(address)

    def after() -> str | None:
        """Another function of the same parameters is given what the idle one was."""
        seen: list[Any] = []
        signature = OPS["rmsnorm"].row.signature
        register("fi_ffi.bench.seen", signature, lambda *arguments: seen.extend(arguments))
        tvm_ffi.get_global_func("fi_ffi.bench.seen")(*tensors.values(), 1e-6, False)
        got = [value.ptr if isinstance(value, TensorDesc) else value for value in seen]
        expected = [*(array.ctypes.data for array in arrays.values()), 1e-6, False]
        return None if got == expected else f"the entry was given {got}, not {expected}"

    return Call(name, _STATEMENT, tensors | {"f": idle}, after, is_peer=True)
