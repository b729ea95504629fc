"""What is tested, by name; every entry runs on the CPU with few keys, and on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any


@dataclass(frozen=True)
class Spec:
    """What is asked for.  Lengths are `lengths` (queries and keys), or drawn: `batches.draw`."""

    family: str = "batch_prefill"
    backend: str = "fa2"
    lengths: tuple[tuple[int, int], ...] = ()
    batch: int = 7
    queries: int = 40
    keys: int = 300
    heads: int = 4
    kv_heads: int = 2
    dim: int = 128
    dim_vo: int = 0
    dtype: str = "float16"
    kv_dtype: str = ""
    o_dtype: str = ""
    page_size: int = 0  # 0: ragged
    layout: str = "NHD"
    together: bool = False  # keys and values in one tensor
    pad: int = 0  # elements between rows, of every tensor; of o not without `pad_o`
    pad_o: bool = False
    causal: bool = False
    window_left: int = -1
    cap: float = 0.0
    mode: str = "NONE"
    rope: tuple[float, float] | None = None
    sm_scale: float | None = None
    mask: bool = False
    sink: bool = False
    items: bool = False
    scales: str = ""  # of which of q, k and v, and "numbers" or "heads": "qk numbers"
    no_keys: bool = True  # whether some requests have none
    indices_at_run: bool = False
    pdl: bool = False
    lse: bool = True
    base_e: bool = False
    plan: Mapping[str, Any] = field(default_factory=dict)

    @property
    def value_dim(self) -> int:
        return self.dim_vo or self.dim

    @property
    def kv(self) -> str:
        return self.kv_dtype or self.dtype

    @property
    def o(self) -> str:
        return self.o_dtype or ("float16" if self.dtype.startswith("float8") else self.dtype)

    @property
    def whole_requests(self) -> bool:
        """Whether what a row must be depends on where it is: not to be told from a few rows."""
        places = self.window_left >= 0 or self.mode == "ROPE_LLAMA"
        return self.mode == "ALIBI" or (places and not self.causal)

    def options(self) -> dict[str, Any]:
        """The plan's options."""
        same = {"page_size": self.page_size or None, "q_data_type": self.dtype}
        same |= {"kv_data_type": self.kv_dtype or None} | dict(self.plan)
        if self.family == "batch_attention":
            return same | {
                "num_qo_heads": self.heads, "num_kv_heads": self.kv_heads, "causal": self.causal,
                "head_dim_qk": self.dim, "logits_soft_cap": self.cap,
            }  # fmt: skip
        if self.family == "batch_mla":
            return same | {
                "num_heads": self.heads, "causal": self.causal, "backend": self.backend
            }  # fmt: skip
        same |= {
            "num_qo_heads": self.heads, "num_kv_heads": self.kv_heads,
            "o_data_type": self.o_dtype or None, "window_left": self.window_left,
            "logits_soft_cap": self.cap, "pos_encoding_mode": self.mode,
        }  # fmt: skip
        if self.family == "batch_decode":
            return same | {"head_dim": self.dim}
        return same | {
            "head_dim_qk": self.dim, "head_dim_vo": self.value_dim, "causal": self.causal,
            "backend": self.backend, "use_custom_mask": self.mask,
            "use_multi_item_scoring": self.items, "use_attention_sink": self.sink,
        }  # fmt: skip


Table = dict[str, Spec]
BACKENDS = ("fa2", "fa3")
# The kernels there are for every backend: tools/gpu_kernels.py.
KINDS = [{"dim": dim} for dim in (64, 128, 256)] + [{"dtype": "bfloat16"}]
# Ragged, and pages of each size in one layout and the other, apart and together.
RAGGED = [{"layout": "NHD"}, {"layout": "HND"}]
PAGED = [
    {"page_size": 1}, {"page_size": 1, "layout": "HND"},
    {"page_size": 3, "together": True}, {"page_size": 3, "layout": "HND"},
    {"page_size": 16, "together": True, "layout": "HND"}, {"page_size": 16},
    {"page_size": 64, "layout": "HND"}, {"page_size": 64, "together": True},
]  # fmt: skip
PAGES_16 = {"page_size": 16}


