"""`fi-ffi replay`: repeats a dumped call and compares its results.

The dump is read and checked (docs/call-log.md describes the files). The call is repeated on a GPU,
or by the reference on the CPU. Its results are compared with those in the dump and with the op's
definition. Tensors keep their relative placement: they overlap as before and have the same
alignment.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import ml_dtypes
import numpy as np

import fi_ffi
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import array_values
from fi_ffi.abi.objects import Array as ArrayObject
from fi_ffi.abi.tensor import DTYPES, Device, DType, TensorDesc, make_desc, parse_device
from fi_ffi.cli import output
from fi_ffi.cli.cases import case_of
from fi_ffi.errors import ArtifactError, FiFfiError
from fi_ffi.loader import machine, runtime, search
from fi_ffi.loader.fetch import progress
from fi_ffi.ops.attention.workspace import FLOAT_BYTES, INT_BYTES
from fi_ffi.ops.call import cuda
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.call.releases import fits
from fi_ffi.ops.call.row import PlanInfo, Row, Tensor
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.plans.rows import FORMS
from fi_ffi.reference import EXACT, MOVES
from fi_ffi.reference.arrays import Array, bits
from fi_ffi.watch import safetensors
from fi_ffi.watch.dump import AFTER, BEFORE, FORMAT, PLAN

_CPU = parse_device("cpu")


# Reading a dump

# Limits of the bytes that all tensors span: a multiple of the files' contents, since tensors may be
# views of larger ones, and a minimum for small files.
_MAX_SPREAD, _ALWAYS = 64, 2**26


@dataclass(frozen=True)
class RecordedTensor:
    """A recorded tensor argument, with its elements before the call if they were dumped."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    address: int
    reads: bool
    writes: bool
    is_scratch: bool
    elements: Array | None

    @property
    def span(self) -> int:
        """Bytes from the first to the end of the last element."""
        if 0 in self.shape:
            return 0
        steps = zip(self.strides, self.shape, strict=True)
        return self.dtype.bytes_of(sum(stride * (size - 1) for stride, size in steps) + 1)


@dataclass(frozen=True)
class RecordedCall:
    """A recorded call."""

    path: Path
    document: Mapping[str, Any]
    row: Row | None
    tensors: dict[str, RecordedTensor]
    # Numbers and strings; None for an omitted tensor.
    values: dict[str, Any]
    # The planning call; None if the call does not belong to a plan.
    plan: RecordedCall | None = None
    # The written tensors after the call; None if the call did not finish.
    after: dict[str, Array] | None = None
    result: Any = None

    @property
    def module(self) -> str:
        return str(self.document.get("module", ""))

    @property
    def device(self) -> str:
        return str(self.document.get("device", "cpu"))


def load(path: Path) -> RecordedCall:
    """Load a dumped call by either of its files, or by the common prefix of their names.

    Raises `ArtifactError` for anything but a dump of this version's format, and `OSError`.
    """
    stem = str(path).removesuffix(BEFORE).removesuffix(AFTER)
    before = Path(stem + BEFORE)
    data, words = safetensors.read(before)
    _check_format(before, words)
    document = _json(before, words, "call")
    planned = document.get("plan") if isinstance(document, dict) else None
    plan = None
    if planned is not None:
        arrays = {name[len(PLAN) :]: of for name, of in data.items() if name.startswith(PLAN)}
        plan = _recorded(before, planned, arrays)
    recorded = _recorded(before, document, data, plan)
    _check_spans(recorded)
    after_path = Path(stem + AFTER)
    if not after_path.exists():
        return recorded
    after, words = safetensors.read(after_path)
    _check_format(after_path, words)
    arrays_after = {
        name: _elements(
            after_path, name, recorded.tensors[name].dtype, recorded.tensors[name].shape, of
        )
        for name, of in after.items()
        if name in recorded.tensors
    }
    return replace(recorded, after=arrays_after, result=_json(after_path, words, "result"))


