"""Calls after a good one, with which they have most in common: refused as by a row compiled anew.

The tests are those of test_refusals.py.  What a good call has left (a variant, a frame) must let
nothing through, and change no word.
"""

from __future__ import annotations

import contextlib
import inspect

import pytest

import fi_ffi
from fi_ffi.ops.functions import OPS

from ops import test_refusals as in_full
from prepared_calls import refusal_of, same_error


@pytest.fixture
def _after_a_good_call(monkeypatch):
    def refused(op, case, values, argument):
        good = in_full.described(case)
        with contextlib.suppress(fi_ffi.ArgumentError):  # some cases have no good call
            op(**good)
        error = call_refused(op, case, values, argument)
        with contextlib.suppress(fi_ffi.LoaderError):  # of a GPU that is not there
            expected = refusal_of(op.row, values)
            if expected is None:  # what packing does not look at
                assert error.argument == "stream"
            else:
                assert error.argument == "stream" or same_error(error, expected), (error, expected)
            try:
                op.prepare(**values)
            except fi_ffi.ArgumentError as told:
                # To prepare takes no stream: what else is wrong is told.
                assert expected is not None and same_error(told, expected)
            else:
                assert error.argument == "stream", "it can be prepared"
        return error

    for op in OPS.values():
        op.select_release("0.6.13")
    call_refused = in_full.call_refused
    monkeypatch.setattr(in_full, "call_refused", refused)
    yield
    for op in OPS.values():
        op.forget()
        op.select_release(None)


for _name, _test in inspect.getmembers(in_full, inspect.isfunction):
    # Those that a fixture can be asked for: hypothesis calls its own many times.
    if _name.startswith("test_") and not hasattr(_test, "hypothesis"):
        globals()[_name] = pytest.mark.usefixtures("_after_a_good_call")(_test)
