"""What reads bytes that others wrote: each with seeds, and the one error that it may raise.

tests/stress/corpus/NAME.txt has more seeds, one to a line as Python writes bytes without
quotes: what tools/fuzz.py found, and texts that were printed by real binaries.
test_parsers.py looks for what reads bytes in the code: what no parser here reaches, and `OWN` does
not name, fails.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import json
import os
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import fi_ffi
from fi_ffi.abi.signature import Signature, parse_signature, signature_from_mismatch
from fi_ffi.cli import replay
from fi_ffi.errors import (
    AbiError,
    ArgumentError,
    ArtifactError,
    BuildError,
    FetchError,
    FiFfiError,
    LoaderError,
)
from fi_ffi.loader import cache, kernels, lock, per_device
from fi_ffi.loader.elf import inspect_elf
from fi_ffi.loader.fatbin import architectures
from fi_ffi.loader.fetch import index, pinning, published, wheels_lock
from fi_ffi.loader.fetch.http import Policy
from fi_ffi.loader.fetch.urls import check_url, redact, redirected
from fi_ffi.loader.machine import sass_named
from fi_ffi.loader.wheel import Wheel, parse_record
from fi_ffi.module_names import parse as parse_name
from fi_ffi.modules.module import AtPath
from fi_ffi.modules.packing import packer_of
from fi_ffi.modules.reflection import tells_types
from fi_ffi.watch import safetensors
from fi_ffi.watch.dump import AFTER, BEFORE
from tools.release.exports import Source
from tools.release.exports import read as read_exports
from tools.release.generators import added_parameters, generators
from tools.release.interface import VARIANTS, _filled, interface_of
from tools.release.wheels import SourceWheel

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
    path = Path(_folder.name) / "a-1-py3-none-any.whl"
    path.write_bytes(data)
    wheel = Wheel(path)
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


def _index(data: bytes) -> None:
    root = Path(_folder.name) / "cache"
    (root / "indexes").mkdir(exist_ok=True, mode=0o700, parents=True)
    root.chmod(0o700)
    (root / "indexes" / "0.json").write_bytes(data)
    with mock.patch.dict(os.environ, {cache.ENVIRONMENT: str(root)}):
        record = index.stored_record("0", None)
    assert record is None or all(isinstance(name, str) for name in record)


@contextlib.contextmanager
def _as_loaded(data: bytes) -> Iterator[Any]:
    """A module's file with this content, as if it were loaded."""
    path = Path(_folder.name) / "library.so"
    path.write_bytes(data or b"\0")
    with path.open("rb") as file, mock.patch.dict(kernels.open_libraries):
        kernels.open_libraries[0, 0] = file.fileno(), "a library's"
        yield type("File", (), {"sha256": "a library's"})


def _evidence(data: bytes) -> None:
    made: Any = object.__new__(AtPath)
    with _as_loaded(data) as file:
        made._loaded = type("Loaded", (), {"file": file})
        has_refusals, names = made._evidence
    assert isinstance(has_refusals, bool) and all(isinstance(name, str) for name in names)


def _variables(data: bytes) -> None:
    with _as_loaded(data) as file:
        assert all(0 <= at < len(data) for at in per_device.variables(file))


class _Served:
    """A client that answers every request with these bytes, as a page."""

    policy = Policy()
    url = "https://example.com/simple/"

    def __init__(self, data: bytes) -> None:
        self.data = data

    def open(self, url: str) -> Any:
        return contextlib.nullcontext(self)

    def chunks(self, answer: Any) -> list[bytes]:
        return [self.data]


def _page(data: bytes) -> None:
    served: Any = _Served(data)
    for link in pinning.links_at(served.url, served)[1]:
        for read in (lambda link: pinning.describe(link.file), pinning.Link.sha256):
            with contextlib.suppress(ArgumentError, ArtifactError):
                read(link)


def _address(data: bytes) -> None:
    text = _text(data)
    assert redact(text).isprintable()
    check_url(redirected("https://example.com/", text))


# What the headers of the C++ below have; one includes itself.
_HEADERS = {
    "declared.h": "void FromHeader(TensorView x, MORE_OF_IT);\n#define MORE_OF_IT int64_t n\n",
    "part.inc": "#define IN_PART 1\n",
    "twice.inc": '#include "part.inc"\n#include "part.inc"\n',
    "itself.inc": '#include "itself.inc"\n#include "part.inc"\n',
}


def _cpp(data: bytes) -> None:
    defines = {"ADDITIONAL_FUNC_PARAMS": ", ffi::Tensor more"}
    source = Source("a.cu", _text(data), defines)
    for is_switch in (True, False):
        found = read_exports(
            [source], lambda path, name: _HEADERS.get(name), lambda name, is_switch=is_switch:
            is_switch, is_lenient=is_switch,
        )  # fmt: skip
        for function in found.exports.values():
            assert len(function.names) == len(function.signature.params)


def _python(data: bytes) -> None:
    text = _text(data)
    reading: list[Callable[[], object]] = [
        lambda: generators("jit/a.py", text),
        lambda: list(_filled(text)),
        *(partial(added_parameters, text, *variant) for of in VARIANTS.values() for variant in of),
    ]
    errors = []
    for read in reading:
        try:
            read()
        except BuildError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _release(data: bytes) -> None:
    path = Path(_folder.name) / "flashinfer_python-0.6.13-py3-none-any.whl"
    path.write_bytes(data)
    wheel = SourceWheel("0.6.13", path, "0" * 64)
    interface_of(wheel.release, sorted(wheel.members), wheel.text)
    wheel.gpus()


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
    error: type[FiFfiError] | tuple[type[FiFfiError], ...]
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


