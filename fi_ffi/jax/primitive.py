"""The operation in jax's programs that calls fi_ffi: how it is traced, lowered and refused."""

from __future__ import annotations

import atexit
import functools
import math
import os
from typing import Any, NoReturn

import jax
from jax._src import dispatch
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from fi_ffi.errors import ArgumentError, ArgumentTypeError, LoaderError
from fi_ffi.jax import plans, shards
from fi_ffi.jax.results import Result
from fi_ffi.jax.xla import TARGETS, CallText, Handlers, exchanged_last

_call = Primitive("fi_ffi")
_call.multiple_results = True
# Without it jax lowers a program before it knows the devices, which it asks for to divide a call.
dispatch.prim_requires_devices_during_lowering.add(_call)


def bind(
    call: CallText, arrays: list[Any], results: dict[str, Result], is_recorded: bool
) -> list[Any]:
    """Call an op on arrays or what stands for them in a trace; return its results."""
    aliases = [
        (call.arguments.index(name), i) for i, name in enumerate(results) if name in call.arguments
    ]
    made: list[Any] = _call.bind(
        *arrays,
        call=call.written(),
        results=tuple(results.values()),
        aliases=tuple(aliases),
        target=TARGETS[is_recorded],
    )
    return made


def _abstract(*given: Any, call: str, results: tuple[Result, ...], **_: Any) -> list[Any]:
    """Return the types of results; where types say how arrays are divided, by rows as the call's
    arguments are."""
    are_split = shards.are_split(CallText.read(call.encode()))
    rows = [of.sharding for of, has_rows in zip(given, are_split, strict=False) if has_rows]
    divided = next((each for each in rows if each.spec and each.spec[0] is not None), None)
    typed = {} if divided is None else {"sharding": shards.by_rows(divided)}
    return [
        jax.core.ShapedArray(shape, jax.numpy.dtype(dtype), **typed) for shape, dtype in results
    ]


@functools.lru_cache(maxsize=4096)
def _compiled(**params: Any) -> Any:
    return jax.jit(functools.partial(_call.bind, **params))


def _run(*arrays: Any, **params: Any) -> Any:
    # What is recorded keeps its plan, and these programs stay.
    return _compiled(**params | {"target": TARGETS[False]})(*arrays)


def _name(call: str) -> str:
    return plans.shown(CallText.read(call.encode()).function)


def _lowered(ctx: Any, *operands: Any, call: str, results: Any, aliases: Any, target: str) -> Any:
    text = CallText.read(call.encode())
    count = _devices_of(ctx.module_context.axis_context)
    if count > 1:
        again = functools.partial(_call.bind, call=call, aliases=aliases, target=target)
        made = shards.lowered(ctx, operands, text, again, results)
        if made is None:
            got = f"arrays of {count} devices in one call"
            expected = "the arrays of one device: call it in jax.shard_map"
            raise ArgumentError(_name(call), "sharding", got=got, expected=expected)
        return made
    layouts = [
        _layout(len(aval.shape), name in text.transposed)
        for name, aval in zip(text.arguments, ctx.avals_in, strict=True)
    ]
    lower = functools.partial(_lowered_call, target=target, aliases=dict(aliases), call=call)
    if not plans.is_plan(text.function):
        return lower(ctx, operands, layouts)
    if target == TARGETS[True]:
        plans.keep(text.function, ctx.module_context)
    # Runs of a plan share its workspace. The result of the one before is an operand, which the
    # handler does not read: so XLA runs one after the other.
    latest = ctx.module_context.cached_primitive_lowerings.setdefault(_call, {})
    place = text.function, mlir.ir.InsertionPoint.current.block
    given = ctx
    if place in latest:
        value, aval = latest[place]
        operands, layouts = (*operands, value), [*layouts, _layout(len(aval.shape), False)]
        given = ctx.replace(avals_in=[*ctx.avals_in, aval])
    made = lower(given, operands, layouts)
    latest[place] = made[0], ctx.avals_out[0]
    return made


