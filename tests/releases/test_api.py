"""FlashInfer's names against the table of names: none lacks a row, none is invented."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator, Mapping

import pytest

from fi_ffi.catalogue.api_map import release

from tests.records.test_api_map import IMPORTS, NAMES, RECORD, label

# Packages of FlashInfer's whose `__init__` exports are for its users.
PACKAGES = (
    "attention", "comm", "cudnn", "cute_dsl", "dsv3_ops", "fused_moe", "gemm", "grouped_mm",
    "logits_processor", "mamba", "mla", "moe_ep", "parallel_attention", "quantization",
)  # fmt: skip

Modules = Mapping[str, ast.Module]


@pytest.fixture(scope="module")
def modules(release_wheel) -> Modules:
    """FlashInfer's Python, by the modules' names."""
    wheel = release_wheel(release())
    return {
        f"flashinfer/{name}".removesuffix(".py").removesuffix("/__init__").replace("/", "."):
        ast.parse(wheel.text(name))
        for name in wheel.members
        if name.endswith(".py")
    }  # fmt: skip


def bound(tree: ast.Module) -> Iterator[str]:
    """The names that a module binds, whatever they hang on."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.ImportFrom, ast.Import)):
            yield from ((alias.asname or alias.name) for alias in node.names)
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def exported(tree: ast.Module) -> set[str]:
    """What a package's `__init__` takes from its modules: all, or what it says."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            with contextlib.suppress(ValueError):  # one that is put together of others
                return {*ast.literal_eval(node.value)}
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }


def marked(tree: ast.Module) -> set[str]:
    """The functions and classes that are marked as FlashInfer's interface."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            parts: list[ast.AST] = [node, *node.body]
        elif isinstance(node, ast.FunctionDef):
            parts = [node]
        else:
            continue
        decorators = [d for part in parts for d in getattr(part, "decorator_list", ())]
        if any("flashinfer_api" in ast.unparse(d) for d in decorators):
            found.add(node.name)
    methods = {
        each.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for each in node.body
        if isinstance(each, ast.FunctionDef)
    }
    return found - methods


def is_public(name: str) -> bool:
    """Whether a name is for users: compilers' parts, versions and modules are not."""
    return not name.startswith(("_", "gen_")) and name not in ("*", "__version__")


def test_every_name_is_flashinfers(modules):
    for row in NAMES:
        assert row.section in modules, f"no module {row.section}"
        names = {*bound(modules[row.section])}
        stars = "*" in names and any(
            row.name in bound(tree)
            for name, tree in modules.items()
            if name.startswith(f"{row.section}.")
        )
        assert row.name in names or stars, f"{label(row)} is not there"


def test_entries_that_engines_take_are_flashinfers(interface):
    """Of the release that they were read with."""
    exported = {key.name for key in interface(RECORD["flashinfer"]).exports}
    for row in IMPORTS:
        for entry in row.entries:
            assert entry.rpartition(".")[2] in exported, f"{label(row)}: no {entry}"


def test_no_public_name_lacks_a_row(modules):
    known = {row.name for row in NAMES}
    packages = ["flashinfer", *(f"flashinfer.{name}" for name in PACKAGES)]
    wanted = {name for package in packages for name in exported(modules[package])}
    for module, tree in modules.items():
        if ".jit." not in module:
            wanted |= marked(tree)
    here = {name.rpartition(".")[2] for name in modules}
    lacking = sorted(name for name in wanted - known - here if is_public(name))
    assert not lacking, f"no row of fi_ffi/catalogue/data/flashinfer-api.toml: {', '.join(lacking)}"
