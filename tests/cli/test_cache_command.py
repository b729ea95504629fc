"""`fi-ffi cache`: what it prints, what it removes, and its exit status."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from filelock import FileLock

from fi_ffi.cli import main
from fi_ffi.errors import ArtifactError, LoaderError
from fi_ffi.loader import cache, trust

from tests.helpers.forking import in_child

DAY = 86400
OTHER_KINDS = {"1": "pipe", "2": "link", "3": "folder", "4": "another's"}


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FI_FFI_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["cache", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def document(*arguments: object, code: int = 0) -> Any:
    return json.loads(run(*arguments, "--json", code=code).stdout)


def names(items: list[dict[str, Any]]) -> list[str]:
    return [item["name"] for item in items]


def store(content: bytes, name: str, days: float = 0) -> Path:
    """A cached file that was last used some days ago."""
    path = cache.store([content], hashlib.sha256(content).hexdigest(), name, "a test")
    then = time.time() - days * DAY
    os.utime(cache.stamp_path(path), (then, then))
    return path


def build_folder(root: Path, name: str, days: float = 0) -> Path:
    folder = root / "build" / name
    folder.mkdir(parents=True)
    if name.startswith("env-"):
        locks = folder.with_name(name + ".json.lock")
        folder.with_name(name + ".json").write_text("{}")
    else:
        locks = folder / ".lock"
    locks.touch()
    (folder / "object.o").write_bytes(b"o" * 1000)
    for path in (folder / "object.o", locks):
        then = time.time() - days * DAY
        os.utime(path, (then, then))
    return folder


def leave_a_temporary(root: Path) -> None:
    def victim() -> None:
        with cache.temporary() as new:
            os.write(new.fd, b"half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(victim) == -signal.SIGKILL


def test_an_empty_cache(root: Path) -> None:
    groups = {name: [] for name in ("objects", "wheels", "builds", "downloads", "leftovers")}
    assert document("list") == {"root": str(root), **groups, "total": 0}
    assert f"0 files in {root}" in run("list").output
    assert document("prune", "--all")["freed"] == 0
    assert document("verify")["verified"] == 0
    assert not root.exists()


def test_names_of_commands_hide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cache` and `list` are modules of the package, too, once they are imported."""
    monkeypatch.setenv("FI_FFI_PARANOID", "0")
    for arguments in (["--paranoid", "cache", "verify"], ["list", "--help"], ["--help"]):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.exception


def test_list(root: Path) -> None:
    path = store(b"norm" * 1000, "norm.so", days=3)
    store(b"page", "page.so")
    build_folder(root, "0.6.13-9.0a")
    leave_a_temporary(root)
    found = document("list")
    assert names(found["objects"]) == ["norm.so", "page.so"]
    norm = found["objects"][0]
    assert (norm["size"], norm["sha256"], norm["path"]) == (4000, path.parent.name, str(path))
    used = time.strftime("%Y-%m-%d", time.gmtime(time.time() - 3 * DAY))
    assert norm["last_use"].startswith(used)
    assert names(found["builds"]) == ["0.6.13-9.0a"]
    assert found["builds"][0]["size"] == 1000
    assert [item["size"] for item in found["leftovers"]] == [4]
    files = [p for p in root.rglob("*") if p.is_file()]
    assert found["total"] == sum(p.stat().st_size for p in files) > 5004
    text = run("list").output
    for part in ("norm.so", "4,000", path.parent.name[:12], "0.6.13-9.0a", "1 leftover of"):
        assert part in text
    assert f"total: {found['total']:,} bytes" in text


def test_wheels_are_listed_and_stay(root: Path) -> None:
    name = "flashinfer_jit_cache-0.6.13+cu130.sm90a-cp39-abi3-linux_x86_64.whl"
    store(b"norm", "norm.so")
    (root / "wheels").mkdir()
    (root / "wheels" / name).write_bytes(b"w" * 1234)
    (root / "wheels" / "notes.txt").write_text("mine")
    found = document("list")["wheels"]
    assert [(item["name"], item["size"]) for item in found] == [(name, 1234)]
    text = run("list").output
    assert name in text.replace("\n", "") and "1,234" in text and "notes.txt" not in text
    removed = document("prune", "--all")["removed"]
    assert names(removed) == ["norm.so"] and (root / "wheels" / name).exists()


