"""Reads and writes safetensors files, after the published format.

A file is a length in 8 bytes, that many bytes of JSON, then the tensors' bytes. Reading runs
nothing from the file, and never reads past its end.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fi_ffi.abi.tensor import DTYPES, DType
from fi_ffi.errors import ArtifactError

_METADATA = "__metadata__"
_MAX_HEADER = 2**26
_LENGTH = struct.Struct("<Q")
# The format's names of dtypes. Dtypes with two values a byte are stored as bytes.
_NAMES = {
    "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float4_e2m1fn_x2": "U8", "float4_e2m1fn": "U8", "int4": "U8", "uint4": "U8",
    "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL",
}  # fmt: skip
_ITEMSIZES = {_NAMES[dtype.name]: dtype.itemsize for dtype in DTYPES.values()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's elements, row by row."""

    dtype: DType
    shape: tuple[int, ...]
    data: bytes | memoryview


def write(path: Path, tensors: Mapping[str, StoredTensor], words: Mapping[str, str]) -> None:
    """Write a file atomically; raises `OSError`."""
    header: dict[str, Any] = {_METADATA: dict(words)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + len(tensor.data)
        dtype, shape = _NAMES[tensor.dtype.name], list(tensor.shape)
        if tensor.dtype.shares_bytes:
            shape = [len(tensor.data)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # Readable by the owner only: tensors may hold private data.
    partial = path.with_name(f".{path.name}.partial")
    file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with open(file, "wb") as out:
            out.write(_LENGTH.pack(len(text)) + text)
            for tensor in tensors.values():
                out.write(tensor.data)
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read(path: Path) -> tuple[dict[str, memoryview], dict[str, str]]:
    """Return the tensors' bytes by name, and the file's metadata.

    Raises `ArtifactError` for a file of another format, and `OSError`.
    """
    data = memoryview(path.read_bytes())
    header, body = _header(path, data)
    words = header.pop(_METADATA, {})
    if not isinstance(words, dict) or not all(isinstance(word, str) for word in words.values()):
        raise ArtifactError(f"{path}: its metadata is not a map of strings")
    return {name: body[slice(*_place(path, name, of, body))] for name, of in header.items()}, words


def _header(path: Path, data: memoryview) -> tuple[dict[str, Any], memoryview]:
    if len(data) < _LENGTH.size:
        raise ArtifactError(f"{path}: {len(data)} bytes are no safetensors file")
    (count,) = _LENGTH.unpack(data[: _LENGTH.size])
    if count > min(len(data) - _LENGTH.size, _MAX_HEADER):
        raise ArtifactError(f"{path}: a header of {count} bytes in a file of {len(data)}")
    end = _LENGTH.size + count
    try:
        header = json.loads(bytes(data[_LENGTH.size : end]))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: its header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise ArtifactError(f"{path}: its header is no object")
    return header, data[end:]


def _place(path: Path, name: str, entry: Any, body: memoryview) -> tuple[int, int]:
    try:
        itemsize, shape = _ITEMSIZES[entry["dtype"]], entry["shape"]
        start, end = entry["data_offsets"]
        if any(type(number) is not int or not 0 <= number < 1 << 63 for number in [start, *shape]):
            raise ValueError(f"offset {start!r:.40}, shape {shape!r:.80}")
        is_inside = type(end) is int and start <= end <= len(body)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: {name!r:.100} is not described: {error!r:.200}") from error
    count = itemsize
    for size in shape:
        count = min(count * size, 1 << 63)  # a product of many sizes could be of any length
    if not is_inside or end - start != count:
        raise ArtifactError(f"{path}: {name!r:.100} has {count} bytes, and not {start} to {end}")
    return start, end
