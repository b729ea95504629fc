"""Notes: what was worked out once and is kept, as JSON, to save the time.

A note that is missing, damaged or somebody else's is worked out again; one that
cannot be written is no reason to fail.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from fi_ffi.errors import LoaderError
from fi_ffi.loader.caching import temporaries, trust

_MAX_FILE = 32 << 20  # bytes; twice what may be kept of a wheel's directory and RECORD


def read(root: Path, path: Path, form: int) -> Any:
    """What was written to `path`, below the cache's `root`, in this form; None otherwise.

    None too where another user could have written it.
    """
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        if not trust.folders_exist(root, path.parent):
            return None
        status = os.lstat(path)
        trust.check_object(path, status)
        if status.st_size <= _MAX_FILE:
            note = json.loads(path.read_bytes())
            return note["data"] if note["format"] == form else None
    return None


def write(root: Path, path: Path, form: int, data: Any) -> None:
    """Keep `data`; it appears whole or not at all."""
    with contextlib.suppress(OSError, LoaderError), temporaries.temporary(root) as new:
        for folder in reversed([p for p in path.parents if p.is_relative_to(root) and p != root]):
            temporaries.make_folder(folder)
        with open(new.fd, "w", closefd=False) as file:
            json.dump({"format": form, "data": data}, file)
        os.fsync(new.fd)
        os.fchmod(new.fd, 0o644)
        os.replace(new.path, path)
