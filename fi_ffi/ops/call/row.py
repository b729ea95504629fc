"""The classes that a row of the op table is made of.

A row states, once, what a kernel entry takes. Checks, packing, the Python signature, the docstring,
the declared signature and the catalogue are derived from it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fi_ffi.abi.signature import Signature
from fi_ffi.abi.tensor import TensorDesc, frozen
from fi_ffi.errors import ArgumentTypeError
from fi_ffi.loader.distributions import split
from fi_ffi.ops.call.notation import Condition, parse_axis, parse_expression


@dataclass(frozen=True, kw_only=True)
class Ranged:
    """An item that exists from FlashInfer `since` on and until before `until`; "" is no bound."""

    since: str = ""
    until: str = ""


@dataclass(frozen=True)
class Tensor(Ranged):
    """A tensor argument.

    `axes` names its axes ("n h"). The same name is the same size everywhere in the row. An axis may
    also be a number, "b+1", or an expression such as "2*h", "x+y" or "2*h/128", which must be a
    whole number. `dtype` is a variable of the row's `dtypes`, or a dtype's name.
    """

    name: str
    axes: str
    dtype: str
    doc: str
    writes: bool = False
    # Read before it is written: an in-place argument.
    reads: bool = True
    # The entry takes a Tensor object, not a view (`ffi.Tensor` in its signature).
    as_object: bool = False
    # `contiguous`: all elements are adjacent. Otherwise those of the last `packed` axes are.
    contiguous: bool = False
    packed: int = 1
    # The last `broadcast` axes have stride 0.
    broadcast: int = 0
    # The caller may pass None (`optional`); the entry takes an optional type, but the op requires
    # the tensor (`entry_optional`).
    optional: bool = False
    entry_optional: bool = False
    # For None, the entry gets a tensor without elements.
    empty: bool = False
    # On the host, independent of the device of the others.
    host: bool = False
    # It may be page-locked host memory, or managed memory, in a call on a GPU.
    mapped: bool = False
    # The call's `kv_layout` orders the axes; `axes` is the NHD order.
    kv: bool = False
    # As the row's `offset_limit`, which applies if this is None.
    offset_limit: int | None = None
    # The kernel stores each stride in an integer that is less than this.
    stride_limit: int = 2**63
    # The alignment of the address in bytes, in addition to that of vector loads.
    alignment: int = 1
    # Whether the row's `vector` applies; otherwise only `alignment` does.
    in_vectors: bool = True
    # The last two axes are exchanged in memory: the last but one has stride 1.
    transposed: bool = False
    # The tensor is one of this many adjacent parts of a contiguous tensor.
    parts: int = 1
    # Scratch memory: fixed bytes, bytes for each multiprocessor, and bytes that depend on sizes.
    # Without the argument, each stream uses scratch memory allocated by fi_ffi.
    bytes: int = 0
    bytes_per_multiprocessor: int = 0
    bytes_for: Any = None  # Callable[[Mapping[str, int]], int]
    # Scalars that `bytes_for` gets beside the sizes.
    bytes_given: tuple[str, ...] = ()
    # The kernel gets the size of this scratch memory and works with any.
    any_size: bool = False
    # All zero before the first call; each call restores that.
    zeroed: bool = False
    # For None, the kernel reads zeros that fi_ffi keeps on each device.
    or_zeros: bool = False
    # The caller may pass [n, 1] for [n].
    column: bool = False
    # The entry's view of the same memory, if it differs: for each axis of the entry the indices of
    # axes here. Several indices are merged into one axis, and must be adjacent in memory.
    view: tuple[tuple[int, ...], ...] = ()
    # The places that its integers may name, in the notation of `fi_ffi.reference.indices`, such as
    # "0 <= maybe_indices < r": checked on the CPU only. Or why they name none.
    index: tuple[str, ...] = ()
    no_index: str = ""

    # What is computed once is computed at its first use: most rows of a process are never called.

    @cached_property
    def axis_names(self) -> tuple[str, ...]:
        return tuple(self.axes.split())

    @cached_property
    def axis_variables(self) -> tuple[str, ...]:
        """The names of sizes in the axes."""
        return tuple(name for text in self.axis_names for name in parse_axis(text).names)

    @cached_property
    def is_scratch(self) -> bool:
        return bool(self.bytes or self.bytes_per_multiprocessor or self.bytes_for)

    @property
    def may_be_none(self) -> bool:
        """Whether a call may leave it out: it is optional, or memory that fi_ffi has."""
        return self.optional or self.is_scratch

    @property
    def is_loose(self) -> bool:
        """Whether the tensor may be passed with fewer or more axes: [] and [1, 1] for [1]."""
        return self.column or (self.axes == "1" and not self.is_scratch)

    @property
    def abi_type(self) -> str:
        kind = "ffi.Tensor" if self.as_object else "DLTensor*"
        is_optional = (self.optional or self.entry_optional) and not self.empty
        return f"Optional<{kind}>" if is_optional else kind

    @property
    def entry_rank(self) -> int:
        """The rank in which the entry takes the tensor."""
        return len(self.view or self.axis_names)

    def axes_in(self, kv_layout: str) -> tuple[str, ...]:
        """Return the axes in the order of a tensor of this layout."""
        names = self.axis_names
        return names if not self.kv or kv_layout == "NHD" else exchanged(names)


@dataclass(frozen=True)
class Scalar(Ranged):
    """A scalar argument, passed by value.

    `default` is None if the caller must give it. `low` and `high` are the least and the greatest
    value allowed, unless the tensor `instead` is given. With `size_of`, the value is the size of
    that axis, and None (then the default) stands for it; with `or_less`, it may be smaller. With
    `library`, it is a handle of that CUDA library, and 0 stands for fi_ffi's own handle. With
    `zero`, the entry gets that expression of sizes instead of 0.
    """

    name: str
    type: type[int] | type[float] | type[bool]
    default: int | float | bool | None
    doc: str
    low: float | None = None
    high: float | None = None
    multiple_of: int = 1
    size_of: str = ""
    or_less: bool = False
    library: str = ""
    instead: str = ""
    zero: str = ""
    # The entry takes an optional type, but always gets a value.
    entry_optional: bool = False

    @property
    def abi_type(self) -> str:
        name = self.type.__name__
        return f"Optional<{name}>" if self.entry_optional else name


PDL = Scalar(
    "enable_pdl",
    bool,
    False,
    "programmatic dependent launch (SM90 and later): start while the previous kernel finishes",
)


@dataclass(frozen=True)
class Text(Ranged):
    """A text argument: one of a few words."""

    name: str
    words: tuple[str, ...]
    default: str | None
    doc: str
    abi_type: str = "std::string"


# FlashInfer's codes for the order of a cache's axes (`TensorLayout` in flashinfer/utils.py).
KV_LAYOUTS = {"NHD": 0, "HND": 1}


@dataclass(frozen=True)
class KvLayout(Ranged):
    """The order of the axes of keys and values, given as "NHD" or "HND".

    If a kernel takes its strides from the tensors (`strided`), HND tensors are passed as NHD views
    of the same memory, so that one code path of the kernel serves both.
    """

    strided: bool = True
    name: str = "kv_layout"
    abi_type: str = "int"
    default: str = "NHD"
    doc: str = '"NHD" (tokens, heads, head_dim) or "HND" (heads, tokens, head_dim)'


def exchanged(axes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Exchange the axes of tokens and heads: names of axes, sizes, or strides."""
    return (*axes[:-3], axes[-2], axes[-3], axes[-1])


