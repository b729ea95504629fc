"""Kernels in numpy behind the same ABI, which run where there is no GPU.

Each is registered as a TVM-FFI function, so that a call on CPU tensors goes through the same
checks, packing, library call and error decoding as one on a GPU. Most are an op's formula in
float64, rounded once; the results of a GPU are compared with the same formula. The kernels in
`KERNELS` have no formula, or round in between.

`EXACT` has the ops in float64, written from their definition and not from the kernels. For every
tensor that the op writes, a formula returns the value and the magnitude that rounding errors scale
with. `largest` in its inputs has the largest value of each tensor's dtype, if there is one. Ops
that only move elements (`MOVES`) take them unchanged, and return the written tensors as they must
be, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from fi_ffi.abi import library
from fi_ffi.abi.function import Entry, register
from fi_ffi.abi.signature import Signature
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import ArgumentError, KernelNotFoundError
from fi_ffi.families import FAMILIES
from fi_ffi.loader import generation, tvm_ffi
from fi_ffi.loader.distributions import is_in
from fi_ffi.ops.call.releases import release_in_force
from fi_ffi.ops.call.row import Row
from fi_ffi.reference.arrays import as_array, bits, over_arrays, store_changed
from fi_ffi.reference.formula import Formula, Move, as_inputs
from fi_ffi.reference.indices import Facts, judge, judged

# What a module was compiled for, if its kernels depend on it: names and values.
Compiled = tuple[tuple[str, object], ...]

# What a module was compiled for that changes results and is no argument of its entries.
_IN_NAMES = ("pos_encoding_mode", "use_sliding_window", "use_logits_soft_cap")
# Releases whose math.cuh has IEEE's infinity in place of 5e4.
_HAVE_INFINITY = ">=0.7.0"

_NAMES = (*FAMILIES, "moe", "comm", "comm_fusion")
EXACT: dict[str, Formula]
MOVES: dict[str, Move]
_entries: dict[tuple[str, str, str, Compiled, str, tuple[str, ...], Row | None], Entry] = {}


def _families(first: str = "") -> Iterator[ModuleType]:
    """Import the families' modules as they are asked for, the one of this name first.

    All of them together take longer than a call does.
    """
    for name in sorted(_NAMES, key=lambda name: name != first):
        yield library.import_whole(f"fi_ffi.reference.{name}")


def __getattr__(name: str) -> Any:
    """Return `EXACT` or `MOVES`, which are put together when they are asked for."""
    if name not in ("EXACT", "MOVES"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _of_all(name)


@functools.cache
def _of_all(name: str) -> dict[str, Any]:
    formulas: dict[str, Any] = {}
    for family in _families():
        formulas |= getattr(family, name, {})
    return formulas


def kernels() -> dict[str, list[str]]:
    """Return the entries that have a kernel of their own, by module."""
    attention = library.import_whole("fi_ffi.reference.attention")
    entries: dict[str, set[str]] = {module: {*names} for module, names in attention.KERNELS.items()}
    for family in _families():
        for module, names in getattr(family, "KERNELS", {}).items():
            entries.setdefault(module, set()).update(names)
    return {module: sorted(names) for module, names in entries.items()}


def entry(
    module: str,
    signature: Signature,
    kernel: str,
    compiled: Compiled = (),
    formula: str = "",
    names: Sequence[str] = (),
    row: Row | None = None,
) -> Entry:
    """Return the numpy `kernel` of a module, as a TVM-FFI function with that signature.

    `compiled` is for the attention families: see `attention.reference_kernel`. If the entry has no
    kernel, its formula serves, which takes its arguments by `names`. The kernel refuses indices
    that name no place, as the `row` states it.
    """
    has_indices = row is not None and any(arg.index for arg in row.tensors)
    judged_by = row if has_indices else None
    key = (module, kernel, str(signature), compiled, formula, tuple(names), judged_by)
    found = _entries.get(key)
    if found is None:
        function = _function(module, kernel, compiled, formula, names)
        if function is None:
            raise KernelNotFoundError(
                f"{module}.{kernel} has no reference kernel: it runs on CUDA only"
            )
        tvm_ffi.ensure_tvm_ffi()
        words = (module, kernel, *(f"{word}_{value}" for word, value in compiled))
        name = ".".join(("fi_ffi.reference", *words))
        # No lock: a `__del__` on this thread may ask too. One of two alike serves all.
        facts = _facts(module, kernel) if has_indices else None
        made = register(name, signature, over_arrays(judged(function, judged_by, facts)))
        found = _entries.setdefault(key, made)
    return found


def judge_descs(row: Row, descs: Mapping[str, TensorDesc], **sizes: int) -> None:
    """Refuse indices outside their tensors, in tensors of the CPU; see `indices.judge`."""
    try:
        judge(row, {name: as_array(desc) for name, desc in descs.items()}, None, **sizes)
    except ArgumentError as error:
        raise ArgumentError(
            row.name, error.argument, got=error.got, expected=error.expected
        ) from None


def _facts(module: str, kernel: str) -> Facts | None:
    """Return what the conditions of a family's rows name, if it is one of attention."""
    if module in _NAMES:
        return None
    planned = library.import_whole("fi_ffi.reference.attention.planned")
    found: Facts | None = planned.facts_of(module, kernel)
    return found


