"""Questions to FlashInfer's generators, which answer in the build environment."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fi_ffi.catalogue.requests import Request
from fi_ffi.errors import BuildError
from fi_ffi.loader.uris import DTYPES, Row, Value
from fi_ffi_build import cute
from fi_ffi_build.environment import Environment

DRIVER = Path(__file__).with_name("driver.py")
CUTE_DRIVER = Path(__file__).with_name("cute_driver.py")


class Asked(Protocol):
    """Where a driver runs: a workshop, or what there is of one without FlashInfer."""

    @property
    def folder(self) -> Path: ...

    @property
    def environment(self) -> Environment: ...

    @property
    def log(self) -> Path: ...

    def variables(self) -> dict[str, str]: ...


def ask(workshop: Asked, question: Mapping[str, object], driver: Path = DRIVER) -> Any:
    """Run a driver in the build environment and return its answer."""
    path = workshop.folder / "answer.json"
    command = [str(workshop.environment.python), "-I", "-W", "ignore", str(driver), str(path)]
    done = subprocess.run(
        command,
        env={**os.environ, **workshop.variables()},
        input=json.dumps(question),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    with workshop.log.open("a") as log:
        log.write(f"$ {' '.join(command)}\n{done.stdout}")
    if done.returncode:
        cause = done.stdout.strip().rpartition("\n")[2]
        raise BuildError(f"the script {driver.name} could not be run: {cause}", str(workshop.log))
    return json.loads(path.read_text())


def question_of(request: Request, release: str) -> dict[str, object]:
    """Return a request as the drivers take it, with the generator or the call that answers it."""
    if request.is_cute:
        return cute.question(request)
    question: dict[str, object] = {"text": request.text, "exact": request.exact}
    if row_and_params := request.params_in(release):
        row, params = row_and_params
        if row.generator is not None:
            texts = {name: row.text(name, params[name]) for name in row.kinds}
            generator = row.generator.format_map(texts)
            question |= {"generator": generator, "arguments": _arguments(row, params)}
    return question


def _arguments(row: Row, params: Mapping[str, Value]) -> dict[str, Value]:
    """Return a generator's arguments, with dtypes as torch names them.

    The driver passes those that are in the generator's signature.
    """
    arguments: dict[str, Value] = dict(row.arguments)
    for name, value in params.items():
        is_dtype = row.kinds[name].is_dtype and value is not None
        arguments[name] = f"torch.{DTYPES[str(value)]}" if is_dtype else value
    return arguments
