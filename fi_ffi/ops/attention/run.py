"""Runs of a plan, prepared to be launched many times."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any

from fi_ffi.abi.function import Frame
from fi_ffi.abi.streams import handle_for
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.ops.attention.bind import BoundRow
from fi_ffi.ops.call.prepared import PackedCall, tensor_like


class Packing:
    """Passed as the stream of a run that is to be packed and not launched."""

    bound: BoundRow
    frame: Frame | None


class PreparedRun(PackedCall):
    """A packed run of a plan: `call()` launches it, `call.update(...)` changes tensors.

    Made by `fi_ffi.prepare`. After a `replan`, the next call packs it anew. Otherwise as
    `fi_ffi.ops.call.prepared.Prepared`.
    """

    __slots__ = ("_given", "_plan", "_run", "_stream", "_tensors", "_version")

    def __init__(self, run: Any, given: dict[str, Any], stream: object) -> None:
        plan = run.__self__
        self._plan, self._run, self._given, self._stream = plan, run, given, stream
        if stream is not None:  # refuse what is no stream now, not at the first call
            handle_for(stream, plan.device, plan.op)
        self._version: object = None
        self.own_frame(self._packed(given))

    @property
    def op(self) -> str:
        return str(self._plan.op)

    def _packed(self, given: Mapping[str, Any]) -> Frame | None:
        self._plan._check_current()
        packing = Packing()
        self._run(**given, stream=packing)
        compiled = packing.bound.compiled
        self._version = self._plan._info
        # Tensors that `update` accepts, by the run's names.
        self._tensors = [compiled.refuse.name(arg.name) for arg in compiled.tensors]
        return packing.frame

    def __call__(self) -> None:
        """Launch the run. Raises as `Prepared` does, and as the run itself if it is packed anew."""
        try:
            frame = self.take()
        except IndexError:
            frame = self.reclaim()
        try:
            if self._plan._info is not self._version:
                frame = self._packed(self._given)
            if frame is not None:
                self._plan._launch_frame(frame, self._stream)
        finally:
            self.frame = frame
            self.give(frame)

    def update(self, **tensors: Any) -> None:
        """Change tensors by the run's names, to addresses or to tensors of the same layout.

        Raises `ArgumentError` and `ArgumentTypeError`; the call is unchanged then.
        """
        plan, given = self._plan, dict(self._given)
        known = [name for name in self._tensors if name in given]
        for name, value in tensors.items():
            if name not in known or not isinstance(given[name], (TensorDesc, NoneType)):
                expected = f"one of {', '.join(known)}; prepare another call for other options"
                raise plan._refuse("update", name, expected)
            given[name] = tensor_like(plan._refuse, name, given[name], value)
        self.renew(lambda: self._packed(given))
        self._given = given

    def __repr__(self) -> str:
        given = ", ".join(
            f"{name}={value.ptr:#x}" if isinstance(value, TensorDesc) else f"{name}={value!r}"
            for name, value in self._given.items()
            if value is not None
        )
        return f"<prepared run of {type(self._plan).__name__}({given}) on {self._plan.device}>"
