"""`fi-ffi trace`: FlashInfer-Bench definitions of dumped calls, or of ops and sizes."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import click

from fi_ffi.cli import output
from fi_ffi.cli.tracing.definition import Definition, define
from fi_ffi.cli.tracing.subject import Subject, names, of_dump, of_op
from fi_ffi.errors import ArgumentError
from fi_ffi.ops.watch.dump import AFTER, BEFORE


def _pairs(_: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise click.BadParameter(f"{text!r} is not NAME=VALUE", param=parameter)
        found[name] = value
    return found


@click.command()
@click.argument("subjects", nargs=-1, required=True, metavar="OP|FILE...")
@click.option("--size", "sizes", multiple=True, callback=_pairs, help="An axis' size: h=4096.")
@click.option("--dtype", "dtypes", multiple=True, callback=_pairs, help="A dtype: T=bfloat16.")
@click.option("--set", "values", multiple=True, callback=_pairs, help="A number: eps=1e-5.")
@click.option("--with", "given", multiple=True, help="An optional tensor that is there.")
@click.option(
    "-o", "--output", "folder", type=click.Path(file_okay=False, path_type=Path),
    help="Write NAME.json into this directory, and print the names.",
)  # fmt: skip
def trace(
    subjects: tuple[str, ...], sizes: dict[str, str], dtypes: dict[str, str],
    values: dict[str, str], given: tuple[str, ...], folder: Path | None,
) -> None:  # fmt: skip
    """Write FlashInfer-Bench definitions: axes, inputs, outputs, and a reference to run.

    Each FILE is a dumped call (FI_FFI_DUMP_DIR), which has its own sizes. An OP is a typed op,
    or single_decode, single_prefill, gqa_paged_decode, gqa_paged_prefill, gqa_ragged,
    mla_paged_decode or mla_paged_prefill, and needs the sizes that are part of its definition.
    """
    numbers = {name: _integer(name, text) for name, text in sizes.items()}
    literals = {name: _literal(text) for name, text in values.items()}
    found: dict[str, Definition] = {}
    for text in subjects:
        definition = define(_subject(text, numbers, dtypes, literals, given))
        found[definition["name"]] = definition
    if folder is None:
        made = list(found.values())
        output.print_json(made[0] if len(made) == 1 else made)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, definition in found.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(definition, indent=2) + "\n")
        click.echo(path)


def _subject(
    text: str, sizes: dict[str, int], dtypes: dict[str, str], values: dict[str, Any],
    given: tuple[str, ...],
) -> Subject:  # fmt: skip
    if text in names():
        return of_op(text, sizes, dtypes, values, given)
    path = Path(text)
    if text.endswith((BEFORE, AFTER)) or path.with_name(path.name + BEFORE).exists():
        return of_dump(path)
    expected = f"a dumped call, or one of {', '.join(names())}"
    raise ArgumentError("trace", "op", got=text, expected=expected)


def _integer(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ArgumentError("trace", "size", got=f"{name}={text}", expected="a number")
    return int(text)


def _literal(text: str) -> Any:
    """A number or a bool as Python writes it; a word else."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text, text)
