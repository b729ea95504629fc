"""The families of modules that `fi-ffi build` makes, with their options.

FlashInfer's generators make modules of some families from a few options. The others are kernels in
CuTe DSL, which are not in FlashInfer's list of modules built ahead of time: it compiles such a
kernel when it is called, for the shapes, dtypes and flags of the call. Therefore a family of them
is a call (`fi_ffi_build.cute`), and its options determine the kernel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fi_ffi.loader.uris import DTYPES

DEFAULT_RELEASE = "0.6.13"
DEFAULT_ARCH = ("9.0a",)

# Options of a request by name.
Options = Mapping[str, str]


@dataclass(frozen=True)
class BuildOption:
    """One option of a family: the values it takes (None: any that match `form`) and its default."""

    values: tuple[str, ...] | None
    default: str
    doc: str
    form: str = ""

    def accepts(self, value: str) -> bool:
        return value in self.values if self.values else bool(re.fullmatch(self.form, value))

    @property
    def expected(self) -> str:
        return " or ".join(self.values) if self.values else self.doc


@dataclass(frozen=True)
class Family:
    """Modules that are made from a few options.

    FlashInfer may name a kernel of CuTe DSL by itself; others are called `stem`, and then the
    `words` for the options. A family without a `stem` is one of its generators'.
    """

    name: str  # the key in the table of module names, or of calls
    options: Mapping[str, BuildOption]
    doc: str
    stem: str = ""
    words: Callable[[Options], list[str]] | None = None

    @property
    def is_cute(self) -> bool:
        """Whether its modules are kernels of CuTe DSL."""
        return bool(self.stem)

    def suffix(self, options: Options) -> str:
        """Return the words of a module of CuTe DSL, as they end its name."""
        assert self.words is not None
        return "_".join(self.words(options))


def _flag(default: str, doc: str) -> BuildOption:
    return BuildOption(("0", "1"), default, doc)


def _count(default: int, doc: str) -> BuildOption:
    return BuildOption(None, str(default), doc, r"[1-9]\d{0,5}")


def _size(doc: str) -> BuildOption:
    return BuildOption(None, "0", doc, r"0|[1-9]\d{0,11}")


_HEAD_DIM = "a size such as 128, or one for query and key and one for value: 192x128"
_KV_DTYPES = ("f16", "bf16", "e4m3", "e5m2", "same")
OPTIONS = {
    "dtype": BuildOption(("f16", "bf16"), "f16", "type of query and output"),
    "kv_dtype": BuildOption(_KV_DTYPES, "same", "type of key and value; same: as dtype"),
    "head_dim": BuildOption(None, "128", _HEAD_DIM, r"[1-9]\d{0,3}(x[1-9]\d{0,3})?"),
    "backend": BuildOption(("fa2", "fa3"), "fa2", "FlashAttention 2, or 3 (needs 9.0a)"),
    "use_sliding_window": _flag("0", "compiled for window_left"),
    "use_logits_soft_cap": _flag("0", "compiled for logits_soft_cap"),
}
_DECODE = {name: option for name, option in OPTIONS.items() if name != "backend"}
_PREFILL = {**_DECODE, "backend": OPTIONS["backend"]}
_MLA = {name: OPTIONS[name] for name in ("dtype", "backend")}

_FLOATS = BuildOption(("f16", "bf16"), "bf16", "type of inputs and outputs")
_STATES = ("f32", "bf16", "f16", "e4m3", "e5m2")
_INDICES = ("i32", "i64")
_GATE = BuildOption(("bf16", "f16", "f32"), "bf16", "type of this gate")
_BATCH = _count(64, "requests of a call, by which FlashInfer chooses a kernel")
_TOKENS = _count(1, "new tokens of each request")
_GDN_DECODE_KEYS_FIRST = {
    "batch": _BATCH,
    "q_heads": _count(16, "heads of queries and keys"),
    "v_heads": _count(32, "heads of values"),
    "a": _GATE,
    "b": _GATE,
    "dt_bias": BuildOption(("f32", "bf16"), "f32", "type of dt_bias"),
    "l2norm": _flag("1", "queries and keys normalised"),
}
_GDN_DECODE = {
    **_GDN_DECODE_KEYS_FIRST,
    "tokens": _TOKENS,
    "state": BuildOption(("f32", "bf16"), "f32", "type of the states"),
    "indices": BuildOption(_INDICES, "i32", "type of indices into the pool of states"),
    "pool": _flag("1", "states in a pool"),
    "split": _flag("0", "states written elsewhere than read"),
    "steps": _flag("0", "states kept after each token"),
    "update": _flag("1", "final states written"),
    "slots": _size("states of the pool, if they lie apart; 0: any, one after another"),
    "slot_stride": _size("elements from one such state to the next"),
}
_GDN_PREFILL = {
    "dtype": _FLOATS,
    "state": BuildOption(_STATES, "f32", "type of the final states"),
    "cu_seqlens": BuildOption(_INDICES, "i64", "type of cu_seqlens"),
    "alpha": _flag("1", "with a forget gate"),
    "beta": _flag("1", "with an update gate"),
    "initial_state": BuildOption(("0", *_STATES), "f32", "type of initial states, 0: none"),
    "checkpoints": BuildOption(("0", *_STATES), "0", "type of states kept on the way"),
    "indices": BuildOption(("0", *_INDICES), "0", "type of indices into a pool of states"),
}
_KDA_DECODE = {
    "batch": _BATCH,
    "tokens": _TOKENS,
    "heads": _count(16, "heads of queries and keys"),
    "group": _count(1, "heads of values for each of them"),
    "head_size": BuildOption(("64", "128"), "128", "size of a head"),
    "gate": _flag("1", "the gate is computed by the kernel"),
    "bias": _flag("1", "with dt_bias, if it is"),
    "bound": _flag("0", "the computed gate has a lower bound"),
    "norm": _flag("1", "queries and keys normalised"),
    "logit": _flag("0", "beta is a logit"),
    "packed": _flag("0", "tokens side by side, with cu_seqlens and indices of states"),
}
_PAGE_SIZES = ("1", "2", "4", "8", "16", "32", "64", "128")
_MLA_DECODE = {
    "dtype": BuildOption(("f16", "bf16", "e4m3"), "bf16", "type of queries and of the cache"),
    "page_size": BuildOption(_PAGE_SIZES, "64", "tokens of a page"),
    "lengths": BuildOption(("varied", "equal"), "varied", "of the requests of a call"),
    "split": _flag("1", "requests are split, with a workspace"),
}
_RMSNORM = {
    "dtype": _FLOATS,
    "hidden_size": _count(4096, "hidden size"),
    "weight_bias": BuildOption(("0", "1"), "0", "what is added to the weight"),
    "contiguous": _flag("1", "rows one after another"),
}
_QK_RMSNORM = {
    "dtype": _FLOATS,
    "head_size": _count(128, "head size"),
    "weight_bias": _RMSNORM["weight_bias"],
}
_RMSNORM_FP4QUANT = {
    "dtype": _FLOATS,
    "hidden_size": _count(4096, "hidden size"),
    "block_size": BuildOption(("16", "32"), "16", "numbers that share a scale"),
    "scale": BuildOption(("e4m3", "ue8m0"), "e4m3", "type of the scales"),
    "swizzled": _flag("0", "scales as tensor cores read them"),
}


def every_option(options: Options) -> list[str]:
    """Return every option, for kernels that FlashInfer names itself since 0.7."""
    return [f"{name}_{value}" for name, value in options.items()]


def _gdn_prefill(options: Options) -> list[str]:
    def part(option: str, name: str) -> str:
        value = options[option]
        return f"no{name}" if value == "0" else name if value == "1" else f"{name}_{DTYPES[value]}"

    return [
        DTYPES[options["dtype"]],
        part("alpha", "alpha"),
        part("beta", "beta"),
        part("initial_state", "init"),
        DTYPES[options["state"]],
        part("checkpoints", "checkpoints"),
        part("indices", "indices"),
        DTYPES[options["cu_seqlens"]],
    ]


# The word for a flag that is not the default.
_KDA_WORDS = {
    "bias": "nobias",
    "bound": "bound",
    "norm": "nonorm",
    "logit": "logit",
    "packed": "packed",
}
KDA_FLAGS = tuple(_KDA_WORDS)


def _kda_decode(options: Options) -> list[str]:
    flags = [w for name, w in _KDA_WORDS.items() if options[name] != _KDA_DECODE[name].default]
    return [
        *(f"{name[0]}{options[name]}" for name in ("batch", "tokens", "heads")),
        # The kernel for one token takes any number of heads.
        *([f"g{options['group']}"] if options["tokens"] != "1" else []),
        f"d{options['head_size']}",
        "gate" if options["gate"] == "1" else "nogate",
        *flags,
    ]


def _rmsnorm(options: Options) -> list[str]:
    dtype, hidden_size = DTYPES[options["dtype"]], options["hidden_size"]
    strided = [] if options["contiguous"] == "1" else ["strided"]
    return [dtype, hidden_size, f"bias{options['weight_bias']}", *strided]


def _qk_rmsnorm(options: Options) -> list[str]:
    return [DTYPES[options["dtype"]], f"d{options['head_size']}", f"bias{options['weight_bias']}"]


def _rmsnorm_fp4quant(options: Options) -> list[str]:
    dtype, hidden_size = DTYPES[options["dtype"]], options["hidden_size"]
    layout = "swizzled" if options["swizzled"] == "1" else "rows"
    return [dtype, hidden_size, f"{options['scale']}x{options['block_size']}", layout]


def _mla_decode(options: Options) -> list[str]:
    split = "split" if options["split"] == "1" else "whole"
    return [DTYPES[options["dtype"]], f"p{options['page_size']}", options["lengths"], split]


FAMILIES = {
    family.name: family
    for family in (
        Family("single_decode", _DECODE, "decode attention of one request"),
        Family("batch_decode", _DECODE, "decode attention over a paged KV cache"),
        Family("single_prefill", _PREFILL, "prefill attention of one request"),
        Family("batch_prefill", _PREFILL, "prefill attention, ragged and paged"),
        Family("batch_mla", _MLA, "multi-head latent attention over a paged cache"),
        Family(
            "gdn_decode", _GDN_DECODE,
            "CuTe DSL: gated delta rule, new tokens of many requests",
            "gdn_decode", every_option,
        ),
        Family(
            "gdn_decode_keys_first", _GDN_DECODE_KEYS_FIRST,
            "CuTe DSL: the same over states as [key, value], a token of each request",
            "gdn_decode", every_option,
        ),
        Family(
            "gdn_prefill", _GDN_PREFILL,
            "CuTe DSL: gated delta rule, whole sequences (needs 9.0a)",
            "gdn_prefill_sm90", _gdn_prefill,
        ),
        Family(
            "kda_decode", _KDA_DECODE,
            "CuTe DSL: Kimi delta attention, new tokens of many requests",
            "recurrent_kda", _kda_decode,
        ),
        Family(
            "mla_decode", _MLA_DECODE,
            "CuTe DSL: latent attention, new tokens of many requests (10.0 and 10.3)",
            "mla_decode", _mla_decode,
        ),
        Family("rmsnorm_cute", _RMSNORM, "CuTe DSL: RMS norm", "rmsnorm", _rmsnorm),
        Family(
            "qk_rmsnorm_cute", _QK_RMSNORM, "CuTe DSL: RMS norm of each head", "qk_rmsnorm",
            _qk_rmsnorm,
        ),
        Family(
            "rmsnorm_fp4quant", _RMSNORM_FP4QUANT,
            "CuTe DSL: RMS norm and quantisation to fp4",
            "rmsnorm_fp4quant", _rmsnorm_fp4quant,
        ),
    )
}  # fmt: skip
