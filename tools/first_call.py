"""Name the functions of a first call in order, from `rmsnorm` to the `dlopen` of its kernel.

    python3 tools/first_call.py KERNELS

KERNELS is a folder of modules with `norm`, as a wheel has it.  No GPU is needed: one of compute
capability 9.0 is pretended, and the call ends where the kernel's library would be opened.  What is
printed is docs/first-call.md; tests/test_first_call.py compares it.  A process before has filled
the cache.  What modules run while they are imported is left out, and so are comprehensions.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PAGE = """# The first call

<!-- made by tools/first_call.py -->
What runs in a process's first `fi_ffi.rmsnorm` on a GPU, from the call to the `dlopen` of a local
kernel that an earlier process has checked: {functions} functions in {files} files, in the order in
which each is first entered. The calls after it run
[one generated function and the launch](design.md#a-call).
"""


class Step(NamedTuple):
    """A function that was entered: its file, its qualified name and its first line."""

    file: str
    name: str
    line: int


class Opened(BaseException):
    """The call has come to the kernel's library."""


def _is_counted(code: CodeType) -> bool:
    """Whether this is a function: no module, class body, lambda or comprehension."""
    return bool(code.co_flags & inspect.CO_OPTIMIZED) and not code.co_name.startswith("<")


def steps() -> list[Step]:
    """Call `rmsnorm`, and return the functions that were entered."""
    import fi_ffi
    from fi_ffi.loader import machine

    package = str(ROOT / "fi_ffi") + os.sep
    seen: dict[Step, None] = {}
    importing: list[FrameType] = []

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if event == "call":
            if code.co_name == "<module>":
                importing.append(frame)
            elif not importing and code.co_filename.startswith(package) and _is_counted(code):
                name = getattr(code, "co_qualname", code.co_name)
                seen[Step(code.co_filename[len(package) :], name, code.co_firstlineno)] = None
                if code.co_name == "open_module" and "norm" in Path(frame.f_locals["path"]).name:
                    raise Opened
        elif event == "return" and importing and importing[-1] is frame:
            importing.pop()

    # The machine has one GPU, whatever it has.
    machine.device_count = lambda: 1
    machine.capability = lambda device: (9, 0)
    x, weight = (
        fi_ffi.TensorDesc(0x7F0000000000 + 4096 * at, shape, "float16", device="cuda:0")
        for at, shape in enumerate([(5, 128), (128,)])
    )
    rmsnorm = fi_ffi.rmsnorm
    sys.setprofile(profile)
    try:
        rmsnorm(x, x, weight, eps=1e-6, stream=1)
    except Opened:
        return list(seen)
    finally:
        sys.setprofile(None)
    raise SystemExit("no kernel was opened")


def summary_of(step: Step) -> str:
    """Return the first sentence of a function's docstring, or ""."""
    for node in ast.walk(_tree(step.file)):
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if is_function and step.line in _lines_of(node):  # type: ignore[arg-type]
            text = ast.get_docstring(node)  # type: ignore[arg-type]
            return " ".join(text.split("\n\n")[0].split()) if text else ""
    return ""


def _tree(file: str) -> ast.Module:
    path = ROOT / "fi_ffi" / file
    return ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])


def _lines_of(node: ast.FunctionDef) -> Iterator[int]:
    """The lines that may be a function's first: its own, or a decorator's."""
    yield node.lineno
    yield from (decorator.lineno for decorator in node.decorator_list)


def page_of(taken: list[Step]) -> str:
    """Return the page of a trace."""
    files = {step.file for step in taken if not step.file.endswith(">")}
    lines = [PAGE.format(functions=len(taken), files=len(files))]
    number = 0
    for file, of_file in groupby(taken, key=lambda step: step.file):
        lines.append(
            f"\n**{file}**\n" if not file.endswith(">") else "\n**the generated function**\n"
        )
        for step in of_file:
            number += 1
            summary = summary_of(step)
            lines.append(f"{number}. `{step.name}`" + (f": {summary}" if summary else ""))
    return "\n".join(lines) + "\n"


def traced(kernels: str) -> list[Step]:
    """Trace a process whose cache another has filled."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"FI_FFI_CACHE_DIR": cache, "FI_FFI_KERNELS": kernels}
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, __file__, "--trace"], env=environment, stdout=subprocess.PIPE,
                text=True, check=True,
            )  # fmt: skip
    return [Step(*each) for each in json.loads(done.stdout)]


def main() -> int:
    """Print the page of the kernels that are named."""
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    if sys.argv[1] == "--trace":
        print(json.dumps(steps()))
    else:
        print(page_of(traced(sys.argv[1])), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
