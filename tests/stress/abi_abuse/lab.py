"""Cases that may crash, run in a process of their own that is started again after one that did."""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fi_ffi.loader import runtime

from tests.helpers.children import environment
from tests.helpers.compiler import compiled
from tests.helpers.stress_strength import scaled

_SECONDS = 300


def abuse_library() -> str:
    """abuse.c, compiled against the pinned TVM-FFI's headers."""
    return str(compiled(Path(__file__).with_name("abuse.c"), "-pthread"))


def cases_of(module: str) -> dict[str, Callable[[], None]]:
    """Its functions called case_..., and what it has made of parameters."""
    found = importlib.import_module(module)
    cases = {k[5:]: v for k, v in vars(found).items() if k.startswith("case_")}
    return cases | getattr(found, "CASES", {})


@functools.cache
def results(module: str) -> dict[str, str | None]:
    """What became of each case: None where it passed, else what is wrong."""
    return _run(module, abuse_library())


def _run(module: str, library: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    names = [*cases_of(module)]
    while len(found) < len(names):
        rest = names[len(found) :]
        done = subprocess.run(
            [sys.executable, "-m", "tests.stress.abi_abuse.lab", module, library, *rest],
            capture_output=True, text=True, env=environment(), timeout=_SECONDS,
        )  # fmt: skip
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
        found |= dict(lines)
        told = done.stderr[-2000:]
        if len(found) < len(names):
            found[names[len(found)]] = f"the process ended with {done.returncode}: {told}"
        elif done.returncode or done.stderr:
            # Also of a crash at exit, and of what cffi prints of an exception that escaped.
            problem = f"at exit {done.returncode}, on stderr: {told}"
            found[names[-1]] = f"{found[names[-1]] or ''}\n{problem}"
    return found


def main(module: str, library: str, *names: str) -> None:
    abuse.path = library
    runtime.ensure_tvm_ffi()
    cases = cases_of(module)
    for name in names:
        problem = None
        try:
            cases[name]()
        except BaseException:
            problem = traceback.format_exc()[-4000:]
        print(json.dumps([name, problem]), flush=True)


class _Abuse:
    """abuse.c in this process: an attribute is one of its functions, unchecked and undecorated."""

    path = ""

    def __getattr__(self, name: str) -> Any:
        from fi_ffi.abi import library
        from fi_ffi.abi.function import Entry

        address = library.find_symbol(library.open_module(self.path), f"__tvm_ffi_{name}")
        assert address is not None, name
        made = Entry(name, address)
        setattr(self, name, made)
        return made


abuse = _Abuse()


def leaves_nothing(work: Callable[[], object], full: int, short: int, most: int = 4 << 20) -> None:
    """Done so often, it takes few bytes more of memory than after its first times."""

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(200):
        work()
    before = resident()
    for _ in range(scaled(full, short)):
        work()
    assert resident() - before < most


if __name__ == "__main__":
    from tests.stress.abi_abuse import lab  # the module that the cases import, not this `__main__`

    lab.main(*sys.argv[1:])
