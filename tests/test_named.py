"""What the pages name in a span of code is there: commands, their options, functions, extras."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import fi_ffi
from fi_ffi.cli import main

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from tests.helpers.blocks import PAGES, ROOT, blocks_of, parsed, shown

ADDED = "fi_ffi.mhc_post"  # by who follows docs/adding-an-op.md


def spans(page: Path) -> list[str]:
    tokens = parsed(page.read_text())
    inside = [child for token in tokens for child in token.children or ()]
    return [child.content for child in inside if child.type == "code_inline"]


def commands(page: Path) -> list[str]:
    """The lines that call fi-ffi: in spans of code, and in blocks that a shell runs."""
    shell = [block.code.replace("\\\n", " ") for block in blocks_of(page) if block.language == "sh"]
    parts = re.split(r"&&|\|\||[|;\n]", "\n".join(shell))
    lines = spans(page) + [part.strip() for part in parts]
    return [line for line in lines if re.match(r"(\w+=\S* )*fi-ffi( |$)", line)]


def check_command(line: str) -> None:
    """Its names and options are those of the click command; `a|b` stands for either."""
    command: click.Command = main
    words = shlex.split(line.replace("…", "..."), comments=True)
    words = words[words.index("fi-ffi") + 1 :]
    context = click.Context(main)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        names = words.pop(0).split("|")
        if names == ["..."]:
            return
        found = [command.get_command(context, name) for name in names]
        assert all(found), f"`{line}`: no command {names}"
        command = found[0]
    options = {"--help", "-h"}
    for parameter in command.params:
        options |= {*parameter.opts, *parameter.secondary_opts}
    given = {word.partition("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)}
    assert given <= options, f"`{line}`: no option {sorted(given - options)}"


def test_commands_exist():
    lines = {line for page in PAGES for line in commands(page)}
    assert len(lines) > 20
    for line in lines:
        check_command(line)


@pytest.mark.parametrize("line", ["fi-ffi demos", "fi-ffi cache list|lose", "fi-ffi demo --no"])
def test_a_command_that_is_not_there_is_noticed(line):
    with pytest.raises(AssertionError, match="no (command|option)"):
        check_command(line)


def leaves(command: click.Command) -> Iterator[click.Command]:
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from leaves(command.get_command(context, name))
    else:
        yield command


def test_every_command_takes_json():
    for command in leaves(main):
        assert any("--json" in parameter.opts for parameter in command.params), command.name
    assert "Each takes `--json`." in (ROOT / "README.md").read_text()
    shown = CliRunner().invoke(main, ["--help"]).output
    assert all(f"  {name} " in shown for name in main.list_commands(click.Context(main)))


def lost(span: str) -> str:
    """The first part of `fi_ffi.a.b` that is not there; names in capitals stand for others."""
    dotted = re.match(r"fi_ffi((?:\.[A-Za-z_]\w*)+)", span)
    if dotted is None or dotted[0] == ADDED or re.search(r"\.[A-Z_]+$", dotted[0]):
        return ""
    found, path = fi_ffi, "fi_ffi"
    for part in dotted[1][1:].split("."):
        path += f".{part}"
        try:
            found = getattr(found, part) if hasattr(found, part) else importlib.import_module(path)
        except ImportError:
            return path
    return ""


def test_names_exist():
    assert lost("fi_ffi.rmsnorms(x)") == "fi_ffi.rmsnorms"
    assert not lost("fi_ffi.rmsnorm.prepare(out)")
    for page in PAGES:
        assert not [span for span in spans(page) if lost(span)], shown(page)


def test_extras_exist():
    made = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras, named = {*made["project"]["optional-dependencies"]}, set()
    for page in PAGES:
        text = page.read_text()
        for names in re.findall(r"(?:fi-ffi|\.)\[([^\]\s]+)\](?=['\"`])", text):
            assert set(names.split(",")) <= extras, f"{shown(page)}: {names}"
            named |= set(names.split(","))
    assert {"cu12", "llm-gpu", "nccl", "test"} <= named
