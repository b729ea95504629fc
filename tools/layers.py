"""The layers of the package, read from its imports: what stands on what, lazily or not.

`python3 tools/layers.py` prints a table by layer; `tools/generate_layers.py` draws it.
tests/test_layers.py holds the order.
"""

from __future__ import annotations

import ast
import functools
import io
import sys
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fi_ffi", "fi_ffi_build")
GENERATED = {"fi_ffi.abi._cffi"}


@dataclass(frozen=True)
class Layer:
    """Modules that may import each other and what is below: modules or packages by name."""

    name: str
    holds: tuple[str, ...]
    is_core: bool = False


# From below to above: a module imports its own layer and those before it, and no other.
LAYERS = (
    Layer("errors", ("fi_ffi.errors", "fi_ffi.families"), True),
    Layer("abi", ("fi_ffi.abi",), True),
    Layer("loader", ("fi_ffi.loader",), True),
    Layer("ops/call", ("fi_ffi.ops.call",), True),
    Layer("ops/table", ("fi_ffi.ops.table",), True),
    Layer("ops/attention", ("fi_ffi.ops.attention",), True),
    Layer("ops", ("fi_ffi.ops",), True),
    Layer("export", ("fi_ffi.export",)),
    Layer("on_host", ("fi_ffi.ops.on_host", "fi_ffi.ops.philox")),
    Layer("loader/fetch", ("fi_ffi.loader.fetch",)),
    Layer("module names", ("fi_ffi.module_names",)),
    Layer("reference", ("fi_ffi.reference",)),
    Layer("catalogue", ("fi_ffi.catalogue",)),
    Layer("ops/steps", ("fi_ffi.ops.steps",)),
    Layer("ops/plans", ("fi_ffi.ops.plans",)),
    Layer("ops/matmul", ("fi_ffi.ops.matmul",)),
    Layer("ops/moe", ("fi_ffi.ops.moe",)),
    Layer("ops/states", ("fi_ffi.ops.states",)),
    Layer("graphs", ("fi_ffi.graphs",)),
    Layer("modules", ("fi_ffi.modules",)),
    Layer("watch", ("fi_ffi.watch",)),
    Layer("comm", ("fi_ffi.comm",)),
    Layer("capability", ("fi_ffi.capability",)),
    Layer("fi_ffi_build", ("fi_ffi_build",)),
    Layer("fi_ffi", ("fi_ffi",)),
    Layer("jax", ("fi_ffi.jax",)),
    Layer("cli", ("fi_ffi.cli", "fi_ffi.__main__")),
)
# Upward all the same, in one function: what the CPU device imports when it is needed.
EXCEPTIONS = {
    ("fi_ffi.ops.call.releases", "reference"): "fi_ffi.reference",
}


@dataclass(frozen=True)
class Import:
    """An import of one of our modules; `function` is the one in which it stands, or ""."""

    source: str
    target: str
    function: str
    line: int

    def __str__(self) -> str:
        where = f" in {self.function}()" if self.function else ""
        return f"{self.source}:{self.line}{where} imports {self.target}"


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the packages, by name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str) -> Iterator[Import]:
    """The imports of a module: statements, and strings that name a module.

    A string ends in a dot if the rest of the name is computed; it imports the whole package.
    """
    tree = ast.parse(modules()[name].read_text())
    for node, function in _nodes(tree, ""):
        for target in _targets(node):
            yield Import(name, target, function, getattr(node, "lineno", 0))


def _nodes(tree: ast.AST, function: str) -> Iterator[tuple[ast.AST, str]]:
    for node in ast.iter_child_nodes(tree):
        if _is_docstring(node):
            continue
        yield node, function
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        yield from _nodes(node, node.name if is_function else function)  # type: ignore[attr-defined]


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _targets(node: ast.AST) -> Iterator[str]:
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = node.value.removesuffix(".")
        names = [text] if text in modules() and "." in text else []
    for name in names:
        while name and name not in modules():
            name = name.rpartition(".")[0]
        if name:
            yield name


def layer_of(module: str) -> int:
    """The number of a module's layer: that of the longest name that holds it."""
    held = [
        (len(name), number)
        for number, layer in enumerate(LAYERS)
        for name in layer.holds
        if module == name or module.startswith(f"{name}.")
    ]
    return max(held)[1]


@functools.cache
def every() -> tuple[Import, ...]:
    """All imports of all modules of one another."""
    return tuple(each for name in modules() for each in imports(name) if each.source != each.target)


def upward() -> list[Import]:
    """The imports of a layer above, but for the exceptions."""
    return [
        each
        for each in every()
        if layer_of(each.target) > layer_of(each.source)
        and not (
            each.target.startswith(EXCEPTIONS.get((each.source, each.function), "nothing"))
            or (each.source == "fi_ffi" and not LAYERS[layer_of(each.target)].is_core)
        )
    ]


def circles(of: Mapping[str, set[str]]) -> list[list[str]]:
    """The circles among these names (Tarjan's strongly connected components)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        number[name] = lowest[name] = len(number)
        stack.append(name)
        for other in sorted(of.get(name, ())):
            if other not in number:
                visit(other)
            if other in stack:
                lowest[name] = min(lowest[name], lowest[other])
        if lowest[name] == number[name]:
            at = stack.index(name)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for name in sorted(of):
        if name not in number:
            visit(name)
    return found


def file_circles() -> list[list[str]]:
    """The circles of files.  The package itself does not count: it imports names lazily."""
    of: dict[str, set[str]] = {name: set() for name in modules()}
    for each in every():
        if each.target != "fi_ffi" and (each.source, each.function) not in EXCEPTIONS:
            of[each.source].add(each.target)
    return circles(of)


def lines_of_code(path: Path) -> int:
    """Lines that have code: no comment, docstring or blank line."""
    text = path.read_text()
    counted: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            counted.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if _is_docstring(node):
            assert isinstance(node, ast.Expr)
            counted.difference_update(range(node.lineno, (node.end_lineno or 0) + 1))
    return len(counted)


_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def table() -> list[tuple[str, int, int, int, int]]:
    """Of each layer: its name, lines of code, files, upward imports, and circles of its files."""
    lines, files = [0] * len(LAYERS), [0] * len(LAYERS)
    for name, path in modules().items():
        if name not in GENERATED:
            files[layer_of(name)] += 1
            lines[layer_of(name)] += lines_of_code(path)
    up, round_ = [0] * len(LAYERS), [0] * len(LAYERS)
    for each in upward():
        up[layer_of(each.source)] += 1
    for circle in file_circles():
        round_[max(map(layer_of, circle))] += 1
    names = [layer.name for layer in LAYERS]
    return [*zip(names, lines, files, up, round_, strict=True)]


def main() -> None:
    print(f"{'layer':15}{'lines':>8}{'files':>7}{'upward':>8}{'circles':>9}")
    rows = table()
    for name, *numbers in rows:
        print("{:15}{:8,}{:7}{:8}{:9}".format(name, *numbers))
    core = [row for row, layer in zip(rows, LAYERS, strict=True) if layer.is_core]
    print(f"core {sum(row[1] for row in core):,}, all {sum(row[1] for row in rows):,}")
    for each in upward():
        print(each)
    for circle in file_circles():
        print("circle:", " ".join(circle))


if __name__ == "__main__":
    sys.exit(main())
