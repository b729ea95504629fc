"""Functions that work around the entries they call, with `prepare` and `supports`."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast

from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.streams import handle_for
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.ops.call.arguments import Refusal
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.call.prepared import Prepared, prepare_call, tensor_like
from fi_ffi.ops.call.support import Support, supports
from fi_ffi.ops.call.values import Values

_P = ParamSpec("_P")
_Result = TypeVar("_Result", covariant=True)
Launch = Callable[[object], None]


class KeywordCall(Generic[_P]):
    """A function that fills in the arguments of a row's entry, and launches it when called."""

    def __init__(self, fill: Callable[_P, Values]) -> None:
        self._fill = fill
        functools.update_wrapper(self, fill)

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> None:
        self._fill(*args, **kwargs).call(kwargs.get("stream"))

    def prepare(self, *args: _P.args, **kwargs: _P.kwargs) -> Prepared:
        """Pack the same call without launching it."""
        return self._fill(*args, **kwargs).prepare(kwargs.get("stream"))

    def supports(self, sm: Any = None, **asked: Any) -> Support:
        """Ask whether the function can be called on a GPU (`sm=90`), with kernels of a `release`
        and a `cuda` tag, and with these dtypes, head size and options (`q_data_type`,
        `kv_data_type`, `o_data_type`, `head_dim`, `head_dim_vo`, and the call's own). See
        `Op.supports`."""
        name: str = self.__name__  # type: ignore[attr-defined]
        return supports(name, sm=sm, **asked)


class KeywordFunction(Protocol[_P, _Result]):
    """A function that launches kernels."""

    __name__: str

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _Result: ...

    def prepare(self, *args: _P.args, **kwargs: _P.kwargs) -> Any:
        """Check and pack the same call without launching it: see `fi_ffi.prepare`."""

    def supports(self, sm: Any = None, **asked: Any) -> Support:
        """Ask whether the function can be called on a GPU: see `Op.supports`."""


def keyword_function(
    prepare: Callable[..., Any],
) -> Callable[[Callable[_P, _Result]], KeywordFunction[_P, _Result]]:
    """Give a public function its `prepare` and its `supports`.

    `prepare` gets the call's arguments by name, with defaults and `stream`.
    """

    def given(function: Callable[_P, _Result]) -> KeywordFunction[_P, _Result]:
        made = cast(Any, function)

        def prepared(*args: Any, **kwargs: Any) -> Any:
            """Check and pack the same call without launching it: see `fi_ffi.prepare`."""
            return prepare(**arguments_by_name(function, function.__name__, args, kwargs))

        def asked_support(sm: Any = None, **asked: Any) -> Support:
            """Ask whether the function can be called on a GPU (`sm=90`; by default the first GPU),
            with the arguments of `Op.supports`."""
            return supports(function.__name__, sm=sm, **asked)

        made.prepare, made.supports = prepared, asked_support
        return cast("KeywordFunction[_P, _Result]", function)

    return given


def arguments_by_name(
    function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return a call's arguments by name, with defaults."""
    import inspect  # imported late: it takes longer than a first call

    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name}.prepare() {error}") from None
    bound.apply_defaults()
    return dict(bound.arguments)


def prepare_row(compiled: CompiledRow, stream: object, *args: Any, **kwargs: Any) -> Prepared:
    """Prepare a call of a row; its update uses the caller's names for tensors."""
    values, _ = compiled.arguments(*args, **kwargs)
    return prepare_call(compiled, values, stream, by_caller=True)


class PreparedSteps:
    """A prepared call of several steps: `call()` launches it, `call.update(...)` changes tensors.

    Made by `prepare` of `segment_gemm`, `fp8_blockscale_gemm_sm90` and `bgmv_moe`. It launches on
    the stream given to `prepare`, or without one on the stream of the scope that is open at the
    launch. It keeps the tensors that it was given alive; keep memory valid that you gave by
    address.
    """

    def __init__(
        self, op: str, tensors: dict[str, Any], check: Callable[..., Launch], stream: object
    ) -> None:
        self.refuse, self._check, self._stream = Refusal(op), check, stream
        # With the lock, a Ctrl-C between the steps of an update leaves the call unchanged.
        self._lock = threading.Lock()
        self._tensors: dict[str, TensorDesc | None] = {
            name: None if value is None else as_desc(value, op, name)
            for name, value in tensors.items()
        }
        self._launch = check(**self._tensors)
        if stream is not None:  # refuse what is no stream now, not at the first call
            first = next(desc for desc in self._tensors.values() if desc is not None)
            handle_for(stream, first.device, op)

    def __call__(self) -> None:
        """Launch the call. Raises `ArgumentError` without a stream, and `KernelError`."""
        self._launch(self._stream)

    def update(self, **tensors: Any) -> None:
        """Change tensors by the function's names, to addresses or to tensors of the same layout.

        Raises `ArgumentError` and `ArgumentTypeError`; the call is unchanged then.
        """
        with self._lock:
            changed = dict(self._tensors)
            for name, value in tensors.items():
                if name not in changed:
                    expected = f"one of {', '.join(changed)}; prepare another call for others"
                    raise self.refuse("update", name, expected)
                changed[name] = tensor_like(self.refuse, name, changed[name], value)
            self._launch, self._tensors = self._check(**changed), changed

    def __repr__(self) -> str:
        given = (f"{name}={desc.ptr:#x}" for name, desc in self._tensors.items() if desc)
        return f"<prepared {self.refuse.op}({', '.join(given)})>"

    __reduce_ex__ = Prepared.__reduce_ex__
