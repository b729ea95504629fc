"""Plans in jax's programs: their names in calls' texts, and how long a program keeps them."""

from __future__ import annotations

import inspect
import secrets
import weakref
from collections.abc import Callable
from typing import Any

from fi_ffi.errors import ArgumentError
from fi_ffi.ops.attention.prefill import RUN_OPTIONS
from fi_ffi.ops.call import cuda
from fi_ffi.ops.functions import OPS

_PLAN = "plan "  # a plan's name in a call's text begins so
# No other process has these names, if it finds a compiled program on disk.
_plans: dict[str, weakref.ref[Any]] = {}


def name_of(plan: Any) -> str:
    """Return a plan's name in calls' texts."""
    for name, alive in _plans.copy().items():
        if alive() is plan:
            return name
        if alive() is None:
            _plans.pop(name, None)
    name = _PLAN + secrets.token_hex(8)
    _plans[name] = weakref.ref(plan)
    return name


def _plan_of(name: str) -> Any:
    """Return the plan of a name, or None if it is gone."""
    return _plans[name]() if name in _plans else None


def run_of(plan: Any) -> Callable[..., Any]:
    """Return a plan's method that runs it."""
    if hasattr(plan, "run"):
        name = "run"
    else:
        name = "ragged_run" if plan.options.page_size is None else "paged_run"
    found: Callable[..., Any] = getattr(plan, name)
    return found


def is_plan(function: str) -> bool:
    """Return whether a call's text names a plan."""
    return function.startswith(_PLAN)


def find(function: str) -> Callable[..., Any]:
    """Return what a call's text names: an op, or a plan's run."""
    if not is_plan(function):
        return OPS[function]
    plan = _plan_of(function)
    if plan is None:
        expected = "a plan that lives as long as what was compiled with it"
        raise ArgumentError("run", "plan", got="a plan that is gone", expected=expected)
    return run_of(plan)


def shown(function: str) -> str:
    """Return what errors call it: an op's name, or a plan's class and run."""
    if not is_plan(function):
        return function
    plan = _plan_of(function)
    return "run" if plan is None else title(plan)


def title(plan: Any) -> str:
    """Return what errors call a plan's run."""
    return f"{type(plan).__name__}.{run_of(plan).__name__}"


def names_of_run(plan: Any) -> tuple[list[str], list[str]]:
    """Return the names of the arrays that a run takes before its outputs, and of its options."""
    kinds = {name: each.kind for name, each in inspect.signature(run_of(plan)).parameters.items()}
    named = inspect.Parameter.POSITIONAL_OR_KEYWORD
    arrays = [name for name, kind in kinds.items() if kind is named]
    if arrays[-2:] != ["o", "lse"]:
        expected = "a plan whose run writes `o` and `lse` alone"
        raise ArgumentError("run", "plan", got=type(plan).__name__, expected=expected)
    options = {name for name, kind in kinds.items() if kind is inspect.Parameter.KEYWORD_ONLY}
    if inspect.Parameter.VAR_KEYWORD in kinds.values():
        options |= {*RUN_OPTIONS}
    return arrays[:-2], sorted(options - {"stream"})


def is_recordable(plan: Any) -> bool:
    """Return whether a recorded run stays right: its launch is fixed, or follows the lengths."""
    is_fixed = bool(getattr(plan.options, "enable_cuda_graph", False))
    return is_fixed or bool(getattr(plan, "_is_of_any_lengths", False))


def keep(function: str, module: Any) -> None:
    """Keep a plan as long as a program that XLA may run without asking for it; have its replans
    wait for XLA, whose replays nobody else can order."""
    plan = _plan_of(function)
    if plan is not None:
        module.add_keepalive(plan)
        plan.workspace.set_replayed(plan)
        if plan.device.is_cuda:  # the copies of the plan in force may still run
            cuda.synchronize(plan.device)
