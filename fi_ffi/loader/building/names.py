"""What `fi-ffi build` can be asked for: architectures, and names of kernel modules.

A module is asked for by its exact name, as FlashInfer's own build list has it
(`norm`, `gdn_prefill_sm90`, `single_decode_with_kv_cache_dtype_q_f16_…`), or by a
family and its options: `batch_prefill:backend=fa3,dtype=bf16`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from fi_ffi.errors import ArgumentError

DEFAULT_RELEASE = "0.6.13"
DEFAULT_ARCH = ("9.0a",)

# The short names that FlashInfer's module names use, and torch's names for the same types.
_DTYPES = {
    "f16": "torch.float16",
    "bf16": "torch.bfloat16",
    "e4m3": "torch.float8_e4m3fn",
    "e5m2": "torch.float8_e5m2",
}
_FLAGS = {"0": False, "1": True}


@dataclass(frozen=True)
class Option:
    """One option of a family: the values it takes (None: see `form`) and its default."""

    values: tuple[str, ...] | None
    default: str
    doc: str
    form: str = ""

    def accepts(self, value: str) -> bool:
        return value in self.values if self.values else bool(re.fullmatch(self.form, value))

    @property
    def expected(self) -> str:
        return " or ".join(self.values) if self.values else self.doc


OPTIONS = {
    "dtype": Option(("f16", "bf16"), "f16", "type of query and output"),
    "kv_dtype": Option((*_DTYPES, "same"), "same", "type of key and value; same: as dtype"),
    "head_dim": Option(
        None, "128", "a size such as 128, or one for query and key and one for value: 192x128",
        r"[1-9]\d{0,3}(x[1-9]\d{0,3})?",
    ),
    "backend": Option(("fa2", "fa3"), "fa2", "FlashAttention 2, or 3 (needs 9.0a)"),
    "use_sliding_window": Option(tuple(_FLAGS), "0", "compiled for window_left"),
    "use_logits_soft_cap": Option(tuple(_FLAGS), "0", "compiled for logits_soft_cap"),
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Modules that one of FlashInfer's generators makes from a few options."""

    name: str
    generator: str  # "module:function" inside flashinfer
    options: tuple[str, ...]
    doc: str