def _cpp_sources() -> list[bytes]:
    from tests.cli import test_release as texts

    method = (
        'if (name == "go") return Function::FromTyped([this](int64_t id) -> bool { return 1; });'
    )
    return [text.encode() for text in (
        texts.PAGE.format(more="IN_PART int64_t n, "), texts.DECODE,
        texts.PLAIN.format(result="void", parameters="TensorView a, int64_t b = 3"),
        '#include "declared.h"\nTVM_FFI_DLL_EXPORT_TYPED_FUNC(f, FromHeader);\n',
        '#include "twice.inc"\n' + texts.EXPORT.format("f"),
        f"class Runner : public ModuleObj {{\n GetFunction(String name) {{ {method} }} }};\n"
        "Module init(int64_t n) { }\nTVM_FFI_DLL_EXPORT_TYPED_FUNC(init, init);\n",
        "#if (CUDA_VERSION >= 12080 && defined(A)) || !B\n#define K 0x10\n#elif K + 010 > 1\n#else"
        "\nnamespace a::b { enum class E { x }; using T = Array<Optional<E>>; }\n#endif\n"
        + texts.GENERATED.format(", Map<String, T> m"),
    )]  # fmt: skip


def _python_sources() -> list[bytes]:
    from tests.cli import test_release as texts

    modules = texts.MODULES.format(parameter=", *, stride=1", more="", type="", suffix="_{stride}")
    cases = (
        "def gen_batch_prefill_module(backend, fp8_enabled):\n    if backend == 'fa2':\n"
        "        a, b = [], []\n        return f(['maybe_x'], ['float'], ['y'], ['double'])\n"
        "    elif not fp8_enabled:\n        return f([], [], [], [])\n    return f(a)\n"
    )
    named = 'def gen_new_module(arch):\n    name = f"new_{arch!r}" + "a" if arch else "b"\n'
    return [text.encode() for text in (
        modules, texts.ACTIVATION.format(more='\n    "gelu": gelu_text,'), cases,
        named + "    return env.gen_jit_spec(name=name)\n",
    )]  # fmt: skip


def _releases() -> list[bytes]:
    from tests.cli import test_release as texts

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in (texts.NEW | {"aot.py": texts.TARGETS}).items():
            archive.writestr(f"flashinfer/{name}", text)
    return [out.getvalue()]


def _indexes() -> list[bytes]:
    text = "a/b.so,sha256=hOxeCKkzGnVn_lKyPBfbnlN1lRpWpXEH3R1k-hRIrVo,32\n"
    data = {"size": 9, "pieces": {"0": "UEsFBg=="}, "record": text}
    return [json.dumps({"format": index._INDEX_FORMAT, "data": data}).encode()]


PAGES = [
    b'<!DOCTYPE html><base href="https://example.com/whl/"><a href="flashinfer_jit_cache-0.6.13%2B'
    b"cu130-cp39-abi3-manylinux_2_28_x86_64.whl#sha256=" + b"0f" * 32 + b'">a</a><br/>',
]
ADDRESSES = [b"https://user:word@[::1]:8/a%2Bb?q=1#f", b"http://127.0.0.1/a", b"//host/a;b"]
NAMES = [
    b"norm",
    b"batch_prefill_with_kv_cache_dtype_q_f16_dtype_kv_f16_dtype_o_f16_dtype_idx_i32_"
    b"head_dim_qk_128_head_dim_vo_128_posenc_0_use_swa_False_use_logits_cap_False_f16qk_False",
]
SCHEMAS = [json.dumps({"type_schema": json.dumps({"type": "ffi.Function", "args": []})}).encode()]
NOTES = [b'{"format": 1, "data": {"a": [1, null]}}', b"[" * 100_000]
EVIDENCES = [
    b"_ZZ14__tvm_ffi_rope\0Mismatched number of arguments when calling",
    b"_ZZ" + b"9" * 9999,
]
PINNED = wheels_lock.PinnedDistribution(
    "a", "1", "linux-x86_64", "a-1-py3-none-any.whl", "0" * 64, "1" * 64, 9, "none", "a test"
)
REPORTS = [
    b'{"version": "1", "install": [{"download_info": {"url": "https://a.example/a-1-py3-none-any.whl",'
    b' "archive_info": {"hashes": {"sha256": "' + b"0" * 64 + b'"}}}}]}',
    b'{"install": []}', b'{"install": [{"download_info": 1}]}', b"[" * 9999,
]  # fmt: skip
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
    "variables": Parser(_variables, LoaderError, _libraries),
    "schema": Parser(lambda data: tells_types(_text(data)), AbiError, lambda: SCHEMAS),
    "module-name": Parser(
        lambda data: parse_name(_text(data), "0.6.13"), LoaderError, lambda: NAMES
    ),
    "index": Parser(_index, LoaderError, _indexes),
    "page": Parser(_page, FetchError, lambda: PAGES),
    "report": Parser(
        lambda data: published.located(PINNED, _text(data)), (FetchError, ArtifactError),
        lambda: REPORTS,
    ),
    "address": Parser(_address, FetchError, lambda: ADDRESSES),
    "cpp": Parser(_cpp, BuildError, _cpp_sources),
    "python": Parser(_python, BuildError, _python_sources),
    "release": Parser(_release, (ArtifactError, BuildError), _releases),
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
