"""Packing bits: entries of FlashInfer's `quantization` module.

The kernels (`include/flashinfer/quantization.cuh`) read the bytes of booleans one at a time and
shift them unchanged: a byte other than 0 or 1 corrupts its neighbours.
"""

from __future__ import annotations

from typing import Any

from fi_ffi.ops.call.arguments import INT32_MAX
from fi_ffi.ops.call.row import Row, Rule, Tensor, Text, Vector

_BITORDER = Text(
    "bitorder",
    ("big", "little"),
    "big",
    "the first of 8 values becomes the highest bit, as in numpy.packbits, or the lowest",
)
_X = Tensor("x", "n", "bool", "bytes of 0 or 1", contiguous=True)
_INDPTR: dict[str, Any] = {"dtype": "int32", "contiguous": True}


def _row(name: str, doc: str, *args: Tensor | Text, **fields: Any) -> Row:
    return Row(
        name,
        "quantization",
        name,
        "csrc/flashinfer_quantization_binding.cu",
        doc,
        args,
        {},
        releases=">=0.6.3",
        vector=Vector(()),
        offset_limit=2**63,
        **fields,
    )


ROWS = (
    _row(
        "packbits",
        "Pack booleans into bits, 8 to a byte. The rest of the last byte is 0.",
        _X,
        _BITORDER,
        Tensor("y", "num_bytes", "uint8", "the bits", writes=True, reads=False, contiguous=True),
        # The limit of a grid, whose blocks have 2048 bits each.
        requires=(
            f"n <= {INT32_MAX * 2048}",
            Rule(
                "y",
                "num_bytes == ceil_div(n, 8)",
                "num_bytes = (n + 7) // 8, a byte for every 8 bits begun",
            ),
        ),
    ),
    _row(
        "segment_packbits",
        "Pack segments of booleans into bits. Each segment starts with a new byte.",
        _X,
        Tensor(
            "input_indptr",
            "b+1",
            doc="start of each segment in `x`, and the end",
            index=("0 <= input_indptr <= n", "0 <= steps(input_indptr)"),
            **_INDPTR,
        ),
        Tensor(
            "output_indptr",
            "b+1",
            doc="start of its bits in `y`: see `packed_indptr`",
            index=("0 <= output_indptr[:-1] <= num_bytes - (steps(input_indptr) + 7) // 8",),
            **_INDPTR,
        ),
        _BITORDER,
        Tensor(
            "y",
            "num_bytes",
            "uint8",
            "the bits; other bytes stay unchanged",
            writes=True,
            reads=False,
            contiguous=True,
        ),
        requires=(f"n <= {INT32_MAX}", f"b <= {INT32_MAX}"),
        nothing_axis="b",
        # Bits written over the starts would make other threads write anywhere.
    ),
)
