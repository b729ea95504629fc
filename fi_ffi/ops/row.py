"""What a row of the op table is made of.

A row states, once, what a kernel entry takes.  Checks, packing, the Python
signature, the docstring, the declared signature and the catalogue are derived.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fi_ffi.abi.signature import Signature
from fi_ffi.abi.tensor import TensorDesc, frozen
from fi_ffi.ops.notation import Condition, names_in


@dataclass(frozen=True, kw_only=True)
class Ranged:
    """What came with FlashInfer `since`, and was gone with `until`, where they are not ""."""

    since: str = ""
    until: str = ""


@dataclass(frozen=True)
class Tensor(Ranged):
    """A tensor argument.

    `axes` names its axes ("n h"); the same name is the same size everywhere in
    the row, a number is that size, "b+1" is one more than b, and "2*h", "x+y" and
    "2*h/128" (of what is a multiple) are what they say.  `dtype` is a variable of the row's
    `dtypes`, or a dtype's name.
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
    # Every element adjacent; otherwise only those of the last axis need be, or of so many of the
    # last axes.
    contiguous: bool = False
    packed: int = 1
    # Along so many of the last axes all elements are one: their strides are 0.
    broadcast: int = 0
    # None where there is none; or the entry could do without it, and the op cannot.
    optional: bool = False
    entry_optional: bool = False
    # There is always one for the entry: without elements, where there is none.
    empty: bool = False
    # On the host, whatever device the others are on.
    host: bool = False
    # Axes in the order that the call's `kv_layout` says; `axes` gives that of NHD.
    kv: bool = False
    # The same as the row's of this name, which is in force where this is None.
    offset_limit: int | None = None
    # The kernel keeps each stride in an integer that holds less than this.
    stride_limit: int = 2**63
    # The address is a multiple of so many bytes, whatever the kernel loads at a time.
    alignment: int = 1
    # Loaded as the row's `vector` says; otherwise `alignment` alone holds.
    in_vectors: bool = True
    # In memory the last two axes are the other way round: the last but one has stride 1.
    transposed: bool = False
    # It is one of so many parts of a contiguous tensor, which lie beside each other.
    parts: int = 1
    # Scratch memory: so many bytes, so many for each multiprocessor, and what the sizes of the
    # other tensors' axes demand.  Where the caller gives none, each stream has its own of fi_ffi's.
    bytes: int = 0
    bytes_per_multiprocessor: int = 0
    bytes_for: Any = None  # Callable[[Mapping[str, int]], int]
    # Scalars that `bytes_for` is given beside the sizes.
    bytes_given: tuple[str, ...] = ()
    # The kernel is told how large it is, and makes do with any size.
    any_size: bool = False
    # Zero before the first call; each call leaves it so.
    zeroed: bool = False
    # None stands for zeros, of which each device has some.
    or_zeros: bool = False
    # Each element may have an axis of its own: [n, 1] stands for [n].
    column: bool = False
    # How the entry has it, where that is another view of the same memory: for each of its axes
    # those of `axes`, by number.  Several are one axis there, and have to lie side by side.
    view: tuple[tuple[int, ...], ...] = ()

    @property
    def entry_rank(self) -> int:
        """The rank that the entry has it in."""
        return len(self.view or self.axis_names)

    @property
    def is_scratch(self) -> bool:
        return bool(self.bytes or self.bytes_per_multiprocessor or self.bytes_for)

    @property
    def is_loose(self) -> bool:
        """Whether its elements may be given with fewer or more axes: [] and [1, 1] for [1]."""
        return self.column or (self.axes == "1" and not self.is_scratch)

    @property
    def axis_names(self) -> tuple[str, ...]:
        return tuple(self.axes.split())

    def axes_in(self, kv_layout: str) -> tuple[str, ...]:
        """The axes in the order that a tensor of this layout has them."""
        names = self.axis_names
        return names if not self.kv or kv_layout == "NHD" else exchanged(names)

    @property
    def abi_type(self) -> str:
        kind = "ffi.Tensor" if self.as_object else "DLTensor*"
        is_optional = (self.optional or self.entry_optional) and not self.empty
        return f"Optional<{kind}>" if is_optional else kind


