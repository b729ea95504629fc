"""How values of one type stand in module names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

Value = str | int | bool | None

# FlashInfer's short names, and those of the same types in torch and in `fi_ffi.abi.tensor`.
DTYPES = {
    "f16": "float16",
    "bf16": "bfloat16",
    "f32": "float32",
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "i8": "int8",
    "u8": "uint8",
    "i16": "int16",
    "i32": "int32",
    "i64": "int64",
    # Two values in a byte.  FlashInfer has had two names for it, besides "u8": see docs.
    "fp4_e2m1": "float4_e2m1fn_x2",
    "fp4x2_e2m1": "float4_e2m1fn_x2",
}


class Kind(Protocol):
    """What a parameter of a template may be; `text` raises ValueError for what it may not."""

    @property
    def pattern(self) -> str:
        """A regular expression, without groups, for exactly the texts it writes."""

    @property
    def expected(self) -> str: ...

    def text(self, value: Value) -> str: ...

    def value(self, text: str) -> Value: ...


@dataclass(frozen=True)
class Words:
    """A few values, each with its text; `aliases` are other spellings of values."""

    words: Mapping[Value, str]
    aliases: Mapping[Value, Value] = field(default_factory=dict)

    @property
    def pattern(self) -> str:
        # The longest first: "sm10" must not hide "sm100".
        return "|".join(re.escape(text) for text in sorted(self.words.values(), key=len)[::-1])

    @property
    def expected(self) -> str:
        return " or ".join(str(value) for value in self.words)

    def text(self, value: Value) -> str:
        value = self.aliases.get(value, value)
        # By type too: 1 and True are the same key of a dictionary.
        for known, text in self.words.items():
            if known == value and type(known) is type(value):
                return text
        raise ValueError(value)

    def value(self, text: str) -> Value:
        return next(value for value, known in self.words.items() if known == text)


@dataclass(frozen=True)
class Number:
    """An integer of at least `low`, written without leading zeros."""

    low: int = 1

    @property
    def pattern(self) -> str:
        return r"[1-9][0-9]{0,8}" if self.low else r"0|[1-9][0-9]{0,8}"

    @property
    def expected(self) -> str:
        return f"an integer of at least {self.low}"

    def text(self, value: Value) -> str:
        if type(value) is not int or not self.low <= value < 10**9:
            raise ValueError(value)
        return str(value)

    def value(self, text: str) -> Value:
        return int(text)


@dataclass(frozen=True)
class Optional:
    """A piece of a name that is there or not: `before` and the value, or nothing for `none`."""

    before: str
    kind: Words | Number
    none: Value = None

    @property
    def pattern(self) -> str:
        return f"(?:{self.before}(?:{self.kind.pattern}))?"

    @property
    def expected(self) -> str:
        return f"{self.none} or {self.kind.expected}"

    def text(self, value: Value) -> str:
        if value == self.none and type(value) is type(self.none):
            return ""
        return self.before + self.kind.text(value)

    def value(self, text: str) -> Value:
        return self.kind.value(text.removeprefix(self.before)) if text else self.none


def dtypes(*names: str) -> Words:
    """Some of FlashInfer's short names; the long ones are understood too."""
    aliases: dict[Value, Value] = {}
    for name in names:
        aliases.setdefault(DTYPES[name], name)
    return Words({name: name for name in names}, aliases)


def words(*texts: str) -> Words:
    """Values that stand for themselves."""
    return Words({text: text for text in texts})


def is_dtype(kind: Kind) -> bool:
    """Whether the values are names of dtypes."""
    inner = kind.kind if isinstance(kind, Optional) else kind
    return isinstance(inner, Words) and all(value in DTYPES for value in inner.words)


_WIDE = ("f16", "bf16", "f32", "i8", "i16", "i32", "i64", "e4m3")

# The kinds that templates name.
KINDS: dict[str, Kind] = {
    "dtype": dtypes("f16", "bf16", "e4m3", "e5m2"),
    # NVFP4 keys and values: see table.py for the releases.
    "kv_u8": dtypes("f16", "bf16", "e4m3", "e5m2", "u8", "fp4_e2m1"),
    "kv_fp4": dtypes("f16", "bf16", "e4m3", "e5m2", "fp4x2_e2m1"),
    "half": dtypes("f16", "bf16"),
    "xqa_mla": dtypes("e4m3", "bf16"),
    "xqa_kv": dtypes("f16", "bf16", "e4m3", "i8", "u8"),
    "idx": dtypes("i32", "i64"),
    "ssu": dtypes(*_WIDE),
    "size": Number(1),
    "count": Number(0),
    "posenc": Words({0: "0", 1: "1", 2: "2"}),
    "Flag": Words({False: "False", True: "True"}),
    "flag": Words({False: "false", True: "true"}),
    "fa": Words({"fa2": "", "fa3": "_sm90"}),
    "surface": Words({"full": "", "paged": "_paged"}),
    "stride": Words(
        {
            "runtime": "",
            "equal": "_kv_stride_equal",
            "independent": "_kv_stride_independent",
        }
    ),
    "ragged": Words({False: "", True: "_ragged_q"}),
    "pdl": Words({False: "", True: "_pdl"}),
    "ssu_scale": Optional("_sc_", dtypes(*_WIDE)),
    "philox": Optional("_pr_", Number(1), none=0),
    "ssu_arch": Words({"": "", "sm90": "_sm90", "sm100": "_sm100"}),
    "mla_arc": words("sm80", "cuda_core"),
    "moe_arch": words("89", "90", "100", "103", "120"),
    "fp4_arch": words("90", "100", "103", "110", "120", "121"),
    "fp4_arch_f": words("90", "100", "103", "110", "120", "120f", "121"),
    "fp4_arch_107": words("90", "100", "103", "107", "110", "120", "120f", "121"),
    "silu_out": words("bf16", "fp8", "nvfp4"),
    "fmha_layout": words(
        "packed_qkv", "contiguous_q_kv", "q_paged_kv_nhd", "q_paged_kv_hnd", "separate_q_k_v"
    ),
    "fmha_dtype": Words({"f16": "fp16", "bf16": "bf16", "e4m3": "e4m3"}),
}
