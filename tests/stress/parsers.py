"""What reads bytes that others wrote: each with seeds, and the one error that it may raise.

tests/stress/corpus/NAME.txt has more seeds, one to a line as Python writes bytes without
quotes: what tools/fuzz.py found, and texts that were printed by real binaries.
"""

from __future__ import annotations

import ast
import functools
import io
import json
import os
import struct
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import fi_ffi
from fi_ffi.abi.signature import Signature, parse_signature, signature_from_mismatch
from fi_ffi.cli import replay
from fi_ffi.errors import AbiError, ArtifactError, FiFfiError, LoaderError
from fi_ffi.loader import cache, kernels, lock
from fi_ffi.loader.elf import inspect_elf
from fi_ffi.loader.fatbin import architectures
from fi_ffi.loader.fetch import wheels_lock
from fi_ffi.loader.machine import sass_named
from fi_ffi.loader.wheel import Wheel, parse_record
from fi_ffi.modules.module import AtPath
from fi_ffi.modules.packing import packer_of
from fi_ffi.watch import safetensors
from fi_ffi.watch.dump import AFTER, BEFORE

from tests.helpers.plan_calls import Case
from tests.loader import test_elf as made

CORPUS = Path(__file__).parent / "corpus"


class InMemory:
    """Bytes where a path is wanted."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __str__(self) -> str:
        return "in memory"

    def open(self, mode: str = "rb") -> io.BytesIO:
        return io.BytesIO(self._data)

    def read_bytes(self) -> bytes:
        return self._data

    def read_text(self) -> str:
        return self._data.decode()


def _in_memory(data: bytes) -> Any:
    return InMemory(data)


def _text(data: bytes) -> str:
    return data.decode(errors="replace")  # as it comes from an Error object


def _refusal(data: bytes) -> None:
    found = signature_from_mismatch(_text(data))
    assert str(len(found.params)).isdigit()


def _signature(data: bytes) -> None:
    found = parse_signature(_text(data))
    assert isinstance(found, Signature)
    again = parse_signature(str(found))
    assert again.same_types(found)


def _elf(data: bytes) -> None:
    assert inspect_elf(data).machine in ("x86_64", "aarch64")


def _fatbin(data: bytes) -> None:
    found = architectures(data)
    assert len(found) <= len(data) // 48
    assert all(code.kind in ("ptx", "sass") for code in found)


def _wheel(data: bytes) -> None:
    wheel = Wheel(_in_memory(data))
    for member in wheel.record:
        try:
            for chunk in wheel._chunks(member, wheel._recorded(member).size):
                assert len(chunk) <= 1 << 20
        except ArtifactError:
            pass


def _container(data: bytes) -> None:
    tensors, words = safetensors.read(_in_memory(data))
    assert all(isinstance(word, str) for word in words.values())
    assert sum(map(len, tensors.values())) <= len(data) * max(len(tensors), 1)


_folder = tempfile.TemporaryDirectory(prefix="fi-ffi-parsers-")


def _note(data: bytes) -> None:
    root = Path(_folder.name) / "cache"
    root.mkdir(exist_ok=True, mode=0o700)
    path = root / "note.json"
    path.write_bytes(data)
    with mock.patch.dict(os.environ, {cache.ENVIRONMENT: str(root)}):
        cache.read_note("note.json", 1)


def _evidence(data: bytes) -> None:
    path = Path(_folder.name) / "library.so"
    path.write_bytes(data or b"\0")
    made: Any = object.__new__(AtPath)
    made._loaded = type("Loaded", (), {"file": type("File", (), {"sha256": "a library's"})})
    with path.open("rb") as file, mock.patch.dict(kernels.open_libraries):
        kernels.open_libraries[0, 0] = file.fileno(), "a library's"
        has_refusals, names = made._evidence
    assert isinstance(has_refusals, bool) and all(isinstance(name, str) for name in names)


@functools.cache
def _dumps() -> list[str]:
    """A plan and a run of it as a call log keeps them: what their files' names begin with."""
    folder, case = Path(_folder.name) / "dumps", Case("decode")
    with fi_ffi.call_log(0, dump=folder):
        case.run(case.plan())
    return [str(path).removesuffix(BEFORE) for path in sorted(folder.glob(f"*{BEFORE}"))]


