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

import importlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fi_ffi.abi import library
from fi_ffi.abi.function import Entry, register
from fi_ffi.abi.signature import Signature
from fi_ffi.errors import KernelNotFoundError
from fi_ffi.families import FAMILIES
from fi_ffi.loader import generation, runtime
from fi_ffi.ops.call.providers import release_in_force
from fi_ffi.ops.call.releases import is_in
from fi_ffi.reference import attention
from fi_ffi.reference.arrays import bits, over_arrays, store_changed
from fi_ffi.reference.formula import Formula, Move, as_inputs

# What a module was compiled for, if its kernels depend on it: names and values.
Compiled = tuple[tuple[str, object], ...]

# What a module was compiled for that changes results and is no argument of its entries.
_IN_NAMES = ("pos_encoding_mode", "use_sliding_window", "use_logits_soft_cap")
# Releases whose math.cuh has IEEE's infinity in place of 5e4.
_HAVE_INFINITY = ">=0.7.0"

_FAMILIES = tuple(
    importlib.import_module(f"fi_ffi.reference.{name}")
    for name in (*FAMILIES, "moe", "comm", "comm_fusion")
)
EXACT: dict[str, Formula] = {}
MOVES: dict[str, Move] = {}
for _family in _FAMILIES:
    EXACT |= getattr(_family, "EXACT", {})
    MOVES |= getattr(_family, "MOVES", {})
_lock = threading.Lock()
library.renew_after_fork(globals(), "_lock", threading.Lock)
_entries: dict[tuple[str, str, str, Compiled, str, tuple[str, ...]], Entry] = {}


def kernels() -> dict[str, list[str]]:
    """Return the entries that have a kernel of their own, by module."""
    found: dict[str, set[str]] = {module: {*names} for module, names in attention.KERNELS.items()}
    for family in _FAMILIES:
        for module, names in getattr(family, "KERNELS", {}).items():
            found.setdefault(module, set()).update(names)
    return {module: sorted(names) for module, names in found.items()}


def entry(
    module: str,
    signature: Signature,
    kernel: str,
    compiled: Compiled = (),
    formula: str = "",
    names: Sequence[str] = (),
) -> Entry:
    """Return the numpy `kernel` of a module, as a TVM-FFI function with that signature.

    `compiled` is for the attention families: see `attention.reference_kernel`. If the entry has no
    kernel, its formula serves, which takes its arguments by `names`.
    """
    key = (module, kernel, str(signature), compiled, formula, tuple(names))
    with _lock:
        if key not in _entries:
            function = _function(module, kernel, compiled) or from_formula(formula, names)
            if function is None:
                raise KernelNotFoundError(
                    f"{module}.{kernel} has no reference kernel: it runs on CUDA only"
                )
            runtime.ensure_tvm_ffi()
            words = (module, kernel, *(f"{word}_{value}" for word, value in compiled))
            name = ".".join(("fi_ffi.reference", *words))
            _entries[key] = register(name, signature, over_arrays(function))
        return _entries[key]


@generation.cached
def compiled_for(module: str) -> Compiled:
    """Return what a module of a family was compiled for, from its name and the release in force."""
    from fi_ffi.loader import uris  # imported late: only attention needs module names

    release = release_in_force()
    parsed = uris.parse(module)
    if parsed is None:
        return ()
    found = tuple((name, parsed.params[name]) for name in _IN_NAMES if name in parsed.params)
    return (*found, ("has_infinity", True)) if is_in(release, _HAVE_INFINITY) else found


def _function(module: str, kernel: str, compiled: Compiled) -> Callable[..., Any] | None:
    if module in attention.KERNELS:
        if kernel not in attention.KERNELS[module]:
            return None
        return attention.reference_kernel(module, kernel, **dict(compiled))
    found = (getattr(family, "KERNELS", {}).get(module, {}).get(kernel) for family in _FAMILIES)
    return next(filter(None, found), None)


def from_formula(formula: str, names: Sequence[str]) -> Callable[..., Any] | None:
    """Return a kernel that computes an op's formula and rounds once; None if there is no formula.

    `names` are the formula's names of the arguments, "" for an argument that the op lacks.
    """
    exact, move = EXACT.get(formula), MOVES.get(formula)
    if exact is None and move is None:
        return None

    def kernel(*values: Any) -> None:
        given = dict(zip(names, values, strict=True))
        given = {name: value for name, value in given.items() if name and value is not None}
        if move is not None:
            arrays = {name: _as_moved(value) for name, value in given.items()}
            for name, after in move(arrays).items():
                store_changed(arrays[name], after, arrays[name])
        elif exact is not None:
            inputs = as_inputs(given)
            for name, expected in exact(inputs).items():
                value = expected[0] if isinstance(expected, tuple) else expected.value()
                store_changed(given[name], value, inputs[name])

    return kernel


def _as_moved(value: Any) -> Any:
    """View values as their bits: conversions of numpy's extension dtypes may change a NaN."""
    is_moved = isinstance(value, np.ndarray) and value.dtype.kind not in "iub"
    return bits(value) if is_moved else value