def _check_format(path: Path, words: Mapping[str, str]) -> None:
    version = words.get("format")
    if version != FORMAT:
        raise ArtifactError(f"{path}: its format is {version!r:.60}, and this reads {FORMAT!r}")


def _json(path: Path, words: Mapping[str, str], name: str) -> Any:
    try:
        return json.loads(words[name])
    except (KeyError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: its {name} is no JSON: {error!r}") from error


def _recorded(
    path: Path, document: Any, data: Mapping[str, memoryview], plan: RecordedCall | None = None
) -> RecordedCall:
    try:
        tensors: dict[str, RecordedTensor] = {}
        values: dict[str, Any] = {}
        for of in document["arguments"]:
            name = str(of["name"])
            if "dtype" in of:
                tensors[name] = _tensor(path, name, of, data.get(name))
            else:
                values[name] = of.get("value")
        row = document.get("row")
        known_row = None if row is None else row_of(path, row)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path}: the call is not described: {error!r}") from error
    return RecordedCall(path, document, known_row, tensors, values, plan)


def _tensor(path: Path, name: str, of: Any, data: memoryview | None) -> RecordedTensor:
    dtype, shape, strides = DTYPES[of["dtype"]], tuple(of["shape"]), tuple(of["strides"])
    numbers = [*shape, *strides, of["address"]]
    if len(shape) != len(strides) or not all(type(n) is int and 0 <= n < 2**64 for n in numbers):
        raise ArtifactError(f"{path}: {name} has an impossible layout: {of!r:.300}")
    elements = None if data is None else _elements(path, name, dtype, shape, data)
    reads, writes, scratch = (bool(of[flag]) for flag in ("reads", "writes", "scratch"))
    return RecordedTensor(
        name, dtype, shape, strides, of["address"], reads, writes, scratch, elements
    )


def _check_spans(recorded: RecordedCall) -> None:
    """Raise `ArtifactError` if the tensors span far more memory than they have elements."""
    calls = [recorded] if recorded.plan is None else [recorded, recorded.plan]
    kept = [of for call in calls for of in call.tensors.values() if not of.is_scratch]
    spanned = sum(of.span for of in kept)
    held = sum(of.elements.nbytes for of in kept if of.elements is not None)
    if spanned > max(_MAX_SPREAD * held, _ALWAYS):
        widest = max(kept, key=lambda of: of.span)
        raise ArtifactError(
            f"{recorded.path}: its tensors span {spanned} bytes, {widest.name} {widest.span} of "
            f"them, and it has {held} bytes of elements: {_MAX_SPREAD} times as much is the most"
        )


def _elements(
    path: Path, name: str, dtype: DType, shape: tuple[int, ...], data: memoryview
) -> Array:
    count = dtype.bytes_of(math.prod(shape))
    if len(data) != count:
        raise ArtifactError(f"{path}: {name} has {len(data)} bytes, and its shape needs {count}")
    array = np.frombuffer(data, dtype.numpy)
    return array if dtype.shares_bytes else array.reshape(shape)


def row_of(path: Path, described: Mapping[str, Any]) -> Row:
    """Return the row of a dumped call; `ArtifactError` if this version has no equal row."""
    forms = [form for forms in FORMS.values() for form in forms]
    rows = [row for op in OPS.values() for row in op.rows] + forms
    wanted = tuple(described[key] for key in ("name", "variant", "signature"))
    fitting = [row for row in rows if (row.name, row.variant, str(row.signature)) == wanted]
    release = search.release()
    for row in fitting:
        if release is None or fits(row, release):
            return row
    if fitting:  # a row of another release; the call reports the mismatch
        return fitting[0]
    raise ArtifactError(f"{path}: this version of fi_ffi has no row {' '.join(map(str, wanted))}")


# Repeating the call

