"""What FlashInfer's generators say that only the records need: names, and sources of modules.

As a script (`python -I described.py ANSWER`) it runs in the build environment, beside the
package's own driver, of which it is an extension.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DRIVER = Path(__file__).with_name("driver.py")


def generated_names(
    requests: Sequence[Mapping[str, object]], *, release: str, arch: str, build_dir: Path | None
) -> tuple[dict[str, str], dict[str, str]]:
    """What FlashInfer's generators call modules, and why they refuse others, by `text`.

    A request has a `text` of its own, a `generator` ("module:function") and its `arguments`.
    """
    from fi_ffi.loader.building import build, environment, names

    architectures = names.parse_arch(arch)
    with environment.open_workshop(release, architectures, build_dir) as workshop:
        question: dict[str, object] = {"action": "names", "requests": list(requests)}
        answer = build.ask(workshop, question, Path(__file__))
    return answer["names"], answer["failed"]


def described(
    unlisted: Sequence[str], *, release: str, arch: str, build_dir: Path | None
) -> dict[str, Any]:
    """What FlashInfer's own list of modules is compiled from.

    `modules` have a name, `sources` (paths), and `cflags` and `cuda_cflags`, and so have
    those `unlisted` modules that are asked for by name; `data` is the folder of the sources
    that none was generated for; `unavailable` has generators that failed, and why.
    """
    from fi_ffi.loader.building import build, environment, names

    architectures = names.parse_arch(arch)
    requests = [names.parse_request(name).as_json(release) for name in unlisted]
    with environment.open_workshop(release, architectures, build_dir) as workshop:
        # A generator compiles a helper, which includes cuBLAS.
        environment.install_headers(workshop.environment, "cublas", workshop.toolkit, workshop.say)
        question: dict[str, object] = {"action": "sources", "requests": requests}
        answer: dict[str, Any] = build.ask(workshop, question, Path(__file__))
    return answer


def _answer(driver: Any, question: dict[str, Any]) -> dict[str, Any]:
    """In the environment: the names that were asked for, or the sources of all modules.

    Also of those that could not be built here, and of some that are not listed.
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
    """What the modules asked for are called, and reasons for those that cannot be."""
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
    """Let generators make their specs without the files that they download.

    What they download is compiled in, and does not change which sources a module is of.
    """
    importlib.import_module("flashinfer.aot")
    stand_ins = {
        "get_artifact": lambda *args, **kwargs: b"absent",
        "get_cubin": lambda *args, **kwargs: b"absent",  # as earlier releases call it
        "get_meta_hash": lambda *args: "absent",
        "ensure_symlink": lambda *args: None,
        "verify_symlinked_headers": lambda *args: None,
    }
    for name, module in sorted(sys.modules.items()):
        if name.startswith("flashinfer."):
            for known in stand_ins.keys() & vars(module).keys():
                setattr(module, known, stand_ins[known])


def _sources(spec: Any) -> dict[str, Any]:
    """The files that a spec is compiled from, and the flags they are compiled with."""
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
