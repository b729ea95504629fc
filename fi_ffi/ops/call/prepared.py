"""Prepared calls: packed once, launched many times, and updated in between."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from fi_ffi.abi.function import Frame
from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.streams import handle_for
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import ArgumentError, printed
from fi_ffi.ops.call.compiled import KEEP, CompiledRow, Variant
from fi_ffi.ops.call.launch import launch
from fi_ffi.ops.call.memory import keep
from fi_ffi.ops.row import Absent, KvLayout, Scalar, Tensor

_reclaiming = threading.Lock()
_HAS_GIL = getattr(sys, "_is_gil_enabled", lambda: True)()


class PackedCall:
    """What is packed to be launched many times, by one thread at a time.

    It has one frame, or None where there is nothing to launch.
    """

    __slots__ = ("frame", "give", "take")
    frame: Any

    @property
    def op(self) -> str:
        """What was prepared, as the caller knows it."""
        raise NotImplementedError

    def hold(self, frame: Frame | None) -> None:
        """Take over a frame that was packed."""
        self.frame = frame
        free = [frame]
        # Whoever has taken the frame has the call to itself.
        self.take: Callable[[], Any] = free.pop
        self.give: Callable[[Any], None] = free.append

    def renew(self, pack: Callable[[], Frame | None]) -> Any:
        """Pack it anew; the frame it had.  Where that raises it stays as it is."""
        try:
            taken = self.take()
        except IndexError:
            taken = self.reclaim()
        try:
            frame = pack()
        except BaseException:
            self.give(taken)
            raise
        self.hold(frame)
        return taken

    def reclaim(self) -> Any:
        """The frame, where whoever took it is gone; raises where another has hold of it.

        A signal's exception (Ctrl-C) can come between taking it and the block that gives it back.
        """
        with _reclaiming:
            # That of the attribute, and that of the argument: nobody has it.  Without a GIL
            # these counts are not exact.
            if _HAS_GIL and sys.getrefcount(self.frame) == 2:
                self.give(self.frame)
        try:
            return self.take()
        except IndexError:
            expected = "one call of it at a time: prepare one for each thread"
            got = "a prepared call that is in use, by another thread or by this one"
            raise ArgumentError(self.op, "self", got=got, expected=expected) from None

    def __copy__(self) -> NoReturn:
        raise TypeError("a prepared call has packed arguments of its own and cannot be copied")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a prepared call is of this process and cannot be copied or pickled")


def tensor_like(
    error: Callable[[str, object, object], ArgumentError], op: str, name: str,
    before: TensorDesc | None, value: Any, called: str = "",
) -> TensorDesc | None:  # fmt: skip
    """A new tensor in the place of one like it: an address, or a tensor of the same layout.

    `called` is the caller's name for it, where `error` expects the row's.
    """
    if before is None:
        if value is None:
            return None
        raise error(name, "a tensor", "None, as it was prepared; prepare another call")
    if type(value) is int:
        if not 0 <= value < 2**64 - before.span_bytes:
            raise error(name, hex(value), f"an address with room for {before.layout}")
        return before.at(value)
    desc = as_desc(value, op, called or name)
    is_like = (
        desc.shape == before.shape and desc.strides == before.strides
        and desc.dtype is before.dtype and desc.device is before.device
    )  # fmt: skip
    if not is_like:
        raise error(name, desc.layout, f"{before.layout}, as it was prepared; prepare another call")
    return desc


class Prepared(PackedCall):
    """A call that is packed: `call()` launches it, `call.update(...)` changes what it is of.

    Made by an op's `prepare` and by `fi_ffi.prepare`.  It launches on the stream it was
    prepared for or, prepared without one, on that of the scope that is open then.  Tensors
    that it was given are kept alive; memory given by address must stay valid.

    It has one set of packed arguments: threads may use it in turns, and not at once
    (`ArgumentError`).
    """

    __slots__ = (
        "_is_plain", "compiled", "given", "masks", "owners", "spans", "stream", "variant",
    )  # fmt: skip
    variant: Variant

    def __init__(self, compiled: CompiledRow, given: dict[str, Any], stream: object) -> None:
        self.compiled, self.stream = compiled, stream
        self.hold(self._pack(given))
        if stream is not None:  # raises for what is no stream
            handle_for(stream, self.variant.device, compiled.refuse.op)
        self.variant.start()

    @property
    def op(self) -> str:
        return self.compiled.refuse.op

    def _pack(self, given: dict[str, Any]) -> Frame | None:
        """Pack the call with these arguments; no frame: there is nothing to do."""
        row = self.compiled.row
        # The bits that other addresses must not have are those of the layouts' loads.
        variant, frame, scratch, masks = self.compiled.pack(**given)
        names = [arg.name for arg in row.tensors if arg.is_scratch]
        given |= dict(zip(names, scratch, strict=False))
        descs = [given.get(arg.name) for arg in row.tensors]
        # Tensors by their addresses alone: what keeps their memory alive is apart, so that an
        # update can let go of it.
        given |= {
            arg.name: desc.at(desc.ptr)
            for arg, desc in zip(row.tensors, descs, strict=True)
            if desc is not None
        }
        self.variant, self.given, self.masks = variant, given, masks
        self.owners = descs
        self.spans = tuple(desc.span_bytes if desc else 0 for desc in descs)
        is_more = row.allocates or row.result != "void"
        self._is_plain = frame is not None and not (is_more or frame.has_objects)
        return frame  # type: ignore[no-any-return]

    def __call__(self) -> Any:
        """Launch it; what its entry returns.  Raises `ArgumentError` without a stream, and
        `KernelError`."""
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
            keep(frame)  # a callee has a Tensor object of it
            self.hold(self._pack(self._given_now()))
        return result

    def update(self, /, *args: Any, **kwargs: Any) -> None:
        """Change arguments: by name, or by place in the op's order.

        Tensors are given as addresses (the layout stays), or as tensors of the same
        layout.  Raises `ArgumentError` and `ArgumentTypeError`, and changes nothing then.
        """
        raise NotImplementedError  # each row has its own

    def change(self, changes: dict[str, Any]) -> None:
        """An update in full: the call is packed anew, with what it was given otherwise."""
        refuse, given = self.compiled.refuse, self._given_now()
        for arg in self.compiled.row.given:
            value = changes.get(arg.name, KEEP)
            if value is KEEP:
                continue
            if isinstance(arg, Tensor):
                given[arg.name] = tensor_like(
                    refuse.error,
                    refuse.op,
                    arg.name,
                    given[arg.name],
                    value,
                    refuse.name(arg.name),
                )
            elif isinstance(arg, Scalar):
                given[arg.name] = value
            else:
                expected = "what it was prepared with; prepare another call"
                raise refuse.error(arg.name, printed(value), expected)
        variant = self.variant
        before = self.renew(lambda: self._pack(given))
        if before is not None:
            variant.frames.append(before)

    def _given_now(self) -> dict[str, Any]:
        """The arguments, with the addresses that updates have written."""
        given, frame = dict(self.given), self.frame
        if frame is None:
            names = [arg.name for arg in self.compiled.row.tensors]
            return given | dict(zip(names, self.owners, strict=True))
        place, owners = self.compiled.layout.tensors, iter(self.owners)
        for i, arg in enumerate(self.compiled.row.args):
            if not isinstance(arg, Tensor):
                continue
            owner, desc = next(owners), given.get(arg.name)
            if desc is not None:
                given[arg.name] = owner or desc.at(frame.addresses[place[i]])
        return given

    def __repr__(self) -> str:
        given = self._given_now()
        parts = []
        for arg in self.compiled.row.args:
            if isinstance(arg, Absent):
                continue
            value = given.get(arg.name)
            if isinstance(arg, Tensor):
                parts.append(f"{arg.name}={value.ptr if value else 0:#x}")
            else:
                parts.append(f"{arg.name}={value}")
        name, device = self.compiled.row.name, self.variant.device
        return f"<prepared {name}({', '.join(parts)}) on {device}>"


@functools.cache
def _class_of(compiled: CompiledRow) -> type[Prepared]:
    """The class of a row's prepared calls, with the update that is compiled for it."""
    own = {"__slots__": (), "update": compiled.update}
    return type(f"Prepared_{compiled.row.name}", (Prepared,), own)


