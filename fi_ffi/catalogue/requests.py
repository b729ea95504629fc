"""The requests that `fi-ffi build` and `fetch` accept: architectures, and names of kernel modules.

A module is requested by its exact name in FlashInfer's own build list (`norm`, `gdn_prefill_sm90`,
`single_decode_with_kv_cache_dtype_q_f16_…`), or by a family and its options:
`batch_prefill:backend=fa3,dtype=bf16`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fi_ffi.catalogue.families import FAMILIES, OPTIONS, Family, every_option
from fi_ffi.errors import ArgumentError
from fi_ffi.loader.machine import architecture_named
from fi_ffi.loader.uris import DTYPES, Row, Value, family_row
from fi_ffi.module_names import ModuleName, complete, parse, uri


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
        return self.family is not None and self.family.is_cute

    @property
    def all_options(self) -> dict[str, str]:
        """The options of the family, with defaults for those that are not requested."""
        assert self.family is not None
        defaults = {name: option.default for name, option in self.family.options.items()}
        return {**defaults, **self.options}

    def params_in(self, release: str) -> tuple[Row, dict[str, Value]] | None:
        """Return a release's row of the module, and its parameters.

        None for an exact name that follows no rule.
        """
        if module := self.module and (parse(self.text, release) or self.module):
            return module.row, dict(module.params)
        if self.family is None:
            return None
        row = family_row(self.family.name, release)
        return row, complete(row, _params(self.options, row))

    def module_in(self, release: str) -> str:
        """Return the one module that is requested, by its name in a release."""
        if self.family is None:
            return self.text
        if self.is_cute:
            expected = (
                "a module's name: what CuTe DSL makes is called as FlashInfer calls it when it "
                "compiles it"
            )
            raise _error("modules", repr(self.text), expected)
        row = family_row(self.family.name, release)
        return uri(self.family.name, release=release, **_params(self.options, row))


def _params(options: Mapping[str, str], row: Row) -> dict[str, Value]:
    """Return the parameters that the options determine; the row has defaults for the others."""
    value = {name: options.get(name, option.default) for name, option in OPTIONS.items()}
    head_dim_qk, _, head_dim_vo = value["head_dim"].partition("x")
    kv_dtype = value["dtype"] if value["kv_dtype"] == "same" else value["kv_dtype"]
    params: dict[str, Value] = {
        "backend": value["backend"],
        "dtype_q": value["dtype"],
        "dtype_kv": kv_dtype,
        "head_dim_qk": int(head_dim_qk),
        "head_dim_vo": int(head_dim_vo or head_dim_qk),
        "use_sliding_window": value["use_sliding_window"] == "1",
        "use_logits_soft_cap": value["use_logits_soft_cap"] == "1",
    }
    return {name: param for name, param in params.items() if name in row.kinds}


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
        for values in itertools.product(*(choices[key] for key in keys)):
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
    architectures: set[tuple[int, int, str]] = set()
    for text in re.split(r"[\s,;]+", " ".join(texts).strip()):
        named = architecture_named(text)
        if named is None or not (7, 5) <= named[:2] < (20, 0):
            raise _error("arch", repr(text), "7.5 or later, such as 8.7, sm87, 9.0a or 12.0f")
        # FlashInfer has no kernels for plain 9.0 and interprets it as 9.0a.
        architectures.add((9, 0, "a") if named == (9, 0, "") else named)
    return tuple(f"{major}.{minor}{suffix}" for major, minor, suffix in sorted(architectures))


_CUTE_MODULE = re.compile(r"(\w+?)_sm(\d+)(\d[af]?)_cute_dsl_(\w+)")


def request_for(module: str) -> tuple[str, str] | None:
    """Return the `fi-ffi build` request and the architecture for a module of CuTe DSL.

    The request is "" if the name does not determine the options. Returns None if no CuTe DSL module
    can have this name.
    """
    parts = _CUTE_MODULE.fullmatch(module)
    if parts is None:
        return None
    stem, major, minor, words = parts.groups()
    for family in FAMILIES.values():
        if family.stem != stem or family.words is every_option:
            continue
        for options in _options_in(words, family):
            if words.endswith(f"_{family.suffix(options)}"):
                chosen = [
                    f"{name}={value}"
                    for name, value in options.items()
                    if value != family.options[name].default
                ]
                request = f"{family.name}:{','.join(chosen)}" if chosen else family.name
                return request, f"{major}.{minor}"
    return "", f"{major}.{minor}"


def _options_in(words: str, family: Family) -> Iterator[dict[str, str]]:
    """Yield the options that a module's name with these words may have been made from."""
    numbers = re.findall(r"\d+", words)
    choices = [
        [v for v in option.values if v in "01" or v in words or DTYPES.get(v, v) in words]
        if option.values
        else [n for n in dict.fromkeys((option.default, *numbers)) if option.accepts(n)]
        for option in family.options.values()
    ]
    for values in itertools.product(*choices):
        yield dict(zip(family.options, values, strict=True))