def name(**fields: Any) -> str:
    """An id out of what was chosen."""
    return "-".join(f"{key}={value}" if key not in ("backend", "layout") else str(value)
                    for key, value in fields.items())  # fmt: skip


def table(*alternatives: Any, **same: Any) -> Table:
    """Every combination of the alternatives, each a list of fields."""
    made: Table = {}
    for choice in product(*alternatives):
        fields = {key: value for part in choice for key, value in part.items()}
        made[name(**fields)] = Spec(**same | fields)
    return made


def each(key: str, *values: Any) -> list[dict[str, Any]]:
    return [{key: value} for value in values]


def under(prefix: str, entries: Table) -> Table:
    return {f"{prefix} {name}": spec for name, spec in entries.items()}


FA2, FA3 = [{"backend": "fa2"}], [{"backend": "fa3"}]
BOTH = FA2 + FA3
CAUSAL = each("causal", False, True)
RAGGED_OR_PAGED: list[dict[str, Any]] = [{}, PAGES_16]

PREFILL: Table = {
    **table(KINDS, BOTH, RAGGED + PAGED, CAUSAL),
    **under("group", table(
        BOTH, RAGGED_OR_PAGED,
        [{"heads": 2, "kv_heads": 2}, {"heads": 8, "kv_heads": 2}, {"heads": 8, "kv_heads": 1},
         {"heads": 10, "kv_heads": 2}], causal=True,
    )),
    **under("many", table(BOTH, RAGGED_OR_PAGED, each("batch", 1, 64, 512), queries=20, keys=200)),
    # More works than fa3's planner makes for each head.
    "many requests, fa3": Spec(backend="fa3", batch=4200, queries=1, keys=20, heads=2, **PAGES_16),
    **under("long", table(BOTH, RAGGED_OR_PAGED, [
        {"lengths": ((1, 32768), (3, 5))}, {"lengths": ((17, 32768),)},
        {"lengths": ((300, 20000), (0, 3), (1, 1))}, {"lengths": ((4096, 4096), (130, 131))},
    ], causal=True, heads=2, kv_heads=1)),
    "long, all keys fa2": Spec(lengths=((200, 30000),), heads=2, kv_heads=1, **PAGES_16),
    "long, all keys fa3": Spec(lengths=((200, 30000),), heads=2, kv_heads=1, backend="fa3"),
    **under("auto", table(RAGGED_OR_PAGED, CAUSAL, backend="auto")),
    **under("rows apart", table(BOTH, RAGGED + PAGED[4:], pad=16, causal=True)),
    **under("rows apart", table(FA3, RAGGED_OR_PAGED, pad=16, pad_o=True)),
    **under("without lse", table(BOTH, RAGGED_OR_PAGED, CAUSAL, lse=False)),
    **under("pages at the run", table(BOTH, PAGED[4:], indices_at_run=True)),
    **under("pdl", table(BOTH, RAGGED_OR_PAGED, causal=True, pdl=True)),
    **under("scale", table(BOTH, RAGGED_OR_PAGED, each("sm_scale", 0.02, 0.25))),
    **under("scales", table(BOTH, RAGGED_OR_PAGED, scales="qk numbers")),
    **under("scales", table(FA3, RAGGED_OR_PAGED, each("scales", "v numbers", "qkv numbers",
                                                        "v heads"))),
    **under("split", table(FA2, PAGED[4:], each("plan", {"fixed_split_size": 3},
                                                {"disable_split_kv": True},
                                                {"num_colocated_ctas": 250}),
                           causal=True, queries=90, keys=3000)),
    **under("mask", table(FA2, RAGGED_OR_PAGED, mask=True)),
    "mask, auto": Spec(mask=True, backend="auto", **PAGES_16),
    **under("no queries", table(BOTH, RAGGED_OR_PAGED, lengths=((0, 70), (0, 0), (0, 1)))),
    **under("items", table(BOTH, PAGED[2:6], items=True, no_keys=False, queries=300, keys=700)),
    **under("items, few queries", table(BOTH, items=True, no_keys=False, keys=1500, **PAGES_16)),
    **under("items, causal", table(BOTH, each("page_size", 1, 5, 16), each("heads", 4, 32),
                                   [{"lengths": ((37, 54),)}, {"lengths": ((81, 97), (81, 97))}],
                                   kv_heads=4, causal=True, items=True)),
}  # fmt: skip