def as_nhd(desc: TensorDesc, kv_layout: str) -> TensorDesc:
    """View a tensor of rank 3 or more in this layout as NHD."""
    if kv_layout == "NHD":
        return desc
    return frozen(desc.ptr, exchanged(desc.shape), exchanged(desc.strides), desc.kind, desc)


@dataclass(frozen=True)
class IntArray(Ranged):
    """An Array of ints, passed as the object's address; 0 is none."""

    name: str
    abi_type: str = "Array<int>"
    doc: str = "an Array object"

    @property
    def optional(self) -> bool:
        return self.abi_type.startswith("Optional<")


@dataclass(frozen=True)
class PlanInfo(IntArray):
    """The result of a plan entry, passed on to its run entry."""

    name: str = "plan_info_vec"
    doc: str = "the result of the plan"


@dataclass(frozen=True)
class TensorArray(Ranged):
    """An Array of Tensor objects, which callers pass one by one after all other arguments."""

    name: str
    items: tuple[Tensor, ...]
    abi_type: str = "Optional<Array<ffi.Tensor>>"


@dataclass(frozen=True)
class Absent(Ranged):
    """An argument of the entry that the op lacks: a null tensor, a number, a bool, or None for an
    optional type.

    Some entries look at the layout of a tensor that they do not use: they get one of this `shape`.
    `of` computes a number from sizes, as "num_seqs * heads".
    """

    name: str
    abi_type: str = "DLTensor*"
    value: int = 0
    dtype: str = "uint8"
    shape: tuple[int, ...] = (0,)
    of: str = ""

    @property
    def entry_rank(self) -> int | None:
        """The rank of a null tensor; None for any other value."""
        return len(self.shape) if self.abi_type == "DLTensor*" else None


