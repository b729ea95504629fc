"""Write fi_ffi/abi/_cffi.py from fi_ffi/abi/declarations.h; `--check` only compares."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import cffi

ABI = Path(__file__).resolve().parent.parent / "fi_ffi" / "abi"


def generated() -> str:
    ffi = cffi.FFI()
    ffi.cdef((ABI / "declarations.h").read_text())
    ffi.set_source("fi_ffi.abi._cffi", None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "_cffi.py"
        ffi.emit_python_code(str(path))
        return path.read_text()


def main() -> int:
    target, text = ABI / "_cffi.py", generated()
    if "--check" in sys.argv[1:]:
        if target.read_text() != text:
            print("fi_ffi/abi/_cffi.py is stale: run python tools/generate_cffi.py")
            return 1
        return 0
    target.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