POISON = 0xFF  # fills every byte that a call only writes
_ALIGNMENT = 256  # addresses keep their remainder by this
_DEFAULT_STREAM = 0
# POD attention appends this to the names of its second plan's arguments.
_OF_DECODE = "_d"
# Least sizes of scratch memory on a GPU, because another device may need more than the dump's.
_LEAST = {"float_workspace_buffer": FLOAT_BYTES, "tmp": 2**26, "tmp_p": 2**26}
_LEAST_OF_INTS = INT_BYTES  # for the int workspace and its host copy
_MOST = 2**30  # most scratch bytes that a dump may ask for
_ON_CPU = 2**20  # the reference uses no scratch memory
_OF_PLANS = ("float_workspace_buffer", "int_workspace_buffer")


class CannotReplay(FiFfiError, ValueError):
    """A dumped call lacks data that is needed to repeat it."""


def rerun(recorded: RecordedCall, device: Device) -> tuple[dict[str, Array], Any]:
    """Repeat a dumped call on a device; return the tensors it wrote, and its result.

    Raises `CannotReplay`, and the errors of the call itself.
    """
    row = _row(recorded)
    scratch: dict[str, TensorDesc] = {}
    info = None
    if any(isinstance(arg, PlanInfo) for arg in row.args):
        if recorded.plan is None:
            raise CannotReplay(
                f"{recorded.path}: it was planned before the log was open, so that nothing is "
                "known of the plan; open the log before planning"
            )
        planning = _Calling(recorded.plan, device, scratch)
        info = planning.make(None)
    calling = _Calling(recorded, device, scratch)
    result = calling.make(info)
    written = [name for name, of in recorded.tensors.items() if of.writes and not of.is_scratch]
    after = calling.placed.get(written)
    return after, array_values(result) if isinstance(result, ArrayObject) else result


def _row(recorded: RecordedCall) -> Row:
    if recorded.row is None:
        raise CannotReplay(
            f"{recorded.path}: no row describes {recorded.document.get('entry')}, so that it is "
            "not known what it writes; its tensors can be read from the file"
        )
    return recorded.row


class _Calling:
    """One call with its tensors placed; calls of one plan share the scratch memory."""

    def __init__(
        self, recorded: RecordedCall, device: Device, scratch: dict[str, TensorDesc]
    ) -> None:
        self._recorded, self._device, self._scratch = recorded, device, scratch
        self._row = _row(recorded)
        self._args = {arg.name: arg for arg in self._row.tensors}
        if not recorded.tensors.keys() <= self._args.keys():
            unknown = ", ".join(recorded.tensors.keys() - self._args.keys())
            raise CannotReplay(f"{recorded.path}: {self._row.name} has no {unknown}")
        kept = [of for of in recorded.tensors.values() if not of.is_scratch]
        for of in kept:
            if of.elements is None:
                raise CannotReplay(f"{recorded.path}: the elements of {of.name} are not in it")
        on_host = {name for name, arg in self._args.items() if arg.host}
        self.placed = Placed(kept, device, on_host)

    def make(self, info: ArrayObject | None) -> Any:
        """Make the call and return its result."""
        values = [self._value(arg, info) for arg in self._row.given]
        compiled = CompiledRow(self._row, self._recorded.module or None)
        stream = _DEFAULT_STREAM if self._device.is_cuda else None
        return compiled.call(None, *values, stream=stream)

    def _value(self, arg: Any, info: ArrayObject | None) -> Any:
        if isinstance(arg, PlanInfo):
            assert info is not None
            return int(ffi.cast("uintptr_t", info.handle))
        of = self._recorded.tensors.get(arg.name)
        if of is None:
            return self._recorded.values.get(arg.name)
        if not of.is_scratch:
            return self.placed.desc(arg.name)
        # An op allocates its own kind of scratch memory, as large as this device needs.
        return None if arg.is_scratch else self._workspace(arg, of.span)

    def _workspace(self, arg: Tensor, count: int) -> TensorDesc:
        # The name under which the plan knows the workspace.
        name = arg.name.removesuffix(_OF_DECODE)
        if name not in self._scratch:
            if self._recorded.plan is not None and name in _OF_PLANS:
                raise CannotReplay(f"{self._recorded.path}: its plan has no {name}")
            if count > _MOST:
                raise CannotReplay(
                    f"{self._recorded.path}: {name} has {count} bytes, and {_MOST} is the most"
                )
            size = max(count, _LEAST.get(name, _LEAST_OF_INTS))
            where = _CPU if arg.host else self._device
            memory = cuda.allocate(size if self._device.is_cuda else _ON_CPU, where, zeroed=True)
            self._scratch[name] = memory.desc.at(memory.desc.ptr, memory)
        return self._scratch[name]


