"""The options of the plan classes: checked once, then facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass
from typing import Any, ClassVar, TypeVar

from fi_ffi.errors import ArgumentError
from fi_ffi.ops.attention.options import (
    CAUSAL,
    CUSTOM,
    MULTI_ITEM_SCORING,
    NON_CAUSAL,
    POS_ENCODING_MODES,
    Kernel,
    check_encoding,
    data_type,
    soft_cap,
)
from fi_ffi.ops.attention.rows import DECODE_GROUPS, F16, FP8
from fi_ffi.ops.attention.sizes import Geometry
from fi_ffi.ops.call.arguments import check_choice, check_flag, check_int

_Of = TypeVar("_Of", bound="_Checks")

_MODES = tuple(POS_ENCODING_MODES)


class _Checks:
    """Checks by field name, shared by the options of all plan classes."""

    op: str
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @classmethod
    def of(cls: type[_Of], options: Mapping[str, Any]) -> _Of:
        """From a plan's keywords; a `TypeError` names the plan, as a call's own would."""
        fields = cls.__dataclass_fields__
        for name in options:
            if name not in fields:
                raise TypeError(f"{cls.op}() got an unexpected keyword argument {name!r}")
        missing = [n for n, f in fields.items() if f.default is MISSING and n not in options]
        if missing:
            raise TypeError(f"{cls.op}() missing required keyword arguments: {', '.join(missing)}")
        return cls(**options)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _integers(self, low: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None or self.__dataclass_fields__[name].default is not None:
                self._set(name, check_int(self.op, name, value, low))

    def _flags(self, *names: str) -> None:
        for name in names:
            check_flag(self.op, name, getattr(self, name))

    def _data_types(self) -> None:
        """Dtypes by name; keys are of the queries' dtype, and so is the output, unless said."""
        q = data_type(self.op, "q_data_type", self.q_data_type, F16 + FP8)  # type: ignore[attr-defined]
        self._set("q_data_type", q)
        self._data_type("kv_data_type", q, F16 + FP8)
        self._data_type("o_data_type", "float16" if q in FP8 else q, F16 if q in FP8 else (q,))

    def _data_type(self, name: str, default: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        chosen = default if value is None else data_type(self.op, name, value, allowed)
        self._set(name, chosen)

    def _heads(self) -> None:
        qo, kv = self.num_qo_heads, self.num_kv_heads  # type: ignore[attr-defined]
        if qo % kv:
            raise self.refuse("num_qo_heads", qo, f"a multiple of num_kv_heads = {kv}")

    def _soft_cap(self) -> None:
        self._set("logits_soft_cap", soft_cap(self.op, self.logits_soft_cap))  # type: ignore[attr-defined]

    def _encoding(self) -> None:
        mode = getattr(self, "pos_encoding_mode")  # noqa: B009
        check_choice(self.op, "pos_encoding_mode", mode, _MODES)
        check_encoding(self.op, mode, getattr(self, "logits_soft_cap"))  # noqa: B009

    def refuse(self, argument: str, got: object, expected: object) -> ArgumentError:
        return ArgumentError(self.op, argument, got=got, expected=expected)


@dataclass(frozen=True, kw_only=True)
class PrefillOptions(_Checks):
    """The options of `BatchPrefillPlan`; its docstring says what they are."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int | None = None
    page_size: int | None = None
    q_data_type: Any = "float16"
    kv_data_type: Any = None
    o_data_type: Any = None
    causal: bool = False
    window_left: int = -1
    logits_soft_cap: float = 0.0
    pos_encoding_mode: str = "NONE"
    use_fp16_qk_reduction: bool = False
    use_custom_mask: bool = False
    use_multi_item_scoring: bool = False
    use_attention_sink: bool = False
    backend: str = "auto"
    fixed_split_size: int | None = None
    disable_split_kv: bool = False
    enable_cuda_graph: bool = False
    max_total_num_rows: int | None = None
    max_num_indices: int | None = None
    op = "BatchPrefillPlan"

    def __post_init__(self) -> None:
        self._integers(1, "num_qo_heads", "num_kv_heads", "head_dim_qk", "head_dim_vo", "page_size")
        self._integers(1, "fixed_split_size", "max_total_num_rows", "max_num_indices")
        self._integers(-1, "window_left")
        self._set("head_dim_vo", self.head_dim_vo or self.head_dim_qk)
        self._flags("causal", "use_fp16_qk_reduction", "use_custom_mask", "use_multi_item_scoring",
                    "use_attention_sink", "disable_split_kv", "enable_cuda_graph")  # fmt: skip
        self._heads()
        self._data_types()
        self._soft_cap()
        self._encoding()
        self._check_masks()

    def _check_masks(self) -> None:
        if self.use_multi_item_scoring and self.page_size is None:
            expected = "False without page_size: the kernels for ragged keys lack it"
            raise self.refuse("use_multi_item_scoring", True, expected)
        if self.sees_past_window and self.fixed_split_size is not None:
            expected = "None with a window and a mask that is not causal: these are never split"
            raise self.refuse("fixed_split_size", self.fixed_split_size, expected)
        if self.disable_split_kv and self.fixed_split_size is not None:
            raise self.refuse("disable_split_kv", True, "False with fixed_split_size")
        modes = ("causal", "use_custom_mask", "use_multi_item_scoring")
        chosen = [name for name in modes if getattr(self, name)]
        if len(chosen) > 1:
            raise self.refuse(chosen[1], True, f"False with {chosen[0]}: the mask is one of them")
        if not self.use_attention_sink:
            return
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
    def kernel(self) -> Kernel:
        sink = "_with_attention_sink" if self.use_attention_sink else ""
        return Kernel(
            f"batch_prefill{sink}", self.q_data_type, self.kv_data_type, self.o_data_type,
            self.head_dim_qk, self.head_dim_vo or self.head_dim_qk, self.pos_encoding_mode,
            self.window_left >= 0, self.logits_soft_cap > 0, self.use_fp16_qk_reduction,
        )  # fmt: skip

    @property
    def sees_past_window(self) -> bool:
        """Whether queries see keys after their own though there is a window: fa2's planner
        sizes the pieces of a split request for the window alone, and leaves those out."""
        return self.window_left >= 0 and self.mask_mode != CAUSAL

    def geometry(self, machine: tuple[int, int]) -> Geometry:
        return Geometry(
            self.num_qo_heads, self.num_kv_heads, self.head_dim_vo or self.head_dim_qk,
            self.page_size or 1, *machine, self.enable_cuda_graph, self.window_left,
            self.fixed_split_size or -1, self.disable_split_kv or self.sees_past_window,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DecodeOptions(_Checks):
    """The options of `BatchDecodePlan`; its docstring says what they are."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    q_data_type: Any = "float16"
    kv_data_type: Any = None
    o_data_type: Any = None
    window_left: int = -1
    logits_soft_cap: float = 0.0
    pos_encoding_mode: str = "NONE"
    enable_cuda_graph: bool = False
    max_num_indices: int | None = None
    op = "BatchDecodePlan"

    def __post_init__(self) -> None:
        self._integers(
            1, "num_qo_heads", "num_kv_heads", "head_dim", "page_size", "max_num_indices"
        )
        self._integers(-1, "window_left")
        self._flags("enable_cuda_graph")
        self._heads()
        self._data_types()
        self._soft_cap()
        self._encoding()
        if self.q_data_type in FP8:
            expected = "float16 or bfloat16: for fp8 queries see BatchPrefillPlan"
            raise self.refuse("q_data_type", self.q_data_type, expected)
        group = self.num_qo_heads // self.num_kv_heads
        if group not in DECODE_GROUPS:
            known = ", ".join(map(str, DECODE_GROUPS))
            expected = (
                f"{known} for each of num_kv_heads; BatchPrefillPlan, one query each, has any"
            )
            raise self.refuse("num_qo_heads", f"{group} for each of num_kv_heads", expected)

    @property
    def kernel(self) -> Kernel:
        return Kernel(
            "batch_decode", self.q_data_type, self.kv_data_type, self.o_data_type,
            self.head_dim, self.head_dim, self.pos_encoding_mode,
            self.window_left >= 0, self.logits_soft_cap > 0,
        )  # fmt: skip

    def geometry(self, machine: tuple[int, int]) -> Geometry:
        return Geometry(
            self.num_qo_heads, self.num_kv_heads, self.head_dim, self.page_size, *machine,
            self.enable_cuda_graph, self.window_left,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MlaOptions(_Checks):
    """The options of `BatchMlaPlan`; its docstring says what they are."""

    num_heads: int
    page_size: int
    head_dim_ckv: int = 512
    head_dim_kpe: int = 64
    q_data_type: Any = "bfloat16"
    kv_data_type: Any = None
    causal: bool = False
    backend: str = "auto"
    enable_cuda_graph: bool = False
    max_total_num_rows: int | None = None
    max_num_indices: int | None = None
    op = "BatchMlaPlan"

    def __post_init__(self) -> None:
        self._integers(1, "num_heads", "page_size", "head_dim_ckv", "head_dim_kpe")
        self._integers(1, "max_total_num_rows", "max_num_indices")
        self._flags("causal", "enable_cuda_graph")
        for name, size in (("head_dim_ckv", 512), ("head_dim_kpe", 64)):
            if getattr(self, name) != size:
                raise self.refuse(name, getattr(self, name), f"{size}, the only one there is")
        q = data_type(self.op, "q_data_type", self.q_data_type, F16)
        self._set("q_data_type", q)
        self._data_type("kv_data_type", q, (q,))

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
