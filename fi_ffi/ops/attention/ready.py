"""Runs like one that a plan has made before: only addresses change, and nothing is looked up."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from fi_ffi.abi.frame import Frame, word_of
from fi_ffi.abi.streams import current_scope, thread
from fi_ffi.abi.tensor import TensorDesc, make_desc
from fi_ffi.errors import ArgumentError
from fi_ffi.ops import watching
from fi_ffi.ops.attention.run import as_called, option_of
from fi_ffi.ops.attention.workspace import Workspace
from fi_ffi.ops.launch import Preparing, launch
from fi_ffi.ops.prepared import Prepared
from fi_ffi.ops.row import Row
from fi_ffi.ops.settled import Settled

_PLAIN = (type(None), str, int, float, bool)


def can_repeat(options: Sequence[object], tensors: Sequence[object]) -> bool:
    """Whether a run depends on nothing but these options, layouts and addresses.

    Runs are found again by options that are equal to these: 0.0 and -0.0 are, and not the same.
    """
    return all(
        type(option) in _PLAIN and (type(option) is bool or option != 0) for option in options
    ) and all(tensor is None or type(tensor) is TensorDesc for tensor in tensors)


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

    __slots__ = ("_again", "_given", "_info", "_made", "_names", "_plan")

    def __init__(self, plan: Any, made: Prepared, names: Sequence[str]) -> None:
        self._plan, self._made = plan, made
        # What the plan was when this was packed.
        self._info = plan._info
        # As the run calls its tensors, and as the binding does.
        self._names = {option_of(name): name for name in names}
        # The tensors now, or their addresses, and the run with others: from `can_renew`.
        self._given: dict[str, object] = {}
        self._again: Callable[[Mapping[str, object]], PreparedRun] | None = None

    @property
    def names(self) -> Collection[str]:
        """What the run calls its tensors."""
        return self._names.keys()

    def can_renew(
        self, given: dict[str, object], again: Callable[[Mapping[str, object]], PreparedRun]
    ) -> PreparedRun:
        """Let `again(tensors)` prepare the run anew; `given` are those that it has now."""
        self._given, self._again = given, again
        return self

    def __call__(self) -> None:
        """Launch it.  Raises as `Prepared` does, and as the run where it is packed anew."""
        plan = self._plan
        if plan._info is not self._info:
            self._renew()
        made, workspace = self._made, plan.workspace
        stream, scopes = made.stream, thread.scopes
        if stream is None and scopes:
            stream = scopes[-1].handle
        # On the plan's own stream there is nothing to wait for.
        is_in_order = stream == workspace.stream and workspace.generation == plan._generation
        try:
            if is_in_order and not watching.inboxes:
                made()
            else:
                plan.launch_prepared(made)
        except ArgumentError:
            with as_called(plan.op):
                raise

    def _renew(self) -> None:
        if self._again is None:
            return
        made, names, info = self._made, self._names, self._plan._info
        tensors = {
            name: make_desc(value, made.layout(names[name])) if type(value) is int else value
            for name, value in self._given.items()
        }
        self._made = self._again(tensors)._made
        self._info = info

    def update(self, **tensors: Any) -> None:
        """Change tensors, by the run's names for them: addresses, or tensors of their layout.

        Raises `ArgumentError` and `ArgumentTypeError`, and changes nothing then.
        """
        update(self._plan.op, self._made.update, self._names, tensors)
        self._given.update(tensors)

    def __repr__(self) -> str:
        return f"<prepared run of {type(self._plan).__name__}: {self._made!r}>"


def update(
    op: str, change: Callable[..., None], names: Mapping[str, str], tensors: Mapping[str, object]
) -> None:
    """Change tensors of a prepared call, named as the op's caller does."""
    try:
        changes = {names[name]: value for name, value in tensors.items()}
    except KeyError as error:
        expected = f"one of {', '.join(names)}; prepare another call for other options"
        raise ArgumentError(op, "update", got=error.args[0], expected=expected) from None
    try:
        change(**changes)
    except ArgumentError:
        with as_called(op):
            raise


@functools.cache
def _single_class(base: Any) -> type[Prepared]:
    """The same, but named as `single_prefill` and `single_decode` are."""

    def update_tensors(self: Prepared, **tensors: Any) -> None:
        """Change tensors, by the function's names for them: addresses, or tensors of their
        layout.

        Raises `ArgumentError` and `ArgumentTypeError`, and changes nothing then.
        """
        names = {option_of(arg.name): arg.name for arg in self.row.tensors}
        update(_op_of(self), functools.partial(base.update, self), names, tensors)

    def in_use(self: Prepared) -> ArgumentError:
        error: ArgumentError = base.in_use(self)
        return ArgumentError(_op_of(self), "self", got=error.got, expected=error.expected)

    update_tensors.__name__ = "update"
    own = {"__slots__": (), "update": update_tensors, "in_use": in_use}
    return type(base.__name__, (base,), own)


def _op_of(made: Prepared) -> str:
    return made.row.name.partition(".")[0]


def prepared_single(made: Prepared) -> Prepared:
    """A prepared call of `single_prefill` or `single_decode`, as its caller knows it."""
    kind: Any = type(made)
    made.__class__ = _single_class(kind)
    return made