@dataclass(frozen=True)
class Scalar(Ranged):
    """A scalar argument, passed by value.

    `default` is None where the caller must give it; `low` and `high` are the least and the
    greatest value allowed, unless there is the tensor that is read `instead`.  With `size_of` it
    is the size of that axis, which None (then the default) stands for; or less, with `or_less`.
    With `library` it is a handle of that library of CUDA; 0 stands for fi_ffi's own of the device.
    The entry is given an expression of sizes instead of 0, where `zero` has one.
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

    @property
    def abi_type(self) -> str:
        return self.type.__name__


PDL = Scalar(
    "enable_pdl", bool, False,
    "programmatic dependent launch (SM90 and later): start while the previous kernel drains",
)  # fmt: skip


@dataclass(frozen=True)
class Text(Ranged):
    """A text argument, one of a few words."""

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

    Where a kernel takes its strides from the tensors (`strided`), HND tensors are handed
    over as NHD views of the same memory, so that one code path of it serves both.
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
    """View a tensor of rank 3 or more, and of this layout, as one of NHD."""
    if kv_layout == "NHD":
        return desc
    return frozen(desc.ptr, exchanged(desc.shape), exchanged(desc.strides), desc.kind, desc)


@dataclass(frozen=True)
class IntArray(Ranged):
    """An Array of ints, which callers give by the object's address; 0 is none."""

    name: str
    abi_type: str = "Array<int>"

    @property
    def optional(self) -> bool:
        return self.abi_type.startswith("Optional<")


@dataclass(frozen=True)
class PlanInfo(IntArray):
    """What a plan returned, handed on to its run."""

    name: str = "plan_info_vec"


@dataclass(frozen=True)
class TensorArray(Ranged):
    """An Array of Tensor objects, which callers give one by one, after all other arguments."""

    name: str
    items: tuple[Tensor, ...]
    abi_type: str = "Optional<Array<ffi.Tensor>>"


@dataclass(frozen=True)
class Absent(Ranged):
    """An argument of the entry that the op has not: a tensor without an address, a number, a bool,
    or of an optional type none.

    An entry that looks at a tensor's layout before it leaves it alone is told this `shape`.  A
    number may be one of sizes, as "num_seqs * heads": `of`.
    """

    name: str
    abi_type: str = "DLTensor*"
    value: int = 0
    dtype: str = "uint8"
    shape: tuple[int, ...] = (0,)
    of: str = ""


Arg = Tensor | Scalar | Text | KvLayout | IntArray | TensorArray | Absent

# In a rule: whether a tensor that is written is the very memory of one that is read, and of the GPU
# the number of multiprocessors, and a block's bytes of shared memory (without end on the CPU).
IN_PLACE, MULTIPROCESSORS, SHARED_MEMORY = "in_place", "multiprocessors", "shared_memory"


@dataclass(frozen=True, eq=False)
class Rule(Ranged):
    """A condition that has words of its own: `fi_ffi.ops.notation` has the notation.

    Its names are axes (None where no tensor there has it), scalars and texts (also where an axis
    has the same name), those above, a tensor's for whether it is there, and a variable of `dtypes`
    for its dtype's name.  An error is of `argument`; `expected` says what must be, or is given
    the names' values and does.  `using` has the functions that the condition calls.
    """

    argument: str
    holds: str
    expected: str | Callable[..., str]
    using: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return names_in(self.holds)


def default_of(arg: Arg) -> str | None:
    """The Python default of an argument as it is written; None where it must be given."""
    if isinstance(arg, Tensor):
        return "None" if arg.optional or arg.is_scratch or arg.or_zeros else None
    if isinstance(arg, Scalar) and arg.size_of:
        return "None"
    default = getattr(arg, "default", None)
    return None if default is None else repr(default)


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


# The default of a parameter that must be given and comes after one that need not be.
REQUIRED = _Required()


def defaults(args: Sequence[Arg]) -> list[str | None]:
    """The defaults that a Python function of these parameters has."""
    written = [default_of(arg) for arg in args]
    first = next((i for i, default in enumerate(written) if default), len(written))
    return [default or (repr(REQUIRED) if i > first else None) for i, default in enumerate(written)]


@dataclass(frozen=True)
class Vector:
    """How wide a kernel loads: along the axes named, `bytes` at a time.

    Addresses and strides must be multiples of gcd(bytes / itemsize, size) elements, where the
    itemsize is that of `dtype` (a variable of the row) or, with None, the tensor's own.
    """

    axes: tuple[str, ...]
    bytes: int = 16
    dtype: str | None = None
    # At most so many threads share the axis, each with several vectors if need be; 0: any number.
    threads: int = 0