FP8 = {"dtype": "float8_e4m3fn", "o_dtype": "float16"}
SINK = {"dtype": "bfloat16", "dim": 64, "sink": True}
WIDE = {"dtype": "bfloat16", "dim": 192, "dim_vo": 128}
WINDOWS = each("window_left", 0, 17, 140)
ROPES = each("rope", None, (2.0, 5e5))

PREFILL_OPTIONS: Table = {
    **under("window", table(BOTH, WINDOWS, RAGGED_OR_PAGED, CAUSAL)),
    "window, long fa2": Spec(lengths=((2000, 9000), (1, 30000)), window_left=700, causal=True,
                             heads=2, kv_heads=1, **PAGES_16),
    "window, long fa3": Spec(lengths=((2000, 9000), (1, 30000)), window_left=700, causal=True,
                             heads=2, kv_heads=1, backend="fa3"),
    "window, mask": Spec(window_left=40, mask=True),
    **under("cap", table(BOTH, each("cap", 1.0, 30.0), RAGGED_OR_PAGED, CAUSAL)),
    **under("rope", table(ROPES, RAGGED_OR_PAGED, CAUSAL, mode="ROPE_LLAMA")),
    **under("alibi", table(RAGGED_OR_PAGED, CAUSAL, mode="ALIBI")),
    **under("items", table([{"cap": 30.0}, {"cap": 30.0, "backend": "fa3"}, {"mode": "ROPE_LLAMA"}],
                           each("heads", 4, 32), lengths=((37, 54),), kv_heads=4, causal=True,
                           items=True, **PAGES_16)),
    **under("fp8 keys", table(PAGED[2:6] + [{}], CAUSAL, kv_dtype="float8_e4m3fn")),
    "fp8 keys, scales": Spec(kv_dtype="float8_e4m3fn", scales="qk numbers", **PAGES_16),
    **under("fp8", table(RAGGED_OR_PAGED, CAUSAL, each("scales", "", "qkv numbers", "qkv heads"),
                         backend="fa3", heads=8, **FP8)),
    **under("fp8, narrow", table(RAGGED_OR_PAGED, CAUSAL, backend="fa3", dim=64, heads=8,
                                 scales="qkv heads", **FP8)),
    **under("fp8, window", table(WINDOWS, RAGGED_OR_PAGED, CAUSAL, backend="fa3", **FP8)),
    "fp8, auto": Spec(backend="auto", **FP8),
    **under("fp8, bfloat16 outputs", table(RAGGED_OR_PAGED, CAUSAL, backend="fa3", heads=8,
                                           **FP8 | {"o_dtype": "bfloat16"})),
    **under("head sizes apart", table(BOTH, RAGGED, CAUSAL, **WIDE)),
    # fa3 has no paged keys with these: "auto" takes fa2 then.
    **under("head sizes apart", table(each("backend", "fa2", "auto"), PAGED[5:7], CAUSAL, **WIDE)),
    **under("sink", table(BOTH, each("window_left", -1, 30), RAGGED_OR_PAGED, CAUSAL, **SINK)),
    "sink, long fa2": Spec(lengths=((40, 9000),), causal=True, **SINK, **PAGES_16),
    "sink, auto": Spec(backend="auto", **SINK),
}  # fmt: skip

