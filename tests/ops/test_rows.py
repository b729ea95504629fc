"""What is derived from rows: signatures, docstrings, Python parameters, public names."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import fi_ffi
from fi_ffi import reference
from fi_ffi.ops import functions
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.call.row import Row, Rule, Scalar, Tensor, default_of
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.matmul.rows import ROWS as OF_PRODUCTS
from fi_ffi.ops.moe.lora import ROWS as OF_ADAPTERS
from fi_ffi.ops.plans.rows import ROWS as OF_PLANS
from fi_ffi.ops.table import ROWS
from fi_ffi.ops.table.comm import OPS as OF_RANKS
from fi_ffi.reference import EXACT, MOVES, norm

ROW_IDS = [f"{row.name} {row.releases}" for row in ROWS]


@pytest.mark.parametrize("row", ROWS, ids=ROW_IDS)
def test_every_row_is_public_and_has_a_reference_and_a_formula(row):
    assert getattr(fi_ffi, row.name) is OPS[row.name]
    assert row.name in fi_ffi.__all__
    formula = reference.from_formula(row.formula, [arg.name for arg in row.args])
    assert formula or row.reference in reference.kernels()[row.module]
    assert (row.formula in EXACT) != (row.formula in MOVES)


@pytest.mark.parametrize("row", ROWS, ids=ROW_IDS)
def test_python_signature_is_the_abis_order_and_then_the_stream(row):
    parameters = inspect.signature(Op(row)).parameters
    assert list(parameters) == [arg.name for arg in row.given] + ["stream"]
    assert parameters["stream"].kind is inspect.Parameter.KEYWORD_ONLY
    for arg, written in zip(row.given, row.defaults, strict=True):
        default = parameters[arg.name].default
        assert (default is inspect.Parameter.empty) == (written is None)
        assert written in (None, repr(default))


@pytest.mark.parametrize("row", ROWS, ids=ROW_IDS)
def test_docstring_tells_everything(row):
    doc = Op(row).__doc__
    for arg in row.given:
        assert re.search(rf"^    {arg.name} \([^:]+\):\s+\S", doc, re.MULTILINE), arg.name
    for wanted in (row.source, row.module, row.releases, "Raises", *row.dtypes):
        assert wanted in doc
    for names in row.dtypes.values():
        assert all(name in doc for name in names)
    assert max(map(len, doc.splitlines())) <= 100
    assert "<function" not in doc  # the words of a rule that computes them


EVERY_ROW = [*ROWS, *OF_RANKS, *OF_PLANS, *OF_PRODUCTS, *OF_ADAPTERS]


@pytest.mark.parametrize("row", EVERY_ROW, ids=[f"{row.name} {row.releases}" for row in EVERY_ROW])
def test_arguments_have_names_of_their_own_by_which_rules_refuse_them(row):
    """Those that no caller gives as well; an error names what the caller can change."""
    names = [arg.name for arg in row.args]
    assert len({*names}) == len(names)
    given = {arg.name for arg in row.given}
    # The op has it from 0.6.8 on.
    given |= {"deterministic"} if row.name == "radix_topk_page_table_transform" else set()
    assert {rule.argument for rule in row.requires if isinstance(rule, Rule)} <= given


def test_a_new_row_and_its_formula_are_a_function_at_once(monkeypatch):
    row = Row(
        "mine", "norm", "rmsnorm", "here", "Mine.",
        (
            Tensor("y", "n h", "T", "result", writes=True, reads=False),
            Tensor("x", "n h", "T", "argument"),
            Tensor("w", "h", "T", "scale"),
            Scalar("epsilon", float, 0.0, "epsilon"),
            Scalar("pdl", bool, False, "unused"),
        ),
        {"T": ("float16",)}, ">=0",
    )  # fmt: skip
    import numpy as np

    monkeypatch.setitem(norm.EXACT, "mine", lambda a: {"y": (a["x"] / 2 * a["w"], None)})
    y, x, w = (np.ones(s, np.float16) for s in ((2, 8), (2, 8), (8,)))
    Op(row)(y=y, x=2 * x, w=3 * w)
    assert (y == 3).all()
    with pytest.raises(fi_ffi.ArgumentError, match="mine: argument `w`"):
        Op(row)(y, x, w[:4])


def test_stubs_have_each_ops_own_parameters():
    """What mypy tells users of an op is what its call takes: names, types, defaults."""
    stubs = ast.parse(Path(functions.__file__).with_suffix(".pyi").read_text())
    calls = {
        node.name: ast.unparse(node.body[0].args)
        for node in stubs.body if isinstance(node, ast.ClassDef)
    }  # fmt: skip
    classes = {
        node.target.id: node.annotation.id
        for node in stubs.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.annotation, ast.Name)
    }
    assert classes.keys() == OPS.keys()
    for name, op in OPS.items():
        namespace = {}
        exec(
            f"from __future__ import annotations\ndef call({calls[classes[name]]}): ...", namespace
        )
        told = inspect.signature(namespace["call"]).parameters
        own = inspect.signature(op).parameters
        assert list(told) == ["self", *own], name
        for parameter in own.values():
            stub = told[parameter.name]
            assert stub.kind == parameter.kind, (name, parameter)
            is_given = stub.default is inspect.Parameter.empty
            assert is_given == (parameter.default is inspect.Parameter.empty), (name, parameter)
            assert stub.default in (parameter.default, ...), (name, parameter)
        for arg in op.row.given:
            assert told[arg.name].annotation == _annotation(arg), (name, arg.name)
        assert told["stream"].annotation == "object"


def _annotation(arg):
    if isinstance(arg, Scalar):
        return f"{arg.type.__name__} | None" if arg.size_of else arg.type.__name__
    if isinstance(arg, Tensor):
        return "TensorLike | None" if default_of(arg) else "TensorLike"
    return f"Literal[{', '.join(map(repr, getattr(arg, 'words', ('NHD', 'HND'))))}]"
