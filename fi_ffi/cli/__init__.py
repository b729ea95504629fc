"""The `fi-ffi` command.

Each subcommand is a module, imported only if that subcommand runs.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import Any

import click

from fi_ffi import __version__
from fi_ffi.errors import ArgumentError, FiFfiError, nearest
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
    "release": "Compare and record the sources of FlashInfer releases.",
    "replay": "Repeat a dumped call and compare its results.",
}
# Words that users type instead of a command, and the hint for each.
_ELSEWHERE = {
    "trace": "`FI_FFI_LOG_LEVEL=3 PROGRAM` logs a program's calls; "
    "`FI_FFI_DUMP_DIR=FOLDER PROGRAM` dumps them for `fi-ffi replay`",
    "version": "`fi-ffi --version` prints it",
    "info": "`fi-ffi doctor` shows what is installed",
    "download": "`fi-ffi fetch NAME...` puts modules into the cache",
    "install": "`fi-ffi fetch NAME...` puts modules into the cache; `fi-ffi build` builds them",
    "clean": "`fi-ffi cache prune` removes what is not needed",
}
_ELSEWHERE["log"] = _ELSEWHERE["trace"]

INTERRUPTED = 130  # 128 + SIGINT, as in shells; docs/commands.md lists the other exit codes


class NearNames(click.Group):
    """A command group that suggests the nearest commands for an unknown one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            every = self.list_commands(ctx)
            known = nearest(name, every) or f"; the commands are {', '.join(every)}"
            if self is main and name in _ELSEWHERE:
                known = f": {_ELSEWHERE[name]}"
            ctx.fail(f"no command {name!r}{known}")
        return super().resolve_command(ctx, args)


class _Group(NearNames):
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

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["fi_ffi.cli.wants_json"] = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        # Imported here: `--help` does not need the modules that print tables.
        from fi_ffi.cli.output import Failure, Misuse, for_people

        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            _as_json(ctx, type(error).__name__, error.message, error.exit_code)
            error.message = for_people(error.message)  # type: ignore[misc]
            raise
        except FiFfiError as error:
            kind = Misuse if isinstance(error, ArgumentError) else Failure
            _as_json(ctx, type(error).__name__, str(error), kind.exit_code)
            raise kind(for_people(str(error))) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader closed the pipe, which click handles
                raise
            _as_json(ctx, type(error).__name__, str(error), Failure.exit_code)
            raise Failure(for_people(str(error))) from error
        except KeyboardInterrupt:  # click would exit with 1, as for a failure
            _as_json(ctx, "KeyboardInterrupt", "interrupted", INTERRUPTED)
            click.echo("Interrupted.", err=True)
            sys.exit(INTERRUPTED)


def _as_json(ctx: click.Context, kind: str, message: str, code: int) -> None:
    """Print an error as JSON and exit, if JSON was requested and none was printed yet."""
    from fi_ffi.cli import output

    meta: dict[str, Any] = ctx.find_root().meta
    if meta.get(output.WANTS_JSON) and not meta.get(output.PRINTED_JSON):
        output.print_json({"error": {"type": kind, "message": message, "exit_status": code}})
        sys.exit(code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fi-ffi")
@click.option(
    "--paranoid", is_flag=True, help="Check hash and signatures of cached files at each use."
)
def main(paranoid: bool) -> None:
    """FlashInfer's CUDA kernels without torch and without a compiler."""
    if paranoid:
        os.environ[PARANOID] = "1"
