"""The requests that `fi-ffi build` accepts: architectures, and names of kernel modules.

A module is requested by its exact name in FlashInfer's own build list (`norm`, `gdn_prefill_sm90`,
`single_decode_with_kv_cache_dtype_q_f16_…`), or by a family and its options:
`batch_prefill:backend=fa3,dtype=bf16`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from fi_ffi.errors import ArgumentError
from fi_ffi.loader.fatbin import architecture_named
from fi_ffi.loader.uris import DTYPES, ModuleName, Row, Value, family_row, parse, uri
from fi_ffi_build import cute
from fi_ffi_build.options import Option

DEFAULT_RELEASE = "0.6.13"
DEFAULT_ARCH = ("9.0a",)

_FLAGS = {"0": False, "1": True}


OPTIONS = {
    "dtype": Option(("f16", "bf16"), "f16", "type of query and output"),
    "kv_dtype": Option(("f16", "bf16", "e4m3", "e5m2", "same"), "same",
                       "type of key and value; same: as dtype"),
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
    """Modules that FlashInfer makes from a few options.

    They are made by one of its generators, or by the call of a kernel of CuTe DSL (`call`).
    """

    name: str  # the key in the table of module names, or of calls
    options: Mapping[str, Option]
    doc: str
    call: cute.CuteCall | None = None


def _options_of(*names: str) -> dict[str, Option]:
    return {name: OPTIONS[name] for name in names}


_ATTENTION = ("dtype", "kv_dtype", "head_dim", "use_sliding_window", "use_logits_soft_cap")
FAMILIES = {
    family.name: family
    for family in (
        Family("single_decode", _options_of(*_ATTENTION), "decode attention of one request"),
        Family("batch_decode", _options_of(*_ATTENTION), "decode attention over a paged KV cache"),
        Family("single_prefill", _options_of(*_ATTENTION, "backend"),
               "prefill attention of one request"),
        Family("batch_prefill", _options_of(*_ATTENTION, "backend"),
               "prefill attention, ragged and paged"),
        Family("batch_mla", _options_of("dtype", "backend"),
               "multi-head latent attention over a paged cache"),
        *(Family(name, cute.OPTIONS[name], f"CuTe DSL: {cute.DOCS[name]}", call)
          for name, call in cute.CALLS.items()),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One thing to build: a family with options, or a module's name if it is `exact`.

    An exact name that follows the rules of a family is parsed (`module`), so that modules can be
    built that FlashInfer does not list.
    """

    text: str
    family: Family | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    exact: bool = False
    module: ModuleName | None = field(default=None, compare=False)

    @property
    def backend(self) -> str:
        return self.module.backend if self.module else self.options.get("backend", "")

    @property
    def is_cute(self) -> bool:
        """Whether a kernel of CuTe DSL is requested."""
        return self.family is not None and self.family.call is not None

    def module_in(self, release: str) -> str:
        """Return the one module that is requested, by its name in a release."""
        if self.family is None:
            return self.text
        if self.is_cute:
            raise _error(
                "modules",
                repr(self.text),
                "a module's name: what CuTe DSL makes is "
                "called as FlashInfer calls it when it compiles it",
            )
        row = family_row(self.family.name, release)
        return uri(self.family.name, release=release, **_params(self.options, set(row.kinds)))

    def as_json(self, release: str = DEFAULT_RELEASE) -> dict[str, object]:
        """Return the request for the driver in the build environment."""
        question: dict[str, object] = {"text": self.text, "exact": self.exact}
        if self.family is not None and self.family.call is not None:
            given = {name: option.default for name, option in self.family.options.items()}
            return question | self.family.call.as_json({**given, **self.options})
        module = self.module and (parse(self.text, release) or self.module)
        if module is not None:
            row, params = module.row, module.params
        elif self.family is not None:
            row = family_row(self.family.name, release)
            params = row.complete(_params(self.options, set(row.kinds)))
        else:
            return question
        if generator := row.generator_for(params):
            question["generator"] = generator
            question["arguments"] = _driver_arguments(row, params)
        return question


