"""Functions that no row tells of, made wrong: all that is known is a right call of each.

A tensor's descriptor is changed, anything else is replaced by anything; what then happens is a
refusal that names the function, or a call that stays within what it writes.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import fi_ffi

from . import odd
from .guard import check_refusal, kernels_run, stopped
from .memory import Room
from .wrong import Wrong, another, built, told, wrong_tensor

_WORDS = ["auto", "fa2", "fa3", "NONE", "ALIBI", "ROPE_LLAMA", "NHD", "HND", "cpu", "MN", "K",
          "fp4", "int4", "Swiglu", "Gelu", "cuda:0", "cuda_host", *fi_ffi.DTYPES]  # fmt: skip
_INDICES = ("int32", "int64", "uint32")


def _ints(rng: random.Random) -> Any:
    values = [rng.randint(-2, 12) for _ in range(rng.randrange(7))]
    return rng.choice([values, np.array(values, np.int32), np.array(values, np.int64)])


def anything(rng: random.Random, name: str) -> Wrong:
    """What stands in for an argument that is no tensor."""
    if name == "stream":  # an int is one
        at = rng.randrange(8)
        return Wrong(f"stream {at}", odd.NOT_TENSORS[at])
    kind = rng.randrange(5)
    if kind == 0:
        word = rng.choice(_WORDS)
        return Wrong(repr(word), lambda: word)
    if kind == 1:
        number = rng.choice([rng.randint(-3, 200), rng.uniform(-2, 2), 2 ** rng.randrange(70)])
        return Wrong(repr(number), lambda: number)
    if kind == 2:
        ints = _ints(rng)
        return Wrong(repr(ints), lambda: ints)
    at = rng.randrange(len(odd.ANYTHING))
    return Wrong(f"anything {at}", odd.ANYTHING[at])


@dataclass
class Known:
    """A right call: host arrays for tensors, and whatever else it is given."""

    function: Callable[..., Any]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)
    writes: Sequence[str] = ()
    # Who the errors are of; the function's own name where nothing is said.
    ops: Sequence[str] = ()
    # Names that are replaced beside those of its signature, and those that are left alone.
    more: Sequence[str] = ()
    never: Sequence[str] = ()
    # Whether the right call is made first; it is not where only a GPU has the kernels.
    runs: bool = True
    # What else may be raised: a function that asks the machine for a GPU.
    also: tuple[type[Exception], ...] = ()


class Function:
    """Wrong calls of one function."""

    def __init__(self, known: Known) -> None:
        self.known, self.room = known, Room(known.arrays)
        self.name = known.function.__name__
        self.ops = known.ops or [self.name]
        parameters = inspect.signature(known.function).parameters.values()
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        names = [one.name for one in parameters if one.kind not in kinds]
        self.names = [name for name in (*names, *known.more) if name not in known.never]
        self.descs = self.room.descs()
        if known.runs:
            self.call({})

    @property
    def values(self) -> dict[str, Any]:
        return {**self.descs, **self.known.others}

    def call(self, changes: Mapping[str, Any]) -> Any:
        """Make the call; what it wrote is put back."""
        values = {**self.values, **changes}
        result = self.known.function(**values)
        names = [
            name for name in self.known.writes if isinstance(values.get(name), fi_ffi.TensorDesc)
        ]
        outside = self.room.changed_outside([values[name] for name in names])
        assert not outside, f"{outside} bytes were written that are no element of a result"
        self.room.restore()
        return result

    def draw(self, rng: random.Random) -> dict[str, Wrong]:
        count = 1 if rng.random() < 0.6 else rng.randint(2, 3)
        names = rng.sample(self.names, min(count, len(self.names)))
        return {name: self._wrong(rng, name) for name in names}

    def _wrong(self, rng: random.Random, name: str) -> Wrong:
        if name not in self.descs or rng.random() < 0.1:
            return anything(rng, name)
        if rng.random() < 0.1:
            return another(rng, name, self.descs)
        return wrong_tensor(rng, self.descs[name])

    def can_run(self, changes: Mapping[str, Any]) -> bool:
        """Whether there is memory behind everything, and indices are what they were."""
        changed = [(name, value) for name, value in changes.items() if self.is_tensor(value)]
        for name, value in changed:
            if type(value) is not fi_ffi.TensorDesc or not self.room.holds(value):
                return False
            own = self.descs.get(name)
            if own is None or own.dtype.name in _INDICES:
                return False
        indexed = any(desc.dtype.name in _INDICES for desc in self.descs.values())
        return not (indexed and changed)

    def is_tensor(self, value: Any) -> bool:
        return isinstance(value, (fi_ffi.TensorDesc, odd.Interface))

    def __call__(self, rng: random.Random, tell: Callable[[str], None]) -> str:
        wrong = self.draw(rng)
        tell(f"{self.name}: {told(wrong)}")
        changes = built(wrong)
        if changes is None:
            return "no descriptor"
        return self.judge(changes)

    def judge(self, changes: Mapping[str, Any]) -> str:
        try:
            with kernels_run(self.can_run(changes)):
                self.call(changes)
        except fi_ffi.ArgumentError as error:
            check_refusal(error, self.ops, None)
            assert self.room.is_untouched(), "something was written by a call that was refused"
            return "refused"
        except fi_ffi.KernelError as error:
            assert stopped(error), error
            assert self.room.is_untouched()
            return "fits"
        except RuntimeError as error:
            if "memory that is not there" not in str(error) and not isinstance(
                error, self.known.also
            ):
                raise
            return "fits"
        return "right"


class Functions:
    """Wrong calls of several."""

    def __init__(self, known: Sequence[Callable[[], Known]]) -> None:
        self.known = known
        self._made: dict[int, Function] = {}

    def __call__(self, rng: random.Random, tell: Callable[[str], None]) -> str:
        at = rng.randrange(len(self.known))
        function = self._made.pop(at, None) or Function(self.known[at]())
        outcome = function(rng, tell)
        self._made[at] = function
        return outcome