@generation.cached
def compiled_for(module: str) -> Compiled:
    """Return what a module of a family was compiled for, from its name and the release in force."""
    from fi_ffi.module_names import parse  # imported late: only attention needs module names

    release = release_in_force()
    parsed = parse(module)
    if parsed is None:
        return ()
    options = tuple((name, parsed.params[name]) for name in _IN_NAMES if name in parsed.params)
    return (*options, ("has_infinity", True)) if is_in(release, _HAVE_INFINITY) else options


def _function(
    module: str, kernel: str, compiled: Compiled, formula: str, names: Sequence[str]
) -> Callable[..., Any] | None:
    """Return a module's kernel, or else what computes the formula."""
    if module not in _NAMES:
        attention = library.import_whole("fi_ffi.reference.attention")
        if module in attention.KERNELS:
            if kernel not in attention.KERNELS[module]:
                return None
            of_attention: Callable[..., Any] = attention.reference_kernel(
                module, kernel, **dict(compiled)
            )
            return of_attention
    for family in _families(module):
        own: Callable[..., Any] | None = getattr(family, "KERNELS", {}).get(module, {}).get(kernel)
        exact, move = (getattr(family, kind, {}).get(formula) for kind in ("EXACT", "MOVES"))
        if found := own or _from_formula(exact, move, names):
            return found
    return None


def from_formula(formula: str, names: Sequence[str]) -> Callable[..., Any] | None:
    """Return a kernel that computes an op's formula and rounds once; None if there is no formula.

    `names` are the formula's names of the arguments, "" for an argument that the op lacks.
    """
    return _from_formula(_of_all("EXACT").get(formula), _of_all("MOVES").get(formula), names)


def _from_formula(
    exact: Formula | None, move: Move | None, names: Sequence[str]
) -> Callable[..., Any] | None:
    if exact is None and move is None:
        return None

    def kernel(*values: Any) -> None:
        arguments = dict(zip(names, values, strict=True))
        arguments = {name: value for name, value in arguments.items() if name and value is not None}
        if move is not None:
            arrays = {name: _as_moved(value) for name, value in arguments.items()}
            for name, after in move(arrays).items():
                store_changed(arrays[name], after, arrays[name])
        elif exact is not None:
            inputs = as_inputs(arguments)
            for name, expected in exact(inputs).items():
                value = expected[0] if isinstance(expected, tuple) else expected.value()
                store_changed(arguments[name], value, inputs[name])

    return kernel


def _as_moved(value: Any) -> Any:
    """View values as their bits: conversions of numpy's extension dtypes may change a NaN."""
    is_moved = isinstance(value, np.ndarray) and value.dtype.kind not in "iub"
    return bits(value) if is_moved else value
