"""Plans: how each is made of each step's tables, measured beside each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fi_ffi.ops.call import cuda
from fi_ffi.reference.arrays import Array
from marks import Wrong
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
    direct: Planner, tables: Sequence[Sequence[Array]],
) -> Iterator[Line]:  # fmt: skip
    """Ours against FlashInfer's wrapper with the host tensors that it is quicker with.

    `key` names the mark of that line, "" where there is none.  The last two of the ratios are to
    the floor of both, which checks nothing and binds nothing: the module's own planner, and in
    numpy and C alone one pass over each of the step's `tables`, and their way to the GPU.
    `wrapper(name, made)` plans with tables that `made` makes of numpy arrays.
    """
    torch = bench.peers.need("torch")
    wrappers = [
        wrapper("host tensors", torch.from_numpy),
        wrapper("page-locked host tensors", lambda table: torch.from_numpy(table).pin_memory()),
    ]
    planners = [mine, *wrappers, direct, first]
    sides = [one.side(check) for one in planners]
    found = bench.measure([*sides, _floor(bench, direct, tables)], bench.less(4, 50))
    best, other = sorted((found[one.name] for one in wrappers), key=lambda figure: figure.median)
    yield Line(key, found[mine.name], best, what)
    yield Line("", found[mine.name], other, what)
    yield Line("", found[mine.name], found[direct.name], what)
    yield Line("", found[mine.name], found[_FLOOR], what)
    yield Line("", found[_FLOOR], best, f"{what}: the least that it can take")
    yield Line("", found[first.name], None, f"{what}: a new plan, in a workspace it is given")


_FLOOR = "its planner through tvm_ffi, numpy's passes and one copy"


def _floor(bench: Bench, direct: Planner, tables: Sequence[Sequence[Array]]) -> Side:
    """The module's planner; one pass over each array, which is written to page-locked memory; and
    one copy of this and of the schedule, with its event, as fi_ffi queues them."""
    torch = bench.peers.need("torch")
    count = sum(max(len(step[i]) for step in tables) for i in range(len(tables[0])))
    stage = torch.empty(count, dtype=torch.int32).pin_memory()
    target = torch.empty(count, dtype=torch.int32, device=bench.gpu.device)
    words, plan, stream = stage.numpy(), direct.plan, bench.gpu.stream
    event = cuda.Event()
    send = cuda.copying(target.data_ptr(), stage.data_ptr(), 4 * count, True)
    pointer = cuda.pointer(stream)

    def loop(turns: list[Any]) -> None:
        for arrays, arguments in turns:
            at = 0
            for array in arrays:
                array.argmax()
                words[at : (at := at + len(array))] = array
            plan(*arguments)
            send(pointer)
            event.record(stream)

    def check() -> None:
        loop([(tables[-1], direct.steps[-1])])
        bench.gpu.settle()
        got, expected = target.cpu().numpy(), np.concatenate(tables[-1])
        if not (got[: len(expected)] == expected).all():
            raise Wrong("the copy of the tables is another")

    return Side(_FLOOR, with_turns(loop, [*zip(tables, direct.steps, strict=True)]), check)
