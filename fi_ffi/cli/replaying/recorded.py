"""A dumped call, read and checked: see docs/call-log.md for what is in its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fi_ffi.abi.tensor import DTYPES, DType
from fi_ffi.errors import ArtifactError
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.row import Row
from fi_ffi.ops.watch import safetensors
from fi_ffi.ops.watch.dump import AFTER, BEFORE, FORMAT, PLAN
from fi_ffi.reference.arrays import Array

# Bytes from the first element to past the last, of all tensors: so many times what the files
# hold, for tensors may lie in larger ones, and so many where the files are small.
_MOST_SPREAD, _ALWAYS = 64, 2**26


@dataclass(frozen=True)
class RecordedTensor:
    """A tensor argument, and its elements before the call, if they were kept."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    address: int
    reads: bool
    writes: bool
    is_scratch: bool
    elements: Array | None

    @property
    def span(self) -> int:
        """Bytes from the first element to past the last."""
        if 0 in self.shape:
            return 0
        steps = zip(self.strides, self.shape, strict=True)
        return (sum(stride * (size - 1) for stride, size in steps) + 1) * self.dtype.itemsize


@dataclass(frozen=True)
class Recorded:
    """A call as it was made."""

    path: Path
    document: Mapping[str, Any]
    row: Row | None
    tensors: dict[str, RecordedTensor]
    # Numbers and words; None for a tensor that was not there.
    values: dict[str, Any]
    # What the call's plan was planned with; None for a call that is no plan's.
    plan: Recorded | None = None
    # The tensors that were written, after the call; None where it did not come so far.
    after: dict[str, Array] | None = None
    result: Any = None

    @property
    def module(self) -> str:
        return str(self.document.get("module", ""))

    @property
    def device(self) -> str:
        return str(self.document.get("device", "cpu"))


def load(path: Path) -> Recorded:
    """A dumped call, by either of its files or by what their names have in common.

    Raises `ArtifactError` for what is no dump of this version's, and `OSError`.
    """
    stem = str(path).removesuffix(BEFORE).removesuffix(AFTER)
    before = Path(stem + BEFORE)
    data, words = safetensors.read(before)
    _check_format(before, words)
    document = _json(before, words, "call")
    planned = document.get("plan") if isinstance(document, dict) else None
    plan = None
    if planned is not None:
        arrays = {name[len(PLAN) :]: of for name, of in data.items() if name.startswith(PLAN)}
        plan = _recorded(before, planned, arrays)
    made = _recorded(before, document, data, plan)
    _check_spans(made)
    after_path = Path(stem + AFTER)
    if not after_path.exists():
        return made
    after, words = safetensors.read(after_path)
    _check_format(after_path, words)
    arrays_after = {
        name: _elements(after_path, name, made.tensors[name].dtype, made.tensors[name].shape, of)
        for name, of in after.items()
        if name in made.tensors
    }
    fields = {**made.__dict__, "after": arrays_after}
    return Recorded(**fields | {"result": _json(after_path, words, "result")})


def _check_format(path: Path, words: Mapping[str, str]) -> None:
    found = words.get("format")
    if found != FORMAT:
        raise ArtifactError(f"{path}: its format is {found!r:.60}, and this reads {FORMAT!r}")


def _json(path: Path, words: Mapping[str, str], name: str) -> Any:
    try:
        return json.loads(words[name])
    except (KeyError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: its {name} is no JSON: {error!r}") from error


def _recorded(
    path: Path, document: Any, data: Mapping[str, memoryview], plan: Recorded | None = None
) -> Recorded:
    try:
        tensors: dict[str, RecordedTensor] = {}
        values: dict[str, Any] = {}
        for of in document["arguments"]:
            name = str(of["name"])
            if "dtype" in of:
                tensors[name] = _tensor(path, name, of, data.get(name))
            else:
                values[name] = of.get("value")
        row = document.get("row")
        found = None if row is None else row_of(path, row)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path}: the call is not described: {error!r}") from error
    return Recorded(path, document, found, tensors, values, plan)


def _tensor(path: Path, name: str, of: Any, data: memoryview | None) -> RecordedTensor:
    dtype, shape, strides = DTYPES[of["dtype"]], tuple(of["shape"]), tuple(of["strides"])
    numbers = [*shape, *strides, of["address"]]
    if len(shape) != len(strides) or not all(type(n) is int and 0 <= n < 2**64 for n in numbers):
        raise ArtifactError(f"{path}: {name} has no layout that can be: {of!r:.300}")
    elements = None if data is None else _elements(path, name, dtype, shape, data)
    reads, writes, scratch = (bool(of[flag]) for flag in ("reads", "writes", "scratch"))
    return RecordedTensor(
        name, dtype, shape, strides, of["address"], reads, writes, scratch, elements
    )


def _check_spans(made: Recorded) -> None:
    """`ArtifactError` where the tensors take far more memory than they have elements."""
    calls = [made] if made.plan is None else [made, made.plan]
    kept = [of for call in calls for of in call.tensors.values() if not of.is_scratch]
    asked = sum(of.span for of in kept)
    held = sum(of.elements.nbytes for of in kept if of.elements is not None)
    if asked > max(_MOST_SPREAD * held, _ALWAYS):
        widest = max(kept, key=lambda of: of.span)
        raise ArtifactError(
            f"{made.path}: its tensors span {asked} bytes, {widest.name} {widest.span} of them, "
            f"and it has {held} bytes of elements: {_MOST_SPREAD} times as much is the most"
        )


def _elements(
    path: Path, name: str, dtype: DType, shape: tuple[int, ...], data: memoryview
) -> Array:
    count = dtype.itemsize
    for size in shape:
        count *= size
    if len(data) != count:
        raise ArtifactError(f"{path}: {name} has {len(data)} bytes, and {count} elements' need")
    return np.frombuffer(data, dtype.numpy).reshape(shape)


def row_of(path: Path, described: Mapping[str, Any]) -> Row:
    """The row of a dumped call; `ArtifactError` where this version has none that is the same."""
    from fi_ffi.ops.attention.rows import FORMS

    forms = [form for forms in FORMS.values() for form in forms]
    rows = [row for op in OPS.values() for row in op.rows] + forms
    wanted = tuple(described[key] for key in ("name", "variant", "signature"))
    for row in rows:
        if (row.name, row.variant, str(row.signature)) == wanted:
            return row
    raise ArtifactError(f"{path}: this version of fi_ffi has no row {' '.join(map(str, wanted))}")
