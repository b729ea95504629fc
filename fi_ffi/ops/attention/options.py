"""The options of the plans: tables that types, defaults, checks and documentation come from.

A `TypedDict` is a table: type checkers take a plan's keywords from it, and each of its
annotations has an `Option` with the rest.
"""

# Annotations are read here, and so none is put off with `from __future__ import annotations`.

import textwrap
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, TypedDict, get_type_hints

from fi_ffi.errors import ArgumentError
from fi_ffi.ops.attention.backends import (
    BACKENDS,
    CAUSAL,
    CUSTOM,
    MULTI_ITEM_SCORING,
    NON_CAUSAL,
    POS_ENCODING_MODES,
    Kernel,
    check_encoding,
    check_soft_cap,
    data_type,
    decode_groups,
    fa2_lacks,
    output_type,
)
from fi_ffi.ops.attention.rows import F16, FP4, FP8
from fi_ffi.ops.attention.sizes import Geometry
from fi_ffi.ops.call.arguments import check_choice, check_flag, check_int

Check = Callable[[str, str, Any], Any]


class Option(NamedTuple):
    """What an option is, and what it is where it is left out.

    `check` takes a plan's name, the option's and a value, and returns the value as plans keep
    it.  None as a default is not checked.  An option without a check depends on others.
    """

    doc: str
    check: Check | None
    default: Any = None


def _count(doc: str) -> Option:
    return Option(doc, partial(check_int, low=1))


def _flag(doc: str) -> Option:
    return Option(doc, check_flag, False)


def _word(doc: str, words: Collection[str]) -> Option:
    """One of some words, the first of which is the default."""
    return Option(doc, partial(check_choice, allowed=words), next(iter(words)))


def _dtype(doc: str, default: str | None, *names: str) -> Option:
    return Option(doc, partial(data_type, allowed=names), default)


def _only(size: int, doc: str) -> Option:
    """A size of which the kernels have one."""

    def check(op: str, name: str, value: Any) -> int:
        if check_int(op, name, value, 1) != size:
            raise ArgumentError(op, name, got=value, expected=f"{size}, the only one there is")
        return size

    return Option(doc, check, size)


class _Heads(TypedDict):
    num_qo_heads: Annotated[int, _count("heads of q: a multiple of num_kv_heads")]
    num_kv_heads: Annotated[int, _count("heads of k and v")]


class _Scores(TypedDict, total=False):
    q_data_type: Annotated[object, _dtype("dtype of q", "float16", *F16, *FP8)]
    kv_data_type: Annotated[
        object,
        _dtype(
            "dtype of k and v; None for that of q; uint8 for NVFP4, two numbers in a byte",
            None,
            *F16,
            *FP8,
            *FP4,
        ),
    ]
    o_data_type: Annotated[
        object,
        Option(
            "dtype of the output; None for that of q, or float16 where q is fp8; decode has fp8",
            None,
        ),
    ]
    window_left: Annotated[
        int,
        Option("keys before its own that a query sees; -1: all", partial(check_int, low=-1), -1),
    ]
    logits_soft_cap: Annotated[
        float, Option("c > 0 makes logits `c * tanh(logits / c)`", check_soft_cap, 0.0)
    ]
    pos_encoding_mode: Annotated[
        str, _word('"NONE", "ROPE_LLAMA" or "ALIBI", applied in the kernel', POS_ENCODING_MODES)
    ]


class _Graphs(TypedDict, total=False):
    enable_cuda_graph: Annotated[
        bool,
        _flag(
            "keep addresses and launch, so that a captured run serves after `replan(...)` for "
            "other lengths of the same number of requests"
        ),
    ]
    max_num_indices: Annotated[
        int | None, _count("with CUDA graphs, the most pages of replans; None for this batch's")
    ]


class _Queries(TypedDict, total=False):
    causal: Annotated[bool, _flag("query i of a request sees keys up to `kv_len - qo_len + i`")]
    backend: Annotated[
        str, _word('"auto" (as FlashInfer: fa3 on SM90 where it can), "fa2" or "fa3"', BACKENDS)
    ]
    max_total_num_rows: Annotated[
        int | None, _count("with CUDA graphs, the most queries of replans; None for this batch's")
    ]


class _HeadDim(_Heads):
    head_dim_qk: Annotated[int, _count("size of a head of q and k")]