# Keys and values of 4 bits, with the scales of their blocks.
_FP4: dict[str, Any] = {"kv_dtype": "uint8"}
_DTYPES = each("dtype", "float16", "bfloat16")
NVFP4: Table = {
    **table(_DTYPES, RAGGED + PAGED, CAUSAL, **_FP4),
    **under("group", table(_DTYPES, RAGGED_OR_PAGED, [
        {"heads": 1, "kv_heads": 1}, {"heads": 8, "kv_heads": 1}, {"heads": 10, "kv_heads": 2},
    ], causal=True, **_FP4)),
    **under("decode", table(_DTYPES, PAGED[4:], batch=64, queries=1, keys=900, **_FP4)),
    **under("long", table(RAGGED_OR_PAGED, [
        {"lengths": ((1, 32768), (3, 5))}, {"lengths": ((300, 20000), (0, 3), (1, 1))},
    ], causal=True, heads=2, kv_heads=1, **_FP4)),
    **under("rows apart", table(RAGGED + PAGED[4:], pad=16, **_FP4)),
    **under("scales", table(RAGGED_OR_PAGED, scales="qk numbers", **_FP4)),
    "without lse": Spec(lse=False, **PAGES_16, **_FP4),
    "pages at the run": Spec(indices_at_run=True, **PAGES_16, **_FP4),
    "mask": Spec(mask=True, **PAGES_16, **_FP4),
    "auto": Spec(backend="auto", **PAGES_16, **_FP4),
    **under("single", table(_DTYPES, [{"lengths": (pair,)} for pair in (
        (1, 1), (33, 200), (130, 513), (77, 2000))], RAGGED, CAUSAL, family="single_prefill",
        **_FP4)),
    **under("single, rows apart", table(RAGGED, lengths=((33, 90),), pad=16,
                                        family="single_prefill", **_FP4)),
}  # fmt: skip

_DECODE = {"family": "batch_decode"}
GROUPS = [{"heads": 2 * g, "kv_heads": 2} for g in (1, 2, 3, 4, 8)]
LATER_GROUPS = [{"heads": 2 * g, "kv_heads": 2} for g in (6, 16)]  # of releases since
DECODE: Table = {
    **table(KINDS, PAGED, **_DECODE),
    **under("group", table(GROUPS + LATER_GROUPS, each("dim", 64, 128), keys=500, **_DECODE,
                           **PAGES_16)),
    **under("group of 256", table(LATER_GROUPS, dim=256, keys=500, **_DECODE, **PAGES_16)),
    **under("many", table(each("batch", 1, 64, 512), each("page_size", 1, 16), **_DECODE)),
    **under("long", table([{"lengths": ((1, 32768),)}, {"lengths": ((1, 32768), (1, 1), (1, 9999))},
                           {"lengths": ((1, 0), (1, 20000), (1, 0))}],
                          each("page_size", 1, 16), **_DECODE)),
    "no keys at all": Spec(lengths=((1, 0), (1, 0)), **_DECODE, **PAGES_16),
    "rows apart": Spec(pad=16, **_DECODE, **PAGES_16),
    "rows apart HND": Spec(pad=16, layout="HND", **_DECODE, **PAGES_16),
    "without lse": Spec(lse=False, **_DECODE, **PAGES_16),
    "pages at the run": Spec(indices_at_run=True, **_DECODE, **PAGES_16),
    "pdl": Spec(pdl=True, **_DECODE, **PAGES_16),
    "scale": Spec(sm_scale=0.25, **_DECODE, **PAGES_16),
    "scales": Spec(scales="qk numbers", **_DECODE, **PAGES_16),
    **under("window", table(WINDOWS, GROUPS[::2], **_DECODE, **PAGES_16)),
    "window, long": Spec(lengths=((1, 30000), (1, 8)), window_left=900, **_DECODE, **PAGES_16),
    **under("cap", table(each("cap", 1.0, 30.0), **_DECODE, **PAGES_16)),
    **under("rope", table(ROPES, GROUPS[::2], mode="ROPE_LLAMA", **_DECODE, **PAGES_16)),
    **under("alibi", table(GROUPS[::2], mode="ALIBI", **_DECODE, **PAGES_16)),
    **under("fp8 keys", table(GROUPS + LATER_GROUPS, PAGED[3:5], kv_dtype="float8_e4m3fn",
                              **_DECODE)),
    **under("fp8 outputs", table([{"keys": 60}, {"lengths": ((1, 20000), (1, 1), (1, 0))}],
                                 each("kv_dtype", "", "float8_e4m3fn"), GROUPS[::2],
                                 o_dtype="float8_e4m3fn", **_DECODE, **PAGES_16)),
}  # fmt: skip

