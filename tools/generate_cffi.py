"""Write fi_ffi/abi/_cffi.py from fi_ffi/abi/declarations.h; `--check` only compares."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import cffi
from generated import write_or_check

ABI = Path(__file__).resolve().parent.parent / "fi_ffi" / "abi"


def text() -> str:
    ffi = cffi.FFI()
    ffi.cdef((ABI / "declarations.h").read_text())
    ffi.set_source("fi_ffi.abi._cffi", None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "_cffi.py"
        ffi.emit_python_code(str(path))
        return path.read_text()


if __name__ == "__main__":
    sys.exit(write_or_check(ABI / "_cffi.py", text(), __file__))