class PrefillKeywords(_HeadDim, _Scores, _Queries, _Graphs, total=False):
    """Of `BatchPrefillPlan`."""

    head_dim_vo: Annotated[
        int | None, _count("size of a head of v and the output; None for head_dim_qk")
    ]
    page_size: Annotated[int | None, _count("tokens in a page; None for ragged keys")]
    use_fp16_qk_reduction: Annotated[bool, _flag("float16 sums in q @ k (fa2, float16 queries)")]
    use_custom_mask: Annotated[bool, _flag("runs bring a packed mask (`pack_custom_mask`); fa2")]
    use_multi_item_scoring: Annotated[
        bool, _flag("runs bring prefix and item lengths; the mask is causal, too")
    ]
    use_attention_sink: Annotated[
        bool, _flag("runs bring `sink`, a logit of each head, part of the softmax's sum (GPT-OSS)")
    ]
    fixed_split_size: Annotated[
        int | None,
        _count(
            "requests are split among blocks in pieces of so many pages, for results that do not "
            "depend on the batch; fa2"
        ),
    ]
    disable_split_kv: Annotated[bool, _flag("requests are not split among blocks; fa2")]
    num_colocated_ctas: Annotated[
        int,
        Option(
            "blocks of another kernel that runs at the same time: requests are split in so many "
            "fewer; fa2",
            partial(check_int, low=0),
            0,
        ),
    ]
    uniform_q_len: Annotated[
        int,
        Option(
            "with CUDA graphs, the queries of every request in every batch, which tiles are for; "
            "0: any; fa2, from 0.6.16 on",
            partial(check_int, low=0),
            0,
        ),
    ]


class DecodeKeywords(_Heads, _Scores, _Graphs):
    """Of `BatchDecodePlan`."""

    head_dim: Annotated[int, _count("size of a head")]
    page_size: Annotated[int, _count("tokens in a page")]


class _Attention(_HeadDim):
    page_size: Annotated[int, _count("tokens in a page")]


class AttentionKeywords(_Attention, _Graphs, total=False):
    """Of `BatchAttentionPlan`."""

    head_dim_vo: Annotated[
        int | None, _count("size of a head of v and the output; None for head_dim_qk")
    ]
    causal: Annotated[bool, _flag("query i of a request sees keys up to `kv_len - qo_len + i`")]
    q_data_type: Annotated[
        object, _dtype("dtype of q and the output: float16 or bfloat16", "bfloat16", *F16)
    ]
    kv_data_type: Annotated[
        object, _dtype("dtype of k and v: that of q, which None is for, or fp8", None, *F16, *FP8)
    ]
    logits_soft_cap: Annotated[
        float, Option("c > 0 makes logits `c * tanh(logits / c)`", check_soft_cap, 0.0)
    ]
    max_total_num_rows: Annotated[
        int | None, _count("with CUDA graphs, the most queries of replans; None for this batch's")
    ]


class _Mla(TypedDict):
    num_heads: Annotated[int, _count("heads of the queries")]
    page_size: Annotated[int, _count("tokens in a page")]


class MlaKeywords(_Mla, _Queries, _Graphs, total=False):
    """Of `BatchMlaPlan`."""

    head_dim_ckv: Annotated[int, _only(512, "size of the compressed keys and values")]
    head_dim_kpe: Annotated[int, _only(64, "size of the part with the encoding")]
    q_data_type: Annotated[object, _dtype("dtype of q: float16 or bfloat16", "bfloat16", *F16)]
    kv_data_type: Annotated[object, Option("dtype of the cache: that of q", None)]


