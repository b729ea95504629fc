"""Whether tensors are what a mode's kernels take: all that the binding checks, and the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fi_ffi.abi.device import Device
from fi_ffi.abi.tensor import Layout, TensorDesc
from fi_ffi.errors import ArgumentError
from fi_ffi.ops.moe.modes import Mode, Sizes
from fi_ffi.ops.moe.options import Parallel

_INT32 = 2**31
_WIDE, _WORD = 16, 4  # bytes that a kernel loads at once
_BIASES = ("fc1_expert_biases", "fc2_expert_biases")
_SWIGLU = ("swiglu_alpha", "swiglu_beta", "swiglu_limit")
# Interleaving works on so many rows of 4-bit weights at a time.
_W4_ROWS = 16

Tensors = Mapping[str, TensorDesc | None]


@dataclass(frozen=True)
class Want:
    """What a tensor must be; `alignment` is of its address, in bytes."""

    name: str
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    alignment: int

    def check_layout(self, op: str, layout: Layout) -> None:
        """Raise unless it is contiguous, of one of the dtypes and of one of the shapes."""
        if layout.dtype.name not in self.dtypes:
            expected = " or ".join(dict.fromkeys(self.dtypes))
        elif layout.shape not in self.shapes:
            expected = f"the shape {' or '.join(str(list(shape)) for shape in self.shapes)}"
        elif not layout.is_contiguous:
            expected = "contiguous memory"
        else:
            return
        raise ArgumentError(op, self.name, got=layout, expected=expected)

    def check_address(self, op: str, desc: TensorDesc) -> None:
        """Raise unless a kernel can load from it."""
        if desc.layout.numel and (not desc.ptr or desc.ptr % self.alignment):
            expected = f"an address that is a multiple of {self.alignment} bytes, and not null"
            got = f"{desc.ptr:#x} for {desc.layout}"
            raise ArgumentError(op, self.name, got=got, expected=expected)


def sizes_of(op: str, mode: Mode, tensors: Tensors, is_gated: bool) -> Sizes:
    """The sizes, of the tensors that tell them; the others are compared with these."""
    ranks = {"input": 2, "token_selected_experts": 2, "fc1_expert_weights": 3,
             "fc2_expert_weights": 3}  # fmt: skip
    shapes = {}
    for name, rank in ranks.items():
        desc = tensors.get(name)
        if desc is None:
            continue
        if len(desc.shape) != rank:
            raise ArgumentError(op, name, got=desc.layout, expected=f"rank {rank}")
        shapes[name] = desc.shape
    experts, hidden, packed = shapes["fc2_expert_weights"]
    chosen = shapes.get("token_selected_experts", (0, 1))
    sizes = Sizes(
        shapes["input"][0], hidden, packed * mode.pack, experts, chosen[1], is_gated
    )  # fmt: skip
    _check_sizes(op, mode, sizes)
    return sizes


def _check_sizes(op: str, mode: Mode, sizes: Sizes) -> None:
    """Raise unless the kernels can have these sizes."""
    known = {"hidden_size": sizes.hidden, "inter_size": sizes.inter}
    for what, size in known.items():
        if not size or size % mode.multiple or 2 * size >= _INT32:
            expected = f"a {what} that is a multiple of {mode.multiple} with {mode.about}"
            raise ArgumentError(op, "fc2_expert_weights", got=size, expected=expected)
        if mode.step and size <= mode.step(size):
            expected = f"a {what} of more than the {size} columns that the kernel takes in one step"
            raise ArgumentError(op, "fc2_expert_weights", got=size, expected=expected)
    if not sizes.experts:
        raise ArgumentError(op, "fc2_expert_weights", got="no experts", expected="1 or more")
    if not sizes.top_k:
        got, expected = "no expert for a token", "1 or more"
        raise ArgumentError(op, "token_selected_experts", got=got, expected=expected)
    for rows, columns in (sizes.matrix(True), sizes.matrix(False)):
        # Of an expert's 4-bit weights the interleaving and the scales count in 32 bits.
        if mode.is_w4 and (rows % _W4_ROWS or rows * columns >= _INT32):
            expected = f"rows in multiples of {_W4_ROWS}, and fewer than {_INT32} values"
            got = f"{rows} by {columns} for an expert"
            raise ArgumentError(op, "fc1_expert_weights", got=got, expected=expected)


def check_limits(op: str, sizes: Sizes, parallel: Parallel) -> None:
    """Raise where the kernels' 32-bit counters would wrap."""
    experts = sizes.experts * parallel.ep_size
    products = {
        "tokens * experts of all ranks": sizes.tokens * experts,
        "tokens * experts of a token": sizes.tokens * sizes.top_k,
        "experts of a token * experts of all ranks": sizes.top_k * experts,
    }
    for what, product in products.items():
        if product >= _INT32:
            expected = f"{what} below {_INT32}"
            raise ArgumentError(op, "token_selected_experts", got=product, expected=expected)
    if sizes.top_k > experts:
        expected = f"at most {experts} for a token, which are all there are"
        raise ArgumentError(op, "token_selected_experts", got=sizes.top_k, expected=expected)


