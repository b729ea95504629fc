"""`fi_ffi.prepare`: packs any call of a kernel, to launch it many times."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Callable
from typing import Any

from fi_ffi.abi.interop import as_desc
from fi_ffi.errors import ArgumentTypeError, printed
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.call.prepared import Prepared


def prepare(function: Callable[..., Any], *args: Any, stream: object = None, **kwargs: Any) -> Any:
    """Check and pack the call `function(*args, **kwargs)` without making it.

    `function` is an op (`fi_ffi.rmsnorm`), another function that launches kernels (`xqa`,
    `segment_gemm`, `cutlass_fused_moe`), a `FusedMoe`, or a run of a plan (`plan.run`,
    `plan.paged_run`, `plan.ragged_run`).  Call the result to launch it, on `stream` or, without
    one, on the stream of the open scope.  Its `update` changes tensors.  The prepared run of a plan
    stays valid after `replan`: the next launch packs it again.

    Raises what the call would raise, and `ArgumentTypeError` for another function.
    """
    from fi_ffi.ops.attention.plan import Plan
    from fi_ffi.ops.attention.run import PreparedRun

    if isinstance(function, Op) or _is_launching(function):
        return function.prepare(*args, stream=stream, **kwargs)  # type: ignore[attr-defined]
    plan, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if not isinstance(plan, Plan) or name not in plan._run_methods:
        expected = "a function of fi_ffi's that launches kernels, or a run of a plan"
        raise ArgumentTypeError("prepare", "function", got=printed(function), expected=expected)
    return PreparedRun(function, _by_name(function, args, kwargs), stream)


def _is_launching(function: object) -> bool:
    """Whether it is a function or object of fi_ffi with a `prepare` of its own."""
    is_ours = str(getattr(function, "__module__", "")).partition(".")[0] == "fi_ffi"
    return is_ours and hasattr(function, "prepare") and not isinstance(function, type)


def _by_name(run: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a run's arguments by name, with tensors described."""
    import inspect

    bound = inspect.signature(run).bind(*args, **kwargs)
    bound.apply_defaults()
    given = dict(bound.arguments)
    given.pop("stream", None)
    given |= given.pop("options", {})
    for name, value in given.items():
        if value is None or isinstance(value, (bool, str, numbers.Number)):
            continue
        with contextlib.suppress(ArgumentTypeError):  # packing raises it with the right name
            given[name] = as_desc(value, run.__self__.op, name)
    return given


__all__ = ["Prepared", "prepare"]
