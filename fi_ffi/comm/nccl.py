"""Collectives by NCCL, through nccl4py: for large messages and ranks of several machines."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Any

from fi_ffi.abi.tensor import Device, TensorDesc
from fi_ffi.comm.hang import run_with_deadline
from fi_ffi.comm.ranks import Ranks
from fi_ffi.errors import HangError, KernelError, LoaderError
from fi_ffi.ops.call import cuda

_SUM = 0  # ncclSum
_DTYPES = {"float16": 6, "float32": 7, "bfloat16": 9}  # ncclDataType_t
# Controls NVLink SHARP, which creates a multicast object; fi_ffi must not depend on one.
_NO_MULTICAST = "NCCL_NVLS_ENABLE"


def imported() -> Any:
    """Return nccl4py's package and its bindings.

    Raises `LoaderError` if nccl4py or NCCL is not installed.
    """
    try:
        from nccl import core
        from nccl.bindings import nccl

        nccl.get_version()
    except Exception as error:  # nccl4py's own exception if libnccl is missing
        words = f"NCCL cannot be used ({error}): pip install 'fi-ffi[nccl]'"
        raise LoaderError(words) from error
    return core, nccl


class Nccl:
    """One rank's NCCL communicator."""

    def __init__(self, ranks: Ranks, device: Device, timeout_s: float) -> None:
        if _NO_MULTICAST not in os.environ:
            os.environ[_NO_MULTICAST] = "0"
        core, self._nccl = imported()
        mine = bytes(core.get_unique_id()) if ranks.rank == 0 else b""
        unique = core.UniqueId.from_bytes(ranks.broadcast(mine))
        made: list[Any] = []
        is_late, end = threading.Event(), time.monotonic() + timeout_s

        def abort_late() -> None:
            with contextlib.suppress(IndexError):  # another thread aborts it
                made.pop().abort()

        def join() -> None:
            with cuda.current(device):
                made.append(core.Communicator.init(ranks.size, ranks.rank, unique))
            if is_late.is_set():
                abort_late()

        try:
            is_made = run_with_deadline(join, lambda: time.monotonic() > end)
        except Exception as error:
            raise KernelError("ncclCommInitRank", type(error).__name__, str(error)) from error
        if not is_made:  # another rank has failed before it joined
            is_late.set()
            run_with_deadline(abort_late, lambda: True)
            op, words = "Group", "for the others to join NCCL"
            raise HangError(op, f"{op}: rank {ranks.rank} waited {timeout_s:g} s {words}")
        (self._communicator,) = made
        self._comm = self._nccl.Comm(self._communicator.ptr)
        self._is_captured = False

    def all_reduce(self, x: TensorDesc, out: TensorDesc, stream: int) -> None:
        self._call("all_reduce", x, out, x.numel, _SUM, stream)

    def reduce_scatter(self, x: TensorDesc, out: TensorDesc, stream: int) -> None:
        self._call("reduce_scatter", x, out, out.numel, _SUM, stream)

    def all_gather(self, x: TensorDesc, out: TensorDesc, stream: int) -> None:
        self._call("all_gather", x, out, x.numel, None, stream)

    def _call(
        self, name: str, x: TensorDesc, out: TensorDesc, count: int, how: int | None, stream: int
    ) -> None:
        operation = () if how is None else (how,)
        self._is_captured = self._is_captured or cuda.is_capturing(stream)
        try:
            getattr(self._nccl, name)(
                x.ptr, out.ptr, count, _DTYPES[x.dtype.name], *operation, self._comm, stream
            )
        except Exception as error:  # an exception class of nccl4py
            raise KernelError(f"NCCL's {name}", type(error).__name__, str(error)) from error

    def abort(self) -> None:
        """Abort queued work; nothing can be called afterwards."""
        self._end("abort")

    def close(self, is_broken: bool) -> None:
        """Destroy the communicator; abort it if the group is broken."""
        self._end("abort" if is_broken else "destroy")

    def _end(self, name: str) -> None:
        """End the communicator once.

        NCCL ends it when no graph holds its calls any more, and may wait for other ranks if it is
        aborted.  This call does not wait for either.
        """
        communicator, self._communicator = self._communicator, None
        if communicator is None:
            return
        is_abort = name == "abort"
        try:
            run_with_deadline(getattr(communicator, name), lambda: self._is_captured or is_abort)
        except Exception as error:  # an exception class of nccl4py
            if not is_abort:  # after which nothing more is asked of NCCL
                raise KernelError(f"NCCL's {name}", type(error).__name__, str(error)) from error