def tensor_wants(
    op: str, mode: Mode, sizes: Sizes, tensors: Tensors, output: str
) -> dict[str, Want]:
    """What all tensors but the scales must be, and are by their layouts."""
    wants = {}
    for name, desc in tensors.items():
        if desc is not None:
            wants[name] = _wanted(name, mode, sizes, tensors, output)
            wants[name].check_layout(op, desc.layout)
    given = [name for name in _BIASES if tensors.get(name) is not None]
    if len(given) == 1:
        (missing,) = {*_BIASES} - {*given}
        expected = f"a tensor, as `{given[0]}` is one: they go together"
        raise ArgumentError(op, missing, got="None", expected=expected)
    return wants


def _wanted(name: str, mode: Mode, sizes: Sizes, tensors: Tensors, output: str) -> Want:
    activation = tensors["input"]
    assert activation is not None
    if name in _SWIGLU:
        return Want(name, ("float32",), ((sizes.experts,),), _WORD)
    if name in ("token_selected_experts", "token_final_scales"):
        dtype = "int32" if name == "token_selected_experts" else "float32"
        return Want(name, (dtype,), ((sizes.tokens, sizes.top_k),), _WORD)
    if name in ("input", "output"):
        dtypes = mode.activations if name == "input" else (output,)
        return Want(name, dtypes, ((sizes.tokens, sizes.hidden),), _WIDE)
    rows, columns = sizes.matrix(name.startswith("fc1"))
    if name in _BIASES:
        return Want(name, (output,), ((sizes.experts, rows),), _WIDE)
    weight = mode.weight or activation.dtype.name
    return Want(name, (weight,), ((sizes.experts, rows, columns // mode.pack),), _WIDE)


def scale_wants(
    op: str, mode: Mode, sizes: Sizes, activation: str, scales: Sequence[TensorDesc]
) -> list[Want]:
    """What `quant_scales` must be, and are by their layouts."""
    if len(scales) != len(mode.scales):
        names = ", ".join(scale.name for scale in mode.scales)
        expected = f"{len(mode.scales)} with {mode.about}{': ' if names else ''}{names}"
        raise ArgumentError(op, "quant_scales", got=f"{len(scales)} tensors", expected=expected)
    wants = []
    for i, (scale, desc) in enumerate(zip(mode.scales, scales, strict=True)):
        known = scale.shapes(activation, sizes)
        alignment = _WORD if "float32" in known else _WIDE
        shapes = known.get(desc.dtype.name, ())
        wants.append(Want(f"quant_scales[{i}] ({scale.name})", tuple(known), shapes, alignment))
        wants[-1].check_layout(op, desc.layout)
    return wants


def check_device(
    op: str, device: Device, wants: Sequence[Want], descs: Sequence[TensorDesc]
) -> None:
    """Raise unless all tensors are on the device."""
    for want, desc in zip(wants, descs, strict=True):
        if desc.device is not device:
            raise ArgumentError(op, want.name, got=desc.device, expected=device)


def check_apart(
    op: str,
    output: TensorDesc,
    wants: Sequence[Want],
    descs: Sequence[TensorDesc],
    name: str = "output",
) -> None:
    """Raise where the output shares memory with what is read, or may not be written."""
    if output.layout.readonly:
        raise ArgumentError(op, name, got="read-only memory", expected="writable memory")
    start, end = output.ptr, output.ptr + output.layout.span_bytes
    for want, desc in zip(wants, descs, strict=True):
        first, last = desc.ptr, desc.ptr + desc.layout.span_bytes
        if want.name != name and first < last and first < end and start < last:
            got = f"memory that overlaps `{want.name}` ({first:#x} to {last:#x})"
            raise ArgumentError(op, name, got=got, expected="memory apart")
