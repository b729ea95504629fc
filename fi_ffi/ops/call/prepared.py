"""Prepared calls: packed once, launched many times, and updated in between."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from fi_ffi.abi.function import Frame
from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.streams import handle_for
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import printed
from fi_ffi.ops.call.arguments import Refusal
from fi_ffi.ops.call.compiled import KEEP, CompiledRow, Variant
from fi_ffi.ops.call.launch import launch
from fi_ffi.ops.call.memory import keep
from fi_ffi.ops.call.row import KvLayout, Scalar, Tensor

_HAS_GIL = getattr(sys, "_is_gil_enabled", lambda: True)()


class PackedCall:
    """A packed call, launched many times by one thread at a time.

    It has one frame, or None if there is nothing to launch.
    """

    frame: Any

    @property
    def op(self) -> str:
        """The name of the prepared function, as the caller knows it."""
        raise NotImplementedError

    def own_frame(self, frame: Frame | None) -> None:
        """Take over a packed frame."""
        self.frame = frame
        free = [frame]
        # The frame again, for each time that it was lost.
        self.lost: dict[int, list[Any]] = {}
        # The thread that pops the frame owns the call.
        self.give: Callable[[Any], None] = free.append
        self.take: Callable[[], Any] = free.pop

    def renew(self, pack: Callable[[], Frame | None]) -> Any:
        """Pack the call anew and return the old frame; if packing raises, keep the old frame."""
        try:
            taken = self.take()
        except IndexError:
            taken = self.reclaim()
        try:
            frame = pack()
        except BaseException:
            self.give(taken)
            raise
        self.own_frame(frame)
        return taken

    def reclaim(self) -> Any:
        """Return the frame if the thread that took it is gone; raise if another call has it.

        A signal handler's exception (Ctrl-C) may come after the frame was taken and before the
        block that returns it. There is no lock, which an exception of a trace function could leave
        held: `setdefault` lets one of several threads win, the number being read before the count.
        """
        lost = self.lost
        number = len(lost)
        # Two references, of the attribute and of the argument: no call has the frame. Without a
        # GIL, reference counts are not exact.
        if _HAS_GIL and sys.getrefcount(self.frame) == 2:
            lost.setdefault(number, [self.frame])
        free = next(filter(None, lost.copy().values()), self.give.__self__)  # type: ignore[attr-defined]
        try:
            return free.pop()
        except IndexError:
            expected = "one call of it at a time: prepare one for each thread"
            got = "a prepared call that is in use, by another thread or by this one"
            raise Refusal(self.op)("self", got, expected) from None

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a prepared call is of this process and cannot be copied or pickled")


def tensor_like(
    refuse: Refusal, name: str, before: TensorDesc | None, value: Any
) -> TensorDesc | None:
    """Describe the replacement of a tensor: an address, or a tensor of the same layout."""
    if before is None:
        if value is None:
            return None
        raise refuse(name, "a tensor", "None, as it was prepared; prepare another call")
    if type(value) is int:
        if not 0 <= value < 2**64 - before.span_bytes:
            raise refuse(name, hex(value), f"an address with room for {before.layout}")
        return before.at(value)
    desc = as_desc(value, refuse.op, name)
    is_like = (
        desc.shape == before.shape
        and desc.strides == before.strides
        and desc.dtype is before.dtype
        and desc.device is before.device
    )
    if not is_like:
        expected = f"{before.layout}, as it was prepared; prepare another call"
        raise refuse(name, desc.layout, expected)
    return desc


class Prepared(PackedCall):
    """A packed call: `call()` launches it, and `call.update(...)` changes its arguments.

    An op's `prepare` and `fi_ffi.prepare` make it.  It launches on the stream that it was prepared
    for or, without one, on the stream of the open scope.  It keeps tensors alive; memory that you
    gave by address must stay valid.

    Threads may use it in turns, but not at the same time (`ArgumentError`).
    """

    variant: Variant

    def __init__(self, compiled: CompiledRow, arguments: dict[str, Any], stream: object) -> None:
        self.compiled, self.stream = compiled, stream
        self.own_frame(self._pack(arguments))
        if stream is not None:  # refuse what is no stream now, not at the first call
            handle_for(stream, self.variant.device, compiled.refuse.op)
        self.variant.start()

    @property
    def op(self) -> str:
        return self.compiled.refuse.op

    def _pack(self, arguments: dict[str, Any]) -> Frame | None:
        """Pack the call with these arguments; None if there is nothing to launch."""
        row = self.compiled.row
        # `masks` are the bits that new addresses must not have, for the alignment of loads.
        variant, frame, scratch, masks = self.compiled.pack(**arguments)
        names = [arg.name for arg in row.tensors if arg.is_scratch]
        arguments |= dict(zip(names, scratch, strict=False))
        descs = [arguments.get(arg.name) for arg in row.tensors]
        # Descriptors without owners: the owners are kept apart, so that an update can drop them.
        arguments |= {
            arg.name: desc.at(desc.ptr)
            for arg, desc in zip(row.tensors, descs, strict=True)
            if desc is not None
        }
        self.variant, self.arguments, self.masks = variant, arguments, masks
        self.owners = descs
        self.spans = tuple(desc.span_bytes if desc else 0 for desc in descs)
        is_more = row.allocates or row.result != "void"
        self._is_plain = frame is not None and not (is_more or frame.has_objects)
        return frame  # type: ignore[no-any-return]

    def __call__(self) -> Any:
        """Launch the call and return its entry's result. Raises `ArgumentError` without a stream,
        and `KernelError`."""
        result = None
        try:
            frame = self.take()
        except IndexError:
            frame = self.reclaim()
        try:
            if self._is_plain:
                launch(frame, self.stream)
            elif frame is not None:
                result = self.variant.run(frame, self.stream)
        finally:
            self.give(frame)
        if not self._is_plain and frame is not None and frame.is_referred_to:
            keep(frame)  # the callee kept one of the frame's Tensor objects
            self.own_frame(self._pack(self._given_now()))
        return result

    def update(self, /, *args: Any, **kwargs: Any) -> None:
        """Change arguments, by name or by position in the op's order.

        Pass tensors as addresses, which keeps the layout, or as tensors of the same layout.  Raises
        `ArgumentError` and `ArgumentTypeError`, and then changes nothing.
        """
        raise NotImplementedError  # each row's class has a compiled one

    def change(self, changes: dict[str, Any]) -> None:
        """Update in full: pack the call anew, with its other arguments as before."""
        refuse, arguments = self.compiled.refuse, self._given_now()
        for arg in self.compiled.row.given:
            value = changes.get(arg.name, KEEP)
            if value is KEEP:
                continue
            if isinstance(arg, Tensor):
                name, before = refuse.name(arg.name), arguments[arg.name]
                arguments[arg.name] = tensor_like(refuse, name, before, value)
            elif isinstance(arg, Scalar):
                arguments[arg.name] = value
            else:
                expected = "what it was prepared with; prepare another call"
                raise refuse.error(arg.name, printed(value), expected)
        variant = self.variant
        frame = self.renew(lambda: self._pack(arguments))
        if frame is not None:
            variant.frames.append(frame)

    def _given_now(self) -> dict[str, Any]:
        """Return the arguments, with the addresses that updates have written."""
        arguments, frame = dict(self.arguments), self.frame
        if frame is None:
            names = [arg.name for arg in self.compiled.row.tensors]
            return arguments | dict(zip(names, self.owners, strict=True))
        place, owners = self.compiled.layout.tensors, iter(self.owners)
        for i, arg in enumerate(self.compiled.row.args):
            if not isinstance(arg, Tensor):
                continue
            owner, desc = next(owners), arguments.get(arg.name)
            if desc is not None:
                arguments[arg.name] = owner or desc.at(frame.addresses[place[i]])
        return arguments

    def __repr__(self) -> str:
        values = self._given_now()
        parts = [
            f"{arg.name}={value.ptr:#x}" if isinstance(value, TensorDesc) else f"{arg.name}={value}"
            for arg in self.compiled.row.given
            for value in (values.get(arg.name),)
        ]
        name, device = self.compiled.row.name, self.variant.device
        return f"<prepared {name}({', '.join(parts)}) on {device}>"


@functools.cache
def _class_of(compiled: CompiledRow, by_caller: bool) -> type[Prepared]:
    """Return the class of a row's prepared calls, with an update of the row's own."""
    update = _update_by_caller(compiled) if by_caller else compiled.update
    return type(f"Prepared_{compiled.row.name}", (Prepared,), {"update": update})


def prepare_call(
    compiled: CompiledRow, arguments: dict[str, Any], stream: object, by_caller: bool = False
) -> Prepared:
    """Prepare a call of a row with these arguments, by name. With `by_caller`, its update takes the
    caller's names, and tensors only."""
    refuse, arguments = compiled.refuse, dict(arguments)
    for arg in compiled.row.given:
        value = arguments.get(arg.name)
        if isinstance(arg, Tensor) and value is not None:
            arguments[arg.name] = as_desc(value, refuse.op, refuse.name(arg.name))
        elif isinstance(arg, KvLayout):
            arguments.setdefault(arg.name, arg.default)
    return _class_of(compiled, by_caller)(compiled, arguments, stream)


def _update_by_caller(compiled: CompiledRow) -> Callable[..., None]:
    refuse, change = compiled.refuse, compiled.update
    names = {refuse.name(arg.name): arg.name for arg in compiled.row.tensors}

    def update(self: Prepared, **tensors: Any) -> None:
        """Change tensors by the function's names, to addresses or to tensors of the same layout.

        Raises `ArgumentError` and `ArgumentTypeError`; the call is unchanged then.
        """
        for name in tensors:
            if name not in names:
                expected = f"one of {', '.join(names)}; prepare another call for other options"
                raise refuse("update", name, expected)
        change(self, **{names[name]: value for name, value in tensors.items()})

    return update
