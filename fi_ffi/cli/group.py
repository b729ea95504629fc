"""Groups of commands: what an unknown command, an error and an interrupt look like."""

from __future__ import annotations

import errno
import sys
from collections.abc import Mapping
from typing import Any

import click

from fi_ffi.errors import ArgumentError, FiFfiError, nearest

# A key in a click context: whether `--json` is among the arguments.
WANTS_JSON = "fi_ffi.cli.wants_json"
INTERRUPTED = 130  # 128 + SIGINT, as in shells; docs/commands.md lists the other exit codes


class NearNames(click.Group):
    """A command group that suggests the nearest commands for an unknown one."""

    # Words that users type instead of a command, and the hint for each.
    elsewhere: Mapping[str, str] = {}

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            every = self.list_commands(ctx)
            known = nearest(name, every) or f"; the commands are {', '.join(every)}"
            if name in self.elsewhere:
                known = f": {self.elsewhere[name]}"
            ctx.fail(f"no command {name!r}{known}")
        return super().resolve_command(ctx, args)


class CommandGroup(NearNames):
    """The group of a whole program: it prints errors for people, or as JSON if that is wanted."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[WANTS_JSON] = "--json" in args
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
    if meta.get(WANTS_JSON) and not meta.get(output.PRINTED_JSON):
        output.print_json({"error": {"type": kind, "message": message, "exit_status": code}})
        sys.exit(code)
