"""Two libraries of one length, and what of them is in this process."""

from __future__ import annotations

import os
import re
from pathlib import Path

_MAPS = Path("/proc/self/maps")


def _maps() -> str:
    """Other tests load files whose names are no UTF-8."""
    return _MAPS.read_text(errors="surrogateescape")


def library_bytes(mark: bytes) -> bytes:
    """A library that loads as often as one likes; `mark` makes it another file of one length."""
    found = re.search(r"/\S+/libm[.-]\S*", _maps())
    assert found, "this Python has no libm"
    return Path(found[0]).read_bytes() + mark.ljust(16, b"\0")


def in_memory(path: Path) -> bool:
    """Whether the file that the path leads to is mapped into this process."""
    status = os.stat(path)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    lines = [line.split(None, 5) for line in _maps().splitlines()]
    return any(line[3] == device and line[4] == str(status.st_ino) for line in lines)


def flip(path: Path, at: int = -1) -> None:
    """Change one byte of a file where it lies."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    mode = path.stat().st_mode
    path.chmod(0o600)
    path.write_bytes(content)
    path.chmod(mode & 0o7777)