_ATTENTION = ("dtype", "kv_dtype", "head_dim", "use_sliding_window", "use_logits_soft_cap")
_MODULES = "flashinfer.jit.attention:"
FAMILIES = {
    family.name: family
    for family in (
        Family("single_decode", _MODULES + "gen_single_decode_module", _ATTENTION,
               "decode attention of one request"),
        Family("batch_decode", _MODULES + "gen_batch_decode_module", _ATTENTION,
               "decode attention over a paged KV cache"),
        Family("single_prefill", _MODULES + "gen_single_prefill_module",
               (*_ATTENTION, "backend"), "prefill attention of one request"),
        Family("batch_prefill", _MODULES + "gen_batch_prefill_module",
               (*_ATTENTION, "backend"), "prefill attention, ragged and paged"),
        Family("batch_mla", _MODULES + "gen_batch_mla_module", ("dtype", "backend"),
               "multi-head latent attention over a paged cache"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One thing to build: a family with options, or a module's name if it is `exact`.

    An exact name that looks like one of a family's has the options read out of it,
    for modules that FlashInfer can make and does not list.
    """

    text: str
    family: Family | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    exact: bool = False

    def as_json(self) -> dict[str, object]:
        """What the driver in the build environment is told."""
        question: dict[str, object] = {"text": self.text, "exact": self.exact}
        if self.family is not None:
            question["generator"] = self.family.generator
            question["arguments"] = _arguments(self.options)
        return question


# Where FlashInfer's module names have the options of a family.
_IN_NAMES = {
    "dtype": r"_dtype_q_([a-z0-9]+)_",
    "kv_dtype": r"_dtype_kv_([a-z0-9]+)_",
    "head_dim": r"_head_dim_qk_(\d+)_head_dim_vo_(\d+)_",
    "use_sliding_window": r"_use_swa_(True|False)_",
    "use_logits_soft_cap": r"_use_logits_cap_(True|False)",
    "backend": r"_(sm90)$",
}
_VALUES_IN_NAMES = {"True": "1", "False": "0", "sm90": "fa3"}


def _exact(name: str) -> Request:
    """A request for one module, with the family that its name points to, if it does."""
    for family in FAMILIES.values():
        if not name.startswith(f"{family.name}_"):
            continue
        found = {option: re.search(_IN_NAMES[option], name) for option in family.options}
        texts = {option: "x".join(match.groups()) for option, match in found.items() if match}
        options = {option: _VALUES_IN_NAMES.get(text, text) for option, text in texts.items()}
        if all(OPTIONS[option].accepts(value) for option, value in options.items()):
            return Request(name, family, options, exact=True)
    return Request(name, exact=True)


def _arguments(options: Mapping[str, str]) -> dict[str, object]:
    """A value for every parameter that a generator of FAMILIES may have.

    The driver passes on those that the generator names in its signature, so the
    parameters' order and their changes between releases are FlashInfer's business.
    """
    value = {name: options.get(name, option.default) for name, option in OPTIONS.items()}
    dtype = _DTYPES[value["dtype"]]
    head_dim_qk, _, head_dim_vo = value["head_dim"].partition("x")
    return {
        "backend": value["backend"],
        "dtype_q": dtype,
        "dtype_kv": dtype if value["kv_dtype"] == "same" else _DTYPES[value["kv_dtype"]],
        "dtype_o": dtype,
        "dtype_idx": "torch.int32",
        "head_dim_qk": int(head_dim_qk),
        "head_dim_vo": int(head_dim_vo or head_dim_qk),
        "head_dim_ckv": 512,  # the sizes of DeepSeek's MLA, the only ones FlashInfer has
        "head_dim_kpe": 64,
        "pos_encoding_mode": 0,
        "use_sliding_window": _FLAGS[value["use_sliding_window"]],
        "use_logits_soft_cap": _FLAGS[value["use_logits_soft_cap"]],
        "use_fp16_qk_reduction": False,
        "use_profiler": False,
    }


def _error(argument: str, got: object, expected: object) -> ArgumentError:
    return ArgumentError("build", argument, got=got, expected=expected)


def parse_request(text: str) -> Request:
    """Read `norm` or `batch_prefill:backend=fa3,dtype=bf16`."""
    name, colon, rest = text.partition(":")
    family = FAMILIES.get(name)
    if family is None:
        if colon or not re.fullmatch(r"\w+", name):
            raise _error("modules", repr(text), f"a module name, or one of {', '.join(FAMILIES)}")
        return _exact(name)
    options: dict[str, str] = {}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        if key not in family.options or key in options:
            known = ", ".join(f"{option}=…" for option in family.options)
            raise _error("modules", f"{item!r} in {text!r}", f"{known}, each at most once")
        if not OPTIONS[key].accepts(value):
            raise _error(f"modules, {text!r}, {key}", repr(value), OPTIONS[key].expected)
        options[key] = value
    return Request(text, family, options)


def parse_requests(names: Sequence[str], architectures: Sequence[str]) -> tuple[Request, ...]:
    """All requests, checked against the architectures they are to be built for."""
    if isinstance(names, str) or not names:
        raise _error("modules", repr(names), "a sequence of at least one name")
    requests = tuple(parse_request(name) for name in dict.fromkeys(names))
    for request in requests:
        if request.options.get("backend") == "fa3" and "9.0a" not in architectures:
            raise _error("arch", " ".join(architectures), f"9.0a, which {request.text!r} needs")
    return requests


def with_options(names: Sequence[str], choices: Mapping[str, Sequence[str]]) -> list[str]:
    """The names, with `choices` filled in where a family takes them and says nothing itself.

    Several values of an option give several modules.
    """
    unused = {key for key, values in choices.items() if values}
    result: list[str] = []
    for name in names:
        request = parse_request(name)
        if request.exact:
            result.append(name)
            continue
        taken = request.family.options if request.family else ()
        keys = [key for key in taken if choices.get(key) and key not in request.options]
        unused -= set(keys)
        for values in product(*(choices[key] for key in keys)):
            options = {**request.options, **dict(zip(keys, values, strict=True))}
            suffix = ",".join(f"{key}={value}" for key, value in options.items())
            result.append(f"{name.partition(':')[0]}:{suffix}" if suffix else name)
    if unused:
        raise _error(", ".join(sorted(unused)), "an option", "a family that takes it")
    return result


def parse_arch(values: str | Iterable[str]) -> tuple[str, ...]:
    """Read `9.0a` or `8.7 9.0a`, the form of FLASHINFER_CUDA_ARCH_LIST; sorted, each once."""
    texts = [values] if isinstance(values, str) else list(values)
    found: set[tuple[int, int, str]] = set()
    for text in re.split(r"[\s,;]+", " ".join(texts).strip()):
        match = re.fullmatch(r"(\d{1,2})\.(\d)([af]?)", text)
        if match is None or (int(match[1]), int(match[2])) < (7, 5):
            raise _error("arch", repr(text), "7.5 or later, such as 8.7, 9.0a or 12.0f")
        # FlashInfer has no kernels for plain 9.0, and takes it to mean 9.0a.
        suffix = "a" if text == "9.0" else match[3]
        found.add((int(match[1]), int(match[2]), suffix))
    return tuple(f"{major}.{minor}{suffix}" for major, minor, suffix in sorted(found))


def parse_release(text: str) -> str:
    """A release such as 0.6.13 or 0.7.2.post1."""
    if not re.fullmatch(r"\d+(\.\d+){1,3}((a|b|rc)\d+)?(\.(post|dev)\d+)?", text):
        raise _error("release", repr(text), f"a version such as {DEFAULT_RELEASE}")
    return text
