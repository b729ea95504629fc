"""Plans made wrong: when they are made, planned anew, run, and prepared runs that are updated.

Everything that a plan could write lies in one room: workspaces, queries, caches, results.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import fi_ffi

from . import odd
from .functions import anything
from .guard import kernels_run, stopped
from .judge import check_refusal
from .memory import Room
from .wrong import Wrong, another, built, changed, told, wrong_tensor
from tests.helpers.plan_calls import KINDS, OPTIONS, Case

_RESULTS = ("o", "lse")
_WORKSPACE = ("float", "int", "staging")


class PlanCase(Case):
    """A batch whose memory is one room, with its index arrays."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__(kind, **options)
        index = super().arrays
        self.room = Room(self.memory | index)
        self.memory = {name: self.room.arrays[name] for name in self.memory}
        self.index = {name: self.room.arrays[name] for name in index}
        self.descs = self.room.descs()

    @property
    def arrays(self) -> dict[str, Any]:
        return getattr(self, "index", None) or super().arrays


class Plan:
    """Wrong calls around a plan of one kind."""

    def __init__(self, kind: str, number: int) -> None:
        rng = random.Random(f"{number} {kind}")
        options = {"backend": rng.choice(["fa2", "fa3"])} if kind != "decode" else {}
        options |= {"enable_cuda_graph": rng.random() < 0.5}
        self.kind, self.case = kind, PlanCase(kind, **options)
        self.plan = self.case.plan()
        self._ready()
        method = {"ragged": "ragged_run", "paged": "paged_run"}.get(kind, "run")
        self.run = getattr(self.plan, method)
        names = set(inspect.signature(self.run).parameters)
        if "options" in names:
            names |= inspect.signature(self.plan._apply).parameters.keys() - {"values"}
        self.run_names = sorted(names - {"options"})

    def _ready(self) -> None:
        """From here on the room must stay as it is, as the plan's workspace is part of it."""
        self.case.run(self.plan)
        self.case.check()
        for name in _RESULTS:
            self.case.memory[name][...] = np.nan
        self.case.room.before[...] = self.case.room.whole

    def draw(self, rng: random.Random, names: list[str]) -> dict[str, Wrong]:
        count = 1 if rng.random() < 0.6 else rng.randint(2, 3)
        return {name: self._wrong(rng, name) for name in rng.sample(names, min(count, len(names)))}

    def _wrong(self, rng: random.Random, name: str) -> Wrong:
        descs = self.case.descs
        if name not in descs or rng.random() < 0.15:
            return anything(rng, name)
        return another(rng, name, descs) if rng.random() < 0.1 else wrong_tensor(rng, descs[name])

    def is_there(self, changes: Mapping[str, Any]) -> bool:
        """Whether what the host reads at once has memory."""
        if any(isinstance(value, odd.Interface) for value in changes.values()):
            return False
        descs = [value for value in changes.values() if isinstance(value, fi_ffi.TensorDesc)]
        on_host = [desc for desc in descs if desc.device.type in ("cpu", "cuda_host")]
        return all(self.case.room.holds(changed(desc, device="cpu")) for desc in on_host)

    def attempt(self, function: Callable[[], Any], runs: bool = True) -> str:
        """Refused, with nothing written; or done, with what may be written."""
        room = self.case.room
        try:
            with kernels_run(runs):
                function()
        except fi_ffi.ArgumentError as error:
            check_refusal(error, [self.case.op, "Workspace"], None)
            assert room.is_untouched(), "something was written by a call that was refused"
            return "refused"
        except fi_ffi.KernelError as error:
            assert stopped(error), error
            return "fits"
        except TypeError as error:  # an option by an unknown name
            assert type(error) is TypeError
            assert "unexpected keyword" in str(error) or "missing" in str(error)
            return "signature"
        return "done"

    def within(self, names: tuple[str, ...], values: Mapping[str, Any] | None = None) -> None:
        """Nothing but these was written."""
        descs = [{**self.case.descs, **(values or {})}[name] for name in names]
        found = [desc for desc in descs if isinstance(desc, fi_ffi.TensorDesc)]
        outside = self.case.room.changed_outside(found)
        assert not outside, f"{outside} bytes were written that are no element of a result"

    def __call__(self, rng: random.Random, tell: Callable[[str], None]) -> str:
        way = rng.choice(
            [self.make, self.replan, self.running, self.running, self.update, self.workspace]
        )
        return f"{way.__name__} {way(rng, tell)}"

    def make(self, rng: random.Random, tell: Callable[[str], None]) -> str:
        """A plan of its own, with a workspace of the room's."""
        names = [
            *self.case.arrays,
            *OPTIONS[self.kind].table,
            "device",
            "workspace",
            "stream",
        ]
        # Whether its items are right is known where the kernels run.
        changes = self._built(
            rng, tell, [name for name in names if name != "use_multi_item_scoring"], "plan"
        )
        if changes is None:
            return "no descriptor"
        if changes.get("device", "cpu") is None:  # that is a GPU
            changes["device"] = "cpu"
        made: list[Any] = []
        outcome = self.attempt(lambda: made.append(self.case.plan(**changes)))
        if made:
            self.attempt_run(made[0])
        self._restore()
        return outcome

    def attempt_run(self, plan: Any) -> None:
        """Of whatever was planned: a run of what was not planned for is told so too."""
        self.within(_WORKSPACE)
        self.case.room.before[...] = self.case.room.whole
        if self.attempt(lambda: self.case.run(plan)) == "done":
            self.within((*_WORKSPACE, *_RESULTS))

    def replan(self, rng: random.Random, tell: Callable[[str], None]) -> str:
        """After a refusal the plan is as it was."""
        changes = self._built(rng, tell, [*self.case.arrays, "stream"], "replan")
        if changes is None:
            return "no descriptor"
        outcome = self.attempt(lambda: self.case.replan(self.plan, **changes))
        if outcome == "done":
            self.within(_WORKSPACE)
            self.case.replan(self.plan)
            self.case.room.before[...] = self.case.room.whole
        elif rng.random() < 0.2:
            self._right()
        return outcome

    def running(self, rng: random.Random, tell: Callable[[str], None]) -> str:
        changes = self._built(rng, tell, self.run_names, "run")
        if changes is None:
            return "no descriptor"
        tensors = {name for name, value in changes.items() if isinstance(value, fi_ffi.TensorDesc)}
        runs = not tensors or all(self.case.room.holds(changes[name]) for name in tensors)
        outcome = self.attempt(lambda: self.case.run(self.plan, **changes), runs)
        if outcome == "done":
            self.within((*_WORKSPACE, *_RESULTS), changes)
        self.case.room.restore()
        if outcome == "refused" and rng.random() < 0.2:
            self._right()
        return outcome

    def update(self, rng: random.Random, tell: Callable[[str], None]) -> str:
        """A prepared run; addresses that pass are not used."""
        made = fi_ffi.prepare(
            self.run, **{name: self.case.memory[name] for name in self.case.run_names}
        )
        changes = self._built(rng, tell, self.case.run_names, "update")
        if changes is None:
            return "no descriptor"
        outcome = self.attempt(lambda: made.update(**changes))
        if outcome == "refused" and rng.random() < 0.3:
            made()
            self._check()
        return outcome

    def workspace(self, rng: random.Random, tell: Callable[[str], None]) -> str:
        names = list(inspect.signature(fi_ffi.Workspace).parameters)
        given = dict(zip(names, (self.case.descs[name] for name in _WORKSPACE), strict=True))
        wrong = {
            name: wrong_tensor(rng, given[name]) for name in rng.sample(names, rng.randint(1, 2))
        }
        tell(f"Workspace: {told(wrong)}")
        changes = built(wrong)
        if changes is None:
            return "no descriptor"
        return self.attempt(lambda: fi_ffi.Workspace(**{**given, **changes}))

    def _built(
        self, rng: random.Random, tell: Callable[[str], None], names: list[str], way: str
    ) -> dict[str, Any] | None:
        wrong = self.draw(rng, names)
        tell(f"{self.kind} {way}: {told(wrong)}")
        changes = built(wrong)
        if changes is None or (way != "run" and not self.is_there(changes)):
            return None
        return changes

    def _right(self) -> None:
        self.case.run(self.plan)
        self._check()

    def _check(self) -> None:
        self.case.check()
        self.within((*_WORKSPACE, *_RESULTS))
        self.case.room.restore()

    def _restore(self) -> None:
        """The plan's own part of the workspace, after another plan was in it."""
        self.plan = self.case.plan()
        self.run = getattr(self.plan, self.run.__name__)
        for name in _RESULTS:
            self.case.memory[name][...] = np.nan
        self.case.room.before[...] = self.case.room.whole


class Plans:
    def __init__(self, number: int) -> None:
        self.number = number
        self._made: dict[str, Plan] = {}

    def __call__(self, rng: random.Random, tell: Callable[[str], None]) -> str:
        kind = rng.choice(KINDS)
        plan = self._made.pop(kind, None) or Plan(kind, self.number)
        outcome = plan(rng, tell)
        self._made[kind] = plan
        return outcome
