"""Keeping `wheels.lock`: adding files to it, pinning RECORDs, comparing it with servers.

Comments and order of the file stay as they are.
"""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote, urlsplit
from urllib.request import url2pathname

from fi_ffi.errors import ArgumentError, ArtifactError, FetchError, LoaderError
from fi_ffi.loader import cache, lockedit
from fi_ffi.loader.download import Reporter, fetch_file
from fi_ffi.loader.http import Client
from fi_ffi.loader.index import resolve
from fi_ffi.loader.lock import IndexFile, KernelFile, Lock, read_lock
from fi_ffi.loader.ranges import NoRanges, RemotePieces
from fi_ffi.loader.remote import RemoteWheel
from fi_ffi.loader.urls import is_file_url, redact
from fi_ffi.loader.wheel import Trust, Wheel

Entry = IndexFile | KernelFile
Verdict = Literal["ok", "wrong", "not pinned", "not checked"]

_PROJECT = re.compile(r"flashinfer_jit_cache(?:_(?P<sm>sm\d+[af]?))?")
_LOCAL = re.compile(r"(?P<cuda>cu\d+)(?:\.(?P<sm>sm\d+[af]?))?(?:\.sm\d+[af]?)*")


@dataclass(frozen=True)
class Added:
    """What `add` did: the entry's keys and values, and whether it was there before."""

    entry: dict[str, Any]
    updated: bool


@dataclass(frozen=True)
class Checked:
    """An entry compared with what its address has; `note` says why where it is not "ok"."""

    file: str
    url: str
    status: Literal["ok", "fail", "unreachable"]
    size: Verdict = "not checked"
    record: Verdict = "not checked"
    sha256: Verdict = "not checked"
    note: str = ""


@dataclass(frozen=True)
class Pinned:
    """A RECORD's sha256, now in the lock, and what vouches for it."""

    file: str
    record_sha256: str
    trust: Trust
    changed: bool


def describe(name: str) -> dict[str, str]:
    """What a kernel wheel's name tells: release, cuda, platform, layout, sm."""
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    try:
        _, version, _, tags = parse_wheel_filename(name)
    except InvalidWheelFilename as error:
        raise ArgumentError("lock add", "FILE", got=name, expected="a wheel's name") from error
    found = {"release": version.public}
    project = _PROJECT.fullmatch(name.partition("-")[0])
    local = _LOCAL.fullmatch(version.local or "")
    platforms = {tag.platform for tag in tags}
    machines = {match[1] for p in platforms if (match := re.search(r"linux(?:_\d+)*_(\w+)", p))}
    if len(machines) == 1:
        found["platform"] = f"linux-{machines.pop()}"
    if project:
        found["layout"] = "provider" if project["sm"] else "monolithic"
    several = (version.local or "").count(".sm") > 1
    sm = (project and project["sm"]) or (local and not several and local["sm"])
    if local:
        found["cuda"] = local["cuda"]
    if sm:
        found["sm"] = sm
    return found


def add(
    path: Path,
    source: str,
    given: dict[str, str],
    *,
    url: str | None = None,
    report: Reporter | None = None,
) -> Added:
    """Hash the wheel at a path or address, and enter it into the lock at `path`.

    `given` are keys that win over what the name tells.  A file that is there already,
    with the same sha256, gets what its entry lacks.
    """
    where, sha256, address = _take(source, report)
    wheel = Wheel(where)
    found: dict[str, Any] = describe(where.name) | given
    missing = {"release", "cuda", "platform", "layout"} - found.keys()
    if missing:
        options = " ".join(f"--{key}" for key in sorted(missing))
        raise ArgumentError(
            "lock add", options, got="nothing", expected="values: the name has none"
        )
    keys = ("release", "cuda", "platform", "layout", "sm")
    entry = {key: found[key] for key in keys if key in found} | {
        "file": where.name,
        "sha256": sha256,
        "size": where.stat().st_size,
        "record-sha256": wheel.record_sha256,
        "provenance": found.get("provenance") or f"hashed here, {_today()}",
    }
    lock = read_lock(path)
    _choose_url(path, entry, where, url or address)
    same = next((file for file in lock.kernels if file.file == where.name), None)
    if same is None:
        lockedit.append_kernels(path, entry)
        return Added(entry, False)
    if same.sha256 != sha256:
        raise ArtifactError(
            f"{where.name} is pinned with sha256 {same.sha256}, and this file has {sha256}"
        )
    old = same.provenance.replace("not verified here", f"verified here, {_today()}")
    entry["provenance"] = found.get("provenance") or old
    lockedit.update(path, where.name, entry)
    return Added(entry, True)


