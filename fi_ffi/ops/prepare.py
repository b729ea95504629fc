"""`fi_ffi.prepare`: any call of a kernel, packed to be launched many times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fi_ffi.errors import ArgumentTypeError, printed
from fi_ffi.ops.launch import Preparing
from fi_ffi.ops.op import Op
from fi_ffi.ops.prepared import Prepared

if TYPE_CHECKING:
    from fi_ffi.ops.attention.ready import PreparedRun

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
    from fi_ffi.ops.attention.ready import prepared_single

    if isinstance(function, Op):
        return function.prepare(*args, stream=stream, **kwargs)
    if function is single.single_decode or function is single.single_prefill:
        return prepared_single(function(*args, stream=Preparing(stream), **kwargs))
    owner = getattr(function, "__self__", None)
    if not isinstance(owner, plan.Plan) or getattr(function, "__name__", "") not in _RUNS:
        expected = "an op, single_prefill, single_decode, or a run of a plan"
        raise ArgumentTypeError("prepare", "function", got=printed(function), expected=expected)
    made: PreparedRun = function(*args, stream=Preparing(stream), **kwargs)
    return _renewable(made, function, args, kwargs, stream)


def _renewable(
    made: PreparedRun, function: Callable[..., Any], args: tuple[Any, ...],
    kwargs: dict[str, Any], stream: object,
) -> PreparedRun:  # fmt: skip
    """A prepared run that can be made again with the same arguments, but for tensors."""
    import inspect

    signature = inspect.signature(function)
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    given = {name: arguments.pop(name) for name in made.names if name in arguments}

    def again(tensors: Mapping[str, object]) -> Any:
        bound = inspect.BoundArguments(signature, {**arguments, **tensors})
        return function(*bound.args, stream=Preparing(stream), **bound.kwargs)

    return made.can_renew(given, again)


__all__ = ["Prepared", "prepare"]