def prepare_call(compiled: CompiledRow, arguments: dict[str, Any], stream: object) -> Prepared:
    """A prepared call of a row with these arguments, by name."""
    refuse, given = compiled.refuse, dict(arguments)
    for arg in compiled.row.given:
        value = given.get(arg.name)
        if isinstance(arg, Tensor) and value is not None:
            given[arg.name] = as_desc(value, refuse.op, refuse.name(arg.name))
        elif isinstance(arg, KvLayout):
            given.setdefault(arg.name, arg.default)
    return _class_of(compiled)(compiled, given, stream)


def _named_by_caller(kind: type[Any]) -> type[Prepared]:
    """A class of prepared calls whose `update` takes the names that the caller knows."""

    def update(self: Prepared, **tensors: Any) -> None:
        """Change tensors, by the function's names for them: addresses, or tensors of their
        layout.

        Raises `ArgumentError` and `ArgumentTypeError`, and changes nothing then.
        """
        refuse = self.compiled.refuse
        names = {refuse.name(arg.name): arg.name for arg in self.compiled.row.tensors}
        unknown = next((name for name in tensors if name not in names), None)
        if unknown is not None:
            expected = f"one of {', '.join(names)}; prepare another call for other options"
            raise ArgumentError(refuse.op, "update", got=unknown, expected=expected)
        kind.update(self, **{names[name]: value for name, value in tensors.items()})

    return type(kind.__name__, (kind,), {"__slots__": (), "update": update})


def prepared_by_caller(made: Prepared) -> Prepared:
    """A prepared call whose tensors are named as its caller does."""
    named: Any = made
    kind: Any = type(made)
    found = _named.get(kind) or _named.setdefault(kind, _named_by_caller(kind))
    named.__class__ = found
    return made


_named: dict[Any, Any] = {}