_ATTENTION = {"family": "batch_attention", "page_size": 16}
ATTENTION: Table = {
    **table(KINDS, CAUSAL, **_ATTENTION),
    **under("pages", table(PAGED, causal=True, family="batch_attention")),
    **under("group", table(
        [{"heads": 2, "kv_heads": 2}, {"heads": 8, "kv_heads": 2}, {"heads": 8, "kv_heads": 1},
         {"heads": 10, "kv_heads": 2}, {"heads": 32, "kv_heads": 8}], CAUSAL, **_ATTENTION,
    )),
    **under("many", table(each("batch", 1, 64, 512), queries=20, keys=200, causal=True,
                          **_ATTENTION)),
    # A prefill beside decodes, split and not; requests without keys or queries among them.
    **under("mixed", table([
        {"lengths": ((300, 20000), (1, 9000), (0, 3), (1, 1), (1, 0), (5, 5))},
        {"lengths": ((1, 32768), (3, 5))}, {"lengths": ((4096, 4096), (1, 130))},
        {"lengths": ((1, 0), (0, 0))},
    ], each("kv_heads", 1, 2), causal=True, heads=2, **_ATTENTION)),
    "long, all keys": Spec(lengths=((200, 30000), (1, 70)), heads=2, kv_heads=1, **_ATTENTION),
    "rows apart": Spec(pad=16, causal=True, **_ATTENTION),
    "rows apart HND": Spec(pad=16, layout="HND", causal=True, **_ATTENTION),
    "without lse": Spec(lse=False, **_ATTENTION),
    "pages at the run": Spec(indices_at_run=True, **_ATTENTION),
    "scale": Spec(sm_scale=0.25, causal=True, **_ATTENTION),
    "scales": Spec(scales="kv numbers", causal=True, **_ATTENTION),
    "scales, split": Spec(scales="kv numbers", lengths=((1, 9000), (90, 5000)), **_ATTENTION),
    **under("cap", table(each("cap", 1.0, 30.0), CAUSAL, **_ATTENTION)),
    **under("fp8 keys", table(CAUSAL, each("scales", "", "kv numbers"), kv_dtype="float8_e4m3fn",
                              **_ATTENTION)),
    **under("NVFP4", table(_DTYPES, PAGED, CAUSAL, family="batch_attention", **_FP4)),
    **under("NVFP4, group", table([
        {"heads": 2, "kv_heads": 2}, {"heads": 8, "kv_heads": 1}, {"heads": 10, "kv_heads": 2},
    ], CAUSAL, **_ATTENTION, **_FP4)),
    **under("NVFP4, mixed", table([
        {"lengths": ((300, 20000), (1, 9000), (0, 3), (1, 1), (1, 0), (5, 5))},
        {"lengths": ((1, 32768), (3, 5))},
    ], causal=True, heads=2, kv_heads=1, **_ATTENTION, **_FP4)),
    **under("NVFP4, rows apart", table(each("layout", "NHD", "HND"), pad=16, **_ATTENTION, **_FP4)),
    "NVFP4, together": Spec(together=True, **_ATTENTION, **_FP4),
    "NVFP4, scales": Spec(scales="kv numbers", causal=True, **_ATTENTION, **_FP4),
    "NVFP4, cap": Spec(cap=30.0, **_ATTENTION, **_FP4),
    "NVFP4, pages at the run": Spec(indices_at_run=True, **_ATTENTION, **_FP4),
}  # fmt: skip