def _lowered_call(
    ctx: Any, operands: Any, layouts: Any, target: str, aliases: dict[int, int], call: str
) -> Any:
    rule = jax.ffi.ffi_lowering(target, operand_layouts=layouts, operand_output_aliases=aliases)
    return rule(ctx, *operands, call=call)


def _layout(rank: int, is_transposed: bool) -> tuple[int, ...]:
    """Return the axes in the order of memory, the innermost first."""
    axes = tuple(range(rank))
    return (exchanged_last(axes) if is_transposed else axes)[::-1]


def _devices_of(context: Any) -> int:
    """Return among how many devices XLA divides a program by itself."""
    count = getattr(context, "num_devices", None)
    mesh = getattr(context, "mesh", None)
    if mesh is not None:
        automatic = {*mesh.axis_names} - {*context.manual_axes}
        count = math.prod(mesh.shape[name] for name in automatic)
    return count or 1


def _refuse_batches(args: Any, dims: Any, *, call: str, **_: Any) -> NoReturn:
    names = CallText.read(call.encode()).arguments
    wrong = next(name for name, dim in zip(names, dims, strict=True) if dim is not None)
    expected = "an array without an axis of jax.vmap: give rows to one call, or use jax.lax.map"
    raise ArgumentError(_name(call), wrong, got="an array of jax.vmap", expected=expected)


def _refuse_tangents(primals: Any, tangents: Any, *, call: str, **_: Any) -> NoReturn:
    names = CallText.read(call.encode()).arguments
    wrong = next(
        name for name, tangent in zip(names, tangents, strict=True) if type(tangent) is not ad.Zero
    )
    expected = "no derivative: wrap the call in jax.custom_vjp, or stop it by lax.stop_gradient"
    raise ArgumentError(_name(call), wrong, got="an array to differentiate by", expected=expected)


_call.def_abstract_eval(_abstract)
_call.def_impl(_run)
batching.primitive_batchers[_call] = _refuse_batches
ad.primitive_jvps[_call] = _refuse_tangents


def static(op: str, name: str, value: Any) -> Any:
    """Return a scalar, which is compiled in; refuse what a trace has in place of it."""
    if isinstance(value, jax.core.Tracer):
        expected = "a number of Python's: it is compiled in, so jit needs it in static_argnames"
        raise ArgumentTypeError(op, name, got=f"{value}", expected=expected)
    return value.item() if hasattr(value, "item") and not getattr(value, "shape", ()) else value


handlers = Handlers(plans.find)


def prepare() -> None:
    """Register the handlers where they are not yet; refuse what would not return."""
    if _registered_in() != os.getpid():
        raise LoaderError(
            "fi_ffi.jax can compile nothing in this process: it was forked from one that had used "
            "jax, whose threads do not survive that; start processes by multiprocessing's spawn"
        )


@functools.cache
def _registered_in() -> int:
    """Register the handlers, and how the operation is lowered, for a process's platforms; return
    the process's id."""
    for ours, theirs in {"cpu": "cpu", "cuda": "CUDA"}.items():
        handlers.register(theirs)
        mlir.register_lowering(_call, _lowered, platform=ours, cacheable=False)
    # A call that comes once the interpreter has ended would wait for it for ever.
    atexit.register(_finish, os.getpid())
    return os.getpid()


def _finish(process: int) -> None:
    """Wait for what is queued: for all arrays, and for calls whose results nobody has."""
    if os.getpid() != process:  # a forked child has nothing queued, and would wait for ever
        return
    jax.block_until_ready(jax.live_arrays())
    for device in jax.local_devices():  # a program waits for those that its thread began before
        jax.block_until_ready(jax.jit(lambda x: x + 1)(jax.device_put(0, device)))
    handlers.wait_until_quiet()
