"""`fi-ffi inspect`: shows the contents of a kernel file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fi_ffi.abi.signature import Signature
from fi_ffi.cli import output
from fi_ffi.errors import FiFfiError
from fi_ffi.loader import cache, machine, search, tvm_ffi
from fi_ffi.loader.elf import inspect_elf
from fi_ffi.loader.fatbin import architectures
from fi_ffi.loader.fetch import progress, published
from fi_ffi.loader.kernels import KernelSource, open_source
from fi_ffi.loader.permission import fetching
from fi_ffi.module_names import parse
from fi_ffi.modules import files


@click.command()
@click.argument("what", metavar="FILE|MODULE|DISTRIBUTION")
@click.option("--no-load", is_flag=True, help="Read without loading; shows recorded signatures.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def inspect(what: str, no_load: bool, as_json: bool) -> None:
    """Show FILE's functions and signatures, its GPU architectures, and what it needs.

    That is libraries, symbols of libtvm_ffi, and the releases of apache-tvm-ffi that it may have
    been compiled with. FILE is loaded, because the functions themselves report their signatures.
    Needs no GPU.

    Of a MODULE, the file of the kernels in use is shown; nothing is fetched for it.

    Of a wheel, or of a DISTRIBUTION that is installed or pinned, all libraries are shown, and why
    one cannot be called. Nothing is loaded then.
    """
    path = Path(what)
    if not path.exists() and parse(what) is not None:
        with fetching(False):
            path = search.find_module(what)[1].path
    if path.is_file() and path.suffix != ".whl":
        document = _document(path, no_load)
        if as_json:
            output.print_json(document)
        else:
            _print(document)
        return
    if path.is_file():
        source = open_source(path)
    elif "/" in what or path.suffix in (".so", ".whl"):
        raise click.BadParameter(f"{what} does not exist", param_hint="FILE")
    else:
        source = published.libraries(what)
    _inspect_all(source, as_json)


def _document(file: Path, no_load: bool) -> dict[str, Any]:
    info = inspect_elf(file)
    signatures, problem = ({}, "not loaded") if no_load else _signatures(file)
    if problem and (recorded := files.recorded(cache.hashed(file)[0])):
        signatures = recorded["functions"]
    return {
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
        "signatures_are_recorded": bool(problem and signatures),
    }


def _inspect_all(source: KernelSource, as_json: bool) -> None:
    names = source.modules()
    if not names:
        raise output.Failure(f"{source.location} has no libraries")
    documents = {}
    with progress.counter("libraries", len(names), lines=False) as count:
        for name in names:
            count(name)
            documents[name] = _document(source.file(name).path, True)
    if as_json:
        output.print_json({"source": source.location, "libraries": documents})
        return
    rows = [_row(name, each) for name, each in documents.items()]
    title = f"{source.location}: {len(rows)} {'library' if len(rows) == 1 else 'libraries'}"
    output.print_table(title, ("library", "functions", "GPUs", "size", "callable here"), rows)
    for name, each in documents.items():
        rows = [(function, signature or "") for function, signature in each["functions"].items()]
        if rows:
            output.print_table(name, ("name", "signature"), rows)


def _row(name: str, document: dict[str, Any]) -> tuple[str, ...]:
    known = ", ".join(document["architectures"]) or "no device code"
    size, count = f"{document['size']:,}", len(document["functions"])
    return name, str(count), known, size, _why_not(document) or "yes"


def _why_not(document: dict[str, Any]) -> str:
    """Return why a library cannot be called in a process like this one, or ""."""
    torch = [name for name in document["needed"] if name.startswith(("libtorch", "libc10"))]
    first = min(torch, key=lambda name: (name.startswith("libc10"), name), default="")
    links = f"links {first}" if first else ""
    if not document["functions"]:
        return " and ".join(filter(None, ["no: it exports no function of TVM-FFI", links]))
    if links:
        return f"no: it {links}"
    if not document["tvm_ffi"]["compiled_for"]:
        return "no: its apache-tvm-ffi is not known"
    if machine.DRIVER in document["needed"] and machine.driver_version() is None:
        return f"no: {machine.DRIVER} is not on this machine"
    return ""


def _signatures(file: Path) -> tuple[dict[str, str], str | None]:
    try:
        signatures = files.file_signatures(file)
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
    if why := document["signatures_missing_because"]:
        kind = "as recorded on a GPU" if document["signatures_are_recorded"] else "none"
        facts.append(("signatures", f"{kind}: {why}"))
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