class Options:
    """A plan's options, checked; each is an attribute."""

    # The plan's name, its options, and those of them that have no default.
    op: ClassVar[str]
    table: ClassVar[Mapping[str, Option]]
    required: ClassVar[frozenset[str]]
    # Whether the kernels can round their output to fp8.
    has_fp8_outputs: ClassVar[bool] = False

    def __init_subclass__(cls, op: str, keywords: Any) -> None:
        hints = get_type_hints(keywords, include_extras=True)
        cls.op, cls.required = op, keywords.__required_keys__
        cls.table = {name: hint.__metadata__[0] for name, hint in hints.items()}

    def __init__(self, **given: Any) -> None:
        """Take a plan's keywords; a `TypeError` names the plan, as a call's own would."""
        for name in given:
            if name not in self.table:
                raise TypeError(f"{self.op}() got an unexpected keyword argument {name!r}")
        missing = [name for name in self.table if name in self.required and name not in given]
        if missing:
            raise TypeError(f"{self.op}() missing required keyword arguments: {', '.join(missing)}")
        for name, (_, check, default) in self.table.items():
            value = given.get(name, default)
            if check is not None and not (value is default is None and name not in self.required):
                value = check(self.op, name, value)
            setattr(self, name, value)
        self.check_together()

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def documented(cls, doc: str | None) -> str | None:
        """A docstring with the options in place of `{options}`."""
        if doc is None or "{options}" not in doc:
            return doc  # python -OO has none
        head, _, tail = doc.partition("{options}")
        indent = head[head.rindex("\n") + 1 :]
        lines = []
        for name, option in cls.table.items():
            is_told = name not in cls.required and option.default is not None
            default = f" ({option.default!r} by default)" if is_told else ""
            lines += textwrap.wrap(
                f"{name}{default}: {option.doc}.", 96,
                initial_indent=indent, subsequent_indent=f"{indent}    ",
            )  # fmt: skip
        return head + "\n".join(lines).lstrip() + tail

    def changed(self) -> dict[str, Any]:
        """The options that are not what they are by default."""
        return {
            name: getattr(self, name)
            for name, option in self.table.items()
            if name in self.required or getattr(self, name) != option.default
        }

    def check_together(self) -> None:
        """Check what depends on several options, and set what is left out."""
        raise NotImplementedError

    def _check_heads(self) -> None:
        qo, kv = self.num_qo_heads, self.num_kv_heads
        if qo % kv:
            raise self.refuse("num_qo_heads", qo, f"a multiple of num_kv_heads = {kv}")

    def _check_scores(self) -> None:
        """Keys are of the queries' dtype, and so is the output, unless said."""
        q = self.q_data_type
        self._set_default("kv_data_type", q)
        if self.kv_data_type in FP4:
            vars(self)["kv_data_type"] = FP4[0]  # what modules are called after
        of_output = partial(output_type, q=q, is_decode=self.has_fp8_outputs)
        self._set_default("o_data_type", F16[0] if q in FP8 else q, of_output)
        check_encoding(self.op, self.pos_encoding_mode, self.logits_soft_cap)

    def _set_default(self, name: str, default: object, check: Check | None = None) -> None:
        """Set an option that was left out, or check it by what others are."""
        value = getattr(self, name)
        if value is None:
            setattr(self, name, default)
        elif check is not None:
            setattr(self, name, check(self.op, name, value))

    def refuse(self, argument: str, got: object, expected: object) -> ArgumentError:
        return ArgumentError(self.op, argument, got=got, expected=expected)

    @property
    def kernel(self) -> Kernel:
        """What the plan's module is compiled for."""
        return Kernel(
            self.family, self.q_data_type, self.kv_data_type, self.o_data_type, self.head_dim_qk,
            self.head_dim_vo, self.pos_encoding_mode, self.window_left >= 0,
            self.logits_soft_cap > 0, getattr(self, "use_fp16_qk_reduction", False),
        )  # fmt: skip

    def geometry(self, machine: tuple[int, int]) -> Geometry:
        """What workspaces' sizes depend on, on a GPU of so many multiprocessors and an SM."""
        raise NotImplementedError


