"""FlashInfer's ops inside `jax.jit`: they take and return jax's arrays.

    import fi_ffi.jax

    @jax.jit
    def norm(x, weight):
        return fi_ffi.jax.rmsnorm(x, weight, eps=1e-6)

Each function has its op's name and arguments, without the outputs, which are its results: one, or a
tuple in the op's order. Shapes and dtypes of results follow from the arguments. Where they do not,
say them under the result's name, as `jax.ShapeDtypeStruct` or a dtype; so you ask for optional
results. What an op reads and writes, such as a cache, is an argument and a result: XLA copies it,
unless the caller has donated it. Scalars are compiled in.

Bad arguments raise fi_ffi's errors where the call is traced, and as a part of jax's errors where
they are seen in the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fi_ffi.errors import ArgumentError, ArgumentTypeError
from fi_ffi.jax import plans
from fi_ffi.jax.primitive import bind, prepare, static
from fi_ffi.jax.results import Result, is_given, is_result, results_of, signature_of
from fi_ffi.jax.xla import DTYPES, CallText
from fi_ffi.ops.call.row import IntArray, Row, Tensor, TensorArray
from fi_ffi.ops.functions import OPS


def _told(op: str, name: str, value: Any) -> Result | str | None:
    """Return what a caller says of a result."""
    if value is None:
        return None
    is_whole = isinstance(value, (jax.ShapeDtypeStruct, jax.Array))
    try:
        dtype = str(jnp.dtype(value.dtype if is_whole else value))
    except TypeError:
        dtype = f"{value!r:.60}"
    if dtype not in DTYPES.values():
        expected = "a dtype that fi_ffi has, or a jax.ShapeDtypeStruct with one"
        raise ArgumentTypeError(op, name, got=dtype, expected=expected)
    return Result(tuple(value.shape), dtype) if is_whole else dtype


def _array(op: str, name: str, value: Any) -> Any:
    """Return what a caller passes as an array of jax's; refuse a dtype that no kernel has."""
    array = jnp.asarray(value)
    if str(array.dtype) not in DTYPES.values():
        got = f"{array.dtype}[{', '.join(map(str, array.shape))}]"
        raise ArgumentTypeError(op, name, got=got, expected="a dtype that fi_ffi has")
    return array


def _of(array: Any) -> Result:
    return Result(tuple(array.shape), str(array.dtype))


def call(op: str, /, *args: Any, **kwargs: Any) -> Any:
    """Call an op by its name: see `fi_ffi.jax`."""
    row = _row(op)
    signature = signature_of(row)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentTypeError(op, "args", got=str(error), expected=str(signature)) from None
    bound.apply_defaults()
    arrays: dict[str, Any] = {}
    scalars: dict[str, Any] = {}
    for arg in row.args:
        value = bound.arguments.get(getattr(arg, "name", ""))
        if value is None or not is_given(arg):
            continue
        if isinstance(arg, Tensor):
            arrays[arg.name] = _array(op, arg.name, value)
        else:
            scalars[arg.name] = static(op, arg.name, value)
    told = {
        arg.name: _told(op, arg.name, bound.arguments.get(arg.name))
        for arg in row.tensors
        if is_result(arg)
    }
    given = {name: _of(array) for name, array in arrays.items()}
    results = results_of(row, given, scalars, told)
    is_recorded = not any(arg.is_scratch or arg.or_zeros for arg in row.tensors)
    transposed = tuple(arg.name for arg in row.tensors if arg.transposed and arg.name in arrays)
    text = CallText(op, tuple(arrays), tuple(results), scalars, transposed)
    return _bound(text, arrays, results, is_recorded)


def run(plan: Any, /, *args: Any, out: Any = None, lse: bool = False, **options: Any) -> Any:
    """Run a plan that was made outside: `run(plan, q, k_cache, v_cache)` returns the output, and
    with `lse` also the logarithms of the sums.

    The plan may be planned again for other lengths between calls of what was compiled. With
    `enable_cuda_graph` XLA may record the run. The plan must live as long as what was compiled.
    """
    op, name = plans.title(plan), plans.name_of(plan)
    names, known = plans.names_of_run(plan)
    if len(args) != len(names):
        got = f"{len(args)} arrays"
        raise ArgumentTypeError(op, "args", got=got, expected=f"{len(names)}: {', '.join(names)}")
    arrays = {name: _array(op, name, value) for name, value in zip(names, args, strict=True)}
    scalars: dict[str, Any] = {}
    for key, value in options.items():
        if key not in known:
            raise ArgumentTypeError(op, "options", got=key, expected=f"of {', '.join(known)}")
        if getattr(value, "shape", ()):
            arrays[key] = _array(op, key, value)
        elif value is not None:
            scalars[key] = static(op, key, value)
    q, values = (arrays[names[i]] for i in (0, 2))
    told = _told(op, "out", out)
    if not isinstance(told, Result):
        told = Result((*q.shape[:-1], values.shape[-1]), told or str(q.dtype))
    results = {"o": told}
    if lse:
        results["lse"] = Result(tuple(q.shape[:-1]), "float32")
    text = CallText(name, tuple(arrays), tuple(results), scalars)
    return _bound(text, arrays, results, plans.is_recordable(plan))


def _bound(
    text: CallText, arrays: dict[str, Any], results: dict[str, Result], is_recorded: bool
) -> Any:
    prepare()
    made = bind(text, [*arrays.values()], results, is_recorded)
    return made[0] if len(made) == 1 else tuple(made)


def _row(op: str) -> Row:
    found = OPS.get(op)
    if found is None:
        raise ArgumentError("call", "op", got=op, expected="an op's name, as in fi_ffi")
    if any(
        isinstance(arg, (IntArray, TensorArray)) or getattr(arg, "parts", 1) > 1
        for arg in found.row.args
    ):
        expected = "an op whose arguments are scalars, and tensors of their own"
        raise ArgumentError("call", "op", got=op, expected=expected)
    return found.row


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in OPS:
        raise AttributeError(f"fi_ffi.jax has no {name!r}", name=name)
    made = functools.partial(call, name)
    functools.update_wrapper(made, OPS[name], assigned=("__name__", "__qualname__"), updated=())
    made.__doc__ = OPS[name].__doc__
    globals()[name] = made
    return made


def __dir__() -> list[str]:
    return sorted({*globals(), *OPS})
