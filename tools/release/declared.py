"""Compares every entry that rows and interfaces declare with what a release's sources declare."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fi_ffi.abi.signature import Signature
from fi_ffi.loader.distributions import is_in
from fi_ffi.ops.call.row import Row
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.matmul import rows as matmul
from fi_ffi.ops.moe import interface as moe
from fi_ffi.ops.moe import lora
from fi_ffi.ops.plans.rows import FORMS
from fi_ffi.ops.states import mamba
from fi_ffi.ops.table import comm
from tools.release.exports import Function
from tools.release.interface import VARIANTS, Interface, Key, Variant

_DEEPGEMM = "csrc/fused_moe/cutlass_backend/deepgemm_jit_setup.cu"

# Answers: the row of the release takes what its binding takes (FITS) or something else (DIFFERS);
# the release has a row but no such entry (GONE), an entry but no row (UNCOVERED), or neither
# (ABSENT).
FITS, DIFFERS, GONE, UNCOVERED, ABSENT = "fits", "differs", "gone", "uncovered", "absent"
WRONG = (DIFFERS, GONE)
# Names in rows, with the names that bindings use for the same argument.
_ALIASES = {
    "input": ("self",), "kv_layout": ("kv_layout_code", "layout", "layout_code"),
    "out": ("output",), "fa": ("_fa",), "reg_buffer": ("_reg_buffer",), "algorithm": ("variant",),
}  # fmt: skip
# Exported entries without a row: the start of the name, the releases, the reason.
REFUSED: tuple[tuple[str, str, str], ...] = (
    ("fused_moe_90.interleave_", ">=0.6.3", "weights are laid out in another way"),
    ("selective_state_update", "<0.6.7", "its kernels take fewer tokens and dtypes"),
)


def why_refused(name: str, release: str) -> str:
    """Return why an entry has no row of a release, or "" if no reason is recorded."""
    found = (why for start, of, why in REFUSED if name.startswith(start) and is_in(release, of))
    return next(found, "")


@dataclass(frozen=True)
class Form:
    """The form of an entry in some releases (a version specifier); `names` are the row's."""

    releases: str
    signature: Signature
    names: tuple[str, ...]

    def takes(self, function: Function) -> bool:
        """Whether a function has the same parameter types, compatible names, and the same
        result."""
        return self.signature.same_types(function.signature) and all(
            theirs in (ours, "", *_ALIASES.get(ours, ()))
            for ours, theirs in zip(self.names, function.names, strict=True)
        )


@dataclass(frozen=True)
class Declared:
    """An entry with a row or an interface here: its binding, and its forms."""

    name: str
    module: str
    key: Key
    forms: tuple[Form, ...]

    def form(self, release: str) -> Form | None:
        """Return the form for a release, or None."""
        return next((form for form in self.forms if is_in(release, form.releases)), None)

    def function(self, interface: Interface) -> Function | None:
        """Return what the release's binding declares, or None."""
        source, variant, name = self.key
        found = interface.of(source, variant, name)
        if found is None and "*." in name:  # a method of any class
            methods = {
                key.name.rpartition(".")[2]: functions[0]
                for key, functions in interface.exports.items()
                if (key.source, key.variant) == (source, variant) and "." in key.name
            }
            found = methods.get(name.removeprefix("*."))
        return found

    def answer(self, interface: Interface) -> str:
        """Compare the entry's form for a release with the release's binding."""
        form, function = self.form(interface.release), self.function(interface)
        if function is None:
            return ABSENT if form is None else GONE
        if form is not None:
            return FITS if form.takes(function) else DIFFERS
        # Another row may declare the same binding, with the only form that this release has.
        others = (each for each in declared() if each.key == self.key and each is not self)
        return ABSENT if any(each.form(interface.release) for each in others) else UNCOVERED


def _entry(row: Row, variant: str = "", label: str = "") -> tuple[str, str, Key]:
    name = f"*.{row.symbol}" if row.factory else row.symbol
    return label or row.name, row.module, Key(row.source, variant, name)


def _form(row: Row) -> Form:
    return Form(row.releases, row.signature, tuple(arg.name for arg in row.args))


def _of_rows(rows: Iterable[Row]) -> Iterator[tuple[tuple[str, str, Key], Form]]:
    for row in rows:
        if not row.is_in_python and not row.distribution:
            yield _entry(row), _form(row)


def _of_attention() -> Iterator[tuple[tuple[str, str, Key], Form]]:
    for first, forms in FORMS.items():
        words = first.variant.replace("_", " ").strip()
        backend = "fa3" if "fa3" in first.variant else "fa2"
        named = Variant(first.module, backend, "fp8" in first.variant).name
        variant = named if first.source in VARIANTS else ""
        if first.module.startswith("xqa"):
            variant = first.module
        label = f"{first.name} ({words})" if words else first.name
        for form in forms:
            yield _entry(form, variant, label), _form(form)


def _of_states() -> Iterator[tuple[tuple[str, str, Key], Form]]:
    for kind in ("one", "steps", "sequences"):
        row = mamba.row_of(kind, 1, 2)
        yield _entry(row, label=f"{row.name} ({kind})"), _form(row)


def _of_moe() -> Iterator[tuple[tuple[str, str, Key], Form]]:
    for one in moe.INTERFACES:
        methods = {f"*.{name}": function for name, function in one.methods.items()}
        for name, function in {"init": one.init, **methods}.items():
            label = f"{moe.MODULE}.{name.removeprefix('*.')}"
            form = Form(one.releases, function.signature, function.names)
            yield (label, moe.MODULE, Key(moe.SOURCE, "", name)), form
    for source, function, releases in (
        (moe.SOURCE, moe.INTERLEAVE, ">=0.6.10"),
        (_DEEPGEMM, moe.SET_INCLUDE_DIRS, ">=0.6.3"),
    ):
        name = function.signature.name
        form = Form(releases, function.signature, function.names)
        yield (f"{moe.MODULE}.{name}", moe.MODULE, Key(source, "", name)), form


def _of_comm() -> Iterator[tuple[tuple[str, str, Key], Form]]:
    yield from _of_rows(comm.OPS)
    for one in comm.SETUP:
        name = one.signature.name
        form = Form(one.releases, one.signature, one.names)
        yield (name, one.module, Key(one.source, "", name)), form


@functools.cache
def declared() -> tuple[Declared, ...]:
    """Return all entries, each with its forms in all releases."""
    found: dict[tuple[str, str, Key], list[Form]] = {}
    everything = (
        _of_rows(row for op in OPS.values() for row in op.rows), _of_attention(), _of_states(),
        _of_rows(matmul.ROWS), _of_rows((*lora.SHRINK, *lora.EXPAND)), _of_moe(), _of_comm(),
    )  # fmt: skip
    for part in everything:
        for entry, form in part:
            found.setdefault(entry, []).append(form)
    merged: dict[tuple[str, Key], Declared] = {}
    for (name, module, key), forms in found.items():
        merged[name, key] = Declared(name, module, key, tuple(forms))
    return tuple(merged.values())


def answers(interface: Interface) -> dict[Declared, str]:
    """Return each entry's answer for a release."""
    return {entry: entry.answer(interface) for entry in declared()}


def without_row(interface: Interface) -> list[Key]:
    """Return the exports of a release that no entry here declares."""
    named = {(entry.key.source, entry.key.name.rpartition("*.")[2]) for entry in declared()}
    return [
        key for key in (*interface.exports, *interface.unread)
        if (key.source, key.name.rpartition(".")[2]) not in named
    ]  # fmt: skip
