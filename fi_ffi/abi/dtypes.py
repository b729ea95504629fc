"""The dtype table: DLPack codes, sizes and names, once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fi_ffi.errors import ArgumentTypeError, printed

if TYPE_CHECKING:
    import numpy


@dataclass(frozen=True, eq=False)
class DType:
    """An element type; the instances in `DTYPES` are the only ones.

    `code`, `bits` and `lanes` are the fields of a `DLDataType` (dlpack.h);
    `itemsize` is in bytes, of one packed element.
    """

    name: str
    code: int
    bits: int
    lanes: int = 1

    @property
    def itemsize(self) -> int:
        return self.bits * self.lanes // 8

    @property
    def numpy(self) -> numpy.dtype[Any]:
        """The numpy dtype of the same bytes; ml_dtypes has those numpy lacks."""
        import ml_dtypes
        import numpy

        if self.lanes > 1:
            return numpy.dtype(numpy.uint8)
        return numpy.dtype(getattr(ml_dtypes, self.name, self.name))

    def __repr__(self) -> str:
        return self.name


_INT, _UINT, _FLOAT, _BFLOAT, _BOOL = 0, 1, 2, 4, 6
_FLOAT8_E4M3FN, _FLOAT8_E5M2, _FLOAT4_E2M1FN = 10, 12, 17

DTYPES: dict[str, DType] = {
    dtype.name: dtype
    for dtype in (
        DType("float16", _FLOAT, 16),
        DType("bfloat16", _BFLOAT, 16),
        DType("float32", _FLOAT, 32),
        DType("float64", _FLOAT, 64),
        DType("float8_e4m3fn", _FLOAT8_E4M3FN, 8),
        DType("float8_e5m2", _FLOAT8_E5M2, 8),
        # Two values in a byte, as FlashInfer and torch's float4_e2m1fn_x2 have it.
        DType("float4_e2m1fn_x2", _FLOAT4_E2M1FN, 4, 2),
        DType("int8", _INT, 8),
        DType("int16", _INT, 16),
        DType("int32", _INT, 32),
        DType("int64", _INT, 64),
        DType("uint8", _UINT, 8),
        DType("uint16", _UINT, 16),
        DType("uint32", _UINT, 32),
        DType("uint64", _UINT, 64),
        DType("bool", _BOOL, 8),
    )
}
_BY_CODE = {(d.code, d.bits, d.lanes): d for d in DTYPES.values()}


def parse_dtype(dtype: object, *, op: str = "TensorDesc", argument: str = "dtype") -> DType:
    """The table's entry for a name, a `DType`, or a numpy, ml_dtypes or torch dtype.

    Raises `ArgumentTypeError` for anything else, listing the known names.
    """
    # numpy dtypes have a name, numpy scalar types a __name__, torch's print as torch.float16.
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or dtype
    name = name if isinstance(name, str) else printed(name)
    found = DTYPES.get(name.rpartition(".")[2])
    if found is None or getattr(dtype, "byteorder", "=") == ">":
        raise ArgumentTypeError(op, argument, got=printed(dtype), expected=f"one of {list(DTYPES)}")
    return found


def dtype_from_code(code: int, bits: int, lanes: int) -> DType | None:
    """The table's entry for the fields of a `DLDataType`, or None."""
    return _BY_CODE.get((code, bits, lanes))
