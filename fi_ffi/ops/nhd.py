"""Caches whose heads come before their tokens (HND), seen the other way round (NHD)."""

from __future__ import annotations

from fi_ffi.abi.tensor import Layout, TensorDesc, make_desc, make_layout


def nhd_layout(layout: Layout) -> Layout:
    """The layout of the same memory with the axes of heads and tokens exchanged."""

    def exchanged(numbers: tuple[int, ...]) -> tuple[int, ...]:
        return (*numbers[:-3], numbers[-2], numbers[-3], numbers[-1])

    shape, strides = exchanged(layout.shape), exchanged(layout.strides)
    return make_layout(shape, layout.dtype, strides, layout.device, layout.readonly)


def as_nhd(desc: TensorDesc, kv_layout: str) -> TensorDesc:
    """A tensor of a layout as one of NHD; of rank 3 or more."""
    if kv_layout == "NHD":
        return desc
    return make_desc(desc.ptr, nhd_layout(desc.layout), desc)
