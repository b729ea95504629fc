"""The `fi-ffi` command.

Each subcommand is a module, imported only if that subcommand runs.
"""

from __future__ import annotations

import importlib
import os

import click

from fi_ffi import __version__
from fi_ffi.cli.group import CommandGroup
from fi_ffi.loader.cache import PARANOID

_COMMANDS = {
    "build": "Build kernel modules from FlashInfer's sources into a wheel.",
    "cache": "List, prune and verify the cache.",
    "demo": "Call the main ops on this machine and check every result.",
    "doctor": "Check what calls need, and say how to get what is missing.",
    "fetch": "Put kernel modules into the cache; needs no GPU.",
    "inspect": "Show a kernel file's functions, GPU architectures and libraries.",
    "list": "List kernel modules and the ops that use them.",
    "lock": "Compare wheels.lock with the files at its addresses.",
    "replay": "Repeat a dumped call and compare its results.",
}
_ELSEWHERE = {
    "trace": "`FI_FFI_LOG_LEVEL=3 PROGRAM` logs a program's calls; "
    "`FI_FFI_DUMP_DIR=FOLDER PROGRAM` dumps them for `fi-ffi replay`",
    "version": "`fi-ffi --version` prints it",
    "info": "`fi-ffi doctor` shows what is installed",
    "download": "`fi-ffi fetch NAME...` puts modules into the cache",
    "install": "`fi-ffi fetch NAME...` puts modules into the cache; `fi-ffi build` builds them",
    "clean": "`fi-ffi cache prune` removes what is not needed",
    "release": "`python3 -m tools.release` in a checkout of fi_ffi compares FlashInfer's releases",
}
_ELSEWHERE["log"] = _ELSEWHERE["trace"]


class _Group(CommandGroup):
    elsewhere = _ELSEWHERE

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"fi_ffi.cli.{cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # From the table, so that `--help` imports no subcommand.
        with formatter.section("Commands"):
            formatter.write_dl([*_COMMANDS.items()])  # the name `list` may be the subcommand here


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fi-ffi")
@click.option(
    "--paranoid", is_flag=True, help="Check hash and signatures of cached files at each use."
)
def main(paranoid: bool) -> None:
    """FlashInfer's CUDA kernels without torch and without a compiler."""
    if paranoid:
        os.environ[PARANOID] = "1"
