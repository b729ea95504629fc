"""All exports of a FlashInfer release, read from the sources in its wheel.

No generator is run, so only the wheel is needed. A binding to which generators add parameters is
read once for each of its variants.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fi_ffi.abi.signature import Signature
from fi_ffi.errors import BuildError
from tools.release.cpp import without_comments
from tools.release.exports import EXPORT, Bindings, Function, Source, read
from tools.release.generators import (
    MODULES,
    Added,
    Generator,
    added_parameters,
    generators,
    templates,
)

# Macros set by FlashInfer's flags and the compiler that bindings test.
_DEFINES = {
    "ENABLE_BF16": "1", "ENABLE_FP8": "1", "ENABLE_FP4": "1", "CUDA_VERSION": "13000",
    "CUDART_VERSION": "13000", "PROFILER_FUNC_PARAMS": "",
}  # fmt: skip
_SUFFIXES = (".cu", ".cc", ".cpp", ".cuh", ".h")
_FOLDERS = ("csrc", "include", "csrc/nv_internal", "csrc/nv_internal/include")
# The hash in the name of a source that is generated for one kernel.
_HASH = re.compile(r"[0-9a-f]{16,}")
_EXPORTED = re.compile(EXPORT + r"\s*\(\s*(\w+)\s*,")
_FILLED = re.compile(r"{% set func_name = \w+ ~ '(\w+)' %}")
_MOST = 1 << 22  # characters of what the templates of a file are filled in to


class Variant(NamedTuple):
    """One of the ways in which generators complete a binding."""

    family: str
    backend: str = "fa2"
    fp8: bool = False

    @property
    def name(self) -> str:
        words = (self.family, self.backend if self.backend == "fa3" else "", "fp8" * self.fp8)
        return " ".join(filter(None, words))


_PREFILL = (Variant("batch_prefill"), Variant("batch_prefill_with_attention_sink"))
_PREFILL_FA3 = (
    Variant("batch_prefill", "fa3"), Variant("batch_prefill", "fa3", True),
    Variant("batch_prefill_with_attention_sink", "fa3"),
)  # fmt: skip
VARIANTS: dict[str, tuple[Variant, ...]] = {
    "csrc/batch_attention_jit_binding.cu": (Variant("batch_attention"),),
    "csrc/batch_decode_jit_binding.cu": (Variant("batch_decode"),),
    "csrc/batch_pod_jit_binding.cu": (Variant("batch_pod"),),
    "csrc/batch_prefill_jit_binding.cu": _PREFILL,
    "csrc/batch_prefill_paged_jit_binding.cu": _PREFILL[:1],
    "csrc/batch_prefill_sm90_jit_binding.cu": _PREFILL_FA3,
    "csrc/pod_jit_binding.cu": (Variant("pod"),),
    "csrc/single_decode_jit_binding.cu": (Variant("single_decode"),),
    "csrc/single_prefill_jit_binding.cu": (Variant("single_prefill"),),
    "csrc/single_prefill_sm90_jit_binding.cu": (
        Variant("single_prefill", "fa3"), Variant("single_prefill", "fa3", True),
    ),
}  # fmt: skip
# The xqa source has two wrappers; a macro selects one for each module.
_XQA = "csrc/flashinfer_xqa_binding.cu"
_XQA_WRAPPERS: dict[str, dict[str, str]] = {"xqa": {}, "xqa_mla": {"MLA_WRAPPER": "1"}}


class Key(NamedTuple):
    """An export: the source below `data` (or a Python file), its variant, and the name.

    A method's name is `Class.method`.
    """

    source: str
    variant: str
    name: str

    def __str__(self) -> str:
        return f"{self.name} [{self.source}{f', {self.variant}' if self.variant else ''}]"


@dataclass(frozen=True)
class Interface:
    """The declarations of one release's sources.

    `exports` has one function for each key, or several if generated sources of one pattern differ.
    `unread` has the reason for each export whose function is unknown.
    """

    release: str
    exports: Mapping[Key, tuple[Function, ...]]
    unread: Mapping[Key, str] = field(default_factory=dict)
    generators: Mapping[str, Generator] = field(default_factory=dict)
    # Distinct names exported by TVM_FFI_DLL_EXPORT_TYPED_FUNC below csrc, and the number of files.
    names: Sequence[str] = ()
    files: int = 0

    def of(self, source: str, variant: str, name: str) -> Function | None:
        """Return the one function of a key, or None."""
        found = self.exports.get(Key(source, variant, name), ())
        return found[0] if len(found) == 1 else None

    def of_source(self, source: str, variant: str = "") -> dict[str, Function]:
        """Return a source's exports, by name."""
        keys = [key for key in self.exports if (key.source, key.variant) == (source, variant)]
        return {key.name: self.exports[key][0] for key in keys}

    def as_json(self) -> dict[str, Any]:
        return {
            "release": self.release,
            "exports": [
                [*key, [_written(f) for f in found]] for key, found in self.exports.items()
            ],
            "unread": [[*key, why] for key, why in self.unread.items()],
            "generators": {name: [*generator] for name, generator in self.generators.items()},
            "names": [*self.names],
            "files": self.files,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Interface:
        return cls(
            data["release"],
            {
                Key(source, variant, name): tuple(_function(name, each) for each in found)
                for source, variant, name, found in data["exports"]
            },
            {Key(source, variant, name): why for source, variant, name, why in data["unread"]},
            {
                name: Generator(tuple(parameters), tuple(names))
                for name, (parameters, names) in data["generators"].items()
            },
            data["names"],
            data["files"],
        )


def _written(function: Function) -> list[Any]:
    signature = function.signature
    return [[*function.names], [*signature.params], signature.result]


def _function(name: str, data: list[Any]) -> Function:
    names, types, result = data
    return Function(Signature(name.rpartition(".")[2], tuple(types), result), tuple(names))


def interface_of(release: str, files: Sequence[str], text: Callable[[str], str]) -> Interface:
    """Read a release's wheel, given its files below `flashinfer` and a function for their texts.

    Files are named as in rows: sources without their folder `data/`. `BuildError` names the file of
    Python that cannot be read, its line and why.
    """
    return _Reading(release, files, text).read()


class _Reading:
    def __init__(self, release: str, files: Sequence[str], text: Callable[[str], str]) -> None:
        self.release, self.files, self.known = release, [*files], {*files}
        self.text = functools.cache(text)
        self.exports: dict[Key, dict[Function, None]] = {}
        self.unread: dict[Key, str] = {}

    def read(self) -> Interface:
        names: set[str] = set()
        made: dict[str, Generator] = {}
        count = 0
        for path in self.files:
            if path.endswith(_SUFFIXES) and path.startswith("csrc/"):
                if EXPORT not in (text := self.text(path)):
                    continue
                found = _EXPORTED.findall(without_comments(text))
                names |= {*found}
                count += bool(found)
                self.add(path, text)
            elif path.endswith(".py"):
                text = self.text(path)
                with _naming(path):
                    if path.startswith("jit/"):
                        made |= generators(path, text)
                    if EXPORT in text:
                        self.add_python(path, text)
        exports = {key: tuple(found) for key, found in sorted(self.exports.items())}
        unread = {key: why for key, why in sorted(self.unread.items()) if key not in exports}
        return Interface(
            self.release, exports, unread, dict(sorted(made.items())), sorted(names), count
        )

    def add(self, path: str, text: str) -> None:
        if path == _XQA:
            for name, defines in _XQA_WRAPPERS.items():
                self.take(path, name, read_binding(text, (), self.include, path, **defines))
            return
        variants = VARIANTS.get(path)
        for variant in variants or (None,):
            added = self.added(variant) if variant else []
            if variant and variants and len(variants) > 1 and not added:
                continue  # the release lacks this family
            found = read_binding(text, added, self.include, path)
            self.take(path, variant.name if variant else "", found)

    def added(self, variant: Variant) -> list[Added]:
        if MODULES not in self.known:
            return []
        with _naming(MODULES):
            return added_parameters(self.text(MODULES), *variant)

    def add_python(self, path: str, text: str) -> None:
        for template in _filled(text):
            self.take(path, "", read_binding(template, (), self.include, path))

    def take(self, path: str, variant: str, found: Bindings) -> None:
        source = _HASH.sub("*", path)
        functions = dict(found.exports)
        for kind, methods in found.objects.items():
            functions |= {f"{kind}.{name}": function for name, function in methods.items()}
        for name, function in functions.items():
            self.exports.setdefault(Key(source, variant, name), {})[function] = None
        for name, why in found.unread.items():
            self.unread[Key(source, variant, name)] = why

    def include(self, path: str, name: str) -> str | None:
        folder = path.rpartition("/")[0]
        for place in (folder, *_FOLDERS):
            if (file := f"{place}/{name}") in self.known:
                return self.text(file)
        return None


@contextmanager
def _naming(path: str) -> Iterator[None]:
    try:
        yield
    except BuildError as error:
        raise BuildError(f"{path}: {error}") from error


def _filled(text: str) -> Iterator[str]:
    """Yield the C++ in a Python file that exports something, with its placeholders filled in."""
    names = re.findall(r'^    "(\w+)": \w+,$', text, re.MULTILINE)
    left = _MOST
    for template in templates(text).values():
        if EXPORT not in template:
            continue
        if "{{" not in template:
            yield template
        elif suffix := _FILLED.search(template):
            left -= len(template) * len(names)
            if left < 0:
                raise BuildError(f"its templates have more than {_MOST} characters, filled in")
            for name in names:
                yield template.replace("{{ func_name }}", name + suffix[1])


def read_binding(
    text: str,
    added: Sequence[Added] = (),
    include: Callable[[str, str], str | None] = lambda path, name: None,
    path: str = "binding",
    **defines: str,
) -> Bindings:
    """Return a binding's exports, with the parameters `added` by a generator.

    An export that cannot be read is listed in `unread`; so are all exports of an unreadable source.
    """
    more = "".join(f", {parameter.declaration}" for parameter in added)
    known = {**_DEFINES, "ADDITIONAL_FUNC_PARAMS": more, **defines}
    source = Source(path, text, known)
    try:
        return read([source], include, is_switch=lambda macro: True, is_lenient=True)
    except BuildError as error:
        names = _EXPORTED.findall(without_comments(text))
        return Bindings(unread={name: str(error) for name in names})