Arg = Tensor | Scalar | Text | KvLayout | IntArray | TensorArray | Absent

# Names in rules: whether a written tensor is the same memory as one that is read, the GPU's number
# of multiprocessors, and the shared memory of a block in bytes (unlimited on the CPU).
IN_PLACE, MULTIPROCESSORS, SHARED_MEMORY = "in_place", "multiprocessors", "shared_memory"


@dataclass(frozen=True, eq=False)
class Rule(Ranged):
    """A condition with words of its own, in the notation of `fi_ffi.ops.call.notation`.

    Its names are axes (None if no given tensor has them), scalars and texts (which hide axes of the
    same name), the constants above, tensors (whether they are given), and variables of `dtypes`
    (the dtype's name). An error names `argument`. `expected` is the text of the error, or a
    function of the names' values that returns it. `using` has the functions that the condition
    calls.
    """

    argument: str
    condition: str
    expected: str | Callable[..., str]
    using: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    @property
    def template(self) -> str:
        """The condition with its names in braces."""
        return parse_expression(self.condition)[0]

    @property
    def names(self) -> tuple[str, ...]:
        return parse_expression(self.condition)[1]


def default_of(arg: Arg) -> str | None:
    """Return the Python default of an argument as source text, or None if the argument is
    required."""
    if isinstance(arg, Tensor):
        return "None" if arg.optional or arg.is_scratch or arg.or_zeros else None
    if isinstance(arg, Scalar) and arg.size_of:
        return "None"
    default = getattr(arg, "default", None)
    return None if default is None else repr(default)


REQUIRED = "REQUIRED"  # the name of a `Required` in generated code


@dataclass(frozen=True)
class Required:
    """The default of a required parameter that follows an optional one.

    `call` is how the op is called, for the error. The error comes where the value is used: as a
    tensor, when its memory is asked for.
    """

    call: str = field(compare=False)

    def __repr__(self) -> str:
        return REQUIRED

    @property
    def __array_interface__(self) -> dict[str, Any]:
        raise self.missing("", "")

    def missing(self, op: str, argument: str) -> ArgumentTypeError:
        error = ArgumentTypeError(op, "no", got="value", expected=f"one: {self.call}")
        return error.of(op, argument) if op else error  # type: ignore[return-value]


@dataclass(frozen=True)
class Vector:
    """How wide a kernel loads: along the axes named, `bytes` at a time.

    Addresses and strides must be multiples of gcd(bytes / itemsize, size) elements. The itemsize is
    that of `dtype` (a variable of the row), or of the tensor itself if that is None.
    """

    axes: tuple[str, ...]
    bytes: int = 16
    dtype: str | None = None
    # The most threads that share the axis, each with several vectors if needed; 0 for any number.
    threads: int = 0


