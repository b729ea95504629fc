"""What tells typed functions from packed ones: read out of the very file that was loaded."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from pathlib import Path

from fi_ffi.ops.modules.module import AtPath

from tests.helpers.stress_strength import scaled
from tests.stress.swapping import library_bytes

STATIC = b"_ZZ16__tvm_ffi_abcdefk\0"


def test_it_is_of_the_file_that_was_loaded(tmp_path: Path, tvm_ffi_loaded: object) -> None:
    path = tmp_path / "a.so"
    path.write_bytes(library_bytes(b"one") + STATIC)
    found = AtPath(path)
    new = tmp_path / "new.so"
    new.write_bytes(library_bytes(b"two") + b"Mismatched number of arguments when calling")
    os.replace(new, path)
    assert found._evidence == (False, {"abcdef"})


def test_an_interruption_while_it_is_read(tmp_path: Path, tvm_ffi_loaded: object) -> None:
    path = tmp_path / "many.so"
    path.write_bytes(library_bytes(os.urandom(8)) + STATIC * 300_000)
    found = AtPath(path)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    raised = []
    try:
        for _ in range(scaled(200, 20)):
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.005, 0.03))
            try:
                AtPath._evidence.func(found)
            except BaseException as error:
                raised.append(type(error))
            finally:
                with contextlib.suppress(KeyboardInterrupt):
                    signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert {*raised} == {KeyboardInterrupt}
