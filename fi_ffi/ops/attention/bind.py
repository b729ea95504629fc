"""The plan's own arguments, bound: written into a frame once, and kept by it for all runs."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from types import FunctionType
from typing import Any, NamedTuple

from fi_ffi.abi.function import Frame
from fi_ffi.abi.tensor import Device, TensorDesc, TensorKind
from fi_ffi.ops.attention.arrays import Arrays, Batch
from fi_ffi.ops.attention.values import Values, compiled_row
from fi_ffi.ops.attention.workspace import Workspace
from fi_ffi.ops.call.compiled import CompiledRow, Variant, giving_back
from fi_ffi.ops.call.notation import parse_axis
from fi_ffi.ops.call.row import Row, Scalar, Tensor

Kinds = Mapping[str, TensorKind | None]
_MASK = 2**64 - 1
# Axes of runs' tensors that grow with the requests' lengths: the noun for errors, the axis that
# bounds them from below ("" for none), and the attribute of `Batch` that has its size.
GROWING_AXES = {
    "nnz_kv": ("keys", "planned_keys", "kv.total"),
    "num_pages": ("pages", "planned_pages", "num_pages"),
    "num_indices": ("page indices", "planned_indices", "num_indices"),
    "mask_bytes": ("mask bytes", "", ""),
}
# Axes whose size changes with each batch, by the attribute of `Batch` that has the size.
_BATCH_AXES = {"nnz_qo": "room_for_rows", "b": "size"}
_BATCH_AXES |= {least: size for _, least, size in GROWING_AXES.values() if least}


class BoundRow:
    """A plan's entry with the plan's own arguments bound.

    `sizes` are those of the compiled row's known axes. `memory` has the start and end addresses of
    both workspaces, then the lowest and the highest of these.
    """

    def __init__(self, compiled: CompiledRow, template: Values) -> None:
        self.compiled, self.template = compiled, template
        self.pack: Callable[..., Any] = compiled.pack  # a frame, or None
        self.sizes: Sequence[int] = ()
        self.memory: Sequence[int] = (0, 0, 0, 0, 0, 0)
        self._places = {arg.name: (i, arg) for i, arg in enumerate(compiled.row.args)}
        # For each bound argument, the words of a frame that it fills, with their values: for a
        # tensor, the address, then sizes and strides.
        self.words: dict[str, list[tuple[int, int]]] = {}
        # The words that change with each schedule: the number of their source, and what is added.
        self.changing: Sequence[tuple[int, int, int]] = ()
        # Each is replaced when words change: a frame of earlier ones is written again.
        self.sources: tuple[int, ...] = ()
        self.state = self.version = object()
        # The layouts of the last run that passed, and what was computed from them.
        self.memo: tuple[Any, ...] = (None,)
        # Of the known axes: a getter of the sizes that each batch changes, and the fixed sizes.
        self.batch_sizes: Callable[[Any], tuple[int, ...]]
        self.own_sizes: tuple[int, ...] = ()
        # The frames that no call has, by the variant that they were made for.
        self._free: dict[Variant, list[Frame]] = {}

    def put(self, name: str, value: Any) -> None:
        """Bind an argument by the binding's name; ignore a name that the row lacks."""
        found = self._places.get(name)
        if found is None or name not in self.compiled.options.bound:
            return
        i, arg = found
        layout = self.compiled.layout
        if isinstance(arg, Tensor):
            words = []
            if value is not None:
                dims = enumerate((*value.shape, *value.strides), layout.dims[i])
                words = [(layout.tensors[i], value.ptr), *dims]
        else:
            is_float = isinstance(arg, Scalar) and arg.type is float
            word = struct.unpack("Q", struct.pack("d", value))[0] if is_float else int(value)
            words = [(layout.value(i), word & _MASK)]
        self.words[name] = words
        self.state = self.version = object()

    def set_defaults(self, first: Sequence[str]) -> None:
        """Give `pack` the template's values as defaults of its arguments after the first."""
        pack: Any = self.pack
        count = len([name for name in first if name in self.template.index])
        values = tuple(self.template.values[count:])
        self.pack = FunctionType(pack.__code__, pack.__globals__, pack.__name__, values)

    def follow(self, sources: tuple[int, ...], batch: Batch) -> None:
        """Take the sources and sizes of another batch."""
        self.sizes = (*self.batch_sizes(batch), *self.own_sizes)
        self.sources = self.state = sources

    def frames_of(self, variant: Variant) -> list[Frame]:
        """Return the pool of a variant's frames."""
        return self._free.setdefault(variant, [])

    def new_frame(self, variant: Variant) -> Frame:
        """Make a frame, which is given back to the pool."""
        frame = variant.new_frame()
        frame.give_back = giving_back(frame, self.frames_of(variant))
        return frame

    def write(self, frame: Frame) -> None:
        """Write the bound arguments into a frame that has others', or none."""
        state, addresses, sources = self.state, frame.addresses, self.sources
        if frame.version is not self.version:
            for words in self.words.values():
                for word, value in words:
                    addresses[word] = value
            frame.version = self.version
        for word, of, more in self.changing:
            addresses[word] = sources[of] + more
        frame.state = state


