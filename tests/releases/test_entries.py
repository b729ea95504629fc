"""The record of what modules export, against FlashInfer's own generators and sources."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from fi_ffi.loader.fetch.wheels_lock import the_lock
from tools.entries import entries_of
from tools.release.command import main

from tests.helpers.compiler import why_not_build

ROOT = Path(__file__).resolve().parent.parent.parent
DEFAULT = the_lock().default_release


def test_the_records_are_what_the_generators_say(tmp_path):
    """Every module's sources, read again: needs nvcc and a C++ compiler."""
    reason = why_not_build()
    if reason is not None:
        pytest.skip(f"{reason}, so FlashInfer's generators cannot be asked")
    options = ["--modules", "--check", "--to", str(ROOT), "--build-dir", str(tmp_path)]
    done = CliRunner().invoke(main, ["record", DEFAULT, *options])
    assert done.exit_code == 0, done.output


def test_the_bindings_in_the_wheel_are_what_is_recorded(interface):
    """Without a compiler, and whatever variants the generators make of a binding."""
    found: dict[tuple[str, str], set[object]] = {}
    for key, functions in interface(DEFAULT).exports.items():
        known = found.setdefault((key.source, key.name), set())
        known |= {(function.signature, function.names) for function in functions}
    compared = 0
    for group in entries_of(DEFAULT):
        methods = {f"{kind}.{n}": e for kind, of in group.objects.items() for n, e in of.items()}
        recorded = {**group.entries, **methods}
        read = [found.get((source, name), set()) for source in group.sources for name in recorded]
        if any(source.startswith("made: ") for source in group.sources):
            continue
        assert len([*filter(None, read)]) == len(recorded), group.sources
        for name, entry in recorded.items():
            of_name = [found[source, name] for source in group.sources if (source, name) in found]
            assert (entry.signature, entry.names) in of_name[0], name
            compared += 1
    assert compared > 200
