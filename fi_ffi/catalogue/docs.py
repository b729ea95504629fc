"""Writes an op's docstring from its row."""

from __future__ import annotations

import textwrap

from fi_ffi.ops.call.row import Absent, Arg, IntArray, Row, Scalar, Tensor, TensorArray, Text

_WIDTH = 96


def _argument(arg: Arg) -> str:
    """Describe an argument: its type, its default, and its limits."""
    assert not isinstance(arg, (Absent, TensorArray))
    if isinstance(arg, IntArray):
        return f"{arg.name}: {arg.doc}."
    if isinstance(arg, Tensor):
        return f"{arg.name} ({_kind_of_tensor(arg)}): {arg.doc}."
    default = "" if arg.default is None else f" = {arg.default!r}"
    if not isinstance(arg, Scalar):
        words = f": {' or '.join(map(repr, arg.words))}" if isinstance(arg, Text) else ""
        return f"{arg.name} (str{default}): {arg.doc}{words}."
    limits = "" if arg.low is None else f", {arg.low} or more"
    limits += "" if arg.high is None else f", {arg.high} or less"
    limits += f", a multiple of {arg.multiple_of}" if arg.multiple_of > 1 else ""
    if arg.size_of:
        default = " or None = None"
        limits += f", {'up to ' * arg.or_less}the size of {arg.size_of}"
    limits += f"; ignored if {arg.instead} is given" if arg.instead else ""
    return f"{arg.name} ({arg.type.__name__}{default}{limits}): {arg.doc}."


def _kind_of_tensor(arg: Tensor) -> str:
    how = ["contiguous"] if arg.contiguous else []
    how += ["written"] if arg.writes else []
    how += ["or None"] if arg.may_be_none or arg.or_zeros else []
    how += ["in NHD order"] if arg.kv else []
    how += ["the last two axes transposed in memory"] if arg.transposed else []
    how += ["on the host"] if arg.host else []
    how += ["also on cuda_host"] if arg.mapped else []
    how += [f"one of {arg.parts} parts, side by side"] if arg.parts > 1 else []
    how += [f"aligned to {arg.alignment} bytes"] if arg.alignment > 1 else []
    shape = ", ".join(arg.axis_names)
    shape = f"[{shape}] or [{shape}, 1]" if arg.column else f"[{shape}]"
    return "; ".join([f"{shape} {arg.dtype}", *how])


def _indented(text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 8)


def _limits(row: Row) -> str:
    """Describe the limits of sizes, one sentence each."""
    vector, most = row.vector, 2**63
    said = [condition.sentence for condition in row.conditions]
    if row.block:
        said.append(
            f"{' * '.join(row.block)} * the threads for {' or '.join(vector.axes)} (one for "
            f"every {vector.bytes} bytes, at most {vector.threads}) is at most 1024."
        )
    for limit in sorted({tensor.stride_limit for tensor in row.tensors} - {most}):
        names = " and ".join(arg.name for arg in row.tensors if arg.stride_limit == limit)
        said.append(f"Strides of {names} stay below {limit} elements.")
    if row.same_strides:
        said.append(f"{' and '.join(row.same_strides)} have the same strides.")
    worded = [rule for rule in row.rules if isinstance(rule.expected, str)]
    said += [f"{rule.argument} is {rule.expected}." for rule in worded]
    if places := [text for tensor in row.tensors for text in tensor.index]:
        said.append(f"On a GPU, nothing checks that {'; '.join(places)}.")
    for lacking in row.lacks:
        told = " with ".join(f"{name} of {dtype}" for name, dtype in lacking.items())
        said.append(f"Not supported: {told}.")
    if row.offset_limit < most:
        said.append(f"Offsets stay below {row.offset_limit} elements.")
    for limit in sorted({arg.offset_limit for arg in row.tensors if arg.offset_limit}):
        limited = [arg.name for arg in row.tensors if arg.offset_limit == limit]
        have = "has" if len(limited) == 1 else "have"
        said.append(f"{' and '.join(limited)} {have} at most {limit} elements.")
    return " ".join(said)


def _memory(row: Row) -> str:
    """Say which arguments may be the same memory, and which are given all or none."""
    said = []
    if row.together:
        said.append(f"Pass {' and '.join(row.together)} together, or none of them.")
    if any(arg.writes for arg in row.tensors) and len(row.tensors) > 1:
        pairs = " or ".join(" and ".join(pair) for pair in row.in_place)
        but = f"; {pairs} may be the same memory" if pairs else ""
        said.append(f"Outputs share no memory with other tensors{but}.")
    return " ".join(said)


def _width(row: Row) -> str:
    """Say how much the kernel loads at a time."""
    vector = row.vector
    if not vector.axes:
        return ""
    whose = f"the itemsize of {vector.dtype}" if vector.dtype else "the itemsize"
    axes = " or ".join(vector.axes)
    return (
        f"The kernel loads gcd({vector.bytes} bytes / {whose}, {axes}) elements at a time from "
        f"tensors with {axes}: their addresses and other strides are multiples of that."
    )


def docstring(row: Row) -> str:
    """Return an op's docstring: shapes, dtypes, errors and the upstream source."""
    dtypes = "; ".join(f"{name} is {' or '.join(types)}" for name, types in row.dtypes.items())
    nothing = f"{row.nothing_axis} = 0" if row.nothing_axis else "no rows"
    able = " or ".join(f"{major}.x" for major in row.capabilities)
    other = f", `ArchitectureError` on GPUs other than of compute capability {able}" if able else ""
    is_mapped = any(arg.mapped for arg in row.tensors)
    where = "one device, or in page-locked memory" if is_mapped else "one device"
    paragraphs = (
        f"{dtypes and f'{dtypes}. '}All tensors are on {where}. The last axis has stride 1. "
        f"{_width(row)} {_limits(row)} {_memory(row)} With {nothing}, nothing is launched.",
        "Raises `ArgumentError` or `ArgumentTypeError` before anything is launched, `AbiError` "
        f"if the kernel file has another interface, `KernelError` with the kernel's own message"
        f"{other}.",
        f"Kernel: `{row.symbol}` of module `{row.module}`, {row.package} {row.releases}, "
        f"`{row.source}`.",
    )
    stream = "stream: the CUDA stream; CUDA tensors need it, or an open `fi_ffi.stream(...)` scope."
    arguments = "\n".join(map(_indented, [*map(_argument, row.given), stream]))
    blocks = [textwrap.fill(row.doc, _WIDTH), f"Args:\n{arguments}"]
    texts = [textwrap.fill(" ".join(text.split()), _WIDTH) for text in paragraphs]
    return "\n\n".join(blocks + texts)
