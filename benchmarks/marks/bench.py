"""What a row is given: the peers, the GPU, and how much to measure."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import fi_ffi
from marks.gpu import Gpu
from marks.peers import Peers
from marks.timing import Effort, Figure, Run, Side, measure, repeated


@dataclass
class Bench:
    """The state that rows share; peers and GPU are looked for when first asked."""

    effort: Effort = field(default_factory=Effort)

    @functools.cached_property
    def peers(self) -> Peers:
        return Peers()

    @functools.cached_property
    def gpu(self) -> Gpu:
        return Gpu(self.peers)

    def less(self, part: int, chunk: int) -> Effort:
        """Of calls that take longer: a part of them, the GPU waited for after every `chunk`."""
        calls = max(self.effort.calls // part, 1)
        return replace(self.effort, calls=calls, chunk=min(chunk, calls))

    def measure(self, sides: Sequence[Side], effort: Effort | None = None) -> dict[str, Figure]:
        return measure(sides, effort or self.effort, self.gpu.settle)

    def in_scope(self, call: Callable[[], object], run: Run | None = None) -> Run:
        """Calls inside a stream scope, which an untimed call has bound to the device."""
        inner, stream = run or repeated(call), self.gpu.stream

        def scoped(count: int) -> float:
            with fi_ffi.stream(stream):
                call()
                return inner(count)

        return scoped

    def free(self) -> None:
        """Give back the memory of a row that is done."""
        if "gpu" in self.__dict__:
            self.gpu.free()