class _Region:
    """Adjacent bytes on a device, and their copy on the host."""

    def __init__(self, start: int, count: int, device: Device) -> None:
        self.start, self.device = start, device
        self.memory = cuda.allocate(count + 2 * _ALIGNMENT, device)
        base = self.memory.desc.ptr
        self.address = base + (start - base) % _ALIGNMENT
        self.host = np.full(count, POISON, np.uint8)

    def view(self, tensor: RecordedTensor) -> Array:
        """Return a view of the tensor in the host copy."""
        dtype = tensor.dtype.numpy
        if 0 in tensor.shape:
            return np.empty(tensor.shape, dtype)
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        offset = tensor.address - self.start
        view: Array = np.ndarray(tensor.shape, dtype, self.host.data, offset, strides)
        return view

    def copy(self, to_host: bool) -> None:
        """Copy the whole region between the device and the host."""
        ends = (self.host.ctypes.data, self.address)
        target, source = ends if to_host else ends[::-1]
        if not self.host.size:
            return
        if not self.device.is_cuda:
            ffi.memmove(cuda.pointer(target), cuda.pointer(source), self.host.size)
            return
        from cuda.bindings import runtime

        from fi_ffi.cli.cuda import check

        kinds = runtime.cudaMemcpyKind
        kind = kinds.cudaMemcpyDeviceToHost if to_host else kinds.cudaMemcpyHostToDevice
        check(runtime.cudaDeviceSynchronize())
        check(runtime.cudaMemcpy(target, source, self.host.size, kind))
        check(runtime.cudaDeviceSynchronize())


class Placed:
    """Tensors placed on a device, or on the host if in `on_host`; write-only ones are poisoned."""

    def __init__(
        self, tensors: Iterable[RecordedTensor], device: Device, on_host: Collection[str] = ()
    ) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._on_host, self._device = on_host, device
        self._regions: dict[str, _Region] = {}
        for group in _groups(self._tensors.values()):
            self._place(group)

    def _place(self, group: list[RecordedTensor]) -> None:
        start = min(tensor.address for tensor in group)
        end = max(tensor.address + tensor.span for tensor in group)
        where = _CPU if group[0].name in self._on_host else self._device
        region = _Region(start, end - start, where)
        for tensor in group:
            self._regions[tensor.name] = region
            if tensor.elements is not None and tensor.reads:
                region.view(tensor)[...] = tensor.elements
        region.copy(to_host=False)

    def desc(self, name: str) -> TensorDesc:
        region, tensor = self._regions[name], self._tensors[name]
        address = region.address + tensor.address - region.start
        return make_desc(
            address, tensor.shape, tensor.dtype, tensor.strides, region.device, owner=region
        )

    def get(self, names: Iterable[str]) -> dict[str, Array]:
        """Return copies of tensors, after waiting for the device."""
        arrays: dict[str, Array] = {}
        for name in names:
            region = self._regions[name]
            region.copy(to_host=True)
            arrays[name] = region.view(self._tensors[name]).copy()
        return arrays


def _groups(tensors: Iterable[RecordedTensor]) -> Iterator[list[RecordedTensor]]:
    """Yield groups of tensors that share memory."""
    group: list[RecordedTensor] = []
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.address):
        if group and (tensor.address >= end or not tensor.span):
            yield group
            group, end = [], 0
        end = max(end, tensor.address + tensor.span)
        group.append(tensor)
    if group:
        yield group


def kernel_of(recorded: RecordedCall, device: Device) -> str:
    """Return the kernel that is called now, and whether its file is the dump's."""
    if not device.is_cuda:
        return "the reference on the CPU"
    loaded = runtime.load(recorded.module, device.index)
    then = recorded.document.get("sha256")
    same = "the same file" if then == loaded.file.sha256 else f"another file than {then}"
    return f"{recorded.module} of {loaded.source.location}, {same}"


