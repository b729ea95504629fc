"""The text of a function with all that it uses, so that it can stand for itself."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from fi_ffi.errors import FiFfiError

_PACKAGE = "fi_ffi."


class NoSource(FiFfiError, ValueError):
    """A function uses what cannot be written down beside it."""


class _Module:
    """A module's definitions and imports at its top level."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.text = inspect.getsource(importlib.import_module(name))
        # The statements that make each name what it is, in order.
        self.definitions: dict[str, list[ast.stmt]] = {}
        # What is imported: from where (a module), and what of it ("" for the module itself).
        self.imports: dict[str, tuple[str, str]] = {}
        # Names that other statements make or change: loops, calls of methods.
        self.unclear: set[str] = set()
        for node in ast.parse(self.text).body:
            self._add(node)

    def _add(self, node: ast.stmt) -> None:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            self.definitions[node.name] = [node]
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            for name in _changed(node):
                self.definitions.setdefault(name, []).append(node)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                self.imports[alias.asname or alias.name.partition(".")[0]] = alias.name, ""
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                self.imports[alias.asname or alias.name] = node.module, alias.name
        else:
            self.unclear |= _changed(node)

    def lines(self, node: ast.stmt) -> str:
        first = min([node.lineno, *(of.lineno for of in getattr(node, "decorator_list", ()))])
        return "\n".join(self.text.splitlines()[first - 1 : node.end_lineno])


@functools.cache
def _module(name: str) -> _Module:
    return _Module(name)


# What has names of its own.
_SCOPES = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda, ast.FunctionDef)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, _SCOPES):
            yield from _walk(child)


def _changed(node: ast.AST) -> set[str]:
    """Names that a statement makes or may change: itself, its elements, or by its methods."""
    found: set[str] = set()
    for part in _walk(node):
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            found.add(part.id)
        base: ast.AST | None = None
        if isinstance(part, (ast.Subscript, ast.Attribute)) and isinstance(part.ctx, ast.Store):
            base = part.value
        elif isinstance(part, ast.Expr) and isinstance(part.value, ast.Call):
            base = part.value.func
        while isinstance(base, (ast.Subscript, ast.Attribute)):
            base = base.value
        if isinstance(base, ast.Name):
            found.add(base.id)
    return found


def _used(node: ast.AST) -> Iterator[str]:
    """Names that are read when a definition is made or called; annotations are not."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _used(child)
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        yield node.id
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        names = [alias.name for alias in node.names]
        where = node.module if isinstance(node, ast.ImportFrom) else names[0]
        if f"{where}.".startswith(_PACKAGE):
            raise NoSource(f"an import of {where} inside a function")


class _Text:
    """Definitions and imports, those first that others use."""

    def __init__(self) -> None:
        self.imports: set[str] = set()
        self.parts: list[str] = []
        # Where each name that was written is from.
        self._homes: dict[str, str] = {}
        self._done: set[tuple[str, str]] = set()

    def add(self, module: _Module, name: str) -> None:
        nodes = module.definitions.get(name)
        if nodes is None:
            if name in module.imports:
                self._import(name, *module.imports[name])
            return  # else a builtin, or a name of the function's own
        if name in module.unclear:
            raise NoSource(f"{name} of {module.name} is made by more than its assignment")
        if (module.name, name) in self._done:
            return
        self._done.add((module.name, name))
        if self._homes.setdefault(name, module.name) != module.name:
            raise NoSource(f"{name} is in {self._homes[name]} and in {module.name}")
        for node in nodes:
            for other in dict.fromkeys(_used(node)):
                if other != name:
                    self.add(module, other)
            lines = module.lines(node)
            if lines not in self.parts:  # of several names at once
                self.parts.append(lines)

    def _import(self, name: str, module: str, of: str) -> None:
        if not f"{module}.".startswith(_PACKAGE):
            plain = f"import {module}" if not of else f"from {module} import {of}"
            known = of or module.partition(".")[0]
            self.imports.add(plain if name == known else f"{plain} as {name}")
            return
        if not of or of not in {**_module(module).definitions, **_module(module).imports}:
            raise NoSource(f"{name} is a module of the package")
        if name != of:
            raise NoSource(f"{of} of {module} goes by another name")
        self.add(_module(module), of)


def source_of(function: Callable[..., Any]) -> str:
    """A module's text that defines `function`, by its own name, and all that it uses.

    Raises `NoSource` for a function that is not defined at the top of a module of fi_ffi's, or
    that uses what is not.
    """
    name, home = getattr(function, "__qualname__", ""), getattr(function, "__module__", "")
    if not f"{home}.".startswith(_PACKAGE) or name not in _module(home).definitions:
        raise NoSource(f"{function!r} is not defined at the top of a module")
    text = _Text()
    text.add(_module(home), name)
    parts = ["\n".join(["from __future__ import annotations", "", *sorted(text.imports)])]
    return "\n\n\n".join([*parts, *text.parts]) + "\n"
