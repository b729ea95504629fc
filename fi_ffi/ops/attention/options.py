"""The options of the plans: tables of types, checks and defaults.

Each table is a `TypedDict`, so that type checkers know a plan's keywords. Each annotation carries
an `Option` with the check and the default. The plans' docstrings say what the options mean.
"""

# No `from __future__ import annotations` here: `Options` reads the annotations as objects.

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, TypedDict, get_type_hints

from fi_ffi.errors import ArgumentTypeError, nearest
from fi_ffi.loader.distributions import is_in
from fi_ffi.ops.attention.backends import (
    BACKENDS,
    CAUSAL,
    CUSTOM,
    MULTI_ITEM_SCORING,
    NON_CAUSAL,
    POS_ENCODING_MODES,
    Kernel,
    Target,
    check_encoding,
    check_soft_cap,
    choose_backend,
    data_type,
    decode_groups,
    output_type,
)
from fi_ffi.ops.attention.rows import (
    BATCH_DECODE_PLAN,
    BATCH_DECODE_RUN,
    BATCH_MLA,
    BATCH_PREFILL,
    BATCH_PREFILL_SINK,
    F16,
    FP4,
    FP8,
    UNIFORM,
)
from fi_ffi.ops.attention.sizes import BY_QUERY, Geometry
from fi_ffi.ops.call.arguments import Refusal, check_choice, check_flag, check_int, shown
from fi_ffi.ops.call.row import Row

Check = Callable[[str, str, Any], Any]


class Option(NamedTuple):
    """An option's check and default.

    `check` takes the plan's name, the option's name and a value, and returns the value as plans
    keep it. A default of None is not checked. An option without a check depends on other options.
    """

    check: Check | None
    default: Any = None


def dtype(default: str | None, *allowed: str) -> Option:
    return Option(partial(data_type, allowed=allowed), default)


def _word(words: Collection[str]) -> Option:
    """A choice of words; the first is the default."""
    return Option(partial(check_choice, allowed=words), next(iter(words)))


def _from(least: int) -> Option:
    """An int from `least` on, which is the default."""
    return Option(partial(check_int, low=least), least)


def _only(size: int) -> Option:
    """A size for which the kernels accept a single value."""

    def check(op: str, name: str, value: Any) -> int:
        if check_int(op, name, value, 1) != size:
            raise Refusal(op)(name, value, f"{size}, the only one there is")
        return size

    return Option(check, size)


_count = Option(partial(check_int, low=1))
Count = Annotated[int, _count]
OptionalCount = Annotated[int | None, _count]
Flag = Annotated[bool, Option(check_flag, False)]
SoftCap = Annotated[float, Option(check_soft_cap, 0.0)]


class _Heads(TypedDict):
    num_qo_heads: Count
    num_kv_heads: Count


class _Scores(TypedDict, total=False):
    q_data_type: Annotated[object, dtype("float16", *F16, *FP8)]
    kv_data_type: Annotated[object, dtype(None, *F16, *FP8, *FP4)]
    o_data_type: Annotated[object, Option(None)]
    window_left: Annotated[int, _from(-1)]
    logits_soft_cap: SoftCap
    pos_encoding_mode: Annotated[str, _word(POS_ENCODING_MODES)]


class Graphs(TypedDict, total=False):
    enable_cuda_graph: Flag
    max_num_indices: OptionalCount


class _Queries(TypedDict, total=False):
    causal: Flag
    backend: Annotated[str, _word(BACKENDS)]
    max_total_num_rows: OptionalCount


class HeadDim(_Heads):
    head_dim_qk: Count


class PrefillKeywords(HeadDim, _Scores, _Queries, Graphs, total=False):
    """Keywords of `BatchPrefillPlan`."""

    head_dim_vo: OptionalCount
    page_size: OptionalCount
    use_fp16_qk_reduction: Flag
    use_custom_mask: Flag
    use_multi_item_scoring: Flag
    use_attention_sink: Flag
    fixed_split_size: OptionalCount
    disable_split_kv: Flag
    num_colocated_ctas: Annotated[int, _from(0)]
    uniform_q_len: Annotated[int, _from(0)]


