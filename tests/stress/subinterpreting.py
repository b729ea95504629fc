"""What test_subinterpreters.py runs: fi_ffi in subinterpreters, before or after the main one."""

from __future__ import annotations

import array
import sys

try:
    import _interpreters as interpreters  # type: ignore[import-not-found]
except ImportError:
    import _xxsubinterpreters as interpreters  # type: ignore[import-not-found,no-redef]

# Without numpy, which is of one interpreter only: what a server with pointers does.
CODE = """
import sys
sys.path[:] = {path!r}
import fi_ffi
module = fi_ffi.module({library!r})
desc = fi_ffi.TensorDesc({address}, (4,), "float32", device="cpu")
for _ in range({count}):
    module.entry("scale")(desc, 1.0)
    assert len(module.entry("give")()) == 37
    try:
        module.entry("fail")(1)
    except fi_ffi.KernelError as error:
        assert error.__cause__
    with fi_ffi.stream(5):
        pass
with fi_ffi.watchdog(60):
    module.entry("scale")(desc, 2.0)
"""
numbers = array.array("f", [1] * 4)
kind, order, library, count = sys.argv[1:]


def make() -> object:
    if sys.version_info >= (3, 13):
        return interpreters.create(kind)
    return interpreters.create(isolated=kind == "isolated")


def call() -> None:
    import fi_ffi

    before = numbers[0]
    desc = fi_ffi.TensorDesc(numbers.buffer_info()[0], (4,), "float32", device="cpu")
    fi_ffi.module(library).entry("scale")(desc, 2.0)
    assert [*numbers] == [2 * before] * 4


def run() -> str:
    """How it ended there, in a line."""
    made = make()
    given = {"path": sys.path, "library": library, "count": count}
    try:
        failed = interpreters.run_string(
            made, CODE.format(**given, address=numbers.buffer_info()[0])
        )
    except Exception as error:  # before 3.13
        failed = error
    interpreters.destroy(made)
    return "works" if failed is None else str(getattr(failed, "formatted", failed)).split("\n")[0]


if order == "after":
    call()
for _ in range(3):
    print(run(), flush=True)
call()
print([*numbers])
