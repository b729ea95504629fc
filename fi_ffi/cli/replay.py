"""`fi-ffi replay`: a dumped call made again, and its results compared."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import fi_ffi
from fi_ffi.abi.tensor import Device, parse_device
from fi_ffi.cli import output
from fi_ffi.cli.replaying import compare, rerun
from fi_ffi.cli.replaying.compare import Compared
from fi_ffi.cli.replaying.recorded import Recorded, load
from fi_ffi.errors import FiFfiError
from fi_ffi.loader import machine

_CPU = parse_device("cpu")


class _NotReplayed(output.Failure):
    exit_code = 2


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--device", help="cpu, or cuda:N (default: where it was called, or else the CPU).")
@click.option("--kernels", help="Directory or wheel of kernels (default: FI_FFI_KERNELS).")
@click.option("--bits", is_flag=True, help="Every bit must be as the dump has it.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def replay(file: Path, device: str | None, kernels: str | None, bits: bool, as_json: bool) -> None:
    """Make the call in FILE again and compare what it writes.

    FILE was written by FI_FFI_DUMP_DIR or `fi_ffi.call_log(dump=...)`: one of a call's two files,
    or what their names have in common.  The results are compared with those in the dump, if the
    call came so far, and with the op's definition in float64 or, without one, the reference on
    the CPU.

    Exits with 0 where all of them agree, 1 where one does not, and 2 where the call cannot be
    made again.
    """
    try:
        recorded = load(file)
        if kernels:
            fi_ffi.use_kernels(kernels)
        where = _device(recorded, device)
        compared, facts = _replayed(recorded, where)
    except (FiFfiError, OSError, MemoryError) as error:
        raise _NotReplayed(f"cannot be replayed: {error}") from error
    wrong = [of for of in compared if of.status != "ok" or (bits and _differs(of))]
    if as_json:
        rows = [asdict(of) | {"status": of.status} for of in compared]
        output.print_json({**facts, "compared": rows, "ok": not wrong})
    else:
        _print(recorded.path, facts, compared)
    if wrong:
        told = ", ".join(f"{of.name} and {of.to}" for of in wrong)
        raise output.Failure(f"these differ: {told}")


def _differs(of: Compared) -> bool:
    return of.to == "the dump" and not of.is_same


def _device(recorded: Recorded, given: str | None) -> Device:
    if given is not None:
        return parse_device(given, op="replay")
    try:
        is_there = parse_device(recorded.device).is_cuda and machine.device_count() > 0
    except FiFfiError:
        is_there = False
    return parse_device("cuda:0") if is_there else _CPU


def _replayed(recorded: Recorded, where: Device) -> tuple[list[Compared], dict[str, Any]]:
    made, row = rerun.rerun(recorded, where), recorded.row
    assert row is not None
    got = compare.without_unwritten(recorded, made.after)
    compared = [*compare.beside(recorded, got, recorded.after or {}, "the dump")]
    if compare.has_definition(row):
        compared += compare.with_definition(row, recorded, made.after)
    elif where.is_cuda:
        reference = rerun.rerun(recorded, _CPU).after
        compared += compare.beside(recorded, made.after, reference, "the reference on the CPU")
    if made.result is not None and recorded.result is not None and str(where) == recorded.device:
        same = made.result == recorded.result
        compared.append(Compared("(result)", "the dump", same, 0.0, 0.0 if same else float("inf")))
    document = recorded.document
    facts = {
        "op": document.get("op"),
        "entry": document.get("entry"),
        "called": document.get("called"),
        "then": f"{document.get('device')}, release {document.get('release', 'reference')}",
        "now": f"{where}, {rerun.kernel_of(recorded, where)}",
        "came_to_its_end": recorded.after is not None,
    }
    return compared, facts


def _print(path: Path, facts: dict[str, Any], compared: list[Compared]) -> None:
    told = [(name, value) for name, value in facts.items() if name != "came_to_its_end"]
    if not facts["came_to_its_end"]:
        told.append(("results", "none in the dump: the call did not come to its end"))
    output.print_table(str(path), ("", ""), told)
    rows = [
        (
            of.name,
            of.to,
            "the same bits" if of.is_same else f"{of.max_error:.2e}",
            f"{of.error_of_bound:.2f}",
            of.status,
        )
        for of in compared
    ]
    columns = ("result", "compared with", "max error", "of bound", "")
    output.print_table("Results", columns, rows, numbers=columns[3:4])
