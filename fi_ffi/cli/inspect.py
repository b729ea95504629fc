"""`fi-ffi inspect`: shows the contents of a kernel file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fi_ffi.abi.signature import Signature
from fi_ffi.cli import output
from fi_ffi.errors import FiFfiError
from fi_ffi.loader import tvm_ffi
from fi_ffi.loader.elf import inspect_elf
from fi_ffi.loader.fatbin import architectures
from fi_ffi.modules.files import file_signatures


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--no-load", is_flag=True, help="Read FILE without loading it; shows no signatures.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def inspect(file: Path, no_load: bool, as_json: bool) -> None:
    """Show FILE's functions and signatures, its GPU architectures, and what it needs.

    That is libraries, symbols of libtvm_ffi, and the releases of apache-tvm-ffi that it may have
    been compiled with. FILE is loaded, because the functions themselves report their signatures.
    Needs no GPU.
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
        "tvm_ffi": {
            "compiled_for": tvm_ffi.compiled_for(file, info.requires),
            "exported_by": {name: _exporting(name) for name in info.requires},
        },
        "functions": {name: signatures.get(name) for name in info.functions},
        "signatures_missing_because": problem,
    }
    if as_json:
        output.print_json(document)
    else:
        _print(document)


def _signatures(file: Path) -> tuple[dict[str, str], str | None]:
    try:
        signatures = file_signatures(file)
    except FiFfiError as error:
        return {}, str(error)
    return {
        name: _types(signature) if isinstance(signature, Signature) else signature
        for name, signature in signatures.items()
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
        ("apache-tvm-ffi", _fitting(document["tvm_ffi"]["compiled_for"])),
        ("size", f"{document['size']:,} bytes"),
    ]
    if document["signatures_missing_because"]:
        facts.append(("signatures", f"none: {document['signatures_missing_because']}"))
    output.print_table(document["file"], ("", ""), facts)
    rows = [(name, signature or "") for name, signature in document["functions"].items()]
    output.print_table(output.counted(len(rows), "function"), ("name", "signature"), rows)
    rows = list(document["tvm_ffi"]["exported_by"].items())
    title = f"{output.counted(len(rows), 'symbol')} of libtvm_ffi"
    output.print_table(title, ("needs", "exported by"), rows)


def _fitting(releases: list[str]) -> str:
    """Return what the symbols of a library say about the apache-tvm-ffi it was compiled with."""
    every = tvm_ffi.releases_record()["releases"]
    if not releases:
        return f"none from {every[0]} to {every[-1]} fits its symbols"
    return f"compiled with {tvm_ffi.span(releases, every) or 'any'}, by its symbols"


def _exporting(symbol: str) -> str:
    """Return which apache-tvm-ffi exports a symbol: "all", "none", or a version specifier."""
    found = tvm_ffi.releases_record()["symbols"].get(symbol)
    return "none" if found is None else found or "all"
