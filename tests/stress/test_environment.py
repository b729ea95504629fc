"""docs/environment.md has every variable that is read, and no other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import fi_ffi

ROOT = Path(fi_ffi.__file__).parent.parent
PACKAGES = (ROOT / "fi_ffi", ROOT / "fi_ffi_build")
NAME = re.compile(r"FI_FFI_[A-Z_]*")


def tables():
    """The variables in the first column of each table."""
    found: list[set[str]] = []
    for line in (ROOT / "docs" / "environment.md").read_text().splitlines():
        cell = line.split("|")[1] if line.startswith("|") else ""
        if cell.strip() == "variable":
            found.append(set())
        elif cell:
            found[-1] |= set(re.findall("`(.+?)`", cell))
    return found


def sources():
    for path in (path for package in PACKAGES for path in package.rglob("*.py")):
        if path.name != "_cffi.py":
            yield path, ast.parse(path.read_text())


def test_every_variable_of_ours_is_told():
    used = {
        name
        for package in PACKAGES
        for path in package.rglob("*.py*")
        if path.suffix in (".py", ".pyi")
        for name in NAME.findall(path.read_text())
    }
    assert used == tables()[0]
    assert not [name for name in used if name.endswith("_")], "a name that is put together"


def test_there_are_few():
    assert len(tables()[0]) <= 17, "an argument, or a command's option, may do instead"


def constants():
    """Module-level names that are strings, of the whole package."""
    found = {}
    for _, tree in sources():
        for node in tree.body:
            if not isinstance(node, ast.Assign):
                continue
            for target in node.targets:
                names, values = [target], [node.value]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    names, values = target.elts, node.value.elts
                for name, value in zip(names, values, strict=True):
                    if isinstance(name, ast.Name) and isinstance(value, ast.Constant):
                        found[name.id] = value.value
    return found


def test_every_variable_of_others_is_told():
    """What is asked of os.environ by name; where a whole environment goes on, nothing is read."""
    known, read = constants(), set()
    for path, tree in sources():
        for node in ast.walk(tree):
            text = ast.unparse(node) if isinstance(node, (ast.Call, ast.Subscript)) else ""
            asked = None
            if re.match(r"os\.(environ\.get|getenv|environ\.pop)\(|is_on\(", text):
                assert isinstance(node, ast.Call)
                asked = node.args[0]
            elif re.match(r"os\.environ\[", text):
                assert isinstance(node, ast.Subscript)
                asked = node.slice
            elif isinstance(node, ast.Compare) and ast.unparse(node).endswith("in os.environ"):
                asked = node.left
            if isinstance(asked, ast.Constant):
                read.add(asked.value)
            elif isinstance(asked, (ast.Name, ast.Attribute)):
                read.add(known.get(getattr(asked, "id", getattr(asked, "attr", "")), f"? {path}"))
    told = tables()
    # `is_on` reads those that it is given. `fi-ffi build` takes compilers' search paths over, and
    # tells FlashInfer not to fetch and CuTe DSL for which GPU it compiles.
    given = {
        f"? {ROOT / path}"
        for path in ("fi_ffi/loader/permission.py", "fi_ffi_build/environment.py")
    }
    written = {"FLASHINFER_NO_DOWNLOAD", "CUTE_DSL_ARCH"}
    assert read - given - written <= told[0] | told[1]
    elsewhere = {"REQUESTS_CA_BUNDLE", "NETRC", "XDG_CACHE_HOME"}
    assert told[1] - elsewhere <= read


def test_variables_of_the_tests_are_told():
    used = set()
    for folder in ("tests", "tools", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".sh"):
                used |= {name for name in NAME.findall(path.read_text()) if name[-1] != "_"}
    assert used <= tables()[0] | tables()[2]
    assert tables()[2] <= used
