"""Facts about modules in FlashInfer's Python code, read from its text without running it.

Generators of attention add parameters to the bindings' own; every generator names its modules.
`BuildError` names the line that cannot be read, and why.
"""

from __future__ import annotations

import ast
import functools
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from fi_ffi.errors import BuildError

MODULES = "jit/attention/modules.py"
_SPEC = "gen_jit_spec"  # called by all generators with a module's name
# Names of each attention family's generator in `MODULES`; the first that exists counts.
_GENERATORS = {
    "batch_attention": ("_gen_batch_attention_module", "gen_batch_attention_module"),
    "batch_decode": ("gen_batch_decode_module",),
    "batch_pod": ("gen_batch_pod_module",),
    "batch_prefill": ("_gen_batch_prefill_module", "gen_batch_prefill_module"),
    "batch_prefill_with_attention_sink": ("gen_batch_prefill_attention_sink_module",),
    "pod": ("gen_pod_module",),
    "single_decode": ("gen_single_decode_module",),
    "single_prefill": ("gen_single_prefill_module",),
}  # fmt: skip
_DTYPES = {
    "float": "float32", "uint8_t": "uint8", "int32_t": "int32", "uint16_t": "uint16",
    "uint32_t": "uint32",
}  # fmt: skip


class Added(NamedTuple):
    """A parameter that a generator adds: its C++ declaration, and a tensor's element dtype."""

    declaration: str
    name: str
    dtype: str


def added_parameters(modules: str, family: str, backend: str, fp8: bool) -> list[Added]:
    """Return the parameters that a family's generator substitutes for ADDITIONAL_FUNC_PARAMS.

    `modules` is the text of `MODULES`. The generator passes lists of names and dtypes: of tensors,
    then of numbers. The result is empty if the family has no such generator.
    """
    functions = {f.name: f for f in _parsed(modules).body if isinstance(f, ast.FunctionDef)}
    named = [name for name in _GENERATORS.get(family, ()) if name in functions]
    if not named:
        return []
    generator = functions[named[0]]
    known: dict[str, Any] = {"backend": backend, "fp8_enabled": fp8}
    with _worded(generator):
        call = _run(generator.body, known)
        values = [_list(argument, known) for argument in getattr(call, "args", ())]
        lists = [value for value in values if value is not None]
        if [len(lists), *map(len, lists[::2])] != [4, *map(len, lists[1::2])]:
            raise ValueError(f"{generator.name} passes no lists of names with their dtypes")
        tensors, tensor_types, numbers, number_types = lists
        if unknown := {*tensor_types} - _DTYPES.keys():
            raise ValueError(f"{generator.name} has tensors of {sorted(unknown)!r:.80}")
    optional = ("ffi::Tensor", "Optional<ffi::Tensor>")
    parts = [
        Added(f"{optional[name.startswith('maybe')]} {name}", name, _DTYPES[kind])
        for name, kind in zip(tensors, tensor_types, strict=True)
    ]
    parts += [
        Added(f"{kind} {name}", name, "") for kind, name in zip(number_types, numbers, strict=True)
    ]
    return parts


@functools.lru_cache(maxsize=4)
def _parsed(text: str) -> ast.Module:
    with _worded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in strings
        return ast.parse(text)


@contextmanager
def _worded(node: ast.stmt | None = None) -> Iterator[None]:
    """Turn what reading a text, or a statement of it, raises into a `BuildError`."""
    try:
        yield
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        line = getattr(error, "lineno", None) or (node.lineno if node else None)
        is_deep = isinstance(error, (MemoryError, RecursionError))
        what = "it is nested too deeply" if is_deep else getattr(error, "msg", str(error))
        raise BuildError(f"line {line}: {what}" if line else what) from error


