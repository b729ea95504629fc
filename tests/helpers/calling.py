"""Which entries of kernel modules the GPU tests have called, for docs/coverage.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fi_ffi.abi.function import Entry
from fi_ffi.capability.judgement import key_of
from fi_ffi.cli.cuda import gpus
from fi_ffi.loader import search
from fi_ffi.loader.distributions import split
from fi_ffi.module_names import parse
from fi_ffi.modules import files
from tools.entries import entries_of

# More arguments than these ask a function for its signature, and call nothing.
_MOST = 256


class Calls:
    """Notes every entry that returned without an error, of tests that passed: in a folder, a file
    for each release.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._now: set[str] = set()
        self._passed: set[str] = set()

    def watch(self) -> None:
        """Entries made from now on tell of their calls; a call's cost does not matter here."""
        made, now = Entry.__init__, self._now

        def init(entry: Entry, *args: Any, **kwargs: Any) -> None:
            made(entry, *args, **kwargs)
            raw = entry.address

            def address(handle: Any, packed: Any, count: int, result: Any) -> int:
                code: int = raw(handle, packed, count, result)
                if code == 0 and count < _MOST:
                    now.add(entry.name)
                return code

            entry.address = address

        Entry.__init__ = init  # type: ignore[method-assign]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = (yield).get_result()
        if call.when == "call":
            self._passed |= self._now if report.passed else set()
            self._now.clear()

    def pytest_sessionfinish(self) -> None:
        found = gpus()
        if not found or not self._passed:
            return
        release = search.release()
        path = self._folder / f"entries-called-{release}.json"
        before = json.loads(path.read_text()) if path.exists() else {"entries": {}}
        entries = {key: {*names} for key, names in before["entries"].items()}
        for key, symbol in by_family(self._passed, release):
            entries.setdefault(key, set()).add(symbol)
        record = {
            "device": found[0].name,
            "capability": [*found[0].capability],
            "release": release or "unknown",
            "cuda": search.cuda_of_kernels() or 13,
            "entries": {key: sorted(names) for key, names in sorted(entries.items())},
        }
        path.write_text(json.dumps(record, indent=1) + "\n")


def by_family(names: set[str], release: str | None) -> list[tuple[str, str]]:
    """Families and entries, of the names of entries: `module.symbol`, or a method's own."""
    record = entries_of(release) if release else None
    methods = {
        method: group.families[0]
        for group in record or ()
        for kind in group.objects.values()
        for method in kind
    }
    found = set()
    for name in names:
        module, _, symbol = name.rpartition(".")
        if split(module)[0]:  # another distribution's library, which is named with its version
            record = files.recorded(search.find_module(module)[1].sha256)
            found |= {(record["library"].replace(": ", "/"), symbol)} if record else set()
        elif parse(module) is not None:
            found.add(key_of(module, symbol))
        elif symbol in methods and not module.startswith(("fi_ffi", "ffi", "reference")):
            found.add((methods[symbol], symbol))
    return sorted(found)
