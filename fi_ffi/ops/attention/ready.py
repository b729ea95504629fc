"""Runs like one that a plan has made before: only addresses change, and nothing is looked up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fi_ffi.abi.frame import Frame, word_of
from fi_ffi.abi.streams import current_scope
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import ArgumentError
from fi_ffi.ops import watching
from fi_ffi.ops.attention.run import option_of
from fi_ffi.ops.attention.workspace import Workspace
from fi_ffi.ops.launch import Preparing, launch
from fi_ffi.ops.prepared import Prepared
from fi_ffi.ops.row import Row
from fi_ffi.ops.settled import Settled

_PLAIN = (type(None), str, int, float, bool)


def can_repeat(options: Sequence[object], tensors: Sequence[object]) -> bool:
    """Whether a run depends on nothing but these options, layouts and addresses."""
    return all(type(option) in _PLAIN for option in options) and all(
        tensor is None or type(tensor) is TensorDesc for tensor in tensors
    )


class Ready:
    """A run that was checked: packed but for the addresses of the tensors it is given."""

    __slots__ = ("_frames", "_generation", "_moving", "_settled", "_values", "_workspace")

    def __init__(
        self, workspace: Workspace, row: Row, settled: Settled, values: list[Any],
        names: Sequence[str],
    ) -> None:  # fmt: skip
        self._workspace, self._generation = workspace, workspace.generation
        self._settled, self._values = settled, values
        index = {arg.name: i for i, arg in enumerate(row.args)}
        masks = {arg.name: mask for arg, mask in zip(row.tensors, settled.masks, strict=True)}
        # Where each tensor's address goes, and bits that it must not have.
        self._moving = [(word_of(index[name], True), masks[name]) for name in names]
        self._frames: list[Frame] = []

    def run(self, tensors: Sequence[TensorDesc | None], stream: object) -> bool:
        """Launch it; False where it has to be looked at again."""
        workspace, place = self._workspace, self._settled.place
        if workspace.generation != self._generation or watching.inboxes or place is None:
            return False
        if place.is_cuda:
            scope = current_scope() if stream is None else None
            # On any other stream it has to wait for the plan.
            if (stream if scope is None else scope.handle) != workspace.stream:
                return False
        elif type(stream) is Preparing:
            return False
        try:
            frame = self._frames.pop()
        except IndexError:
            frame = self._settled.frame()
            frame.write(self._values)
        try:
            words = frame.pointers
            for (word, mask), tensor in zip(self._moving, tensors, strict=True):
                if tensor is not None:
                    pointer = tensor.ptr
                    if pointer & mask or not pointer:
                        return False
                    words[word] = pointer
            launch(frame, place, stream)
        finally:
            self._frames.append(frame)
        return True


class PreparedRun:
    """A run of a plan that is packed: `call()` launches it, `call.update(...)` changes tensors.

    Made by `fi_ffi.prepare`.  After a `replan` the first call packs it anew, as the plan is
    then.  Otherwise as `fi_ffi.ops.prepared.Prepared`.
    """

    __slots__ = ("_again", "_changed", "_generation", "_made", "_names", "_plan")

    def __init__(self, plan: Any, made: Prepared, names: Sequence[str]) -> None:
        self._plan, self._made = plan, made
        self._generation = plan.workspace.generation
        # As the run calls its tensors, and as the binding does.
        self._names = {option_of(name): name for name in names}
        self._changed: dict[str, object] = {}
        # The run with the same arguments but for tensors: set by `fi_ffi.prepare`.
        self._again: Callable[[Mapping[str, object]], PreparedRun] | None = None

    def can_renew(self, again: Callable[[Mapping[str, object]], PreparedRun]) -> PreparedRun:
        """Let `again(changes)` prepare the run anew."""
        self._again = again
        return self

    def __call__(self) -> None:
        """Launch it.  Raises as `Prepared` does, and as the run where it is packed anew."""
        if self._plan.workspace.generation != self._generation and self._again is not None:
            renewed = self._again(self._changed)
            self._made, self._generation = renewed._made, renewed._generation
        self._plan.launch_prepared(self._made)

    def update(self, **tensors: Any) -> None:
        """Change tensors, by the run's names for them: addresses, or tensors of their layout.

        Raises `ArgumentError` and `ArgumentTypeError`, and changes nothing then.
        """
        names = self._names
        for name in tensors:
            if name not in names:
                expected = f"one of {', '.join(names)}; prepare another run for other options"
                raise ArgumentError(self._plan.op, "update", got=name, expected=expected)
        self._made.update(**{names[name]: value for name, value in tensors.items()})
        self._changed.update(tensors)

    def __repr__(self) -> str:
        return f"<prepared run of {type(self._plan).__name__}: {self._made!r}>"
