"""The text of a definition's reference: an op's formula, and `run` around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fi_ffi.cli.tracing.source import NoSource, source_of

# `run` takes and gives torch's tensors, or arrays that numpy knows.
_AROUND = '''
# The formula's names for the inputs, and what is given to it beside them.
_TRACE_INPUTS = {inputs}
_TRACE_CONSTANTS = {constants}
_TRACE_OUTPUTS = {outputs}
_TRACE_AXES = {axes}
_TRACE_SIZES = {sizes}
_TRACE_LARGEST = {largest}


def _trace_array(x):
    """A tensor's values in float64{or_bits}."""
    if hasattr(x, "detach"):
        {torch_import}

        x = x.detach().cpu().contiguous()
{convert_torch}
    x = np.asarray(x)
{convert_numpy}


def _trace_result(value, dtype, like):
    if hasattr(like, "detach"):
        {torch_import}

        made = torch.from_numpy(np.ascontiguousarray(value))
        kind = getattr(torch, dtype)
        return {back_torch}.to(like.device)
    import ml_dtypes

    return np.asarray(value).astype(getattr(ml_dtypes, dtype, dtype))


def _trace_size(axis, sizes):
    """The size of an axis such as "h", "128", "b+1" or "2*h"."""
    total = 0
    for term in axis.split("+"):
        times, star, name = term.rpartition("*")
        size = int(name) if name.isdigit() else sizes[name]
        total += size * int(times) if star else size
    return total


def run({parameters}):
    given = dict(zip(_TRACE_INPUTS.values(), ({parameters},)))
    arrays = {{name: _trace_array(x) for name, x in given.items() if x is not None}}
    sizes = dict(_TRACE_SIZES)
    for name, array in arrays.items():
        for axis, size in zip(_TRACE_AXES.get(name, ()), array.shape):
            if axis.isidentifier():
                sizes[axis] = size
    for name, _ in _TRACE_OUTPUTS:
        if name not in arrays:
            arrays[name] = np.zeros([_trace_size(axis, sizes) for axis in _TRACE_AXES[name]])
    found = {formula}({{**_TRACE_CONSTANTS, **arrays, "largest": _TRACE_LARGEST}})
    like = next(x for x in given.values() if hasattr(x, "shape"))
    results = [_trace_result({value}, dtype, like) for name, dtype in _TRACE_OUTPUTS]
    return results[0] if len(results) == 1 else tuple(results)
'''
_WIDE = {
    "or_bits": "",
    "convert_torch": "        return x.to(torch.float64).numpy()",
    "convert_numpy": "    return x.astype(np.float64)",
    "back_torch": "made.to(kind)",
    "value": "found[name][0]",
}
# Of ops that only move what they are given.
_BITS = {
    "or_bits": ", or its bits where they are only moved",
    "convert_torch": (
        "        if x.is_floating_point():\n"
        "            bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}\n"
        "            x = x.view(bits[x.element_size()])\n"
        "        return x.numpy()"
    ),
    "convert_numpy": "    return x",
    "back_torch": "made.view(kind)",
    "value": "found[name]",
}


@dataclass(frozen=True)
class Reference:
    """What `run` is made of; `inputs` are the definition's names, in order, and the formula's."""

    formula: Callable[..., Any] | None
    moves: bool
    inputs: Mapping[str, str]
    constants: Mapping[str, Any]
    outputs: list[tuple[str, str]]
    shapes: Mapping[str, list[str]]
    sizes: Mapping[str, int]
    largest: Mapping[str, float]

    def text(self) -> str:
        """Python that defines `run`; raises `NoSource` where there is no formula."""
        if self.formula is None:
            raise NoSource("the op has no formula, and so no reference to write down")
        source = source_of(self.formula)
        if "_trace_" in source:
            raise NoSource(f"{self.formula!r} has names that start as those around it do")
        if "import numpy as np" not in source:
            source = source.replace("annotations\n", "annotations\n\nimport numpy as np", 1)
        around = _AROUND.format(
            formula=self.formula.__name__,
            parameters=", ".join(self.inputs),
            inputs=repr(dict(self.inputs)),
            constants=repr(dict(self.constants)),
            outputs=repr(self.outputs),
            axes=repr({name: list(axes) for name, axes in self.shapes.items()}),
            sizes=repr(dict(self.sizes)),
            largest=repr(dict(self.largest)),
            torch_import="import torch",  # in the text alone: this package imports it nowhere
            **(_BITS if self.moves else _WIDE),
        )
        return f"{source}\n{around}"
