"""What a row of the op table is made of.

A row states, once, what a kernel entry takes.  Checks, packing, the Python
signature, the docstring, the declared signature and the catalogue are derived.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fi_ffi.abi.signature import Signature


@dataclass(frozen=True)
class Tensor:
    """A tensor argument.

    `axes` names its axes ("n h"); the same name is the same size everywhere in
    the row, and a number is that size.  `dtype` is a variable of the row's
    `dtypes`, or a dtype's name.
    """

    name: str
    axes: str
    dtype: str
    doc: str
    writes: bool = False
    # Read before it is written: an in-place argument.
    reads: bool = True
    # The entry takes a Tensor object, not a view (`ffi.Tensor` in its signature).
    as_object: bool = False
    # Every element adjacent; otherwise only those of the last axis need be.
    contiguous: bool = False

    @property
    def axis_names(self) -> tuple[str, ...]:
        return tuple(self.axes.split())

    @property
    def abi_type(self) -> str:
        return "ffi.Tensor" if self.as_object else "DLTensor*"


@dataclass(frozen=True)
class Scalar:
    """A scalar argument, passed by value.

    `default` is None where the caller must give it; `low` is the least value allowed.
    """

    name: str
    type: type[int] | type[float] | type[bool]
    default: int | float | bool | None
    doc: str
    low: float | None = None

    @property
    def abi_type(self) -> str:
        return self.type.__name__


@dataclass(frozen=True, eq=False)
class Row:
    """One op: a kernel entry with one way of calling it."""

    name: str
    module: str
    symbol: str
    source: str
    doc: str
    args: tuple[Tensor | Scalar, ...]
    dtypes: dict[str, tuple[str, ...]]
    # FlashInfer releases that have exactly this interface, as a version specifier.
    releases: str
    # Set where the kernel computes something else than in the op's first row; names
    # a reference and a formula of its own.
    variant: str = ""
    # Rows are loaded this many bytes at a time, along this axis: addresses and
    # strides must be multiples of gcd(vector_bytes / itemsize, size) elements,
    # where the itemsize is that of the `dtypes` variable named first.
    vector_axis: str = "h"
    vector_bytes: int = 16
    # The kernel computes element offsets in an integer that holds less than this.
    offset_limit: int = 2**32
    min_sizes: dict[str, int] = field(default_factory=lambda: {"h": 1})

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(arg for arg in self.args if isinstance(arg, Tensor))

    @property
    def reference(self) -> str:
        """The name of the reference kernel."""
        return self.symbol + self.variant

    @property
    def formula(self) -> str:
        """The name of the formula in float64."""
        return self.name + self.variant

    @property
    def signature(self) -> Signature:
        """What the binary must say of itself."""
        return Signature(self.symbol, tuple(arg.abi_type for arg in self.args))
