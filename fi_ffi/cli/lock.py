"""`fi-ffi lock verify`: compares wheels.lock with the files at its addresses."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import click

from fi_ffi.cli import NearNames
from fi_ffi.cli.output import print_json, print_table
from fi_ffi.errors import ArgumentError, ArtifactError, FetchError
from fi_ffi.loader.download import Reporter, fetch_file
from fi_ffi.loader.http import Client
from fi_ffi.loader.lock import Lock, PinnedWheel, lock_path, read_lock, this_platform
from fi_ffi.loader.progress import counter, reporter
from fi_ffi.loader.ranges import NoRanges, RemotePieces
from fi_ffi.loader.remote import RemoteWheel
from fi_ffi.loader.urls import is_file_url, redact
from fi_ffi.loader.wheel import Wheel

Verdict = Literal["ok", "wrong", "not pinned", "not checked"]


@dataclass(frozen=True)
class Checked:
    """The result of checking one entry; `note` says why `status` is not "ok"."""

    file: str
    url: str
    status: Literal["ok", "fail", "unreachable", "not checked"]
    size: Verdict = "not checked"
    record: Verdict = "not checked"
    sha256: Verdict = "not checked"
    note: str = ""


@click.group(cls=NearNames)
def lock() -> None:
    """Check wheels.lock, which pins every file that may be fetched.

    FI_FFI_LOCK names another lock than the package's.
    """


@lock.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--all", "everything", is_flag=True, help="Check the entries of every platform.")
@click.option("--full", is_flag=True, help="Fetch the files whole and check their sha256.")
@click.option("--quiet", "-q", is_flag=True, help="Show no progress.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option(
    "--lock",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The lock (default: the one in use).",
)
def verify(
    names: tuple[str, ...],
    everything: bool,
    full: bool,
    path: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare entries with the files at their addresses.

    A NAME is a file, an address or a release; the default is every entry for this platform.
    Sizes are compared, and RECORDs if the server supports ranges. Exits with 1 if anything
    differs or could not be checked.
    """
    where = path or lock_path()
    platform = None if everything else this_platform()
    chosen = entries(read_lock(where), names, platform=platform)
    done = []
    with counter("entries", len(chosen), quiet) as count:
        for entry in chosen:
            count(entry.file)
            with reporter(quiet or not full) as report:
                done.append(check(entry, full=full, report=report))
    if as_json:
        print_json({"lock": str(where), "files": [asdict(each) for each in done]})
    else:
        rows = [(d.file, d.status, d.size, d.record, d.sha256, d.note) for d in done]
        columns = ("file", "status", "size", "RECORD", "sha256", "note")
        print_table(f"{where}", columns, rows)
    if any(d.status != "ok" for d in done):
        sys.exit(1)


def entries(lock: Lock, names: Sequence[str], *, platform: str | None = None) -> list[PinnedWheel]:
    """Return the entries of these files, addresses or releases; by default the platform's."""
    if not names:
        return [entry for entry in lock.kernels if platform in (None, entry.platform)]
    chosen: list[PinnedWheel] = []
    for name in names:
        found = [e for e in lock.kernels if name in (e.file, e.url, unquote(e.url), e.release)]
        if not found:
            files = ", ".join(entry.file for entry in lock.kernels)
            got = redact(name) if "@" in name or "://" in name else name
            raise ArgumentError("lock", "NAME", got=got, expected=f"one of {files or 'none'}")
        chosen += [entry for entry in found if entry not in chosen]
    return chosen


def check(entry: PinnedWheel, *, full: bool = False, report: Reporter | None = None) -> Checked:
    """Compare an entry's pins with the file at its address."""
    found: dict[str, Any] = {"file": entry.file, "url": redact(entry.url)}
    note = ""
    try:
        client = Client()
        try:
            found["size"] = _compare(_size(entry.url, client), entry.size)
            record = RemoteWheel(entry.url, client=client, verify="record").record_sha256
            found["record"] = _compare(record, entry.record_sha256)
        except NoRanges:
            note = "the server has no ranges: `--full` fetches the whole file"
        if full:
            found["sha256"] = "wrong"
            _whole(entry, client, report)
            found["sha256"], note = "ok", ""
    except ArtifactError as error:
        return Checked(**found, status="fail", note=str(error))
    except FetchError as error:
        return Checked(**found, status="unreachable", note=str(error))
    wrong = [key for key in ("size", "record") if found.get(key) == "wrong"]
    if wrong:
        note = f"the address has another {' and '.join(wrong)}"
        return Checked(**found, status="fail", note=note)
    return Checked(**found, status="not checked" if note else "ok", note=note)


def _compare(found: object, pinned: object) -> Verdict:
    if pinned is None:
        return "not pinned"
    return "ok" if found == pinned else "wrong"


def _size(url: str, client: Client) -> int:
    if is_file_url(url):
        path = Path(url2pathname(urlsplit(url).path))
        if not path.is_file():
            raise FetchError(f"{path}: there is no such file")
        return path.stat().st_size
    return RemotePieces(url, client).size()


def _whole(entry: PinnedWheel, client: Client, report: Reporter | None) -> None:
    if is_file_url(entry.url):
        Wheel(Path(url2pathname(urlsplit(entry.url).path)), sha256=entry.sha256)
        return
    pins = {"sha256": entry.sha256, "size": entry.size}
    fetch_file(entry.url, entry.file, client=client, report=report, **pins)  # type: ignore[arg-type]