@dataclass(frozen=True, eq=False)
class Row:
    """One op: a kernel entry with one way of calling it."""

    name: str
    module: str
    symbol: str
    source: str
    doc: str
    args: tuple[Arg, ...]
    dtypes: dict[str, tuple[str, ...]]
    # FlashInfer releases that have exactly this interface, as a version specifier.
    releases: str
    # The entry is a method of the object that this function of the module makes.
    factory: str = ""
    # Names another reference and formula, where the kernel computes something else.
    variant: str = ""
    # The dtype that intermediate results are rounded to (a variable), if not float32.
    rounding: str = ""
    vector: Vector = Vector(("h",), dtype="T")
    # The kernel computes element offsets in an integer that holds less than this.
    offset_limit: int = 2**32
    # What must hold: conditions on sizes, as "d >= top_k", and rules.
    requires: tuple[str | Rule, ...] = ()
    # Axes that one thread block covers, besides the vector's.
    block: tuple[str, ...] = ()
    # Arguments that are given together, or not at all (None, 0 or False).
    together: tuple[str, ...] = ()
    # Tensors that must have the same strides: the kernel reads those of the first.
    same_strides: tuple[str, ...] = ()
    # Nothing is done where this axis has no elements; "": where no written tensor has any.
    nothing_axis: str = ""
    result: str = "void"
    # The kernel makes tensors itself: its calls are given memory for them.
    allocates: bool = False
    # Pairs that may be the same memory; what is written shares none with any other tensor.
    in_place: tuple[tuple[str, str], ...] = ()
    # Major compute capabilities that the kernel was written for; any, where there is none.  And why
    # what is compiled for others is of no use.
    capabilities: tuple[int, ...] = ()
    elsewhere: str = ""
    # Those that other forms of the row are for, which are called otherwise.
    also: tuple[int, ...] = ()
    # The modules of GPUs that have another than `module`, by compute capability.
    modules: Mapping[tuple[int, int], str] = field(default_factory=dict)
    # Dtypes that the kernel does not take together, by variable.
    lacks: tuple[dict[str, str], ...] = ()
    # The op's parameters, where their order is not the entry's.
    order: tuple[str, ...] = ()
    # The row of the module that is compiled for these dtypes, by tensor: those that are there.
    compiled_for: Callable[[Row, Mapping[str, str]], Row] | None = None

    def module_on(self, capability: tuple[int, int] | None) -> str:
        """The module that has the entry for a GPU."""
        return self.module if capability is None else self.modules.get(capability, self.module)

    def other_gpus(self, capability: tuple[int, int] | None) -> str:
        """The GPUs that the kernel was written for, where this is none of them."""
        if capability is None or not self.capabilities or capability[0] in self.capabilities:
            return ""
        able = " or ".join(f"{known}.x" for known in sorted({*self.capabilities, *self.also}))
        why = f" ({self.elsewhere})" if self.elsewhere else ""
        return f"GPUs of compute capability {able}{why}"

    @property
    def conditions(self) -> tuple[Condition, ...]:
        return tuple(Condition.of(each) for each in self.requires if isinstance(each, str))

    @property
    def is_in_python(self) -> bool:
        """Whether its kernel is in Python, in CuTe DSL: nothing in csrc exports it."""
        return self.source.startswith("flashinfer/")

    def limits(self, kind: str) -> dict[str, tuple[int, ...]]:
        """The numbers that sizes are held against by ">=", "<=", "in" or "%", a size each."""
        found = (condition.limit for condition in self.conditions)
        return {limit[1]: limit[2] for limit in found if limit and limit[0] == kind}

    @property
    def rules(self) -> tuple[Rule, ...]:
        return tuple(each for each in self.requires if isinstance(each, Rule))

    @property
    def slots(self) -> tuple[Arg, ...]:
        """The entry's arguments, and then the tensors that are in Arrays of them."""
        arrays = (arg.items for arg in self.args if isinstance(arg, TensorArray))
        return (*self.args, *itertools.chain.from_iterable(arrays))

    @property
    def given(self) -> tuple[Arg, ...]:
        """The arguments that the op has, in its order: all but the absent ones."""
        found = [arg for arg in self.slots if not isinstance(arg, (Absent, TensorArray))]
        if self.order:
            found.sort(key=lambda arg: self.order.index(arg.name))
        return tuple(found)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(arg for arg in self.slots if isinstance(arg, Tensor))

    @property
    def reference(self) -> str:
        """The name of the reference kernel."""
        return self.symbol + self.variant

    @property
    def formula(self) -> str:
        """The name of the formula in float64."""
        return self.name + self.variant

    @property
    def signature(self) -> Signature:
        """What the binary must say of itself."""
        return Signature(self.symbol, tuple(arg.abi_type for arg in self.args), self.result)


def form_on(forms: Sequence[Row], capability: tuple[int, int] | None) -> Row:
    """The form for a GPU; the first, where none is."""
    return next((form for form in forms if not form.other_gpus(capability)), forms[0])
