"""Information from FlashInfer's generators that only records need: modules' names and sources.

As a script (`python -I described.py ANSWER`) this file runs in the build environment and extends
`fi_ffi_build/driver.py`. So it imports nothing of this project at the top.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DRIVER = Path(__file__).resolve().parents[2] / "fi_ffi_build" / "driver.py"


def generated_names(
    requests: Sequence[Mapping[str, object]], *, release: str, arch: str, build_dir: Path | None
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the generators' module names, and the reasons of refusals, both by `text`.

    A request has a unique `text`, a `generator` ("module:function") and its `arguments`.
    """
    from fi_ffi.catalogue.requests import parse_arch
    from fi_ffi_build import environment, questions

    architectures = parse_arch(arch)
    with environment.open_workshop(release, architectures, build_dir) as workshop:
        question: dict[str, object] = {"action": "names", "requests": list(requests)}
        answer = questions.ask(workshop, question, Path(__file__))
    return answer["names"], answer["failed"]


def described(
    unlisted: Sequence[str], *, release: str, arch: str, build_dir: Path | None
) -> dict[str, Any]:
    """Return the sources of all modules in FlashInfer's own list.

    `modules` have a name, `sources` (paths), `cflags` and `cuda_cflags`; so have the `unlisted`
    modules requested by name. `data` is the folder of the sources that are not generated.
    `unavailable` lists failed generators with the reasons.
    """
    from fi_ffi.catalogue.requests import parse_arch, parse_request
    from fi_ffi_build import cute_install, environment, questions

    architectures, torch = parse_arch(arch), cute_install.CUTE_TORCH
    requests = [questions.question_of(parse_request(name), release) for name in unlisted]
    # With torch, so that the list has its extensions.
    with environment.open_workshop(release, architectures, build_dir, torch) as workshop:
        # A generator compiles a helper that includes cuBLAS.
        environment.install_headers(workshop.environment, "cublas", workshop.toolkit, workshop.say)
        question: dict[str, object] = {"action": "sources", "requests": requests}
        answer: dict[str, Any] = questions.ask(workshop, question, Path(__file__))
    return answer


def _answer(driver: Any, question: dict[str, Any]) -> dict[str, Any]:
    """Answer in the build environment: requested names, or the sources of all modules.

    The sources include modules that could not be built here, and some that are not listed.
    """
    result: dict[str, Any] = driver.about()
    if question["action"] == "names":
        result["names"], result["failed"] = _names(driver, question["requests"])
        return result
    _without_artifacts()
    everything, skipped = driver.everything()
    result["modules"] = [_sources(spec) for _, spec in sorted(everything.items())]
    result["unlisted"] = [_sources(driver.generate(asked)) for asked in question["requests"]]
    result["unavailable"] = {entry.generator: entry.reason for entry in skipped}
    result["data"] = str(importlib.import_module("flashinfer.jit.env").FLASHINFER_DATA)
    return result


def _names(driver: Any, requests: list[dict[str, Any]]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the names of requested modules, and reasons for failures."""
    names: dict[str, str] = {}
    failed: dict[str, str] = {}
    for request in requests:
        try:
            found = driver.generate(request)
            names[request["text"]] = found if isinstance(found, str) else found.name
        except Exception as error:
            failed[request["text"]] = driver.reason(error)
    return names, failed


def _without_artifacts() -> None:
    """Replace downloads by stubs, so that generators can make their specs.

    Downloaded files are compiled in; they do not change which sources a module has.
    """
    importlib.import_module("flashinfer.aot")
    stand_ins = {
        "get_artifact": lambda *args, **kwargs: b"absent",
        "get_cubin": lambda *args, **kwargs: b"absent",  # earlier releases' name
        "get_meta_hash": lambda *args: "absent",
        "ensure_symlink": lambda *args: None,
        "verify_symlinked_headers": lambda *args: None,
    }
    for name, module in sorted(sys.modules.items()):
        if name.startswith("flashinfer."):
            for known in stand_ins.keys() & vars(module).keys():
                setattr(module, known, stand_ins[known])


def _sources(spec: Any) -> dict[str, Any]:
    """Return a spec's source files and compiler flags."""
    return {
        "name": spec.name,
        "sources": [str(path) for path in spec.sources],
        "cflags": spec.extra_cflags or [],
        "cuda_cflags": spec.extra_cuda_cflags or [],
    }


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("driver", DRIVER)
    assert spec is not None
    assert spec.loader is not None
    driver = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(driver)
    Path(sys.argv[1]).write_text(json.dumps(_answer(driver, json.load(sys.stdin))))