def test_plain_prune_removes_only_what_killed_processes_left(root: Path) -> None:
    path = store(b"norm", "norm.so", days=400)
    gone = store(b"gone", "gone.so")
    gone.unlink()
    leave_a_temporary(root)
    found = document("prune")
    assert [item["kind"] for item in found["removed"]] == ["leftover"] * 2
    assert path.exists()
    assert not gone.parent.exists()
    assert list((root / "tmp").iterdir()) == []


def test_prune_by_age(root: Path) -> None:
    old, new = store(b"old", "old.so", days=31), store(b"new", "new.so", days=29)
    build_folder(root, "old-build", days=31)
    build_folder(root, "env-old", days=31)
    build_folder(root, "new-build", days=29)
    shown = document("prune", "--older-than", 30, "--dry-run")
    assert old.exists()
    found = document("prune", "--older-than", 30)
    assert shown == found | {"dry_run": True}
    assert names(found["removed"]) == ["old.so", "env-old", "old-build"]
    assert found["freed"] == 2003
    assert not old.parent.parent.exists()
    assert new.exists()
    assert sorted(p.name for p in (root / "build").iterdir()) == ["env-old.json.lock", "new-build"]
    # A use makes a file young.
    used = store(b"old", "old.so", days=31)
    assert cache.find(used.parent.name, "old.so") == used
    assert document("prune", "--older-than", 30)["removed"] == []
    assert document("prune", "--older-than", 0)["freed"] > 6


def test_prune_builds(root: Path) -> None:
    path = store(b"norm", "norm.so")
    build_folder(root, "0.6.13-9.0a")
    (root / "build" / "not-a-build").mkdir()
    assert names(document("prune", "--builds")["removed"]) == ["0.6.13-9.0a"]
    assert path.exists()
    assert [p.name for p in (root / "build").iterdir()] == ["not-a-build"]


def test_a_running_build_is_left_alone(root: Path) -> None:
    running = build_folder(root, "0.6.13-9.0a")
    build_folder(root, "env-0.6.13", days=40)
    with FileLock(running / ".lock"):
        found = document("prune", "--all", code=1)
        assert {item["reason"] for item in found["kept"]} == {"a build is running"}
        # An environment has no lock of its own while compilers run.
        assert names(document("prune", "--older-than", 30, code=1)["kept"]) == ["env-0.6.13"]
        result = run("prune", "--builds", code=1)
        assert "kept build 0.6.13-9.0a: a build is running" in result.stderr
    assert running.exists()
    assert len(document("prune", "--builds")["removed"]) == 2
    assert "exclude each other" in run("prune", "--all", "--builds", code=2).output


