"""The interface a FlashInfer release declares, read from its sources: nothing of them is run."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from fi_ffi.abi.signature import Signature
from fi_ffi.loader.lock import the_lock

# Every release the lock pins kernels of, and the newest one.
RELEASES = sorted({file.release for file in the_lock().kernels} | {"0.7.2.post1"})

_EXPORT = re.compile(r"TVM_FFI_DLL_EXPORT_TYPED_FUNC\(\s*(\w+)\s*,\s*([\w:]+)\s*\)")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)

# A C++ parameter type, as TVM-FFI prints it.
_TYPES = {
    "TensorView": "DLTensor*",
    "Tensor": "ffi.Tensor",
    "double": "float",
    "float": "float",
    "int64_t": "int",
    "int32_t": "int",
    "int": "int",
    "bool": "bool",
    "std::string": "str",
    "String": "str",
    "void": "void",
}
_GENERIC = re.compile(r"(Optional|Array|Tuple)<(.*)>")


def abi_type(text: str) -> str:
    """`Optional<ffi::Tensor>` is `Optional<ffi.Tensor>`, `double` is `float`."""
    text = re.sub(r"\b(const|tvm|ffi)\b(::)?|&", "", text).strip().removeprefix("::")
    generic = _GENERIC.fullmatch(text)
    if generic:
        inner = ", ".join(abi_type(part) for part in _split(generic[2]))
        return f"{generic[1]}<{inner}>"
    return _TYPES[text]


def exported(source: str, added: Sequence[Added] = ()) -> dict[str, Signature]:
    """Every function that a binding source exports, by the exported name."""
    return {
        symbol: Signature(symbol, tuple(abi_type(_without_name(p)) for p in params), result)
        for symbol, (result, params) in _declared(source, added).items()
    }


def parameters(source: str, added: Sequence[Added] = ()) -> dict[str, list[str]]:
    """What the parameters of every exported function are called."""
    return {
        symbol: [re.sub(r"\s*=.*", "", param.strip()).rpartition(" ")[2] for param in params]
        for symbol, (_, params) in _declared(source, added).items()
    }


def _declared(source: str, added: Sequence[Added]) -> dict[str, tuple[str, list[str]]]:
    """The result and the parameters of every exported function."""
    more = "".join(f", {parameter.declaration}" for parameter in added)
    source = _COMMENT.sub(" ", source).replace("ADDITIONAL_FUNC_PARAMS", more)
    found = {}
    for symbol, function in _EXPORT.findall(source):
        name = function.rpartition("::")[2]
        # A result may have spaces between its template arguments.
        declaration = re.search(rf"\b(\w[\w:]*(?:<[^;{{}}()]*>)?)\s+{name}\s*\(([^)]*)\)", source)
        assert declaration, f"{function} is exported and not declared"
        found[symbol] = abi_type(declaration[1]), _split(declaration[2])
    return found


def _split(text: str) -> list[str]:
    """Parameters, split at the commas outside of template arguments."""
    parts, depth = [""], 0
    for char in text:
        depth += (char == "<") - (char == ">")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return [part for part in parts if part.strip()]


def _without_name(parameter: str) -> str:
    return re.sub(r"\s+\w+\s*(=.*)?$", "", parameter.strip())


# The generator of each attention family in `jit/attention/modules.py`; the first there is.
_GENERATORS = {
    "single_decode": ("gen_single_decode_module",),
    "single_prefill": ("gen_single_prefill_module",),
    "batch_decode": ("gen_batch_decode_module",),
    "batch_prefill": ("_gen_batch_prefill_module", "gen_batch_prefill_module"),
    "batch_prefill_with_attention_sink": ("gen_batch_prefill_attention_sink_module",),
}

_DTYPES = {
    "float": "float32", "uint8_t": "uint8", "int32_t": "int32", "uint16_t": "uint16",
    "uint32_t": "uint32",
}  # fmt: skip


class Added(NamedTuple):
    """A parameter that a generator adds: as C++ has it, and the dtype of a tensor's elements."""

    declaration: str
    name: str
    dtype: str


def added_parameters(modules: str, family: str, backend: str, fp8: bool) -> list[Added]:
    """What a family's generator puts for ADDITIONAL_FUNC_PARAMS.

    Its arguments are lists of names and dtypes: of tensors, then of numbers.
    """
    if family not in _GENERATORS:
        return []
    functions = {f.name: f for f in ast.parse(modules).body if isinstance(f, ast.FunctionDef)}
    generator = next(functions[name] for name in _GENERATORS[family] if name in functions)
    known: dict[str, Any] = {"backend": backend, "fp8_enabled": fp8}
    call = _run(generator.body, known)
    assert isinstance(call, ast.Call)
    values = [_list(argument, known) for argument in call.args]
    tensors, tensor_types, numbers, number_types = (v for v in values if v is not None)
    optional = ("ffi::Tensor", "Optional<ffi::Tensor>")
    parts = [
        Added(f"{optional[name.startswith('maybe')]} {name}", name, _DTYPES[kind])
        for name, kind in zip(tensors, tensor_types, strict=True)
    ]
    parts += [
        Added(f"{kind} {name}", name, "") for kind, name in zip(number_types, numbers, strict=True)
    ]
    return parts


def _run(body: list[ast.stmt], known: dict[str, Any]) -> ast.expr | None:
    for statement in body:
        if isinstance(statement, ast.Return):
            return statement.value
        if isinstance(statement, ast.If):
            returned = _run(statement.body if _holds(statement.test, known) else statement.orelse,
                            known)  # fmt: skip
            if returned is not None:
                return returned
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            words = _list(statement.value, known)
            if words is not None:
                known[statement.targets[0].id] = words
    return None


def _holds(test: ast.expr, known: dict[str, Any]) -> bool:
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return not _holds(test.operand, known)
    if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Eq):
        return bool(known[ast.unparse(test.left)] == ast.literal_eval(test.comparators[0]))
    return bool(known[ast.unparse(test)])


def _list(value: ast.expr, known: dict[str, Any]) -> list[str] | None:
    """A list of words, written out or by its name."""
    if isinstance(value, ast.Name):
        found = known.get(value.id)
        return found if isinstance(found, list) else None
    if isinstance(value, ast.List) and all(isinstance(part, ast.Constant) for part in value.elts):
        return list(ast.literal_eval(value))
    return None