# Comparing results

# Allowed error in steps of the dtype, at the element and at its row's largest element.
_STEPS = 2.0


@dataclass(frozen=True)
class Compared:
    """The difference of two results, as a fraction of the allowed error (1 or less is correct)."""

    name: str
    to: str
    is_same: bool
    max_error: float
    error_of_bound: float

    @property
    def status(self) -> str:
        return "ok" if self.error_of_bound <= 1 else "fail"


def _poison_like(array: Array) -> Array:
    """Return an array of the same shape and dtype with `POISON` in every byte."""
    poison: Array = np.full(array.nbytes, POISON, np.uint8).view(array.dtype).reshape(array.shape)
    return poison


def without_unwritten(recorded: RecordedCall, after: Mapping[str, Array]) -> dict[str, Array]:
    """Return what the call wrote; elements that neither call wrote are taken from the dump."""
    results: dict[str, Array] = {}
    for name, got in after.items():
        results[name] = got = got.copy()
        tensor, then = recorded.tensors[name], (recorded.after or {}).get(name)
        if then is None or tensor.reads or tensor.elements is None:
            continue
        poison = bits(_poison_like(got))
        unwritten = (bits(got) == poison) & (bits(then) == bits(tensor.elements))
        got[unwritten] = then[unwritten]
    return results


def beside(
    recorded: RecordedCall, results: Mapping[str, Array], others: Mapping[str, Array], to: str
) -> Iterator[Compared]:
    """Compare results with other results (the dump's or the reference's), by steps of the dtype."""
    for name, wanted in others.items():
        if name not in results:
            continue
        got = results[name]
        if (bits(got) == bits(wanted)).all():
            yield Compared(name, to, True, 0.0, 0.0)
        elif got.dtype.kind in "iub":
            yield Compared(name, to, False, np.inf, np.inf)
        else:
            yield Compared(name, to, False, *_error(got, wanted, _eps(recorded.tensors, name)))


def _error(got: Array, wanted: Array, eps: float) -> tuple[float, float]:
    """Return the largest absolute error, and the largest error as a fraction of the allowed one."""
    with np.errstate(all="ignore"):
        a, b = got.astype(np.float64), wanted.astype(np.float64)
        alike = (a == b) | (np.isnan(a) & np.isnan(b))
        difference = np.where(alike, 0.0, np.abs(a - b))
        difference = np.where(np.isfinite(difference), difference, np.inf)
        sizes = np.where(np.isfinite(b), np.abs(b), 0.0)
    largest = sizes.max(axis=-1, keepdims=True, initial=0.0) if b.ndim else sizes
    smallest = float(ml_dtypes.finfo(got.dtype).smallest_subnormal)
    allowed = np.maximum(_STEPS * eps * (sizes + largest), smallest)
    return float(difference.max()), float((difference / allowed).max())


def with_definition(
    row: Row, recorded: RecordedCall, got: Mapping[str, Array]
) -> Iterator[Compared]:
    """Compare results with the op's definition in float64."""
    arrays = {
        name: of.elements.copy() if of.reads else _poison_like(of.elements)
        for name, of in recorded.tensors.items()
        if of.elements is not None and not of.is_scratch
    }
    values = {name: value for name, value in recorded.values.items() if value is not None}
    case = case_of(row, arrays, values)
    for name in case.expected:
        if name in got:
            error, fraction = case.error(name, got[name])
            yield Compared(name, "the definition in float64", fraction == 0, error, fraction)


def _eps(tensors: Mapping[str, RecordedTensor], name: str) -> float:
    """Return the step of the coarsest dtype among a result and the tensors that the call reads."""
    dtypes = {of.dtype for of in tensors.values() if of.reads and not of.is_scratch}
    dtypes.add(tensors[name].dtype)
    numbers = [of.numpy for of in dtypes if of.lanes == 1 and of.numpy.kind not in "iub"]
    return max((float(ml_dtypes.finfo(dtype).eps) for dtype in numbers), default=0.0)