class Binder(NamedTuple):
    """What all entries of a plan have in common; `facts` are bound arguments and sizes of axes."""

    op: str
    device: Device
    backend: str
    module: str
    dtypes: Mapping[str, str]
    facts: Mapping[str, Any]

    def bind(
        self, row: Row, module: str, kinds: Kinds, others: Mapping[str, Row], **how: Any
    ) -> BoundRow:
        """Compile a row with arguments of these kinds bound, and bind the facts; `others` are the
        rows of other backends."""
        compiled = compiled_row(row, module, self.dtypes, self.op, self.device, bound=kinds, **how)
        bound = BoundRow(compiled, Values(self.op, compiled, self.backend, others))
        for name, value in self.facts.items():
            bound.put(name, value)
        return bound


class RunNames(NamedTuple):
    """Names in runs' rows: of the plan's arrays (with their names here), the schedule, the float
    and the int workspace, and the arguments that runs pass first."""

    arrays: Mapping[str, str]
    info: str = "plan_info_vec"
    workspaces: Sequence[str] = ("float_workspace_buffer", "int_workspace_buffer")
    first: tuple[str, ...] = ()


class BoundRuns:
    """The runs of a plan, bound to the schedule in force.

    `bound` has them by the index of their row, whether the plan has the pages, and the module.
    `current` has those that were used with the schedule's placement, without the module.
    """

    def __init__(self, binder: Binder, rows: Sequence[Row], names: RunNames) -> None:
        self.rows, self._binder, self._names = rows, binder, names
        self.bound: dict[tuple[int, bool, str], BoundRow] = {}
        self.current: dict[tuple[int, bool], BoundRow] = {}
        # The workspaces and arrays, by the rows' names.
        self.places: dict[str, TensorDesc | None] = {}
        self._memory: Sequence[int] = ()
        # How much longer than there are requests the arrays are from which kernels take their
        # number.
        self._longer: Mapping[str, int] = {}
        # All these were made for this placement and workspace.
        self._placed: Arrays | None = None
        self._workspace: Workspace | None = None
        # Where the plan's info is, and the number of requests.
        self._sources = 0, 0

    def follow(self, workspace: Workspace, placed: Arrays, batch: Batch, info: int) -> None:
        """Bind the runs to another schedule, whose info is there."""
        if self._placed is not placed or self._workspace is not workspace:
            self._placed = None  # until all have moved: an interrupt may end this
            self._move(workspace, placed, batch)
            self._placed, self._workspace = placed, workspace
        sources = self._sources = info, batch.size
        for bound in self.bound.values():
            bound.follow(sources, batch)

    def _move(self, workspace: Workspace, placed: Arrays, batch: Batch) -> None:
        """Bind the runs to the addresses of another placement or workspace."""
        counts = {name: len(view) for name, view in batch.views.items() if name != "indices"}
        self._longer = {name: count - batch.size for name, count in counts.items()}
        descs = placed.descs(workspace.int_buffer, counts)
        self.places = {name: descs.get(array) for name, array in self._names.arrays.items()}
        buffers = workspace.float_buffer, workspace.int_buffer.rows(0, placed.kernel_bytes)
        self.places.update(zip(self._names.workspaces, buffers, strict=True))
        whole = workspace.float_buffer, workspace.int_buffer
        memory = [at for buffer in whole for at in (buffer.ptr, buffer.ptr + buffer.shape[0])]
        self._memory = *memory, min(memory), max(memory)
        self.current.clear()  # pages may come from the plan now, and from runs before
        for bound in self.bound.values():
            self._place(bound)

    def _place(self, bound: BoundRow) -> None:
        names, longer = self._names, self._longer
        for name, desc in self.places.items():
            bound.put(name, desc)
        bound.memory = self._memory
        # The plan's info and the arrays' lengths.
        own = [(names.info, 0, 0, 0)]
        own += [(name, 1, 1, longer[of]) for name, of in names.arrays.items() if of in longer]
        words = bound.words
        bound.changing = [
            (words[name][number][0], of, more) for name, number, of, more in own if words.get(name)
        ]

    def bind(self, key: tuple[int, bool, str], others: Mapping[str, Row], batch: Batch) -> BoundRow:
        """Bind a run to the schedule in force; `key` is that of `bound`."""
        (kind, has_indices, module), names = key, self._names
        row, facts = self.rows[kind], self._binder.facts
        values = {**facts, **self.places, names.info: 0}
        given = {arg.name for arg in row.given} & values.keys()
        if not has_indices:
            given = {name for name in given if names.arrays.get(name) != "indices"}
        kinds = {name: getattr(values[name], "kind", None) for name in values if name in given}
        texts = {text for arg in row.tensors for text in arg.axis_names}
        axes = {name for text in texts for name in parse_axis(text).names}
        bounds = [(axis, least) for axis, (_, least, _) in GROWING_AXES.items() if axis in axes]
        not_less = tuple((axis, least) for axis, least in bounds if least)
        axes |= {least for _, least in not_less}
        of_batch = [axis for axis in _BATCH_AXES if axis in axes]
        own = [axis for axis in facts if axis in axes]
        changing = *of_batch, *(axis for axis, _ in bounds if axis != "num_pages")
        axes_of = {"known": (*of_batch, *own), "not_less": not_less, "first": names.first}
        axes_of["changing"] = changing
        bound = self._binder.bind(row, module, kinds, others, **axes_of)
        bound.batch_sizes = attrgetter(*(_BATCH_AXES[axis] for axis in of_batch))
        bound.own_sizes = tuple(facts[axis] for axis in own)
        bound.put(names.info, 0)
        self._place(bound)
        bound.follow(self._sources, batch)
        return bound
