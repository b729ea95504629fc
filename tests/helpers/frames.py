"""Frames of calls, written by hand: a call's own code writes them otherwise."""

from __future__ import annotations

from fi_ffi.abi.function import Frame
from fi_ffi.abi.tensor import TensorDesc


def write_tensor(frame: Frame, i: int, desc: TensorDesc) -> None:
    """Write one tensor of the kind that the frame was made for."""
    frame.addresses[frame.layout.tensors[i]] = desc.ptr
    at = frame.layout.dims[i]
    for n, number in enumerate((*desc.shape, *desc.strides)):
        frame.words[at + n] = number