_MLA = {"family": "batch_mla", "dtype": "bfloat16", "dim": 512}
_MLA_16 = _MLA | {"heads": 16, "page_size": 16, "queries": 3}
_ONE_QUERY = {"queries": 1, "keys": 900}
# The reference of fa3's first release has no scales of groups.
MLA_GROUPS = [{"backend": "fa2"}, {"backend": "auto"}]
MLA: Table = {
    **table(BOTH, each("heads", 16, 32, 128), each("page_size", 1, 16, 64), **_MLA, **_ONE_QUERY),
    **under("queries", table(BOTH, each("heads", 16, 32, 128), CAUSAL, queries=9, page_size=16,
                             **_MLA)),
    **under("many", table(BOTH, each("batch", 1, 64), CAUSAL, queries=3, heads=16, page_size=16,
                          **_MLA)),
    **under("long", table(BOTH, [{"lengths": ((1, 20000), (2, 70))}], CAUSAL, heads=16,
                          page_size=64, **_MLA)),
    **under("base e", table(BOTH, base_e=True, **_MLA_16)),
    **under("without lse", table(BOTH, lse=False, **_MLA_16)),
    **under("rows apart", table(BOTH, pad=16, pad_o=True, **_MLA_16)),
    **under("pages at the run", table(BOTH, indices_at_run=True, **_MLA_16)),
    **under("scale", table(BOTH, sm_scale=0.1, **_MLA_16)),
    **under("no queries", table(BOTH, lengths=((0, 70), (0, 0)), **_MLA_16)),
    "auto": Spec(backend="auto", **_MLA_16),
    **under("fp8 cache", table(BOTH, each("heads", 16, 128), each("page_size", 1, 64),
                               **_MLA, **_ONE_QUERY, kv_dtype="float8_e4m3fn")),
    **under("fp8 cache, queries", table(BOTH, CAUSAL, kv_dtype="float8_e4m3fn", **_MLA_16)),
    **under("fp8 cache, long", table(BOTH, lengths=((1, 9000), (2, 70)), heads=16, page_size=64,
                                     kv_dtype="float8_e4m3fn", **_MLA)),
    **under("fp8 cache, groups", table(MLA_GROUPS, kv_dtype="float8_e4m3fn", scales=" groups",
                                       **_MLA_16)),
}  # fmt: skip

_ONE = {"family": "single_prefill"}
_SIZES = [{"lengths": (pair,)} for pair in ((1, 1), (1, 70), (33, 200), (130, 513), (77, 2000))]
SINGLE_PREFILL: Table = {
    **table(BOTH, _SIZES, RAGGED, CAUSAL, **_ONE),
    **under("long", table(BOTH, [{"lengths": ((4, 32768),)}, {"lengths": ((40, 6000),)}], CAUSAL,
                          heads=2, kv_heads=1, **_ONE)),
    "auto": Spec(lengths=((50, 300),), backend="auto", **_ONE),
    **under("rows apart", table(BOTH, RAGGED, lengths=((33, 90),), pad=16, **_ONE)),
    **under("without lse", table(BOTH, lengths=((33, 90),), lse=False, **_ONE)),
    **under("group of 5", table(BOTH, lengths=((50, 300),), heads=10, kv_heads=2, **_ONE)),
    **under("scales", table(BOTH, lengths=((33, 300),), scales="qk numbers", **_ONE)),
    **under("mask", table(FA2, RAGGED, _SIZES[2:4], mask=True, **_ONE)),
    **under("window", table(WINDOWS, CAUSAL, lengths=((50, 300),), **_ONE)),
    **under("cap", table(each("cap", 1.0, 30.0), CAUSAL, lengths=((50, 300),), **_ONE)),
    **under("rope", table(ROPES, CAUSAL, lengths=((50, 300),), mode="ROPE_LLAMA", **_ONE)),
    **under("alibi", table(CAUSAL, lengths=((50, 300),), mode="ALIBI", **_ONE)),
    **under("fp8 keys", table(RAGGED, CAUSAL, lengths=((50, 300),), kv_dtype="float8_e4m3fn",
                              **_ONE)),
    **under("fp8", table(RAGGED, CAUSAL, each("scales", "", "qkv numbers", "qkv heads"),
                         lengths=((150, 300),), backend="fa3", **FP8, **_ONE)),
    **under("fp8, narrow", table(CAUSAL, lengths=((150, 300),), backend="fa3", dim=64, **FP8,
                                 **_ONE)),
}  # fmt: skip