def _driver_arguments(row: Row, params: Mapping[str, Value]) -> dict[str, Value]:
    """Return a generator's arguments, with dtypes as torch names them.

    The driver passes those that are in the generator's signature.
    """
    found: dict[str, Value] = dict(row.arguments)
    for name, value in params.items():
        short = row.kinds[name].is_dtype and value is not None
        found[name] = f"torch.{DTYPES[str(value)]}" if short else value
    return found


def _params(options: Mapping[str, str], wanted: set[str]) -> dict[str, Value]:
    """Return the parameters that the options determine; the table has defaults for the others."""
    value = {name: options.get(name, option.default) for name, option in OPTIONS.items()}
    head_dim_qk, _, head_dim_vo = value["head_dim"].partition("x")
    kv_dtype = value["dtype"] if value["kv_dtype"] == "same" else value["kv_dtype"]
    found: dict[str, Value] = {
        "backend": value["backend"],
        "dtype_q": value["dtype"],
        "dtype_kv": kv_dtype,
        "head_dim_qk": int(head_dim_qk),
        "head_dim_vo": int(head_dim_vo or head_dim_qk),
        "use_sliding_window": _FLAGS[value["use_sliding_window"]],
        "use_logits_soft_cap": _FLAGS[value["use_logits_soft_cap"]],
    }
    return {name: given for name, given in found.items() if name in wanted}


def _error(argument: str, got: object, expected: object) -> ArgumentError:
    return ArgumentError("build", argument, got=got, expected=expected)


def parse_request(text: str) -> Request:
    """Parse `norm` or `batch_prefill:backend=fa3,dtype=bf16`."""
    name, colon, rest = text.partition(":")
    family = FAMILIES.get(name)
    if family is None:
        if colon or not re.fullmatch(r"\w+", name):
            raise _error("modules", repr(text), f"a module name, or one of {', '.join(FAMILIES)}")
        return Request(name, exact=True, module=parse(name))
    options: dict[str, str] = {}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        if key not in family.options or key in options:
            known = ", ".join(f"{option}=…" for option in family.options)
            raise _error("modules", f"{item!r} in {text!r}", f"{known}, each at most once")
        if not family.options[key].accepts(value):
            expected = family.options[key].expected
            raise _error(f"modules, {text!r}, {key}", repr(value), expected)
        options[key] = value
    return Request(text, family, options)


def parse_requests(names: Sequence[str], architectures: Sequence[str]) -> tuple[Request, ...]:
    """Parse all requests and check them against the architectures."""
    if isinstance(names, str) or not names:
        raise _error("modules", repr(names), "a sequence of at least one name")
    requests = tuple(parse_request(name) for name in dict.fromkeys(names))
    for request in requests:
        if request.backend == "fa3" and "9.0a" not in architectures:
            raise _error("arch", " ".join(architectures), f"9.0a, which {request.text!r} needs")
    return requests


def with_options(names: Sequence[str], choices: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the names with `choices` added to families that accept them and do not set them.

    Several values of an option give several modules.
    """
    unused = {key for key, values in choices.items() if values}
    result: list[str] = []
    for name in names:
        request = parse_request(name)
        if request.exact:
            result.append(name)
            continue
        taken = request.family.options if request.family else {}
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
    """Parse `9.0a` or `8.7 9.0a` (as in FLASHINFER_CUDA_ARCH_LIST), or `sm87`, `90a`; return them
    as FlashInfer writes them, sorted, without duplicates."""
    texts = [values] if isinstance(values, str) else list(values)
    found: set[tuple[int, int, str]] = set()
    for text in re.split(r"[\s,;]+", " ".join(texts).strip()):
        named = architecture_named(text)
        if named is None or not (7, 5) <= named[:2] < (20, 0):
            raise _error("arch", repr(text), "7.5 or later, such as 8.7, sm87, 9.0a or 12.0f")
        # FlashInfer has no kernels for plain 9.0 and interprets it as 9.0a.
        found.add((9, 0, "a") if named == (9, 0, "") else named)
    return tuple(f"{major}.{minor}{suffix}" for major, minor, suffix in sorted(found))