class DecodeKeywords(_Heads, _Scores, Graphs):
    """Keywords of `BatchDecodePlan`."""

    head_dim: Count
    page_size: Count


class _Mla(TypedDict):
    num_heads: Count
    page_size: Count


class MlaKeywords(_Mla, _Queries, Graphs, total=False):
    """Keywords of `BatchMlaPlan`."""

    head_dim_ckv: Annotated[int, _only(512)]
    head_dim_kpe: Annotated[int, _only(64)]
    q_data_type: Annotated[object, dtype("bfloat16", *F16)]
    kv_data_type: Annotated[object, Option(None)]


class Choice(NamedTuple):
    """What serves a plan: the backend, why it was chosen, and the rows of the planner and of the
    runs."""

    backend: str
    reason: str
    rows: Sequence[Row]


# Arguments of `plan` in FlashInfer's wrappers, which the runs of a plan take here.
_OF_RUNS = frozenset({"sm_scale", "rope_scale", "rope_theta"})


def check_keywords(op: str, known: Collection[str], names: Iterable[str]) -> None:
    """Refuse options that a call lacks, as Python refuses unknown keywords."""
    for name in names:
        if name not in known:
            near = "; pass it to each run" if name in _OF_RUNS else nearest(name, known)
            raise TypeError(f"{op}() got an unexpected keyword argument {name!r}{near}")


# FlashInfer's wrappers have several names for an argument. A plan has one of them, or some, and
# takes another for the first that it has.
SAME: tuple[tuple[str, ...], ...] = (
    ("head_dim", "head_dim_qk"),
    ("q_data_type", "data_type"),
    ("paged_kv_last_page_len_arr", "paged_kv_last_page_len"),
    *(
        tuple(f"{prefix}{array}{half}" for prefix in ("paged_kv_", "kv_", ""))
        for array in ("indptr", "indices", "last_page_len")
        for half in ("", "_p", "_d")
    ),
)


def other_names(known: Iterable[str]) -> dict[str, str]:
    """Return other names for these arguments, and which of them each stands for."""
    known = dict.fromkeys(known)
    others = dict[str, str]()
    for group in SAME:
        own = next((name for name in group if name in known), None)
        if own is not None:
            others |= {name: own for name in group if name not in known}
    return others


def by_own_names(
    op: str, known: Iterable[str], given: Mapping[str, Any], positional: Collection[str] = ()
) -> dict[str, Any]:
    """Return arguments by the names that a plan has for them; refuse one that has two values."""
    others, named = other_names(known), dict[str, Any]()
    for name, value in given.items():
        own = others.get(name, name)
        if own in named or (own != name and (own in given or own in positional)):
            expected = f"{own} or {name}, which is the same, not both"
            raise ArgumentTypeError(op, name, got=shown(value), expected=expected)
        named[own] = value
    return named


def parameters_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of a method's parameters, but for `self`, `*args` and `**kwargs`."""
    code = function.__code__
    return code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]


def take_any_name(cls: type) -> None:
    """Let a class of plans take other names for the arguments of its own methods.

    A `replan` with `**others` is left as it is: it costs nothing there.
    """
    own = vars(cls)
    if "__init__" in own:
        setattr(cls, "__init__", _by_any_name(own["__init__"]))  # noqa: B010
    if "replan" in own and "others" not in own["replan"].__code__.co_varnames:
        setattr(cls, "replan", _by_any_name(own["replan"]))  # noqa: B010


def _by_any_name(function: Callable[..., None]) -> Callable[..., None]:
    most, names = function.__code__.co_argcount - 1, parameters_of(function)
    others = frozenset(other_names(names))

    @wraps(function)
    def call(self: Any, *args: Any, **named: Any) -> None:
        if not others.isdisjoint(named):
            named = by_own_names(self.op, names, named, names[: len(args)])
        try:
            function(self, *args, **named)
        except TypeError:
            if len(args) <= most:
                raise
            told = f"takes {most} by position ({', '.join(names[:most])}), not {len(args)}"
            told = f"{self.op}.{function.__name__}() {told}: pass the others by name"
            raise TypeError(told) from None

    # Records of calls have the name of the outermost method.
    made: Any = call
    made.__code__ = made.__code__.replace(co_name=function.__name__)
    return call


