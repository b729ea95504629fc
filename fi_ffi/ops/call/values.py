"""Rows compiled for one module of a family, and their arguments by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fi_ffi.abi.tensor import Device, TensorKind
from fi_ffi.loader import generation
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.call.prepared import Prepared, prepare_call
from fi_ffi.ops.call.row import Row, Scalar

if TYPE_CHECKING:
    from typing_extensions import Self

_compiled_rows: dict[tuple[object, ...], CompiledRow] = {}


def compiled_row(
    row: Row,
    module: str,
    dtypes: Mapping[str, tuple[str, ...]],
    op: str,
    device: Device | None = None,
    *,
    names: Mapping[str, str] = MappingProxyType({}),
    bound: Mapping[str, TensorKind | None] = MappingProxyType({}),
    not_less: tuple[tuple[str, str], ...] = (),
    **options: tuple[str, ...],
) -> CompiledRow:
    """Compile a row for a module of these dtypes, with options of `CompileOptions`.

    All calls of a generation of kernels with the same arguments share the result.
    """
    kinds, others = tuple(bound.items()), tuple(options.items())
    key = (row, module, op, device, kinds, not_less, others, generation.number)
    compiled = _compiled_rows.get(key)
    if compiled is None:
        own = {name: types for name, types in dtypes.items() if name in row.dtypes}
        pairs = (f"{more} >= {less}" for more, less in not_less)
        form = replace(row, dtypes={**row.dtypes, **own}, requires=(*row.requires, *pairs))
        options_: Any = {"op": op, "names": names, "bound": bound, "device": device, **options}
        compiled = CompiledRow(form, module, follows=False, **options_)
        compiled = _compiled_rows.setdefault(key, compiled)
    return compiled


class Values:
    """The arguments of a row's call: a list in the ABI's order, filled by name.

    Scalars have their value in `neutral` until they are set; all else is None.
    """

    __slots__ = ("compiled", "index", "op", "values")

    def __init__(
        self, op: str, compiled: CompiledRow, neutral: Mapping[str, object] | None = None
    ) -> None:
        self.op, self.compiled = op, compiled
        scalars = {arg.name for arg in compiled.row.given if isinstance(arg, Scalar)}
        names = compiled.options.packed_names
        start = {} if neutral is None else {name: neutral.get(name) for name in scalars}
        self.index = {name: i for i, name in enumerate(names)}
        self.values: list[Any] = [start.get(name) for name in names]

    def fresh(self) -> Self:
        """Copy the values, to fill the copy for one call."""
        return self.of(self.values.copy())

    def of(self, values: list[Any]) -> Self:
        """Return an object for the same row with these values."""
        copy: Self = object.__new__(type(self))
        copy.op, copy.compiled, copy.index, copy.values = self.op, self.compiled, self.index, values
        return copy

    def call(self, stream: object) -> None:
        """Call the row's entry with the values."""
        self.compiled.call(None, *self.values, stream=stream)

    def prepare(self, stream: object) -> Prepared:
        """Prepare a call of the row's entry with the values.

        Its `update` takes the caller's names.
        """
        values = dict(zip(self.index, self.values, strict=True))
        return prepare_call(self.compiled, values, stream, by_caller=True)

    def put(self, **values: object) -> None:
        """Set arguments by the binding's names; ignore names that the row lacks."""
        for name, value in values.items():
            if name in self.index:
                self.values[self.index[name]] = value