class PrefillOptions(Options, op="BatchPrefillPlan", keywords=PrefillKeywords):
    """The options of `BatchPrefillPlan`."""

    def check_together(self) -> None:
        self._set_default("head_dim_vo", self.head_dim_qk)
        self._check_heads()
        self._check_scores()
        self._check_masks()
        for name in ("head_dim_qk", "head_dim_vo"):
            if self.kv_data_type in FP4 and getattr(self, name) % 64:
                expected = "a multiple of 64, for keys and values of 4 bits"
                raise self.refuse(name, getattr(self, name), expected)
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
        modes = ("causal", "use_custom_mask", "use_multi_item_scoring")
        chosen = [name for name in modes if getattr(self, name)]
        if chosen == [modes[0], modes[2]]:  # whose mask is causal
            return
        if len(chosen) > 1:
            raise self.refuse(chosen[1], True, f"False with {chosen[0]}: the mask is one of them")

    def _check_sink(self) -> None:
        lacking = {
            "pos_encoding_mode": self.pos_encoding_mode != "NONE",
            "logits_soft_cap": self.logits_soft_cap > 0,
            "use_fp16_qk_reduction": self.use_fp16_qk_reduction,
            "use_custom_mask": self.use_custom_mask,
            "use_multi_item_scoring": self.use_multi_item_scoring,
            "kv_data_type": self.kv_data_type != self.q_data_type or self.q_data_type in FP8,
        }
        for name, is_asked in lacking.items():
            if is_asked:
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
        """Whether queries see keys after their own though there is a window: fa2's planner
        sizes the pieces of a split request for the window alone, and leaves those out."""
        return bool(self.window_left >= 0 and self.mask_mode != CAUSAL)

    def geometry(self, machine: tuple[int, int]) -> Geometry:
        return Geometry(
            self.num_qo_heads, self.num_kv_heads, self.head_dim_vo, self.page_size or 1, *machine,
            self.enable_cuda_graph, self.window_left, self.fixed_split_size or -1,
            self.disable_split_kv or self.sees_past_window, self.num_colocated_ctas,
            self.uniform_q_len,
        )  # fmt: skip


class DecodeOptions(Options, op="BatchDecodePlan", keywords=DecodeKeywords):
    """The options of `BatchDecodePlan`."""

    family, has_fp8_outputs = "batch_decode", True

    def check_together(self) -> None:
        self.head_dim_qk = self.head_dim_vo = self.head_dim
        self._check_heads()
        self._check_scores()
        if self.q_data_type in FP8:
            expected = "float16 or bfloat16: for fp8 queries see BatchPrefillPlan"
            raise self.refuse("q_data_type", self.q_data_type, expected)
        if self.kv_data_type in FP4:
            expected = "float16, bfloat16 or fp8: for keys of 4 bits see BatchPrefillPlan"
            raise self.refuse("kv_data_type", self.kv_data_type, expected)

    def check_group(self, of: str | None) -> None:
        """Refuse as many queries' heads for each of keys as kernels of a release are not for."""
        group, groups = self.num_qo_heads // self.num_kv_heads, decode_groups(of)
        if group not in groups:
            known = ", ".join(map(str, groups))
            expected = (
                f"{known} for each of num_kv_heads; BatchPrefillPlan, one query each, has any"
            )
            raise self.refuse("num_qo_heads", f"{group} for each of num_kv_heads", expected)

    def geometry(self, machine: tuple[int, int]) -> Geometry:
        return Geometry(
            self.num_qo_heads, self.num_kv_heads, self.head_dim, self.page_size, *machine,
            self.enable_cuda_graph, self.window_left,
        )  # fmt: skip


class AttentionOptions(Options, op="BatchAttentionPlan", keywords=AttentionKeywords):
    """The options of `BatchAttentionPlan`."""

    family = "batch_attention"
    pos_encoding_mode, window_left = "NONE", -1

    def check_together(self) -> None:
        self._set_default("head_dim_vo", self.head_dim_qk)
        self._set_default("kv_data_type", self.q_data_type)
        self.o_data_type = self.q_data_type
        self._check_heads()
        lacks = fa2_lacks(self.kernel)
        if lacks:
            raise self.refuse("kv_data_type", self.kv_data_type, f"{self.q_data_type}: {lacks}")

    def geometry(self, machine: tuple[int, int]) -> Geometry:
        return Geometry(
            self.num_qo_heads, self.num_kv_heads, self.head_dim_vo, self.page_size, *machine,
            self.enable_cuda_graph,
        )  # fmt: skip


class MlaOptions(Options, op="BatchMlaPlan", keywords=MlaKeywords):
    """The options of `BatchMlaPlan`."""

    def check_together(self) -> None:
        q = self.q_data_type
        self._set_default("kv_data_type", q, partial(data_type, allowed=(q,)))

    @property
    def kernel(self) -> Kernel:
        return Kernel(
            "batch_mla", self.q_data_type, self.kv_data_type, self.q_data_type,
            self.head_dim_ckv, self.head_dim_kpe,
        )  # fmt: skip

    def geometry(self, machine: tuple[int, int]) -> Geometry:
        return Geometry(
            self.num_heads, 1, self.head_dim_ckv, self.page_size, *machine, self.enable_cuda_graph
        )
