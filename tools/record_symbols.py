"""Records how releases of apache-tvm-ffi differ for what links it: fi_ffi/loader/data/tvm_ffi.json.

    python tools/record_symbols.py

fetches the wheel of every release on the package index from the oldest that fi_ffi works with (2
to 4 MB each, by pip), and also yanked ones, which installations may have.  It records

- the symbols of libtvm_ffi, each with the releases that have it,
- the namespaces that only some releases' headers have: symbols of a library tell by them which
  headers it was compiled with,
- the C++ that has one name and two meanings: a compiler is asked what it returns, and in which
  order virtual functions stand.

Needs g++.  Options go to pip.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from packaging.utils import parse_wheel_filename  # noqa: E402
from packaging.version import Version  # noqa: E402

from fi_ffi.abi import library  # noqa: E402
from fi_ffi.loader.elf import RUNTIME, SYMBOL, open_section  # noqa: E402
from fi_ffi.loader.tvm_ffi import MEMBER, PROJECT, RECORD, span  # noqa: E402

# The C interface is the same on every platform, and so is the C++ that is exported.
PLATFORM = [
    *("--only-binary", ":all:", "--no-deps", "--python-version", "3.12"),
    *("--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_24_x86_64"),
]
# pip lists no yanked release, and installs one that is asked for by its number.
YANKED = ("0.1.13", "0.1.13.post0", "0.1.13.post1", "0.1.14", "0.1.15", "0.1.15.post0")
INCLUDE = "tvm_ffi/include/"
MODULE = "_ZN3tvm3ffi9ModuleObj"
# What libtvm_ffi returns by value: a mangled name has arguments alone.  By the name of a function,
# the symbols that a library needs which calls it or derives from its class.
RETURNED = {
    "ModuleObj::GetFunction": [
        f"{MODULE}11GetFunctionERKNS0_6StringEb",
        "_ZTIN3tvm3ffi9ModuleObjE",
    ],
    "ModuleObj::GetFunctionDoc": [f"{MODULE}14GetFunctionDocERKNS0_6StringEb"],
    "ModuleObj::GetFunctionMetadata": [f"{MODULE}19GetFunctionMetadataERKNS0_6StringEb"],
    "StructuralEqual::GetFirstMismatch": [
        "_ZN3tvm3ffi15StructuralEqual16GetFirstMismatchERKNS0_3AnyES4_bb"
    ],
}
PROBE = """
#include <tvm/ffi/tvm_ffi.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/extra/structural_equal.h>
#include <cstdio>
using namespace tvm::ffi;
template <class R, class... A> constexpr size_t size(R (*)(A...)) { return sizeof(R); }
template <class R, class C>
constexpr size_t size_of(R (C::*)(const String&, bool)) { return sizeof(R); }
int main() {
  std::printf("ModuleObj::GetFunction %zu\\n", size_of(&ModuleObj::GetFunction));
  std::printf("ModuleObj::GetFunctionDoc %zu\\n", size_of(&ModuleObj::GetFunctionDoc));
  std::printf("ModuleObj::GetFunctionMetadata %zu\\n", size_of(&ModuleObj::GetFunctionMetadata));
  std::printf("StructuralEqual::GetFirstMismatch %zu\\n", size(&StructuralEqual::GetFirstMismatch));
}
"""


@dataclass(frozen=True)
class Release:
    """What a release has: exported symbols, its headers' namespaces, meanings by C++ name."""

    symbols: set[str]
    namespaces: set[str]
    meanings: dict[str, str]


def versions(options: Sequence[str]) -> list[Version]:
    """The releases that fi_ffi may meet, oldest first."""
    told = pip("index", "versions", PROJECT, *options)
    listed = re.search(r"^Available versions: (.*)$", told, re.MULTILINE)
    assert listed is not None, told
    found = {*map(Version, listed[1].split(", ")), *map(Version, YANKED)}
    return sorted(version for version in found if version.release >= library._OLDEST)


def pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def read(version: Version, folder: Path, options: Sequence[str]) -> Release:
    """Fetch a release and read it."""
    pip("download", "-q", f"{PROJECT}=={version}", "-d", str(folder), *PLATFORM, *options)
    wheels = folder.glob("*.whl")
    (wheel,) = (path for path in wheels if parse_wheel_filename(path.name)[1] == version)
    place = folder / str(version)
    with zipfile.ZipFile(wheel) as archive:
        headers = [name for name in archive.namelist() if name.startswith(INCLUDE)]
        archive.extractall(place, [*headers, MEMBER])
    text = "\n".join((place / name).read_text() for name in headers if name.endswith(".h"))
    namespaces = {*re.findall(r"^namespace (\w+) \{", text, re.MULTILINE)}
    return Release(symbols_of(place / MEMBER), namespaces, meanings_of(place))


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
    return {name for name in defined if re.match(RUNTIME, name)}


def meanings_of(place: Path) -> dict[str, str]:
    """What a library takes for granted that a compiler makes with a release's headers."""
    with tempfile.TemporaryDirectory() as folder:
        source, classes = Path(folder) / "probe.cc", Path(folder) / "classes"
        source.write_text(PROBE)
        command = ["g++", "-std=c++17", f"-I{place / INCLUDE}", f"-fdump-lang-class={classes}"]
        command += [str(source), str(place / MEMBER), f"-Wl,-rpath,{(place / MEMBER).parent}"]
        subprocess.run([*command, "-o", f"{folder}/probe"], check=True)
        told = subprocess.run([f"{folder}/probe"], check=True, stdout=subprocess.PIPE, text=True)
        table = classes.read_text().partition("\nVtable for tvm::ffi::ModuleObj\n")[2]
    found = {}
    for line in told.stdout.splitlines():
        name, size = line.split()
        found[name] = f"{name} returns {size} bytes"
    slots = re.findall(
        r"\(int \(\*\)\(\.\.\.\)\)(\w\S*)$", table.partition("\n\n")[0], re.MULTILINE
    )
    assert slots, table
    found["ModuleObj"] = f"ModuleObj has the virtual functions {', '.join(slots)}"
    return found


def record(have: Mapping[Version, Release]) -> dict[str, object]:
    """`have`, oldest first, as the file has it."""
    every = [*map(str, have)]
    symbols: dict[str, list[str]] = defaultdict(list)
    headers: dict[str, list[str]] = defaultdict(list)
    meanings: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for version, release in have.items():
        for name in release.symbols:
            symbols[name].append(str(version))
        for name in release.namespaces:
            headers[f"3tvm3ffi{len(name)}{name}"].append(str(version))
        for name, meaning in release.meanings.items():
            meanings[name][meaning].append(str(version))
    return {
        "releases": every,
        "symbols": {name: span(of, every) for name, of in sorted(symbols.items())},
        "headers": {name: span(of, every) for name, of in sorted(headers.items()) if of != every},
        "changed": [
            {"symbols": RETURNED.get(name, ["_ZTIN3tvm3ffi9ModuleObjE"]), "meanings": dict(of)}
            for name, of in sorted(meanings.items())
            if len(of) > 1
        ],
    }


def main() -> None:
    options = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        have = {v: read(v, Path(folder), options) for v in versions(options)}
    made = record(have)
    RECORD.write_text(json.dumps(made, indent=1) + "\n")
    print(", ".join(f"{len(of)} {name}" for name, of in made.items()))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