def test_prune_all_leaves_what_is_not_the_caches(root: Path) -> None:
    store(b"norm", "norm.so")
    build_folder(root, "0.6.13-9.0a")
    of_file = f"{'ab' * 32}.json"
    facts, index = root / "facts" / "ab" / of_file, root / "indexes" / of_file
    kept = [
        *(root / "wheels" / "a.whl", root / "objects" / "README", root / "notes.txt"),
        *(root / "downloads" / name for name in ("film.part", f"{'AB' * 32}.part", "ab.lock")),
        *(root / "facts" / "ab" / "mine.json", root / "indexes" / "mine.json"),
    ]
    for path, text in [(facts, "{}"), (index, "{}"), *((path, "mine") for path in kept)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    others = {kind: root / "downloads" / f"{key * 64}.part" for key, kind in OTHER_KINDS.items()}
    for kind, path in others.items():
        if kind == "another's" and os.geteuid() == 0:
            path.touch()
            os.chown(path, 54321, -1)
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "link":
            path.symlink_to(kept[2])
        elif kind == "folder":
            path.mkdir()
    text = run("prune", "--all", "--dry-run").output
    assert "would remove object norm.so (4 bytes)" in text
    assert "1,008 bytes would be freed" in text
    assert facts.exists()
    assert "1,008 bytes freed" in run("prune", "--all").output
    there = {path for path in others.values() if os.path.lexists(path)}
    assert {p for p in root.rglob("*") if p.is_file()} - there == {*kept}
    assert len(there) == 3 + (os.geteuid() == 0)


def test_unfinished_downloads(root: Path) -> None:
    folder = root / "downloads"
    folder.mkdir(parents=True)
    one, other = "a" * 64, "b" * 64
    for name in (f"{one}.part", f"{one}.lock", f"{other}.part"):
        (folder / name).write_bytes(b"12345")
    assert names(document("list")["downloads"]) == [f"{one}.part", f"{other}.part"]
    assert f"{other}.part" in run("list").output.replace("\n", "")
    assert document("prune")["removed"] == []
    with FileLock(folder / f"{one}.lock"):
        found = document("prune", "--all", code=1)
    assert names(found["removed"]) == [f"{other}.part"]
    assert [(item["name"], item["reason"]) for item in found["kept"]] == [
        (f"{one}.part", "it is being fetched")
    ]
    assert names(document("prune", "--older-than", 0)["removed"]) == [f"{one}.part"]
    assert {path.suffix for path in folder.iterdir()} <= {".lock"}


def test_verify_and_repair() -> None:
    good, bad = store(b"good", "good.so"), store(b"bad!", "bad.so")
    linked = store(b"link", "linked.so")
    linked.unlink()
    linked.symlink_to(good)
    assert "3 files hashed" in run("verify", code=1).output
    before = bad.stat()
    bad.chmod(0o644)
    bad.write_bytes(b"BAD!")
    os.utime(bad, ns=(before.st_atime_ns, before.st_mtime_ns))
    found = document("verify", code=1)
    assert (found["verified"], names(found["bad"])) == (3, ["bad.so", "linked.so"])
    assert found["bad"][0]["problem"].startswith("damaged")
    assert found["bad"][1]["problem"].startswith("refused")
    assert "still there; --repair removes it" in run("verify", code=1).output
    assert "2 bad" in run("verify", "--repair").output
    assert document("verify") == {"root": str(cache.cache_root()), "verified": 1, "bad": []}
    assert good.exists()
    assert not bad.exists()
    assert not linked.is_symlink()


@pytest.mark.parametrize("which", ["a.so", "b.so"])
def test_a_bad_file_that_stays_is_told(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of two it is; the other is removed."""
    files = {name: store(name.encode(), name) for name in ("a.so", "b.so", "good.so")}
    for name in ("a.so", "b.so"):
        files[name].chmod(0o644)
        files[name].write_bytes(b"bad")
    unlink = Path.unlink

    def refusing(self: Path, **options: bool) -> None:
        if self.name == which:
            raise PermissionError(13, "not yours")
        unlink(self, **options)

    monkeypatch.setattr(Path, "unlink", refusing)
    found = document("verify", "--repair", code=1)
    assert {each["name"]: each["removed"] for each in found["bad"]} == {
        "a.so": which != "a.so", "b.so": which != "b.so",
    }  # fmt: skip
    assert {name for name, path in files.items() if path.exists()} == {which, "good.so"}


def test_verify_and_prune_refuse_a_cache_of_everybodys(root: Path) -> None:
    store(b"good", "good.so")
    root.chmod(0o777)
    for command in (["verify"], ["prune", "--all"]):
        assert "can be written by every user" in run(*command, code=1).output
    assert document("list")["objects"]


def test_prune_refuses_a_cache_that_is_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`/objects` and `/tmp` are nobody's cache, and what a home directory holds is not fi_ffi's."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(home)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(Path, "unlink", None)
    for path in ("/", "//", "/tmp/.."):  # no command is tried there
        with pytest.raises(ArtifactError, match="directory of its own, such as /.*fi-ffi"):
            trust.check_root(Path(path))
    for path in (home, f"{home}/", tmp_path / "link", "~"):
        monkeypatch.setenv("FI_FFI_CACHE_DIR", str(path))
        for command in (["prune", "--all"], ["prune", "--builds"], ["verify", "--repair"]):
            assert "set FI_FFI_CACHE_DIR to a directory of its own" in run(*command, code=1).output
        with pytest.raises(LoaderError, match="directory of its own, such as /.*fi-ffi"):
            cache.store([b"norm"], hashlib.sha256(b"norm").hexdigest(), "norm.so", "a test")
    assert os.listdir(home) == []
