"""Packing bits: entries of FlashInfer's `quantization` module.

The kernels (`include/flashinfer/quantization.cuh`) read the bytes of booleans one at a time
and shift them as they are: a byte that is neither 0 nor 1 spoils its neighbours.
"""

from __future__ import annotations

from typing import Any

from fi_ffi.ops.row import Row, Rule, Tensor, Text, Vector

_BITORDER = Text(
    "bitorder", ("big", "little"), "big",
    "where the first of 8 goes: to the highest bit, as numpy.packbits has it, or to the lowest",
)  # fmt: skip
_X = Tensor("x", "n", "bool", "bytes of 0 or 1", contiguous=True)
_INDPTR: dict[str, Any] = {"dtype": "int32", "contiguous": True}


def _row(name: str, doc: str, *args: Tensor | Text, **fields: Any) -> Row:
    return Row(
        name, "quantization", name, "csrc/flashinfer_quantization_binding.cu", doc, args, {},
        releases=">=0.6.3", vector=Vector(()), offset_limit=2**63,
        **fields,
    )  # fmt: skip


ROWS = (
    _row(
        "packbits",
        "Pack booleans to bits, 8 to a byte; what is left of the last byte is 0.",
        _X,
        _BITORDER,
        Tensor("y", "num_bytes", "uint8", "the bits", writes=True, reads=False, contiguous=True),
        # A grid's blocks, of 2048 bits each.
        requires=(
            f"n <= {(2**31 - 1) * 2048}",
            Rule("y", "num_bytes == ceil_div(n, 8)",
                 "num_bytes = (n + 7) // 8, a byte for every 8 bits begun"),
        ),
    ),
    _row(
        "segment_packbits",
        "Pack segments of booleans to bits, each of them from a byte of its own on.",
        _X,
        Tensor("input_indptr", "b+1", doc="where each segment starts in `x`, and the end",
               **_INDPTR),
        Tensor("output_indptr", "b+1", doc="where its bits start in `y`: see `packed_indptr`",
               **_INDPTR),
        _BITORDER,
        Tensor("y", "num_bytes", "uint8", "the bits; other bytes of it stay as they are",
               writes=True, reads=False, contiguous=True),
        requires=(f"n <= {2**31 - 1}", f"b <= {2**31 - 1}"),
        nothing_axis="b",
        # Bits that are written over the starts would send other threads' anywhere.
    ),
)  # fmt: skip
