"""Caches whose heads come before their tokens (HND), seen the other way round (NHD)."""

from __future__ import annotations

from fi_ffi.abi.tensor import TensorDesc, frozen


def exchanged(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes or strides with the axes of heads and tokens exchanged."""
    return (*numbers[:-3], numbers[-2], numbers[-3], numbers[-1])


def as_nhd(desc: TensorDesc, kv_layout: str) -> TensorDesc:
    """A tensor of a layout as one of NHD; of rank 3 or more."""
    if kv_layout == "NHD":
        return desc
    return frozen(desc.ptr, exchanged(desc.shape), exchanged(desc.strides), desc.kind, desc)
