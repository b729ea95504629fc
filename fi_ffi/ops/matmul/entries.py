"""The entries behind these functions, as ops of their own, which are not public."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fi_ffi.abi.device import Device
from fi_ffi.errors import ArgumentError
from fi_ffi.ops.matmul import rows
from fi_ffi.ops.op import Op
from fi_ffi.ops.providers import release_in_use

GET_ALGOS = Op(*rows.GET_ALGOS)
RUN_WITH_ALGO = Op(*rows.RUN_WITH_ALGO)
SEGMENT_SM80 = Op(rows.SEGMENT_SM80)
SEGMENT_SM90 = Op(rows.SEGMENT_SM90)
RUN_GEMM = Op(rows.RUN_GEMM)
GROUPWISE = Op(rows.GROUPWISE)
GROUP_GROUPWISE = Op(rows.GROUP_GROUPWISE)

ENTRIES = (GET_ALGOS, RUN_WITH_ALGO, SEGMENT_SM80, SEGMENT_SM90, RUN_GEMM, GROUPWISE,
           GROUP_GROUPWISE)  # fmt: skip


def settle(release: str | None) -> None:
    """Drop what was learnt of other kernels, and put the rows of this release in force."""
    for op in ENTRIES:
        op.forget()
        op.settle(release)


def in_force(op: Op, device: Device) -> Op:
    """The op, with the row in force that is of the kernels for this device."""
    if device.is_cuda and not op.is_settled:
        op.settle(release_in_use())
    return op


class as_called:  # a context manager
    """Refusals of an entry's row name the function and the argument as the caller does."""

    __slots__ = ("_names", "_op")

    def __init__(self, op: str, names: Mapping[str, str]) -> None:
        self._op, self._names = op, names

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, tb: Any) -> None:
        if isinstance(error, ArgumentError):
            argument = self._names.get(error.argument, error.argument)
            named = type(error)(self._op, argument, got=error.got, expected=error.expected)
            raise named from error.__cause__
