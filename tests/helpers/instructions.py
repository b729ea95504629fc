"""Every instruction of Python code, told before it is executed."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial
from itertools import islice
from types import CodeType, FrameType
from typing import Any

TOOL = 4  # of `sys.monitoring`: none that has a use of its own


def start(
    is_wanted: Callable[[CodeType], bool], tell: Callable[[CodeType, int], object]
) -> Callable[[], object]:
    """Have `tell` called with the code and the line of each instruction on this thread, of code
    that `is_wanted`; what it raises is raised there.  Returns what ends that, a function in C."""
    # From 3.12 on `f_trace_opcodes` misses what is not traced yet, 3.13.0 nearly all.
    if sys.version_info < (3, 12):

        def trace(frame: FrameType, event: str, _: object) -> Any:
            if not is_wanted(frame.f_code):
                return None
            if event == "call":
                frame.f_trace_opcodes, frame.f_trace_lines = True, False
            elif event == "opcode":
                tell(frame.f_code, frame.f_lineno or 0)
            return trace

        sys.settrace(trace)
        return partial(sys.settrace, None)
    mine, monitoring = threading.get_ident(), sys.monitoring

    def monitor(code: CodeType, offset: int) -> None:
        if threading.get_ident() == mine and is_wanted(code):
            tell(code, next(islice(code.co_positions(), offset // 2, None))[0] or 0)

    if monitoring.get_tool(TOOL) is None:
        monitoring.use_tool_id(TOOL, "tests")
    monitoring.register_callback(TOOL, monitoring.events.INSTRUCTION, monitor)
    monitoring.set_events(TOOL, monitoring.events.INSTRUCTION)
    return partial(monitoring.set_events, TOOL, 0)
