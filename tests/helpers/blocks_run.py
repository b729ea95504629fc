"""Run the blocks of one page, in order, in the current directory.

    python -m tests.helpers.blocks_run PAGE [--gpu] [--long]

One process for each page: what a block sets in fi_ffi or in the environment ends with it.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import doctest
import inspect
import io
import json
import re
import subprocess
import sys
import traceback
import types
from pathlib import Path

from tests.helpers.blocks import PARSED, Block, PageError, blocks_of

SH_LIMIT = 600  # seconds
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Page:
    """A page's namespace, and what its last block printed."""

    def __init__(self, has_gpu: bool, is_long: bool) -> None:
        self.has_gpu, self.is_long = has_gpu, is_long
        self.module = types.ModuleType("page")
        sys.modules["page"] = self.module  # where dataclasses and pickle look for it
        self.printed: str | None = None
        self.skipped = False

    def take(self, block: Block) -> str:
        """What became of the block; raises where it is wrong."""
        if "output" in block.marks:
            return self._compare(block)
        if block.language == "python":
            compile(block.code if "signature" not in block.marks else "", block.place, "exec")
        if block.language == "sh":
            _bash("-n", block)
        why = self._why_not(block)
        if why:
            self.printed = None
            return why
        if block.language == "python":
            return self._python(block)
        if block.language == "sh":
            return self._sh(block)
        if block.language in PARSED:
            _parse(block)
            return "parsed"
        return "shown"

    def _why_not(self, block: Block) -> str:
        if block.is_left_out:
            return "left out"
        if block.needs == "gpu" and not self.has_gpu:
            return "skipped: needs a GPU"
        if block.needs == "long" and not self.is_long:
            return "skipped: is long"
        # On a GPU machine the commands were run before, on another.
        is_again = self.has_gpu and block.language == "sh" and block.needs != "gpu"
        return "skipped: needs no GPU" if is_again else ""

    def _python(self, block: Block) -> str:
        if "signature" in block.marks:
            _check_signature(block)
            return "compared"
        if self.skipped:  # it goes on with what that one left
            self.printed = None
            return "skipped: so was a block before"
        wanted = block.marks.get("raises")
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out):
                self._exec(block.setup, block.setup_line, block.page)
                self._exec(block.code, block.line, block.page)
        except Exception as error:
            if why := self._why_missing(error):
                self.printed, self.skipped = None, True
                return f"skipped: {why}"
            if wanted is None or wanted not in (type(error).__name__, _full(error)):
                raise
            print("".join(traceback.format_exception_only(error)), file=out)
        else:
            if wanted is not None:
                raise PageError(f"did not raise {wanted}")
        self.printed = out.getvalue()
        return "run"

    def _why_missing(self, error: Exception) -> str:
        """What the kernels at hand have not, or the release in force: a module, or an option."""
        from fi_ffi.errors import ArgumentError, LoaderError
        from fi_ffi.ops.call.releases import release_in_force

        from tests.helpers import kernels

        if self.has_gpu and isinstance(error, ArgumentError):
            lacks = rf"not in {re.escape(release_in_force())}(?![.\d])"
            return str(error) if re.search(lacks, str(error)) else ""
        is_told = self.has_gpu and isinstance(error, LoaderError)
        return kernels.why_missing(error) if is_told else ""

    def _exec(self, code: str, line: int, page: Path) -> None:
        # In a traceback, lines are the page's own.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), self.module.__dict__)

    def _sh(self, block: Block) -> str:
        if block.setup:
            self._exec(block.setup, block.setup_line, block.page)
        done = _bash("-euo", block)
        if done.returncode != int(block.marks.get("exits", 0)):
            raise PageError(f"exit status {done.returncode}:\n{done.stdout}")
        self.printed = done.stdout
        return "run"

    def _compare(self, block: Block) -> str:
        if self.printed is None:
            return "skipped: so was the block before"
        want, got = (text.replace("…", "...") for text in (block.code, self.printed))
        if not doctest.OutputChecker().check_output(want, got, _FLAGS):
            raise PageError(f"the page shows\n{want}\nand the block before gave\n{got}")
        return "compared"


def _full(error: Exception) -> str:
    return f"{type(error).__module__}.{type(error).__qualname__}"


def _bash(mode: str, block: Block) -> subprocess.CompletedProcess[str]:
    options = ["-euo", "pipefail"] if mode == "-euo" else ["-n"]
    done = subprocess.run(
        ["bash", *options, "-c", block.code],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=SH_LIMIT, check=False,
    )  # fmt: skip
    if mode == "-n" and done.returncode:
        raise PageError(done.stdout)
    return done


def _parse(block: Block) -> None:
    if block.language == "json":
        json.loads(block.code)
        return
    try:
        import tomllib
    except ImportError:
        import tomli as tomllib
    tomllib.loads(block.code)


def _check_signature(block: Block) -> None:
    """`package.name(arguments)` is what `inspect` says of it."""
    import fi_ffi
    from fi_ffi.ops.call.row import REQUIRED, Required

    name, _, arguments = block.code.strip().partition("(")
    (stub,) = ast.parse(f"def _({arguments}: ...").body
    assert isinstance(stub, ast.FunctionDef)
    space: dict[str, object] = {REQUIRED: Required(name)}
    exec(compile(ast.Module([stub], []), block.place, "exec"), space)
    real = inspect.signature(eval(name, {"fi_ffi": fi_ffi}))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in real.parameters.values()]
    written = inspect.signature(space["_"])  # type: ignore[arg-type]
    if written != inspect.Signature(bare):
        raise PageError(f"{name} has the signature {inspect.Signature(bare)}")


def run(path: Path, *, has_gpu: bool, is_long: bool) -> int:
    page = Page(has_gpu, is_long)
    for block in blocks_of(path):
        try:
            became = page.take(block)
        except BaseException as error:
            said = str(error) if isinstance(error, PageError) else traceback.format_exc()
            print(f"{block.place}: the {block.language} block is wrong: {said}")
            return 1
        print(f"{block.place}: {block.language}: {became}", flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--long", action="store_true")
    given = parser.parse_args()
    try:
        return run(given.page.resolve(), has_gpu=given.gpu, is_long=given.long)
    except PageError as error:
        print(error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
