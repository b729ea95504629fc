"""The interface a FlashInfer release declares, read from its sources: nothing of them is run."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any, NamedTuple

from packaging.version import Version

from fi_ffi.abi.signature import Signature
from fi_ffi.loader.lock import the_lock
from fi_ffi.loader.sources import Function, Source, read

# Every release the lock pins kernels of, those that changed something since, and the newest one.
RELEASES = sorted(
    {file.release for file in the_lock().kernels}
    | {"0.6.14", "0.6.15", "0.6.16", "0.6.17", "0.7.0", "0.7.1", "0.7.2.post1"},
    key=Version,
)


def exported(source: str, added: Sequence[Added] = (), **defines: str) -> dict[str, Signature]:
    """Every function that a binding source exports, by the exported name."""
    found = _read(source, added, defines)
    return {symbol: function.signature for symbol, function in found.items()}


def methods(source: str) -> dict[str, Function]:
    """The methods of the objects that a binding source's functions return, by name."""
    objects = read([Source("binding", source, {})], is_switch=lambda macro: True).objects
    return {name: method for found in objects.values() for name, method in found.items()}


def parameters(
    source: str, added: Sequence[Added] = (), **defines: str
) -> dict[str, list[str]]:  # fmt: skip
    """What the parameters of every exported function are called."""
    found = _read(source, added, defines)
    return {symbol: [*function.names] for symbol, function in found.items()}


def _read(text: str, added: Sequence[Added], more_defines: dict[str, str]) -> dict[str, Function]:
    """The functions of a source with these parameters added to what a generator adds them to."""
    more = "".join(f", {parameter.declaration}" for parameter in added)
    defines = {"ADDITIONAL_FUNC_PARAMS": more, "PROFILER_FUNC_PARAMS": "", **more_defines}
    source = Source("binding", text, defines)
    return dict(read([source], is_switch=lambda macro: True).exports)


# The generator of each attention family in `jit/attention/modules.py`; the first there is.
_GENERATORS = {
    "batch_attention": ("_gen_batch_attention_module", "gen_batch_attention_module"),
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
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
            annotated = isinstance(statement, ast.AnnAssign)
            target = statement.target if annotated else statement.targets[0]
            words = _list(statement.value, known)
            if words is not None and isinstance(target, ast.Name):
                known[target.id] = words
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
