"""Calling any function: arguments checked against its own signature, packed, and called."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.device import Device
from fi_ffi.abi.failure import check_kernel
from fi_ffi.abi.function import Entry, probe
from fi_ffi.abi.lent import Call
from fi_ffi.abi.packing import anything, packer_of
from fi_ffi.abi.signature import Signature
from fi_ffi.abi.values import unpack
from fi_ffi.errors import ArgumentError, ArgumentTypeError
from fi_ffi.ops import cuda, watching
from fi_ffi.ops.modules.placing import place_of, stream_of

if TYPE_CHECKING:
    import inspect

_NOTHING = contextlib.nullcontext()


class Life:
    """What a method or function object is called through, until its owner is released."""

    __slots__ = ("handle",)

    def __init__(self, handle: Any) -> None:
        self.handle = handle


class ModuleEntry:
    """A function of a module or an object, called with Python values.

        entry(*args, stream=None, device=None)

    `signature` is the function's own, and arguments are checked against it.  Where it is None
    the function is called unchecked: values are packed as what they are.

    Raises `ArgumentError` and `ArgumentTypeError` before anything is run, naming an argument
    by its number and type, and `KernelError` in the function's own words.
    """

    def __init__(
        self,
        name: str,
        find: Callable[[int | None], Entry],
        signature: Signature | None,
        *,
        life: Life | None = None,
        home: Device | None = None,
        asks: bool = False,
        doc: str = "",
    ) -> None:
        self.name = name
        self._find, self._life, self._home, self._asks = find, life, home, asks
        self._doc = doc
        self._declare(signature)

    def _declare(self, signature: Signature | None) -> None:
        self.signature = signature
        params = () if signature is None else signature.params
        self._packers = [(packer_of(text), f"{i}: {text}") for i, text in enumerate(params)]
        # Of the instance: `help` prints it.
        self.__doc__ = f"{self!r}\n\n{self._doc}".rstrip()

    @property
    def __name__(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def __signature__(self) -> inspect.Signature:
        from inspect import Parameter, Signature

        params = [Parameter("args", Parameter.VAR_POSITIONAL)]
        if self.signature is not None:
            params = [
                Parameter(f"_{i}", Parameter.POSITIONAL_ONLY, annotation=text)
                for i, text in enumerate(self.signature.params)
            ]
        params += [
            Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in ("stream", "device")
        ]
        result = Signature.empty if self.signature is None else self.signature.result
        return Signature(params, return_annotation=result)

    def __repr__(self) -> str:
        if self.signature is None:
            return f"{self.name}(*args), unchecked"
        return str(Signature(self.name, self.signature.params, self.signature.result))

    def probe(self) -> Signature:
        """Ask the function for its signature, and check calls against it from now on.

        A function that takes any arguments is run by this, with 512 of None, and has no
        signature to tell: `AbiError`.
        """
        self._check_alive()
        self._declare(probe(self._find(None)))
        assert self.signature is not None
        return self.signature

    def __call__(self, *args: Any, stream: object = None, device: object = None) -> Any:
        """Call with the arguments of `signature`, in order.

        Args:
            stream: what `fi_ffi.stream` takes; needed where a tensor is on a GPU and no
                scope is open.
            device: the GPU of a call none of whose tensors is on one ("cuda:0").
        """
        self._check_alive()
        call = Call(self.name)
        try:
            packed = self._pack(args, call)
            place, needs_stream = place_of(call, device, self._home)
            if place is None:
                return self._invoke(self._find(None), packed, args, call, None)
            # A missing stream is told before anything is looked up.
            on_stream = stream_of(stream, place, needs_stream, self.name)
            entry = self._find(place.index)
            with cuda.current(place), on_stream or _NOTHING:
                return self._invoke(entry, packed, args, call, place)
        finally:
            call.end()

    def _check_alive(self) -> None:
        if self._life is not None and self._life.handle is None:
            expected = "an object still held"
            raise ArgumentError(self.name, "self", got="one that was released", expected=expected)

    def _pack(self, args: tuple[Any, ...], call: Call) -> Any:
        try:
            return self._packed(args, call)
        except RecursionError as error:
            got, expected = "values inside values without end", "values that C++ can hold"
            raise ArgumentError(self.name, "*args", got=got, expected=expected) from error

    def _packed(self, args: tuple[Any, ...], call: Call) -> Any:
        packed = ffi.new("TVMFFIAny[]", max(len(args), 1))
        if self.signature is None:
            for i, value in enumerate(args):
                anything(packed[i], value, call, str(i))
            return packed
        packers = self._packers
        if len(args) != len(packers):
            expected = f"{len(packers)}, for {self!r}"
            raise ArgumentTypeError(
                self.name, "*args", got=f"{len(args)} of them", expected=expected
            )
        for i, (packer, where) in enumerate(packers):
            packer(packed[i], args[i], call, where)
        return packed

    def _invoke(
        self, entry: Entry, packed: Any, args: tuple[Any, ...], call: Call, place: Device | None
    ) -> Any:
        result = ffi.new("TVMFFIAny *")

        def invoke() -> None:
            check_kernel(entry.address(entry.handle, packed, len(args), result), self.name)

        with cuda.kernel_memory().installed():
            if watching.inboxes:
                watching.called(self.name, invoke, args, call.descs, place)
            else:
                invoke()
        value = unpack(result, owned=True)
        if type(value) in _PLAIN:
            return value
        # Only here: objects have methods, which are entries.
        from fi_ffi.ops.modules.objects import Origin, adopted

        return adopted(value, Origin(self.name, place or self._home, self._asks))


_PLAIN = {type(None), bool, int, float, str, bytes}