def _dumped(suffix: str) -> list[bytes]:
    return [Path(name + suffix).read_bytes() for name in _dumps()]


def _replay(suffix: str, data: bytes) -> None:
    """One of the run's two files; it is read, and nothing is run."""
    path = Path(_dumps()[-1] + suffix)
    right = path.read_bytes()
    path.write_bytes(data)
    try:
        replay.load(path)
    finally:
        path.write_bytes(right)


@dataclass(frozen=True)
class Parser:
    read: Callable[[bytes], object]
    error: type[FiFfiError]
    seeds: Callable[[], list[bytes]]


def _libraries() -> list[bytes]:
    """A small ELF file, and one of this machine: libdl's or another's stub."""
    folders = ("/lib/x86_64-linux-gnu", "/lib/aarch64-linux-gnu", "/lib64")
    names = ("libdl.so.2", "libutil.so.1", "librt.so.1")
    paths = [Path(folder, name) for folder in folders for name in names]
    there = [path.read_bytes() for path in paths if path.exists()]
    return [made.IMAGE, *there[:1]]


def _fatbins() -> list[bytes]:
    return [made.WHOLE, made.holding(made.CUBIN)]


def _wheels() -> list[bytes]:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/norm.so", b"\x7fELF" * 8)
        digest = "sha256=hOxeCKkzGnVn_lKyPBfbnlN1lRpWpXEH3R1k-hRIrVo"
        archive.writestr("a-1.dist-info/RECORD", f"a/norm.so,{digest},32\na-1.dist-info/RECORD,,\n")
    return [out.getvalue()]


def _containers() -> list[bytes]:
    header = json.dumps(
        {"__metadata__": {"op": "x"}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    ).encode()
    return [struct.pack("<Q", len(header)) + header + bytes(8)]


NOTES = [b'{"format": 1, "data": {"a": [1, null]}}', b"[" * 100_000]
EVIDENCES = [
    b"_ZZ14__tvm_ffi_rope\0Mismatched number of arguments when calling",
    b"_ZZ" + b"9" * 9999,
]
PARSERS: dict[str, Parser] = {
    "signature": Parser(_signature, AbiError, list),
    "refusal": Parser(_refusal, AbiError, list),
    "type": Parser(lambda data: packer_of(_text(data)), AbiError, list),
    "elf": Parser(_elf, ArtifactError, _libraries),
    "fatbin": Parser(_fatbin, ArtifactError, _fatbins),
    "architecture": Parser(lambda data: sass_named(_text(data)), ArtifactError, list),
    "record": Parser(lambda data: parse_record(data, "x"), ArtifactError, list),
    "lock": Parser(
        lambda data: wheels_lock.read_lock(_in_memory(data)),
        LoaderError,
        lambda: [lock.lock_path().read_bytes()],
    ),
    "wheel": Parser(_wheel, ArtifactError, _wheels),
    "note": Parser(_note, LoaderError, lambda: NOTES),
    "call-log": Parser(_container, ArtifactError, _containers),
    **{f"dump{suffix}": Parser(partial(_replay, suffix), ArtifactError, partial(_dumped, suffix))
       for suffix in (BEFORE, AFTER)},
    "metadata": Parser(_evidence, LoaderError, lambda: EVIDENCES),
}  # fmt: skip


def seeds_of(name: str) -> list[bytes]:
    """What the parser makes itself, and the corpus."""
    path = CORPUS / f"{name}.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    read = [ast.literal_eval(f"b'''{line}'''") for line in lines if line]
    return [*PARSERS[name].seeds(), *read]


def feed(name: str, data: bytes) -> bool:
    """Whether the parser took it; anything but its own error goes on."""
    try:
        PARSERS[name].read(data)
    except PARSERS[name].error:
        return False
    return True