def _run(body: list[ast.stmt], known: dict[str, Any]) -> ast.expr | None:
    for statement in body:
        if isinstance(statement, ast.Return):
            return statement.value
        if isinstance(statement, ast.If):
            branch = statement.body if _holds(statement.test, known) else statement.orelse
            returned = _run(branch, known)
            if returned is not None:
                return returned
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
            is_plain = isinstance(statement, ast.Assign)
            target = statement.targets[0] if is_plain else statement.target  # type: ignore[union-attr]
            words = _list(statement.value, known)
            if words is not None and isinstance(target, ast.Name):
                known[target.id] = words
    return None


def _holds(test: ast.expr, known: Mapping[str, Any]) -> bool:
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return not _holds(test.operand, known)
    wanted: Any = None
    if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Eq):
        test, wanted = test.left, test.comparators[0]
    name = ast.unparse(test)
    if name not in known or not isinstance(wanted, ast.Constant | None):
        raise BuildError(f"line {test.lineno}: whether {name:.80} holds is unknown")
    return bool(known[name] == wanted.value if wanted else known[name])


def _list(value: ast.expr, known: Mapping[str, Any]) -> list[str] | None:
    """Return a list of strings, written literally or by its variable's name."""
    if isinstance(value, ast.Name):
        found = known.get(value.id)
        return found if isinstance(found, list) else None
    if not isinstance(value, ast.List):
        return None
    words = [part.value for part in value.elts if isinstance(part, ast.Constant)]
    is_text = len(words) == len(value.elts) and all(isinstance(word, str) for word in words)
    return words if is_text else None


class Generator(NamedTuple):
    """A function that makes or names modules: its parameters, and templates of the names."""

    parameters: tuple[str, ...]
    names: tuple[str, ...]


def generators(path: str, text: str) -> dict[str, Generator]:
    """Return the functions `gen_…` and `get_…_uri` of a Python file, by "module:function".

    A name is a template with `{…}` for each value of a parameter.
    """
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    found = {}
    for node in _parsed(text).body:
        if isinstance(node, ast.FunctionDef) and _is_generator(node.name):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            with _worded(node):
                names = tuple(dict.fromkeys(_names(node)))
            parameters = tuple(argument.arg for argument in arguments)
            found[f"flashinfer.{module}:{node.name}"] = Generator(parameters, names)
    return found


def _is_generator(name: str) -> bool:
    plain = name.lstrip("_")
    makes = plain.startswith("gen_") and plain != _SPEC
    return makes or (plain.startswith("get_") and plain.endswith("_uri"))


def _names(function: ast.FunctionDef) -> Iterator[str]:
    """Yield names passed to `gen_jit_spec`, or returned by a function that only makes a name."""
    assigned = {
        node.targets[0].id: node.value
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    template = functools.cache(_template)  # of a variable that is used many times
    for node in ast.walk(function):
        value: ast.expr | None = None
        if isinstance(node, ast.Call) and _name(node.func).endswith(_SPEC):
            named = [word.value for word in node.keywords if word.arg == "name"]
            value = next(iter([*node.args[:1], *named]), None)
        elif isinstance(node, ast.Return) and function.name.endswith("_uri"):
            value = node.value
        if isinstance(value, ast.Name):
            value = assigned.get(value.id)
        if value is not None and (text := template(value)):
            yield text


def _name(function: ast.expr) -> str:
    named = {ast.Name: "id", ast.Attribute: "attr"}.get(type(function), "")
    return str(getattr(function, named, ""))


def _template(value: ast.expr) -> str:
    """Return the text of an expression, with `{…}` for the parts that are not literal."""
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return value.value
    if isinstance(value, ast.JoinedStr):
        return "".join(map(_template, value.values))
    if isinstance(value, ast.FormattedValue):
        return "{" + ast.unparse(value.value) + "}"
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        return _template(value.left) + _template(value.right)
    if isinstance(value, ast.IfExp):
        return f"{{{ast.unparse(value)}}}"
    return ""


def templates(text: str) -> dict[str, str]:
    """Return the C++ in a Python file's string variables, by variable."""
    return {
        node.targets[0].id: node.value.value
        for node in _parsed(text).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }  # fmt: skip