class Options:
    """A plan's checked options, as attributes."""

    # The plan's name, its options, and the names of the required ones.
    op: ClassVar[str]
    table: ClassVar[Mapping[str, Option]]
    required: ClassVar[frozenset[str]]
    refuse: ClassVar[Refusal]
    # Whether the kernels can write fp8 outputs.
    has_fp8_outputs: ClassVar[bool] = False
    use_fp16_qk_reduction = False

    def __init_subclass__(cls, op: str, keywords: Any) -> None:
        hints = get_type_hints(keywords, include_extras=True)
        cls.op, cls.required, cls.refuse = op, keywords.__required_keys__, Refusal(op)
        cls.table = {name: hint.__metadata__[0] for name, hint in hints.items()}

    def __init__(self, **options: Any) -> None:
        """Check a plan's keywords. A `TypeError` names the plan, as for a plain Python call."""
        options = by_own_names(self.op, self.table, options)
        check_keywords(self.op, self.table, options)
        missing = [name for name in self.table if name in self.required and name not in options]
        if missing:
            raise TypeError(f"{self.op}() missing required keyword arguments: {', '.join(missing)}")
        for name, (check, default) in self.table.items():
            value = options.get(name, default)
            if check is not None and not (value is default is None and name not in self.required):
                value = check(self.op, name, value)
            setattr(self, name, value)
        self.check_together()

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __str__(self) -> str:
        """List the required options and those that differ from their default."""
        return ", ".join(
            f"{name}={getattr(self, name)!r}"
            for name, option in self.table.items()
            if name in self.required or getattr(self, name) != option.default
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"

    def check_together(self) -> None:
        """Check combinations of options, and set those that were left out."""
        q, qo, kv = self.q_data_type, self.num_qo_heads, self.num_kv_heads
        if qo % kv:
            raise self.refuse("num_qo_heads", qo, f"a multiple of num_kv_heads = {kv}")
        self._set_default("head_dim_vo", self.head_dim_qk)
        self._set_default("kv_data_type", q)
        of_output = partial(output_type, q=q, is_decode=self.has_fp8_outputs)
        self._set_default("o_data_type", F16[0] if q in FP8 else q, of_output)
        check_encoding(self.op, self.pos_encoding_mode, self.logits_soft_cap)
        if self.kv_data_type in FP4:
            vars(self)["kv_data_type"] = FP4[0]  # the dtype in module names
            for name in ("head_dim_qk", "head_dim_vo"):
                if getattr(self, name) % 64:
                    expected = "a multiple of 64, for keys and values of 4 bits"
                    raise self.refuse(name, getattr(self, name), expected)

    def choose(self, target: Target) -> Choice:
        """Choose the backend and the rows for a target; refuse what it lacks."""
        raise NotImplementedError

    def _set_default(self, name: str, default: object, check: Check | None = None) -> None:
        """Set an option that was left out; otherwise check its value."""
        value = getattr(self, name)
        if value is None:
            setattr(self, name, default)
        elif check is not None:
            setattr(self, name, check(self.op, name, value))

    @property
    def kernel(self) -> Kernel:
        """The parameters that the plan's module is compiled for."""
        window, cap = self.window_left >= 0, self.logits_soft_cap > 0
        uses = {"use_sliding_window": window, "use_logits_soft_cap": cap}
        names = Kernel.__dataclass_fields__.keys() - uses
        return Kernel(**uses, **{name: getattr(self, name) for name in names})

    def geometry(self, multiprocessors: int, major: int, release: str | None) -> Geometry:
        """Return the sizes that determine the workspaces, on a GPU with these multiprocessors and
        this major compute capability, for the kernels of a release."""
        sizes = {"page_size": 1} | {
            name: value
            for name, value in vars(self).items()
            if name in Geometry.__dataclass_fields__ and value is not None
        }
        # Before this release, fa2 counts partial results by queries times heads of a group.
        sizes["by_query"] = release is not None and is_in(release, BY_QUERY)
        return Geometry(multiprocessors=multiprocessors, major=major, **sizes)


class SignatureWithOptions:
    """The signature of a plan class, in which each option is a keyword with its default.

    `help` shows it. It is built on access, because `inspect` is slow to import.
    """

    def __init__(self, options: type[Options] | None = None) -> None:
        self._options = options

    def __get__(self, instance: object, owner: type) -> Any:
        from inspect import Parameter, signature, unwrap

        options: type[Options] = self._options or owner._options_class  # type: ignore[attr-defined]
        init: Any = unwrap(owner.__init__)  # type: ignore[misc]
        *parameters, last = [*signature(init).parameters.values()][1:]
        unpacked = re.fullmatch(r"Unpack\[(\w+)\]", str(last.annotation))
        if unpacked is None:
            return signature(init).replace(parameters=[*parameters, last])
        keywords = init.__globals__[unpacked[1]]
        required = keywords.__required_keys__ | options.required
        defaults = {name: option.default for name, option in options.table.items()}
        for name, hint in get_type_hints(keywords).items():
            default = Parameter.empty if name in required else defaults.get(name)
            parameters.append(
                Parameter(name, Parameter.KEYWORD_ONLY, annotation=hint, default=default)
            )
        return signature(init).replace(parameters=parameters, return_annotation=owner)


# Options of the split, which fa3 lacks.
_FA2_OPTIONS = ("fixed_split_size", "disable_split_kv", "num_colocated_ctas", "uniform_q_len")
# Options that the kernels with attention sinks lack.
_LACKED_WITH_SINKS = (
    "pos_encoding_mode",
    "logits_soft_cap",
    "use_fp16_qk_reduction",
    "use_custom_mask",
    "use_multi_item_scoring",
)


class PrefillOptions(Options, op="BatchPrefillPlan", keywords=PrefillKeywords):
    """Options of `BatchPrefillPlan`."""

    def check_together(self) -> None:
        super().check_together()
        self._check_masks()
        if self.use_attention_sink:
            self._check_sink()

    def _check_masks(self) -> None:
        if self.use_multi_item_scoring and self.page_size is None:
            expected = "False without page_size: the kernels for ragged keys lack it"
            raise self.refuse("use_multi_item_scoring", True, expected)
        if self.sees_past_window and self.fixed_split_size is not None:
            expected = "None with a window and a mask that is not causal: these are never split"
            raise self.refuse("fixed_split_size", self.fixed_split_size, expected)
        if self.uniform_q_len and not self.enable_cuda_graph:
            expected = "0 without enable_cuda_graph: the planner sees what each batch has"
            raise self.refuse("uniform_q_len", self.uniform_q_len, expected)
        if self.disable_split_kv and self.fixed_split_size is not None:
            raise self.refuse("disable_split_kv", True, "False with fixed_split_size")
        # Multi-item scoring is causal.
        modes = ("causal", "use_custom_mask", "use_multi_item_scoring")
        masks = [name for name in modes if getattr(self, name)]
        if len(masks) > 1 and masks != ["causal", "use_multi_item_scoring"]:
            raise self.refuse(masks[1], True, f"False with {masks[0]}: the mask is one of them")

    def _check_sink(self) -> None:
        defaults = {name: self.table[name].default for name in _LACKED_WITH_SINKS}
        defaults["kv_data_type"] = "" if self.q_data_type in FP8 else self.q_data_type
        for name, default in defaults.items():
            if getattr(self, name) != default:
                expected = "its default: the kernels with attention sinks have nothing else"
                raise self.refuse(name, getattr(self, name), expected)

    @property
    def mask_mode(self) -> int:
        if self.use_custom_mask:
            return CUSTOM
        if self.use_multi_item_scoring:
            return MULTI_ITEM_SCORING
        return CAUSAL if self.causal else NON_CAUSAL

    @property
    def family(self) -> str:
        return "batch_prefill" + ("_with_attention_sink" if self.use_attention_sink else "")

    @property
    def sees_past_window(self) -> bool:
        """Whether queries see keys after their own although there is a window.

        fa2's planner sizes the pieces of a split request for the window alone and omits such keys,
        so these requests are never split.
        """
        return bool(self.window_left >= 0 and self.mask_mode != CAUSAL)

    def geometry(self, multiprocessors: int, major: int, release: str | None) -> Geometry:
        is_whole = self.disable_split_kv or self.sees_past_window
        geometry = super().geometry(multiprocessors, major, release)
        return replace(geometry, disable_split_kv=is_whole)

    @property
    def rows(self) -> Mapping[str, Sequence[Row]]:
        """The rows by backend and kind of dtypes: of the planner, and of ragged and paged runs."""
        return BATCH_PREFILL_SINK if self.use_attention_sink else BATCH_PREFILL

    def choose(self, target: Target) -> Choice:
        kernel, is_paged = self.kernel, self.page_size is not None
        refuse, release = Refusal(target.op), target.release
        backend, reason = choose_backend(
            target, self.backend, kernel, self.use_custom_mask, is_paged
        )
        for name in _FA2_OPTIONS if backend == "fa3" else ():
            if getattr(self, name):
                expected = "its default, or backend='fa2': fa3 never splits requests"
                raise refuse(name, getattr(self, name), expected)
        if self.uniform_q_len and release is not None and not is_in(release, UNIFORM):
            expected = f"0: FlashInfer {UNIFORM} has it, and the kernels in use are of {release}"
            raise refuse("uniform_q_len", self.uniform_q_len, expected)
        if self.use_multi_item_scoring and self.q_data_type in FP8:
            expected = "False: the kernels for fp8 queries lack it"
            raise refuse("use_multi_item_scoring", True, expected)
        if self.kv_data_type in FP4 and target.op != self.op:
            expected = f"another: only {self.op} has keys and values of 4 bits"
            raise refuse("kv_data_type", self.kv_data_type, expected)
        return Choice(backend, reason, self.rows[kernel.kind(backend)])


class DecodeOptions(Options, op="BatchDecodePlan", keywords=DecodeKeywords):
    """Options of `BatchDecodePlan`."""

    family, has_fp8_outputs = "batch_decode", True

    def check_together(self) -> None:
        self.head_dim_qk = self.head_dim_vo = self.head_dim
        if self.q_data_type in FP8:
            expected = "float16 or bfloat16: for fp8 queries see BatchPrefillPlan"
            raise self.refuse("q_data_type", self.q_data_type, expected)
        if self.kv_data_type in FP4:
            expected = "float16, bfloat16 or fp8: for keys of 4 bits see BatchPrefillPlan"
            raise self.refuse("kv_data_type", self.kv_data_type, expected)
        super().check_together()

    def choose(self, target: Target) -> Choice:
        group, groups = self.num_qo_heads // self.num_kv_heads, decode_groups(target.release)
        if group not in groups:
            known = ", ".join(map(str, groups))
            expected = (
                f"{known} for each of num_kv_heads; BatchPrefillPlan, one query each, has any"
            )
            raise self.refuse("num_qo_heads", f"{group} for each of num_kv_heads", expected)
        rows = BATCH_DECODE_PLAN, BATCH_DECODE_RUN
        return Choice("cuda cores", "decode kernels have no other", rows)


class MlaOptions(Options, op="BatchMlaPlan", keywords=MlaKeywords):
    """Options of `BatchMlaPlan`."""

    def check_together(self) -> None:
        self.num_qo_heads, self.num_kv_heads = self.num_heads, 1
        self.head_dim_vo = self.head_dim_ckv
        q = self.q_data_type
        allowed = (q, "float8_e4m3fn") if q == "bfloat16" else (q,)
        self._set_default("kv_data_type", q, partial(data_type, allowed=allowed))

    @property
    def kernel(self) -> Kernel:
        q, head_dims = self.q_data_type, (self.head_dim_ckv, self.head_dim_kpe)
        return Kernel("batch_mla", q, self.kv_data_type, q, *head_dims)

    def choose(self, target: Target) -> Choice:
        kernel = self.kernel
        backend, reason = choose_backend(target, self.backend, kernel)
        return Choice(backend, reason, BATCH_MLA[kernel.kind(backend)])
