"""Reports of calls that do not finish; made of what was kept of them, without asking CUDA."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from fi_ffi.ops.watch.recording import Call

_MOST_BLOCKED = 5  # calls that are blocked behind it, told one by one


class Hang(NamedTuple):
    """A call that is late: for how long nothing has moved, and what was called after it."""

    call: Call
    waited: float
    behind: list[Call]


def report(hang: Hang, seconds: float) -> str:
    """All that is known of a late call, a line each."""
    return "\n".join(_lines(hang, seconds))


def _lines(hang: Hang, seconds: float) -> Iterator[str]:
    call = hang.call
    what = "finished, and its stream has not moved" if call.has_returned else "returned"
    yield f"fi_ffi.watchdog({seconds:g}): {call.op} has not {what} for {hang.waited:.2f} s"
    yield f"  called: {caller_of(call)}, {time.monotonic() - call.started:.2f} s ago"
    yield f"  entry: {call.entry}, on {place_of(call)}"
    if call.has_returned:
        yield "  host: the call has returned, its work is queued"
    else:
        yield "  host: the call has not returned"
    yield from (f"  {arg.name}: {arg}" for arg in call.arguments())
    if call.plan is not None:
        try:
            yield f"  plan: {plan_of(call)}"
        except Exception as error:  # made by its thread still, or of other values than expected
            yield f"  plan: a {type(call.plan).__name__} that cannot be told: {error!r}"
    if call.stream is not None:
        yield from _behind(hang.behind)


def caller_of(call: Call) -> str:
    return caller_words(call.file, call.line, call.function, call.thread.name)


def caller_words(file: str, line: int, function: str, thread: str) -> str:
    where = f"{file}:{line} in {function}" if file else "unknown code"
    return f"{where}, thread {thread!r}"


def place_of(call: Call) -> str:
    if call.stream is None:
        return "the host" if call.device is None else str(call.device)
    return f"{call.device}, stream {call.stream:#x}"


def plan_of(call: Call) -> str:
    """The plan in short: its backend, module and batch, and the options that are not defaults."""
    plan = call.plan
    parts = [f"backend {plan.backend!r}", f"module {plan.module}"]
    batch = getattr(plan, "_batch", None)
    if batch is not None:
        parts.append(f"{batch.size} requests")
    parts += [f"{name}={value!r}" for name, value in plan.options.changed().items()]
    if plan._generation != call.plan_generation:
        parts.append("planned since")
    method = "a prepared run" if call.method == "__call__" else call.method
    return f"{type(plan).__name__}, {method}: {', '.join(parts)}"


def _behind(calls: list[Call]) -> Iterator[str]:
    if not calls:
        yield "  behind it: no later call"
        return
    counts = Counter(call.op for call in calls)
    told = ", ".join(f"{count} {op}" for op, count in counts.most_common())
    yield f"  behind it: {len(calls)} later call{'s' if len(calls) > 1 else ''} ({told})"
    blocked = [call for call in calls if not call.has_returned]
    for call in blocked[:_MOST_BLOCKED]:
        yield f"    not returned: {call.op}, {caller_of(call)}"
    if len(blocked) > _MOST_BLOCKED:
        yield f"    and {len(blocked) - _MOST_BLOCKED} more that have not returned"
