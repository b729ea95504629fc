"""Records what inference engines import of FlashInfer: tools/data/engine-names.json.

    python tools/record_engine_names.py flashinfer_python-VERSION.whl vllm-VERSION.whl sglang-….whl

reads the wheels' Python files, and runs nothing of them (`pip download --no-deps` fetches them).
Counted are functions and classes that the release of FlashInfer defines and that a file of the
engine takes: by `from flashinfer… import`, as an attribute of an imported module, or by the names
that a helper for late imports is given. Names with an underscore before them are FlashInfer's own.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

TARGET = Path(__file__).with_name("data") / "engine-names.json"
_FLASHINFER = "flashinfer"


def python_of(wheel: Path) -> Iterator[tuple[str, str]]:
    """The modules of a wheel by name, and their text."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".py"):
                module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
                yield module, archive.read(name).decode("utf-8", "replace")


def defined(wheel: Path) -> tuple[set[str], set[str]]:
    """The modules of FlashInfer, and the functions and classes that any of them defines."""
    modules, names = set(), set()
    for module, text in python_of(wheel):
        modules.add(module)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):  # another name
                names |= {each.id for each in node.targets if isinstance(each, ast.Name)}
    return modules, names


def _is_of_flashinfer(name: str) -> bool:
    return name.partition(".")[0] == _FLASHINFER


def taken(tree: ast.Module) -> set[tuple[str, str]]:
    """The names that a file takes of FlashInfer's modules, with the modules."""
    found: set[tuple[str, str]] = set()
    known: dict[str, str] = {}  # what a name of the file stands for
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and not node.level
            and _is_of_flashinfer(str(node.module))
        ):
            for alias in node.names:
                found.add((str(node.module), alias.name))
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if _is_of_flashinfer(alias.name):
                    known[alias.asname or _FLASHINFER] = alias.name if alias.asname else _FLASHINFER

    def dotted(node: ast.expr) -> str:
        if isinstance(node, ast.Name):
            return known.get(node.id, "")
        if isinstance(node, ast.Attribute) and (home := dotted(node.value)):
            return f"{home}.{node.attr}"
        return ""

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := dotted(node)):
            home, _, last = name.rpartition(".")
            found.add((home, last))
        elif isinstance(node, ast.Call):
            texts = [
                arg.value
                for arg in node.args
                if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            ]
            if len(texts) == 2 and _is_of_flashinfer(texts[0]):
                found.add((texts[0], texts[1]))
    return found


def main() -> None:
    flashinfer, *engines = map(Path, sys.argv[1:])
    modules, names = defined(flashinfer)
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    versions = {}
    for wheel in engines:
        engine, version = wheel.name.split("-")[:2]
        versions[engine] = version
        for _, text in python_of(wheel):
            if _FLASHINFER not in text:
                continue
            for module, name in taken(ast.parse(text)):
                is_public = re.match(r"[A-Za-z]", name) and f"{module}.{name}" not in modules
                if module in modules and name in names and is_public:
                    found[name][engine].add(module)
    made = {
        "flashinfer": flashinfer.name.split("-")[1],
        "engines": versions,
        "names": {
            name: {engine: sorted(homes) for engine, homes in sorted(by.items())}
            for name, by in sorted(found.items())
        },
    }
    TARGET.write_text(json.dumps(made, indent=1) + "\n")
    print(f"{len(found)} names")


if __name__ == "__main__":
    main()
