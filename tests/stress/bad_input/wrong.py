"""One argument made wrong in one way: of a row's, or of any function's.

What is drawn is a name, what makes the value, and whether the call must be refused then: always,
or where nothing else of it is wrong (other arguments can leave nothing to do, and then addresses
are not looked at), or not at all, where only what is made of all arguments tells.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import fi_ffi
from fi_ffi.ops.call.row import Absent, Row, Scalar, Tensor, default_of

from . import odd
from .guard import check_refusal

ALWAYS, ALONE, MAYBE = "always", "alone", "maybe"


@dataclass(frozen=True)
class Wrong:
    what: str
    make: Callable[[], Any]
    refused: str = MAYBE


def changed(desc: fi_ffi.TensorDesc, **fields: Any) -> fi_ffi.TensorDesc:
    """The descriptor with other fields; strides stay where the rank does."""
    values: dict[str, Any] = {"ptr": desc.ptr, "shape": desc.shape, "dtype": desc.dtype}
    values |= {"device": desc.device}
    if "strides" not in fields and len(fields.get("shape", desc.shape)) == len(desc.strides):
        values["strides"] = desc.strides
    values |= fields
    return fi_ffi.TensorDesc(values.pop("ptr"), values.pop("shape"), values.pop("dtype"), **values)


def _to(what: str, desc: fi_ffi.TensorDesc, refused: str = MAYBE, **fields: Any) -> Wrong:
    return Wrong(what, lambda: changed(desc, **fields), refused)


def _rank(rng, desc, arg, row) -> Wrong:
    shape = desc.shape
    shapes = [(), (*shape, 1), (1, *shape), shape[:-1], shape[1:], (desc.numel,)]
    shapes += [(1,) * 64, (1,) * 65]
    chosen = rng.choice([other for other in shapes if len(other) != len(shape)])
    refused = ALWAYS if arg and not arg.is_loose else MAYBE
    return _to(f"rank {len(chosen)}", desc, refused, shape=chosen, strides=None)


def _size(rng, desc, arg, row) -> Wrong:
    axis = rng.randrange(len(desc.shape)) if desc.shape else 0
    n = desc.shape[axis] if desc.shape else 1
    new = rng.choice(
        [0, n - 1, n + 1, 2 * n, n // 2, 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, -1]
    )
    shape = tuple(new if i == axis else old for i, old in enumerate(desc.shape))
    keep = rng.random() < 0.5
    return _to(f"shape {shape}", desc, shape=shape, strides=desc.strides if keep else None)


def _shape(rng, desc, arg, row) -> Wrong:
    shape = list(desc.shape)
    rng.shuffle(shape)
    others = [7, None, "ab", (1.0,), (True,), (None,), [odd.HUGE], (2**40,) * 3, odd.HUGE]
    silly = rng.choice([tuple(shape), *others])
    if isinstance(silly, tuple) and rng.random() < 0.3:
        silly = [*silly]
    what = f"shape of {type(silly).__name__}"
    return Wrong(what, lambda: changed(desc, shape=silly, strides=None))


def _dtype(rng, desc, arg, row) -> Wrong:
    if rng.random() < 0.1:
        silly = rng.choice([None, "float17", 3, int, [], odd.HUGE, "", b"float16", object()])
        return Wrong(f"dtype of {type(silly).__name__}", lambda: changed(desc, dtype=silly))
    new = rng.choice([name for name in fi_ffi.DTYPES if name != desc.dtype.name])
    allowed = row.dtypes.get(arg.dtype, (arg.dtype,)) if arg and row else (new,)
    return _to(f"dtype {new}", desc, MAYBE if new in allowed else ALWAYS, dtype=new)


def _strides(rng, desc, arg, row) -> Wrong:
    if not desc.strides:
        return _rank(rng, desc, arg, row)
    axis = rng.randrange(len(desc.shape))
    own = desc.strides[axis]
    near = [0, -own, -1, 2 * own, own + 1, own - 1, 1, 2]
    new = rng.choice([*near, 2**31, 2**32, 2**40, 2**61, 2**63 - 1, 2**63, -(2**62)])
    strides = tuple(new if i == axis else old for i, old in enumerate(desc.strides))
    is_used = desc.shape[axis] > 1 and desc.numel and new != own
    refused = MAYBE
    if arg and is_used and (new < 0 or (new == 0 and arg.writes) or arg.contiguous):
        refused = ALWAYS
    if arg and is_used and axis == len(strides) - 1 and not arg.transposed:
        refused = ALWAYS
    return _to(f"strides {strides}", desc, refused, strides=strides)


_DEVICES: list[Any] = [
    "cuda:0", "cuda:1", "cuda:7", "cuda_managed:0", "cuda_host", "cpu", "cpu:1", "cuda:2147483647",
    "cuda:2147483648", "gpu", "cuda:-1", 0, None, odd.HUGE,
]  # fmt: skip


def _device(rng, desc, arg, row) -> Wrong:
    new = rng.choice(_DEVICES)
    told = new if isinstance(new, str) else type(new).__name__
    is_known = arg is not None and new != str(desc.device) and not arg.mapped
    return _to(f"device {told}", desc, ALONE if is_known else MAYBE, device=new)


def _address(rng, desc, arg, row) -> Wrong:
    size = desc.dtype.itemsize
    there = desc.numel > 0
    near = [0, desc.ptr + 1, desc.ptr + size // 2, desc.ptr - 1]
    new = rng.choice([*near, -1, 2**63, 2**64 - 1, 2**64, odd.HUGE, 1.5, None, "0", True])
    is_known = arg and there and type(new) is int and (new == 0 or new % size)
    told = new if type(new) is not int or new < 2**65 else "huge"
    return _to(f"address {told}", desc, ALONE if is_known else MAYBE, ptr=new)


def _none(rng, desc, arg, row) -> Wrong:
    must = arg is not None and default_of(arg) is None
    return Wrong("None", lambda: None, ALWAYS if must else MAYBE)


def _no_tensor(rng, desc, arg, row) -> Wrong:
    at = rng.randrange(len(odd.NOT_TENSORS))
    # An array of one number is what some arguments are, and numpy's numbers are such arrays.
    is_array = isinstance(odd.NOT_TENSORS[at](), (np.ndarray, np.generic))
    return Wrong(f"no tensor {at}", odd.NOT_TENSORS[at], ALWAYS if arg and not is_array else MAYBE)


def _an_array(rng, desc, arg, row) -> Wrong:
    at = rng.randrange(len(odd.ARRAYS))
    return Wrong(f"array {at}", odd.ARRAYS[at])


_TENSORS = [_rank, _shape, _device, _none, _no_tensor, _an_array]
_TENSORS += 2 * [_size, _dtype, _strides, _address]


def wrong_tensor(
    rng: random.Random, desc: fi_ffi.TensorDesc, arg: Tensor | None = None, row: Row | None = None
) -> Wrong:
    return rng.choice(_TENSORS)(rng, desc, arg, row)


def another(rng: random.Random, name: str, descs: dict[str, fi_ffi.TensorDesc]) -> Wrong:
    """Another tensor's, or its own layout at (or near) another's address."""
    other = descs[rng.choice([*descs])]
    shift = rng.choice([0, 0, 1, 16, -16])
    if rng.random() < 0.3:
        return Wrong("another's", lambda: other)
    return Wrong("overlapping", lambda: changed(descs[name], ptr=other.ptr + shift))


def wrong_value(rng: random.Random, arg: Any) -> Wrong:
    """Of an argument that is no tensor; anything for one that no row tells of."""
    if not isinstance(arg, Scalar):
        at = rng.randrange(len(odd.ANYTHING))
        # Words stand in texts of their own type only: no odd value is one of them.
        known = arg is not None and not isinstance(arg, Absent)
        return Wrong(f"odd {at}", odd.ANYTHING[at], ALWAYS if known else MAYBE)
    if rng.random() < 0.4:
        at = rng.randrange(len(odd.NOT_NUMBERS))
        value_of = odd.NOT_NUMBERS[at]
        refused = MAYBE if default_of(arg) == "None" and at == 0 else ALWAYS
        return Wrong(f"no number {at}", value_of, refused)
    at = rng.randrange(len(odd.NUMBERS))
    never = _never(arg, odd.NUMBERS[at]())
    return Wrong(f"number {at}", odd.NUMBERS[at], ALWAYS if never else MAYBE)


def _never(arg: Scalar, value: Any) -> bool:
    """Whether no call of anything takes this number."""
    is_bool = type(value).__name__ in ("bool", "bool_")
    if is_bool or arg.type is bool:
        return not (is_bool and arg.type is bool)
    if isinstance(value, (complex, np.complexfloating)):
        return True
    if arg.type is int:
        is_int = hasattr(type(value), "__index__") and not isinstance(value, np.ndarray)
        return not is_int or not -(2**63) <= int(value) < 2**63
    try:
        return not abs(float(value)) < float("inf")
    except (TypeError, ValueError, OverflowError):
        return True


def told(wrong: dict[str, Wrong]) -> dict[str, str]:
    return {name: one.what for name, one in wrong.items()}


def built(wrong: dict[str, Wrong]) -> dict[str, Any] | None:
    """The values; None where a descriptor itself was refused, as it must be."""
    try:
        return {name: one.make() for name, one in wrong.items()}
    except fi_ffi.ArgumentError as error:
        check_refusal(error, ["TensorDesc"], ["ptr", "shape", "dtype", "strides", "device"])
        return None
