"""The stream of a call that is no row's: current while its entry runs."""

from __future__ import annotations

from fi_ffi.abi.streams import current_handle, current_scope, handle_for, swap
from fi_ffi.abi.tensor import Device


class stream_context:
    """Context manager that makes one call's stream current: `stream`, or the open scope's.

    Create it before any other look-up, so that a missing stream is the first error reported.
    """

    __slots__ = ("_before", "_device", "handle")

    def __init__(self, stream: object, device: Device, op: str) -> None:
        self.handle = handle_for(stream, device, op)
        self._device = device
        self._before: int | None = None

    def __enter__(self) -> None:
        scope = current_scope()
        if scope is None or scope.handle != self.handle or not scope.make_current(self._device):
            self._before = current_handle(self._device)
            swap(self._device, self.handle)

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            swap(self._device, self._before)
