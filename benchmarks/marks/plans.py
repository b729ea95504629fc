"""Plans: how each is made of each step's tables, measured beside each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from marks.bench import Bench
from marks.report import Line
from marks.timing import Side, with_turns

# Of the batch that is planned again and again: tables for as many tokens, one after the other.
STEPS = 8

Check = Callable[[Callable[[], object], int], object]


@dataclass(frozen=True)
class Planner:
    """One way of planning: a function, its arguments at each step, and how its plan is run.

    `run` is given what `plan` returned, and the step.
    """

    name: str
    plan: Callable[..., Any]
    steps: Sequence[tuple[Any, ...]]
    run: Callable[[Any, int], object]
    options: dict[str, Any] = field(default_factory=dict)

    def side(self, check: Check) -> Side:
        """`check(call, step)` sees whether a call leaves the results of a step."""
        plan, options = self.plan, self.options

        def loop(turns: list[tuple[Any, ...]]) -> None:
            for arguments in turns:
                plan(*arguments, **options)

        def check_ends() -> None:
            for step in (0, len(self.steps) - 1):
                check(lambda: self.run(plan(*self.steps[step], **options), step), step)  # noqa: B023

        return Side(self.name, with_turns(loop, self.steps), check_ends)


def lines(
    bench: Bench, key: str, what: str, check: Check,
    mine: Planner, first: Planner, wrapper: Callable[[str, Callable[[Any], Any]], Planner],
    direct: Planner,
) -> Iterator[Line]:  # fmt: skip
    """Ours against FlashInfer's wrapper with the host tensors that it is quicker with.

    `key` names the mark of that line, "" where there is none.  The last of the ratios is to the
    module's own planner, the floor of both.
    `wrapper(name, made)` plans with tables that `made` makes of numpy arrays.
    """
    torch = bench.peers.need("torch")
    wrappers = [
        wrapper("host tensors", torch.from_numpy),
        wrapper("page-locked host tensors", lambda table: torch.from_numpy(table).pin_memory()),
    ]
    planners = [mine, *wrappers, direct, first]
    found = bench.measure([one.side(check) for one in planners], bench.less(4, 50))
    best, other = sorted((found[one.name] for one in wrappers), key=lambda figure: figure.median)
    yield Line(key, found[mine.name], best, what)
    yield Line("", found[mine.name], other, what)
    yield Line("", found[mine.name], found[direct.name], what)
    yield Line("", found[first.name], None, f"{what}: a new plan, in a workspace it is given")
