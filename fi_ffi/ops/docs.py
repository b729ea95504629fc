"""An op's docstring, from its row."""

from __future__ import annotations

import textwrap

from fi_ffi.ops.row import Row, Scalar, Tensor

_WIDTH = 96


def _argument(arg: Tensor | Scalar) -> str:
    if isinstance(arg, Scalar):
        low = "" if arg.low is None else f", {arg.low} or more"
        default = "" if arg.default is None else f" = {arg.default!r}"
        return f"{arg.name} ({arg.type.__name__}{default}{low}): {arg.doc}."
    how = ["contiguous"] if arg.contiguous else []
    how += ["written"] if arg.writes else []
    shape = ", ".join(arg.axis_names)
    return f"{arg.name} ({'; '.join([f'[{shape}] {arg.dtype}', *how])}): {arg.doc}."


def _indented(text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 8)


def docstring(row: Row) -> str:
    """Shapes, dtypes, errors and the upstream source of an op."""
    dtypes = "; ".join(f"{name} is {' or '.join(types)}" for name, types in row.dtypes.items())
    first = next(iter(row.dtypes))
    paragraphs = (
        f"{dtypes}. All tensors are on one device. The last axis has stride 1. Rows are loaded "
        f"gcd({row.vector_bytes} bytes / itemsize of {first}, {row.vector_axis}) elements at a "
        "time: addresses and the other strides are multiples of that. Offsets stay below "
        f"{row.offset_limit} elements. With no rows, nothing is launched.",
        "Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` "
        "where the kernel file has another interface, `KernelError` with the kernel's own words.",
        f"Kernel: `{row.symbol}` of module `{row.module}`, FlashInfer {row.releases}, "
        f"`{row.source}`.",
    )
    stream = "stream: where to launch; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope."
    arguments = "\n".join(map(_indented, [*map(_argument, row.args), stream]))
    blocks = [row.doc, f"Args:\n{arguments}"]
    return "\n\n".join(blocks + [textwrap.fill(text, _WIDTH) for text in paragraphs])
