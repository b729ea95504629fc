"""Tensors of others with silly fields, through DLPack and the array interfaces."""

from __future__ import annotations

import ctypes
import datetime
import gc
import itertools
import sys
from typing import Any

import numpy as np

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.interop import as_desc
from fi_ffi.errors import ArgumentError, ArgumentTypeError

_new = ctypes.pythonapi.PyCapsule_New
_new.restype = ctypes.py_object
_new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_set_name = ctypes.pythonapi.PyCapsule_SetName
_set_name.argtypes = [ctypes.py_object, ctypes.c_char_p]
_names: list[bytes] = []


class Exporter:
    """One capsule, made by hand."""

    def __init__(self, *, name: bytes = b"dltensor", device: Any = (1, 0), **fields: Any) -> None:
        self.kept: list[Any] = []
        self.device = device
        versioned = name == b"dltensor_versioned"
        kind = "DLManagedTensorVersioned *" if versioned else "DLManagedTensor *"
        self.managed = ffi.new(kind)
        if versioned:
            self.managed.version.major = fields.pop("major", 1)
            self.managed.version.minor = fields.pop("minor", 0)
            self.managed.flags = fields.pop("flags", 0)
        tensor = self.managed.dl_tensor
        tensor.data, tensor.ndim = ffi.cast("void *", 0x1000), fields.pop("ndim", 2)
        told = fields.pop("told", device)
        tensor.device.device_type, tensor.device.device_id = told
        code, bits, lanes = fields.pop("dtype", (2, 32, 1))
        tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes = code, bits, lanes
        tensor.byte_offset = fields.pop("byte_offset", 0)
        for key, usual in (("shape", (2, 3)), ("strides", None)):
            dims = fields.pop(key, usual)
            if dims is not None:
                self.kept.append(ffi.new("int64_t[]", dims))
                setattr(tensor, key, self.kept[-1])
        assert not fields, fields
        _names.append(name)  # a capsule keeps the pointer
        self.capsule: Any = _new(int(ffi.cast("intptr_t", self.managed)), _names[-1], None)

    def __dlpack__(self, **_: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> Any:
        return self.device


def refused(value: object, match: str = "", kind: type[Exception] = ArgumentError) -> Exception:
    try:
        found = as_desc(value, "the op", "x")
    except kind as error:
        assert "argument `" in str(error) and match in str(error), error
        return error
    raise AssertionError(f"taken as {found!r}")


NEW = b"dltensor_versioned"
SILLY: dict[str, tuple[dict[str, Any], str]] = {
    "negative ndim": ({"ndim": -1}, "-1 dimensions"),
    "least ndim": ({"ndim": -(2**31)}, "dimensions"),
    "65 dimensions": ({"ndim": 65, "shape": (1,) * 65}, "65 dimensions"),
    "most dimensions": ({"ndim": 2**31 - 1}, "2147483647 dimensions"),
    "no shape": ({"shape": None}, "without a shape"),
    "negative size": ({"shape": (2, -3)}, "(2, -3)"),
    "past int64": ({"shape": (2**62, 2**62)}, "within int64"),
    "strides past int64": ({"strides": (2**62, 2**62)}, "within int64"),
    "least stride": ({"strides": (-(2**63), 1)}, "strides"),
    "an offset past the end": ({"byte_offset": 2**64 - 0x1001}, "room for"),
    "no lanes": ({"dtype": (2, 32, 0)}, "dtype 2:32:0"),
    "of no dtype": ({"dtype": (255, 255, 65535)}, "dtype 255:255:65535"),
    "complex": ({"dtype": (5, 64, 1)}, "dtype 5:64:1"),
    "version 0": ({"name": NEW, "major": 0}, "DLPack version 0"),
    "version 2": ({"name": NEW, "major": 2}, "DLPack version 2"),
    "a version of the future": ({"name": NEW, "major": 2**32 - 1}, "DLPack version 4294967295"),
    "consumed": ({"name": b"used_dltensor"}, "not a fresh DLPack capsule"),
    "consumed, new": ({"name": b"used_dltensor_versioned"}, "not a fresh DLPack capsule"),
    "another's capsule": ({"name": b"arrow_array"}, "not a fresh DLPack capsule"),
    "a name with quotes": ({"name": b'dltensor" "dltensor'}, "not a fresh DLPack capsule"),
    "an empty name": ({"name": b""}, "not a fresh DLPack capsule"),
    "no utf-8": ({"name": b"dl\xff\xfe"}, ""),
    "another device": ({"device": (1, 0), "told": (2, 0)}, "device 2:0"),
    "another GPU": ({"device": (2, 1), "told": (2, 0)}, "device 2:0"),
    "a host tensor of a GPU": ({"device": (2, 0), "told": (1, 0)}, "device 1:0"),
    "no such device": ({"device": (1, 0), "told": (77, -3)}, "device 77:-3"),
    "GPU -1": ({"device": (2, -1)}, "device 2:-1"),
    "device type 0": ({"device": (0, 0)}, "device 0:0"),
    "a large device": ({"device": (2**80, 2**80), "told": (1, 0)}, "device"),
    "a device that is text": ({"device": ("cpu", "0"), "told": (1, 0)}, "refused"),
    "no device": ({"device": None, "told": (1, 0)}, "refused"),
    "a device of three": ({"device": (1, 0, 0), "told": (1, 0)}, "refused"),
}


def _one(name: str) -> None:
    fields, match = SILLY[name]
    made = Exporter(**fields)
    before = sys.getrefcount(made.capsule)
    refused(made, match)
    gc.collect()
    assert sys.getrefcount(made.capsule) == before


def case_what_is_fine() -> None:
    assert as_desc(Exporter()).shape == (2, 3)
    assert as_desc(Exporter(name=NEW, minor=99, flags=1)).readonly
    assert as_desc(Exporter(strides=(0, 0))).strides == (0, 0)
    assert as_desc(Exporter(ndim=0, shape=None)).shape == ()
    assert as_desc(Exporter(ndim=64, shape=(1,) * 64)).shape == (1,) * 64
    assert as_desc(Exporter(device=(3, 0), told=(1, 0))).device.type == "cuda_host"
    assert as_desc(Exporter(device=(2, 1), told=(13, 1))).device.type == "cuda"


def case_a_capsule_that_lost_its_name() -> None:
    made = Exporter()
    _set_name(made.capsule, None)
    refused(made, "not a fresh DLPack capsule")


class PyCapsule:
    """Not Python's; its repr says otherwise."""

    def __repr__(self) -> str:
        return '<capsule object "dltensor" at 0x1000>'


def case_what_is_no_capsule() -> None:
    looks = PyCapsule(), type("PyCapsule", (), {})()
    for value in (None, 7, "dltensor", datetime.datetime_CAPI, *looks, ctypes.c_void_p()):
        made = Exporter()
        made.capsule = value
        refused(made, "not a fresh DLPack capsule")


class Mute(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class Broken:
    """Raises where it is told to."""

    def __init__(self, error: BaseException, where: str) -> None:
        self.error, self.where = error, where

    def __repr__(self) -> str:
        raise self.error

    def __dlpack_device__(self) -> tuple[int, int]:
        if self.where == "device":
            raise self.error
        return (1, 0)

    def __dlpack__(self, **_: Any) -> object:
        raise self.error


def case_exporters_that_raise() -> None:
    errors = (ValueError("no"), BufferError(), RecursionError(), OSError(2, "no file"))
    for where in ("device", "export"):
        for error in errors:
            assert refused(Broken(error, where), f"refused: {error}").__cause__ is error
        refused(Broken(Mute(), where), "refused")
    for final in (KeyboardInterrupt(), SystemExit(3), MemoryError()):
        try:
            as_desc(Broken(final, "export"))
        except BaseException as caught:
            assert caught is final  # it is the caller's, and stays so
        else:
            raise AssertionError(final)


GOOD = {"shape": (2,), "typestr": "<f4", "data": (0x1000, False)}
GONE = object()
# What of `GOOD` is something else.
INTERFACES: list[dict[str, Any]] = [
    *({"data": data} for data in (
        GONE, None, 0, (0,), (-1, False), (2**64, False), (4096.5, False), ("0x40", False),
    )),
    *({"typestr": text} for text in (
        GONE, None, 7, "", "f", "<f", "<fx", "<f" + "9" * 5000, ">f4",
    )),
    *({"shape": shape} for shape in (GONE, 3, (-2,), (2.0,), (2**70,), itertools.count())),
    *({"strides": strides} for strides in (("a",), ("4",), (3,), (4, 4))),
]  # fmt: skip
# numpy's protocol allows it; its first bytes are no address.
BUFFERS = [bytes(64), bytearray(64), memoryview(bytes(64)), np.zeros(8)]


def case_array_interfaces() -> None:
    for name in ("__array_interface__", "__cuda_array_interface__"):

        def interface(told: object, name: str = name) -> object:
            return type("Theirs", (), {name: property(lambda _: told)})()

        for changes in INTERFACES:
            told = {key: value for key, value in (GOOD | changes).items() if value is not GONE}
            refused(interface(told))
        for data in BUFFERS:
            refused(interface(GOOD | {"data": data}), "not an address and a flag")
        for other in (None, [], {}):
            refused(interface(other))


def case_arrays_that_are_no_arrays() -> None:
    class Sly(np.ndarray[Any, Any]):
        @property
        def __array_interface__(self) -> Any:  # type: ignore[override]
            raise RuntimeError("sly")

    refused(np.zeros(3).view(Sly), "sly")
    refused(np.array([object()]), "dtype")
    refused(np.zeros(3, "datetime64[s]"), "dtype")
    refused(object(), "TensorDesc", ArgumentTypeError)


CASES = {f"capsule, {name}": (lambda name=name: _one(name)) for name in SILLY}
