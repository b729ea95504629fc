"""The record of what modules export, against FlashInfer's own generators and sources."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest

from fi_ffi.loader.lock import the_lock
from fi_ffi.loader.sources import Source, read
from tools.entries import entries_of

from tests.helpers.compiler import why_not_build

ROOT = Path(__file__).resolve().parent.parent.parent
DEFAULT = the_lock().default_release


def test_the_records_are_what_the_generators_say(tmp_path):
    """Every module's sources, read again: needs nvcc and a C++ compiler."""
    reason = why_not_build()
    if reason is not None:
        pytest.skip(f"{reason}, so FlashInfer's generators cannot be asked")
    tool = ROOT / "tools" / "record_entries.py"
    command = [sys.executable, str(tool), "--check", "--build-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# Macros that the generators set, of the bindings that depend on any.
_SET = {"ENABLE_BF16": "1", "ENABLE_FP8": "1", "ENABLE_FP4": "1", "CUDA_VERSION": "13000"}
# Not written for one module alone: what is added to them depends on the module.
_ADDED = ("ADDITIONAL_FUNC_PARAMS", "MLA_WRAPPER")


def test_the_bindings_in_the_wheel_are_what_is_recorded(sources):
    """Without a compiler: the bindings that no generator changes."""
    compared = 0
    for group in entries_of(DEFAULT):
        texts = {}
        for path in group.sources:
            if not path.startswith("made: "):
                texts[path] = sources(DEFAULT, path)
        if len(texts) < len(group.sources) or any(w in t for t in texts.values() for w in _ADDED):
            continue

        @functools.cache
        def include(path: str, name: str) -> str | None:
            for folder in ("include", "csrc"):
                try:
                    return sources(DEFAULT, f"{folder}/{name}")
                except KeyError:
                    pass
            return None

        given = [Source(path, text, _SET) for path, text in texts.items()]
        found = read(given, include, is_switch=lambda macro: not macro.startswith("_"))
        assert {n: (f.signature, f.names) for n, f in found.exports.items()} == {
            n: (e.signature, e.names) for n, e in group.entries.items()
        }
        methods = {n: f.signature for kind in found.objects.values() for n, f in kind.items()}
        recorded = {n: e.signature for kind in group.objects.values() for n, e in kind.items()}
        assert methods == recorded
        compared += len(found.exports)
    assert compared > 120
