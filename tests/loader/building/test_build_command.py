"""`fi-ffi build`: what the command hands on, what it prints, and its exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from fi_ffi.cli import build as command
from fi_ffi_build.build import Available
from fi_ffi_build.environment import Progress


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the command asked the loader to build."""
    seen: list[dict[str, Any]] = []

    def build(modules: list[str], **settings: Any) -> Path:
        seen.append({"modules": modules, **settings})
        report = settings["report"]
        if report is not None:
            report(Progress("prepare", "making ready"))
            for done in range(4):
                report(Progress("compile", "page", done, 3))
        return Path("a.whl")

    entries = [Available("page", "module", 2), Available("x", "unavailable", note="why")]
    monkeypatch.setattr(command, "build_wheel", build)
    monkeypatch.setattr(command, "available", lambda **settings: entries)
    return seen


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(command.build, arguments, catch_exceptions=False)


def test_options_reach_the_build(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    result = _run(
        "norm", "batch_prefill", "--dtype", "bf16", "--backend", "fa2", "--backend", "fa3",
        "--arch", "9.0a", "--arch", "8.7", "--output", str(tmp_path), "--jobs", "3",
    )  # fmt: skip
    assert result.exit_code == 0
    (call,) = calls
    assert call["modules"] == [
        "norm",
        "batch_prefill:dtype=bf16,backend=fa2",
        "batch_prefill:dtype=bf16,backend=fa3",
    ]
    assert (call["arch"], call["jobs"], call["output"]) == (("8.7", "9.0a"), 3, tmp_path)


@pytest.mark.parametrize("gpu", ["8.7", "87", "sm_87", "sm87"])
@pytest.mark.parametrize("option", ["--arch", "--sm"])
def test_a_gpu_is_named_in_any_way(calls: list[dict[str, Any]], option: str, gpu: str) -> None:
    assert _run("norm", option, gpu).exit_code == 0
    assert calls[0]["arch"] == ("8.7",)


def test_progress_goes_to_stderr_and_the_wheel_to_stdout(calls: list[dict[str, Any]]) -> None:
    result = _run("page")
    assert result.stdout == "a.whl\n"
    assert result.stderr == (
        "making ready\n"
        "compiling page: 0/3 in 0:00\n"
        "compiling page: 3/3 in 0:00, about 0:00 left\n"
        "fi_ffi finds it there\n"
    )
    assert _run("page", "--quiet").stderr == ""


def test_json_and_lists(calls: list[dict[str, Any]]) -> None:
    built = json.loads(_run("page", "--json").stdout)
    assert built["wheel"] == "a.whl"
    assert built["modules"] == ["page"]
    listed = json.loads(_run("--list", "--json").stdout)
    assert listed["modules"] == [{"name": "page", "sources": 2}]
    assert listed["unavailable"] == {"x": "why"}
    assert "single_decode" in [family["name"] for family in listed["families"]]
    lines = _run("--list").stdout.splitlines()
    assert "     2  page" in lines and "  not here: x: why" in lines
    assert [call["modules"] for call in calls] == [["page"]]


def test_no_name_is_an_error_of_usage(calls: list[dict[str, Any]]) -> None:
    result = _run()
    assert result.exit_code == 2
    assert "name what to build, or use --list" in result.stderr


def test_an_interruption_says_that_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(modules: list[str], **settings: Any) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "build_wheel", build)
    result = _run("page")
    assert result.exit_code == 130
    assert "The same command continues from here" in result.stderr
