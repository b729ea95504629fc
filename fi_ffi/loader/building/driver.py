"""Asks FlashInfer's own generators for build files; runs in the build environment only.

A plain script: `python -I driver.py ANSWER` reads a question as JSON from its
standard input and writes the answer as JSON to the file ANSWER.  What FlashInfer
prints goes where standard output goes.  The packages it needs are imported by name
because the program that this file ships with must never import them itself.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_NO_DOWNLOAD = "FLASHINFER_NO_DOWNLOAD"


def _load_bare_package(name: str) -> None:
    """Make `name`'s submodules importable without running its `__init__`.

    FlashInfer's own imports everything that runs kernels, with a dozen large
    dependencies; the generators need none of them.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"{name} is not in this environment")
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    package.__file__ = spec.origin
    package.__spec__ = spec
    sys.modules[name] = package


def reason(error: BaseException) -> str:
    if _NO_DOWNLOAD in str(error):
        return "needs files that FlashInfer downloads when the module is built"
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


class _Skipped:
    """Stands in a list of specs for a generator that failed."""

    def __init__(self, generator: str, reason: str) -> None:
        self.name, self.generator, self.reason = f"(failed) {generator}", generator, reason

    def __iter__(self) -> Iterator[_Skipped]:
        """For generators that give several specs."""
        yield self


def _tolerant(name: str, generator: Callable[..., Any]) -> Callable[..., Any]:
    """A generator that gives a `_Skipped` where it cannot give a spec.

    Some fetch headers from a server when they are called: one that cannot be
    reached must not hide all the other modules.
    """

    @functools.wraps(generator)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return generator(*args, **kwargs)
        except Exception as error:
            return _Skipped(name, reason(error))

    return call


def everything(*, download: bool = False) -> tuple[dict[str, Any], list[_Skipped]]:
    """FlashInfer's list of what it builds ahead of time, with everything turned on; and the
    generators that failed, as some do without `download`."""
    aot = importlib.import_module("flashinfer.aot")
    for home in ("flashinfer.aot", "flashinfer.jit.attention", "flashinfer.jit.comm"):
        names = vars(importlib.import_module(home))  # where the list gets its generators from
        for name in [name for name in names if re.match(r"gen_(?!all_).*_module", name)]:
            names[name] = _tolerant(name, names[name])
    settings = dict(aot.get_default_config())
    settings["sm_capabilities"] = aot.detect_sm_capabilities()
    # The parameters are named as the settings are, some with an underscore after.
    wanted = inspect.signature(aot.gen_all_modules).parameters
    asked = os.environ.get(_NO_DOWNLOAD)
    if not download:
        os.environ[_NO_DOWNLOAD] = "1"
    specs = aot.gen_all_modules(**{name: settings[name.rstrip("_")] for name in wanted})
    if asked is None:
        os.environ.pop(_NO_DOWNLOAD, None)
    skipped = [spec for spec in specs if isinstance(spec, _Skipped)]
    # Some specs (those of CuTe-DSL) are no libraries and have no build file.
    found = {spec.name: spec for spec in specs if hasattr(spec, "write_ninja")}
    return found, skipped


def _value(text: Any) -> Any:
    if isinstance(text, str) and text.startswith("torch."):
        return getattr(importlib.import_module("torch"), text.removeprefix("torch."))
    return text


def generate(request: dict[str, Any]) -> Any:
    """Call the generator of a family with those of the arguments that it names."""
    module, _, function = request["generator"].partition(":")
    generator = inspect.unwrap(getattr(importlib.import_module(module), function))
    known = {name: _value(value) for name, value in request["arguments"].items()}
    wanted = inspect.signature(generator).parameters
    return generator(**{name: known[name] for name in wanted if name in known})


def _resolve(requests: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Specs by request, reasons for those that failed, and all names of the list if consulted."""
    specs: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for request in requests:
        if "generator" in request:
            try:
                specs[request["text"]] = generate(request)
            except Exception as error:
                failed[request["text"]] = f"FlashInfer's generator refused it: {reason(error)}"
    # What the options in an exact name lead to is wanted only if it has that very name.
    exact = [request["text"] for request in requests if request["exact"]]
    open_names = [text for text in exact if text not in specs or specs[text].name != text]
    listed = everything()[0] if open_names else {}
    if any(text not in listed for text in open_names):
        listed = everything(download=True)[0]
    for text in open_names:
        specs.pop(text, None)
        failed.pop(text, None)
        if text in listed:
            specs[text] = listed[text]
        else:
            failed[text] = "unknown"
    return specs, failed, sorted(listed)


def _describe(text: str, spec: Any) -> dict[str, Any]:
    spec.write_ninja()
    return {
        "request": text,
        "name": spec.name,
        "ninja": str(spec.ninja_path),
        "library": str(spec.jit_library_path),
        "sources": len(spec.sources),
    }


def about() -> dict[str, Any]:
    """What the environment has; FlashInfer is loaded with it."""
    _load_bare_package("flashinfer")
    core = importlib.import_module("flashinfer.jit.core")
    version = importlib.import_module("flashinfer.version")
    jit_env = importlib.import_module("flashinfer.jit.env")
    targets = sorted(core.current_compilation_context.TARGET_CUDA_ARCHS)
    return {
        "release": version.__version__,
        "git_version": version.__git_version__,
        "architectures": [f"sm{major}{minor}" for major, minor in targets],
        "folder": str(Path(jit_env.FLASHINFER_JIT_DIR)),
    }


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """`list` names every module that can be built; `generate` writes the files to build some."""
    result = about()
    if question["action"] == "list":
        found, skipped = everything()
        modules = [{"name": name, "sources": len(found[name].sources)} for name in found]
        result["modules"] = sorted(modules, key=lambda module: str(module["name"]))
        result["unavailable"] = {entry.generator: entry.reason for entry in skipped}
        return result
    specs, failed, names = _resolve(question["requests"])
    result["failed"], result["names"] = failed, names
    result["modules"] = [] if failed else [_describe(text, spec) for text, spec in specs.items()]
    return result


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(answer(json.load(sys.stdin))))