@dataclass(frozen=True, eq=False)
class Row:
    """One op: a kernel entry with one way of calling it.

    `module` is FlashInfer's, or "DISTRIBUTION/LIBRARY" of another distribution, as in
    "tokenspeed-kernel/routing". `releases` are then that distribution's versions.
    """

    name: str
    module: str
    symbol: str
    source: str
    doc: str
    args: tuple[Arg, ...]
    dtypes: dict[str, tuple[str, ...]]
    # Releases that have exactly this interface, as a version specifier.
    releases: str
    # The module's function that makes the object whose method the entry is; "" for a function.
    factory: str = ""
    # Selects another reference and formula for a kernel that computes something else.
    variant: str = ""
    # The dtype (a variable) to which intermediate results are rounded, if not float32.
    rounding: str = ""
    vector: Vector = Vector(("h",), dtype="T")
    # The kernel computes element offsets in an integer that is less than this.
    offset_limit: int = 2**32
    # Conditions on sizes, as "d >= top_k", and rules.
    requires: tuple[str | Rule, ...] = ()
    # Axes that one thread block covers, in addition to the vector's.
    block: tuple[str, ...] = ()
    # Arguments that are given all or none (None, 0 or False).
    together: tuple[str, ...] = ()
    # Tensors that must have the same strides, because the kernel reads those of the first.
    same_strides: tuple[str, ...] = ()
    # A call does nothing if this axis is empty; "": if all written tensors are empty.
    nothing_axis: str = ""
    result: str = "void"
    # The kernel allocates tensors, through an allocator that the call provides.
    allocates: bool = False
    # Pairs that may be the same memory; otherwise a written tensor overlaps no other.
    in_place: tuple[tuple[str, str], ...] = ()
    # Major compute capabilities that the kernel was written for (empty for any), and why builds
    # for others are useless.
    capabilities: tuple[int, ...] = ()
    elsewhere: str = ""
    # Capabilities that other forms of the row serve.
    also: tuple[int, ...] = ()
    # Modules for GPUs that use another than `module`, by compute capability.
    modules: Mapping[tuple[int, int], str] = field(default_factory=dict)
    # Combinations of dtypes that the kernel refuses, by variable.
    lacks: tuple[dict[str, str], ...] = ()
    # The op's parameters, if their order is not the entry's.
    order: tuple[str, ...] = ()
    # Returns the row for the module compiled for these dtypes, by name of a given tensor.
    compiled_for: Callable[[Row, Mapping[str, str]], Row] | None = None

    @property
    def distribution(self) -> str:
        """The distribution that has the kernel; "" for FlashInfer's."""
        return split(self.module)[0]

    @property
    def package(self) -> str:
        """Whose releases `releases` are."""
        return self.distribution or "FlashInfer"

    @cached_property
    def slots(self) -> tuple[Arg, ...]:
        """The entry's arguments, then the tensors of its Arrays."""
        arrays = (arg.items for arg in self.args if isinstance(arg, TensorArray))
        return (*self.args, *itertools.chain.from_iterable(arrays))

    @cached_property
    def given(self) -> tuple[Arg, ...]:
        """The op's arguments in its order: all but the absent ones."""
        found = [arg for arg in self.slots if not isinstance(arg, (Absent, TensorArray))]
        if self.order:
            found.sort(key=lambda arg: self.order.index(arg.name))
        return tuple(found)

    @cached_property
    def defaults(self) -> tuple[str | None, ...]:
        """Their defaults in a Python function; None for none."""
        written = [default_of(arg) for arg in self.given]
        first = next((i for i, default in enumerate(written) if default), len(written))
        written[first + 1 :] = [default or REQUIRED for default in written[first + 1 :]]
        return tuple(written)

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(arg for arg in self.slots if isinstance(arg, Tensor))

    @cached_property
    def formula_names(self) -> tuple[str, ...]:
        """The arguments' names for a formula; "" for what it has no use for, scratch memory too."""
        scratch = {tensor.name for tensor in self.tensors if tensor.is_scratch}
        names = ("" if isinstance(arg, Absent) else arg.name for arg in self.args)
        return tuple("" if name in scratch else name for name in names)

    @cached_property
    def kv_layout(self) -> KvLayout | None:
        return next((arg for arg in self.slots if isinstance(arg, KvLayout)), None)

    @cached_property
    def conditions(self) -> tuple[Condition, ...]:
        return tuple(Condition.of(each) for each in self.requires if isinstance(each, str))

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        return tuple(each for each in self.requires if isinstance(each, Rule))

    @cached_property
    def signature(self) -> Signature:
        """The signature that the binary must report."""
        return Signature(self.symbol, tuple(arg.abi_type for arg in self.args), self.result)

    def module_on(self, capability: tuple[int, int] | None) -> str:
        """Return the module that has the entry for a GPU."""
        return self.module if capability is None else self.modules.get(capability, self.module)

    def other_gpus(self, capability: tuple[int, int] | None) -> str:
        """Return the GPUs that the kernel was written for, if this is none of them."""
        if capability is None or not self.capabilities or capability[0] in self.capabilities:
            return ""
        able = " or ".join(f"{known}.x" for known in sorted({*self.capabilities, *self.also}))
        why = f" ({self.elsewhere})" if self.elsewhere else ""
        return f"GPUs of compute capability {able}{why}"

    @property
    def is_in_python(self) -> bool:
        """Whether the kernel is written in Python (CuTe DSL), so that nothing in csrc exports
        it."""
        return self.source.startswith("flashinfer/")

    @property
    def reference(self) -> str:
        """The name of the reference kernel."""
        return self.symbol + self.variant

    @property
    def formula(self) -> str:
        """The name of the formula in float64."""
        return self.name + self.variant


def form_on(forms: Sequence[Row], capability: tuple[int, int] | None) -> Row:
    """Return the form for a GPU; the first if no form names the GPU."""
    return next((form for form in forms if not form.other_gpus(capability)), forms[0])
