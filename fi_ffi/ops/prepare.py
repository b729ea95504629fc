"""`fi_ffi.prepare`: any call of a kernel, packed to be launched many times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.tensor import make_desc
from fi_ffi.errors import ArgumentTypeError
from fi_ffi.ops.launch import Preparing
from fi_ffi.ops.op import Op
from fi_ffi.ops.prepared import Prepared

# Of plans, the methods that launch.
_RUNS = ("run", "ragged_run", "paged_run")


def prepare(function: Callable[..., Any], *args: Any, stream: object = None, **kwargs: Any) -> Any:
    """The call `function(*args, **kwargs)`, checked and packed, and not made.

    `function` is an op (`fi_ffi.rmsnorm`), `single_prefill` or `single_decode`, or a run of a
    plan (`plan.run`, `plan.paged_run`, `plan.ragged_run`).  What is returned is called to launch
    it, on `stream`, or without one on that of the scope that is open then; its `update` changes
    tensors.  A plan's prepared run holds through `replan`: the next launch packs it anew.

    Raises what the call would, and `ArgumentTypeError` for another function.
    """
    from fi_ffi.ops.attention import plan, single
    from fi_ffi.ops.attention.ready import PreparedRun

    if isinstance(function, Op):
        return function.prepare(*args, stream=stream, **kwargs)
    owner = getattr(function, "__self__", None)
    is_run = isinstance(owner, plan.Plan) and getattr(function, "__name__", "") in _RUNS
    is_single = function is single.single_decode or function is single.single_prefill
    if not (is_run or is_single):
        expected = "an op, single_prefill, single_decode, or a run of a plan"
        raise ArgumentTypeError("prepare", "function", got=repr(function), expected=expected)
    made = function(*args, stream=Preparing(stream), **kwargs)
    if isinstance(made, PreparedRun):
        return made.can_renew(_again(function, args, kwargs, stream))
    return made


def _again(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], stream: object
) -> Callable[[Mapping[str, object]], Any]:
    """The same call with other tensors."""
    import inspect

    bound = inspect.signature(function).bind(*args, **kwargs)

    def again(changes: Mapping[str, object]) -> Any:
        for name, value in changes.items():
            before = bound.arguments[name]
            if type(value) is int:
                value = make_desc(value, as_desc(before, "prepare", name).layout)
            bound.arguments[name] = value
        return function(*bound.args, stream=Preparing(stream), **bound.kwargs)

    return again


__all__ = ["Prepared", "prepare"]
