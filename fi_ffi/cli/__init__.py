"""The `fi-ffi` command.

Each subcommand is a module of its own, imported when it is the one that runs.
"""

from __future__ import annotations

import importlib
import os
import sys

import click

from fi_ffi import __version__
from fi_ffi.errors import FiFfiError
from fi_ffi.loader.cache import PARANOID

_COMMANDS = {
    "build": "Build kernel modules from FlashInfer's sources into a wheel.",
    "cache": "List, prune and verify the cache.",
    "demo": "Run the ops on what this machine has, and check every result.",
    "doctor": "Look at everything a call needs, and say what to do about it.",
    "fetch": "Put modules into the cache, of an image or a machine without a GPU.",
    "inspect": "Show a kernel file's functions, architectures and needs.",
    "list": "List kernel modules and what they serve.",
    "lock": "Keep wheels.lock: add files, verify them, pin their RECORDs.",
    "release": "Compare the sources of FlashInfer releases, and record what they have.",
    "replay": "Make a dumped call again and compare its results.",
}


INTERRUPTED = 130  # 128 + SIGINT, as a shell has it


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"fi_ffi.cli.{cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # From the table: `--help` should not import every subcommand.
        with formatter.section("Commands"):
            formatter.write_dl([*_COMMANDS.items()])  # `list` may be the subcommand

    def invoke(self, ctx: click.Context) -> object:
        # Only here: `--help` should not import what prints tables.
        from fi_ffi.cli.output import Failure

        try:
            return super().invoke(ctx)
        except FiFfiError as error:
            raise Failure(str(error)) from error
        except KeyboardInterrupt:  # click's own way is to exit with 1, as if something failed
            click.echo("Interrupted.", err=True)
            sys.exit(INTERRUPTED)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fi-ffi")
@click.option("--paranoid", is_flag=True, help="Hash cached files again, and ask them again.")
def main(paranoid: bool) -> None:
    """FlashInfer's CUDA kernels without torch and without a compiler."""
    if paranoid:
        os.environ[PARANOID] = "1"
