"""Functions without a row, by `fi_ffi.module`: any values for a function of every kind."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np

import fi_ffi

from . import odd
from .judge import check_refusal
from .memory import Room
from .wrong import wrong_tensor

# It compares what it is given with the address of an object that is gone, or never returns.
_NOT = ("fail",)
_VALUES = [made for made in odd.ANYTHING if not isinstance(made(), odd.Interface)]


class Modules:
    """Calls of every_kind.cc's functions with anything."""

    def __init__(self) -> None:
        from tests.modules.conftest import compiled

        self.module = fi_ffi.module(compiled("every_kind.cc"))
        names = [name for name in self.module.entries() if not name.startswith(_NOT)]
        self.names = [name for name in names if self.module.entry(name).signature is not None]
        self.room = Room({"x": np.zeros((2, 3), np.float32)})
        self.desc = self.room.descs()["x"]

    def _value(self, rng: random.Random, depth: int = 0) -> Callable[[], Any]:
        kind = rng.randrange(6)
        if kind == 0:
            wrong = wrong_tensor(rng, self.desc)
            return wrong.make
        if kind == 1 and depth < 3:
            items = [self._value(rng, depth + 1) for _ in range(rng.randrange(4))]
            if rng.random() < 0.3:
                return lambda: {str(i): item() for i, item in enumerate(items)}
            return lambda: [item() for item in items]
        return rng.choice(_VALUES)

    def __call__(self, rng: random.Random, tell: Callable[[str], None]) -> str:
        name = rng.choice(self.names)
        entry = self.module.entry(name)
        count = len(entry.signature.params)
        if rng.random() < 0.05:
            count += rng.choice([-1, 1, 600])
        tell(f"{name} of {count}")
        try:
            args = [self._value(rng)() for _ in range(max(count, 0))]
        except fi_ffi.ArgumentError as error:
            check_refusal(error, ["TensorDesc"], None)
            return "no descriptor"
        if any(isinstance(one, fi_ffi.TensorDesc) and not self.room.holds(one) for one in args):
            return "not there"
        more = (
            {"stream": "no stream", "device": rng.choice(odd.NOT_TENSORS)()}
            if rng.random() < 0.05
            else {}
        )
        tell(f"{entry!r}: {[fi_ffi.errors.printed(arg) for arg in args]} {[*more]}")
        try:
            entry(*args, **more)
        except fi_ffi.ArgumentError as error:
            check_refusal(error, [f"every_kind.{name}"], None)
            return "refused"
        except fi_ffi.KernelError:
            return "the function's own"
        except fi_ffi.LoaderError:
            assert "device" in more
            return "no such GPU"
        finally:
            self.room.restore()
        return "right"