# The command


class _NotReplayed(output.Failure):
    exit_code = 2


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--device", help="cpu, or cuda:N (default: a GPU if the call was on one).")
@click.option("--kernels", help="Directory or wheel of kernels (default: FI_FFI_KERNELS).")
@click.option("--bits", is_flag=True, help="Require the dump's exact bits.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def replay(file: Path, device: str | None, kernels: str | None, bits: bool, as_json: bool) -> None:
    """Repeat the call in FILE and compare its results.

    FILE is one of the two files that FI_FFI_DUMP_DIR or `fi_ffi.call_log(dump=...)` wrote, or the
    common start of their names. The results are compared with those in the dump, if the call
    returned, and with the op's definition in float64, or with the CPU's reference.

    Exits with 0 if all agree, 1 if one differs, and 2 if the call cannot be made.
    """
    try:
        recorded = load(file)
        if kernels:
            fi_ffi.use_kernels(kernels)
        where = _device(recorded, device)
        if where.is_cuda:
            from fi_ffi.cli.cuda import require

            require(where.index)
        with progress.doing("repeating the call"):
            compared, facts = _replayed(recorded, where)
    except (FiFfiError, OSError, MemoryError) as error:
        raise _NotReplayed(f"cannot be replayed: {error}") from error
    wrong = [of for of in compared if of.status != "ok"]
    if bits:
        wrong += [of for of in compared if of.to == "the dump" and not (of.is_same or of in wrong)]
    if as_json:
        rows = [asdict(of) | {"status": of.status} for of in compared]
        output.print_json({**facts, "compared": rows, "ok": not wrong})
    else:
        _print(recorded.path, facts, compared)
    if wrong:
        raise output.Failure("; ".join(f"{of.name} differs from {of.to}" for of in wrong))


def _device(recorded: RecordedCall, text: str | None) -> Device:
    if text is not None:
        return parse_device(text, op="replay")
    try:
        is_there = parse_device(recorded.device).is_cuda and machine.device_count() > 0
    except FiFfiError:
        is_there = False
    return parse_device("cuda:0") if is_there else _CPU


def _replayed(recorded: RecordedCall, where: Device) -> tuple[list[Compared], dict[str, Any]]:
    (after, result), row = rerun(recorded, where), recorded.row
    assert row is not None
    got = without_unwritten(recorded, after)
    compared = [*beside(recorded, got, recorded.after or {}, "the dump")]
    if row.formula in EXACT or row.formula in MOVES:
        compared += with_definition(row, recorded, after)
    elif where.is_cuda:
        by_reference, _ = rerun(recorded, _CPU)
        compared += beside(recorded, after, by_reference, "the reference on the CPU")
    if result is not None and recorded.result is not None and str(where) == recorded.device:
        same = result == recorded.result
        compared.append(Compared("(result)", "the dump", same, 0.0, 0.0 if same else float("inf")))
    document = recorded.document
    facts = {
        "op": document.get("op"),
        "entry": document.get("entry"),
        "called": document.get("called"),
        "then": f"{document.get('device')}, release {document.get('release', 'reference')}",
        "now": f"{where}, {kernel_of(recorded, where)}",
        "came_to_its_end": recorded.after is not None,
    }
    return compared, facts


def _print(path: Path, facts: dict[str, Any], compared: list[Compared]) -> None:
    lines = [(name, value) for name, value in facts.items() if name != "came_to_its_end"]
    if not facts["came_to_its_end"]:
        lines.append(("results", "none in the dump: the call did not return"))
    output.print_table(str(path), ("", ""), lines)
    rows = []
    for of in compared:
        error = "the same bits" if of.is_same else f"{of.max_error:.2e}"
        rows.append((of.name, of.to, error, f"{of.error_of_bound:.2f}", of.status))
    columns = ("result", "compared with", "max error", "of bound", "")
    output.print_table("Results", columns, rows, numbers=columns[3:4])
