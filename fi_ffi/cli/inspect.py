"""`fi-ffi inspect`: shows the contents of a kernel file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fi_ffi.abi.signature import Signature
from fi_ffi.cli import output
from fi_ffi.errors import FiFfiError
from fi_ffi.loader.elf import inspect_elf
from fi_ffi.loader.fatbin import architectures
from fi_ffi.loader.runtime import file_signatures


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--no-load", is_flag=True, help="Read FILE without loading it; shows no signatures.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def inspect(file: Path, no_load: bool, as_json: bool) -> None:
    """Show FILE's functions and signatures, its GPU architectures, and the libraries it needs.

    FILE is loaded, because the functions themselves report their signatures. Needs no GPU.
    """
    if file.suffix == ".whl":
        hint = f"`fi-ffi list --kernels {file} --entries` shows what is in a wheel"
        raise output.Failure(f"{file} is a wheel, not a library; {hint}")
    info = inspect_elf(file)
    signatures, problem = ({}, "not loaded") if no_load else _signatures(file)
    document: dict[str, Any] = {
        "file": str(file),
        "size": file.stat().st_size,
        "machine": info.machine,
        "architectures": [code.name for code in architectures(file)],
        "needed": list(info.needed),
        "runpath": info.runpath,
        "requires": list(info.requires),
        "functions": {name: signatures.get(name) for name in info.functions},
        "signatures_missing_because": problem,
    }
    if as_json:
        output.print_json(document)
    else:
        _print(document)


def _signatures(file: Path) -> tuple[dict[str, str], str | None]:
    try:
        found = file_signatures(file)
    except FiFfiError as error:
        return {}, str(error)
    return {
        name: _types(signature) if isinstance(signature, Signature) else signature
        for name, signature in found.items()
    }, None


def _types(signature: Signature) -> str:
    if signature.named:  # includes names and shapes
        return f"({', '.join(signature.named)}) -> {signature.result}"
    return f"({', '.join(signature.params)}) -> {signature.result}"


def _print(document: dict[str, Any]) -> None:
    facts = [
        ("machine", document["machine"]),
        ("architectures", ", ".join(document["architectures"]) or "no device code"),
        ("needs", ", ".join(document["needed"])),
        ("size", f"{document['size']:,} bytes"),
    ]
    if document["signatures_missing_because"]:
        facts.append(("signatures", f"none: {document['signatures_missing_because']}"))
    output.print_table(document["file"], ("", ""), facts)
    rows = [(name, signature or "") for name, signature in document["functions"].items()]
    output.print_table(output.counted(len(rows), "function"), ("name", "signature"), rows)
