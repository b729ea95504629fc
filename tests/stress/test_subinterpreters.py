"""Subinterpreters: those that share the GIL work, isolated ones are refused in cffi's words (up to
3.11 in Python's own, where a thread is started), and neither takes the process with it."""

from __future__ import annotations

import sys

import pytest

from tests.helpers.children import done
from tests.helpers.stress_strength import scaled
from tests.stress.gauges import counted

REFUSAL = (
    "module _cffi_backend does not support loading in subinterpreters"
    if sys.version_info >= (3, 12)
    else "thread is not supported for isolated subinterpreters"  # which a watchdog has
)
# fi_ffi in subinterpreters, before or after the main one; there without numpy, which is of one
# interpreter only: what a server with pointers does.
PROGRAM = r"""
import array
import sys

try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters

CODE = '''
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
'''
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
"""


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", ["legacy", "isolated"])
def test_subinterpreters(kind: str, order: str) -> None:
    is_refused = kind == "isolated"
    if is_refused and order == "before" and sys.version_info[:2] == (3, 12):
        pytest.skip("3.12 corrupts its own memory when an isolated one imports the same first")
    if kind == "legacy" and not getattr(sys, "_is_gil_enabled", lambda: True)():
        pytest.skip("without a GIL none shares it")
    library = counted()
    status, out, err = done(PROGRAM, kind, order, library, str(scaled(100_000, 100)))
    assert (status, err) == (0, "")
    *told, numbers = out.splitlines()
    assert len(told) == 3
    if is_refused:
        assert all(REFUSAL in line for line in told), out
    else:
        assert told == ["works"] * 3, out
    # Doubled by each that works, and by the main interpreter.
    doubled = (0 if is_refused else 3) + 1 + (order == "after")
    assert numbers == str([2.0**doubled] * 4)
