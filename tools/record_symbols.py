"""Records which apache-tvm-ffi exports what: fi_ffi/loader/data/tvm_ffi.json.

    python tools/record_symbols.py

fetches the wheel of every release on the package index from the oldest that fi_ffi works with (2
to 4 MB each, by pip) and reads the symbols of libtvm_ffi out of it.  Kept are those that not every
release has, with the releases that do.  Options go to pip.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from packaging.utils import parse_wheel_filename  # noqa: E402
from packaging.version import Version  # noqa: E402

from fi_ffi.abi import library  # noqa: E402
from fi_ffi.loader.elf import RUNTIME, SYMBOL, open_section  # noqa: E402
from fi_ffi.loader.linking import SYMBOLS  # noqa: E402
from fi_ffi.loader.tvm_ffi import MEMBER, PROJECT  # noqa: E402

# The C interface is the same on every platform, and so is the C++ that is exported.
PLATFORM = [
    *("--only-binary", ":all:", "--no-deps", "--python-version", "3.12"),
    *("--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_24_x86_64"),
]


def versions(options: Sequence[str]) -> list[Version]:
    """The releases on the index that fi_ffi works with, oldest first."""
    told = pip("index", "versions", PROJECT, *options)
    listed = re.search(r"^Available versions: (.*)$", told, re.MULTILINE)
    assert listed is not None, told
    found = map(Version, listed[1].split(", "))
    return sorted(version for version in found if version.release >= library._OLDEST)


def pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def exported(version: Version, folder: Path, options: Sequence[str]) -> set[str]:
    """The symbols of a release's libtvm_ffi."""
    pip("download", "-q", f"{PROJECT}=={version}", "-d", str(folder), *PLATFORM, *options)
    wheels = folder.glob("*.whl")
    (wheel,) = (path for path in wheels if parse_wheel_filename(path.name)[1] == version)
    with zipfile.ZipFile(wheel) as archive:
        return symbols_of(archive.read(MEMBER))


def symbols_of(file: bytes | Path) -> set[str]:
    """The symbols of libtvm_ffi that a library defines for others."""
    with open_section(file, ".dynstr") as names, open_section(file, ".dynsym") as symbols:
        assert names is not None
        assert symbols is not None
        text, table = names.at(0, names.size), symbols.at(0, symbols.size)
    defined = {
        text[at : text.index(b"\0", at)].decode()
        for at, info, other, section, *_ in SYMBOL.iter_unpack(table)
        if section and info >> 4 and other & 3 in (0, 3)  # neither local nor hidden
    }
    return {name for name in defined if RUNTIME.match(name)}


def record(have: dict[Version, set[str]]) -> dict[str, object]:
    """`have`, oldest first, as the file has it."""
    every = set.intersection(*have.values())
    oldest, *_, newest = have
    symbols: dict[str, str] = {}
    for name in sorted(set.union(*have.values()) - every):
        of = [version for version, names in have.items() if name in names]
        symbols[name] = f">={of[0]}" if of[-1] == newest else f">={of[0]},<={of[-1]}"
    return {"oldest": str(oldest), "newest": str(newest), "symbols": symbols}


def main() -> None:
    options = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        have = {v: exported(v, Path(folder), options) for v in versions(options)}
    made = record(have)
    SYMBOLS.write_text(json.dumps(made, indent=1) + "\n")
    print(f"{len(have)} releases, {len(made['symbols'])} symbols")  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