_LONE = {"family": "single_decode"}
_KEYS = [{"lengths": ((1, n),)} for n in (1, 17, 256, 257, 5000, 32768)]
SINGLE_DECODE: Table = {
    **table(KINDS, _KEYS, RAGGED, **_LONE),
    **under("group", table(GROUPS + LATER_GROUPS, lengths=((1, 700),), **_LONE)),
    "without lse": Spec(lengths=((1, 700),), lse=False, **_LONE),
    "scales": Spec(lengths=((1, 70),), scales="qk numbers", **_LONE),
    **under("window", table(WINDOWS, RAGGED, lengths=((1, 700),), **_LONE)),
    **under("cap", table(each("cap", 1.0, 30.0), lengths=((1, 700),), **_LONE)),
    **under("rope", table(ROPES, RAGGED, lengths=((1, 400),), mode="ROPE_LLAMA", **_LONE)),
    **under("alibi", table(GROUPS[::2], lengths=((1, 700),), mode="ALIBI", **_LONE)),
    **under("fp8 keys", table(RAGGED, _KEYS[1:5], kv_dtype="float8_e4m3fn", **_LONE)),
    **under("fp8 outputs", table(RAGGED, _KEYS[1:], o_dtype="float8_e4m3fn", **_LONE)),
}  # fmt: skip

# Plans over time: small batches, so that many can be compared.
_SMALL = {"dim": 64, "batch": 6, "queries": 5, "keys": 150, "page_size": 16}
SERVED: Table = {
    "prefill fa2": Spec(backend="fa2", causal=True, **_SMALL),
    "prefill fa3": Spec(backend="fa3", causal=True, **_SMALL),
    "decode": Spec(family="batch_decode", **_SMALL | {"queries": 1}),
    "attention": Spec(family="batch_attention", causal=True, **_SMALL | {"dim": 128}),
    **{f"mla {backend}": Spec(**_SMALL | _MLA | {"backend": backend, "heads": 16, "queries": 1})
       for backend in BACKENDS},
}  # fmt: skip
# Longer ones, for captured graphs: requests are split.
GRAPHS: Table = {
    name: Spec(**vars(spec) | {"keys": 900, "dim": 512 if "mla" in name else 128})
    for name, spec in SERVED.items()
} | {
    "mla fa2, 5 queries": Spec(**vars(SERVED["mla fa2"]) | {"queries": 5, "causal": True}),
    "mla fa3, 5 queries": Spec(**vars(SERVED["mla fa3"]) | {"queries": 5, "causal": True}),
    "prefill fa2, long": Spec(causal=True, **_SMALL | {"queries": 90, "keys": 3000, "dim": 128}),
    "prefill fa3, long": Spec(causal=True, backend="fa3",
                              **_SMALL | {"queries": 300, "keys": 3000, "dim": 128}),
}  # fmt: skip
# As many rows in a tile of queries, alone and in a batch: up to 16, and more than 64.
FIXED_SPLIT: Table = {
    "1 query": Spec(batch=5, queries=1, keys=900, page_size=16, causal=True),
    "40 queries": Spec(batch=5, queries=40, keys=900, page_size=16, causal=True),
}
# What the kernels' sources say they do wrong.  Refused: mla.cuh and mla_hopper.cuh round down how
# many keys a tile of rows sees, by (the tile's end) / num_heads: wrong where tiles end inside of a
# query.
TILES_INSIDE: Table = table(
    BOTH,
    [{"heads": 128, "lengths": ((1, 65), (0, 5))},
     {"heads": 48, "lengths": ((4, 66), (4, 130))}],
    causal=True, page_size=16, **_MLA,
)  # fmt: skip
# With a way around it: scheduler.cuh makes pieces of the keys from a window's start for a window
# and a tile of queries; without a causal mask all later keys are seen as well.
LATER_KEYS: Table = table(
    FA2, RAGGED_OR_PAGED, [{"lengths": ((300, 3000),)}, {"lengths": ((500, 500), (3, 9))}],
    window_left=17,
)  # fmt: skip
