"""Queries FlashInfer's own generators for build files; runs in the build environment only.

This is a plain script: `python -I driver.py ANSWER` reads a question as JSON from standard input
and writes the answer as JSON to the file ANSWER. FlashInfer's output goes to standard output. The
packages are imported by name, because fi_ffi itself must never import them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import json
import os
import re
import runpy
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_NO_DOWNLOAD = "FLASHINFER_NO_DOWNLOAD"
NEEDS_TORCH = "needs torch itself, which --torch torch installs"
_STAND_IN = Path(__file__).with_name("stand_in.py")


def _load_bare_package(name: str) -> None:
    """Make `name`'s submodules importable without running its `__init__`.

    FlashInfer's own `__init__` imports everything that runs kernels, with a dozen large
    dependencies that the generators do not need.
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
    # Where an import failed, or an attribute of a module.
    where = error.name if isinstance(error, ImportError) else None
    if isinstance(error, AttributeError):
        where = getattr(getattr(error, "obj", None), "__name__", None)
    torch = sys.modules.get("torch")
    if str(where).partition(".")[0] == "torch" and not getattr(torch, "__file__", None):
        return NEEDS_TORCH
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


class _Skipped:
    """Replaces the spec of a generator that failed."""

    def __init__(self, generator: str, reason: str) -> None:
        self.name, self.generator, self.reason = f"(failed) {generator}", generator, reason

    def __iter__(self) -> Iterator[_Skipped]:
        """Yield itself, for generators that return several specs."""
        yield self


def _tolerant(name: str, generator: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a generator so that it returns a `_Skipped` when it fails.

    Some generators fetch headers from a server; an unreachable one must not hide all other modules.
    """

    @functools.wraps(generator)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return generator(*args, **kwargs)
        except Exception as error:
            return _Skipped(name, reason(error))

    return call


def everything(*, download: bool = False) -> tuple[dict[str, Any], list[_Skipped]]:
    """Return everything that FlashInfer can build ahead of time, and the generators that failed.

    Some generators fail without `download`.
    """
    aot = importlib.import_module("flashinfer.aot")
    for home in ("flashinfer.aot", "flashinfer.jit.attention", "flashinfer.jit.comm"):
        # the namespaces that provide the list's generators
        names = vars(importlib.import_module(home))
        for name in [name for name in names if re.match(r"gen_(?!all_).*_module", name)]:
            names[name] = _tolerant(name, names[name])
    settings = dict(aot.get_default_config())
    settings["sm_capabilities"] = aot.detect_sm_capabilities()
    # Parameters have the names of the settings, some with an appended underscore.
    wanted = inspect.signature(aot.gen_all_modules).parameters
    asked = os.environ.get(_NO_DOWNLOAD)
    if not download:
        os.environ[_NO_DOWNLOAD] = "1"
    specs = aot.gen_all_modules(**{name: settings[name.rstrip("_")] for name in wanted})
    if asked is None:
        os.environ.pop(_NO_DOWNLOAD, None)
    skipped = [spec for spec in specs if isinstance(spec, _Skipped)]
    # Some specs (CuTe DSL) are no libraries and have no build file.
    by_name = {spec.name: spec for spec in specs if hasattr(spec, "write_ninja")}
    return by_name, skipped


def _value(text: Any) -> Any:
    if isinstance(text, str) and text.startswith("torch."):
        return getattr(importlib.import_module("torch"), text.removeprefix("torch."))
    return text


def generate(request: dict[str, Any]) -> Any:
    """Call a family's generator with those of the arguments that it accepts."""
    module, _, function = request["generator"].partition(":")
    generator = inspect.unwrap(getattr(importlib.import_module(module), function))
    known = {name: _value(value) for name, value in request["arguments"].items()}
    wanted = inspect.signature(generator).parameters
    return generator(**{name: known[name] for name in wanted if name in known})


def _resolve(requests: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Return specs and failures by request, and all listed names if the list was needed."""
    specs: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for request in requests:
        if "generator" in request:
            try:
                specs[request["text"]] = generate(request)
            except Exception as error:
                failed[request["text"]] = f"FlashInfer's generator refused it: {reason(error)}"
    # A spec made from the options in an exact name counts only if it has that very name.
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
    """Load FlashInfer and return the environment's facts."""
    runpy.run_path(str(_STAND_IN))["install"]()
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
    """Answer a question: `list` names all modules, `generate` writes build files for some."""
    result = about()
    if question["action"] == "list":
        by_name, skipped = everything()
        modules = [{"name": name, "sources": len(by_name[name].sources)} for name in by_name]
        result["modules"] = sorted(modules, key=lambda module: str(module["name"]))
        result["unavailable"] = {entry.generator: entry.reason for entry in skipped}
        return result
    specs, failed, names = _resolve(question["requests"])
    result["failed"], result["names"] = failed, names
    result["modules"] = [] if failed else [_describe(text, spec) for text, spec in specs.items()]
    return result


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(answer(json.load(sys.stdin))))