def _take(source: str, report: Reporter | None) -> tuple[Path, str, str | None]:
    """The file, its sha256, and its address if it has one."""
    if "://" in source and not is_file_url(source):
        if "@" in urlsplit(source).netloc:
            raise ArgumentError(
                "lock add", "URL", got=redact(source), expected="no password: ~/.netrc may hold it"
            )
        name = unquote(urlsplit(source).path.rpartition("/")[2])
        done = fetch_file(source, name, sha256=None, report=report)
        return done.path, done.sha256, source
    path = Path(url2pathname(urlsplit(source).path) if is_file_url(source) else source)
    try:
        with path.open("rb") as file:
            return path, cache.hash_of(file), None
    except OSError as error:
        raise LoaderError(f"{path} cannot be read: {error.strerror}") from error


def _choose_url(path: Path, entry: dict[str, Any], file: Path, url: str | None) -> None:
    """Enter an address where it is not the one that the lock's pattern gives."""
    pattern = lockedit.load(path)["kernels"]["url"]
    usual = pattern.format(release=entry["release"], file=quote(entry["file"]))
    local = entry["file"].split("-")[1].partition("+")[2]
    if url is None and not re.fullmatch(r"(cu\d+)?", local):
        url = file.resolve().as_uri()  # of no published name: built, and so nowhere else
    if url is not None and unquote(url) != unquote(usual):
        entry["url"] = url


def _today() -> str:
    return datetime.date.today().isoformat()


def entries(lock: Lock, names: Sequence[str], *, platform: str | None = None) -> list[Entry]:
    """The entries of those files, addresses, projects or releases; all without names."""
    every: list[Entry] = [*lock.libtvm_ffi.files.values(), *lock.kernels]
    if not names:
        return [entry for entry in every if platform in (None, entry.platform)]
    chosen: list[Entry] = []
    for name in names:
        found = [entry for entry in every if name in _names(entry)]
        if not found:
            files = ", ".join(entry.file for entry in every)
            raise ArgumentError("lock", "NAME", got=name, expected=f"one of {files}")
        chosen += [entry for entry in found if entry not in chosen]
    return chosen


def _names(entry: Entry) -> tuple[str, ...]:
    if isinstance(entry, IndexFile):
        return entry.file, entry.project
    return entry.file, entry.url, unquote(entry.url), entry.release


def verify(entry: Entry, *, full: bool = False, report: Reporter | None = None) -> Checked:
    """Compare an entry with what its address has now, as far as it is pinned."""
    found: dict[str, Any] = {"file": entry.file, "url": ""}
    try:
        url = resolve(entry) if isinstance(entry, IndexFile) else entry.url
        found["url"] = redact(url)
        client = Client()
        size = _size(url, client)
        found["size"] = _compare(size, entry.size)
        with contextlib.suppress(NoRanges):
            record = RemoteWheel(url, client=client, verify="record").record_sha256
            found["record"] = _compare(record, entry.record_sha256)
        if full:
            found["sha256"] = "wrong"
            _whole(url, entry, client, report)
            found["sha256"] = "ok"
    except ArtifactError as error:
        return Checked(**found, status="fail", note=str(error))
    except FetchError as error:
        return Checked(**found, status="unreachable", note=str(error))
    wrong = [key for key in ("size", "record") if found.get(key) == "wrong"]
    note = f"the address has another {' and '.join(wrong)}" if wrong else ""
    return Checked(**found, status="fail" if wrong else "ok", note=note)


def _compare(found: object, pinned: object) -> Verdict:
    if pinned is None or found is None:
        return "not pinned" if pinned is None else "not checked"
    return "ok" if found == pinned else "wrong"


def _size(url: str, client: Client) -> int | None:
    if is_file_url(url):
        path = Path(url2pathname(urlsplit(url).path))
        if not path.is_file():
            raise FetchError(f"{path}: there is no such file")
        return path.stat().st_size
    with contextlib.suppress(NoRanges):
        return RemotePieces(url, client).size()
    return None


def _whole(url: str, entry: Entry, client: Client, report: Reporter | None) -> None:
    if is_file_url(url):
        Wheel(Path(url2pathname(urlsplit(url).path)), sha256=entry.sha256)
    else:
        pins = {"sha256": entry.sha256, "size": entry.size}
        fetch_file(url, entry.file, client=client, report=report, **pins)  # type: ignore[arg-type]


def pin_record(path: Path, entry: Entry) -> Pinned:
    """Enter the sha256 of an entry's RECORD into the lock at `path`.

    It is taken from the file in the cache, where its sha256 was verified, else from
    what the server sends now.
    """
    whole = cache.find(entry.sha256, entry.file)
    if whole is not None:
        record, trust = Wheel(whole).record_sha256, "file-verified"
    else:
        url = resolve(entry) if isinstance(entry, IndexFile) else entry.url
        record, trust = (
            RemoteWheel(url, size=entry.size, verify="record").record_sha256,
            "record-unpinned",
        )
    if entry.record_sha256 not in (None, record):
        raise ArtifactError(
            f"{entry.file}: RECORD has sha256 {record}, pinned is {entry.record_sha256}"
        )
    if entry.record_sha256 is None:
        lockedit.update(path, entry.file, {"record-sha256": record})
    return Pinned(entry.file, record, trust, entry.record_sha256 is None)  # type: ignore[arg-type]
