"""FlashInfer-Bench definitions: what `fi-ffi trace` writes, and that their references run.

`tests/releases/test_traces.py` holds them against FlashInfer's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner, Result

import fi_ffi
from fi_ffi.cli import main
from fi_ffi.cli.replaying.compare import definition_of
from fi_ffi.cli.replaying.recorded import load
from fi_ffi.cli.tracing import attention, source
from fi_ffi.cli.tracing.definition import define
from fi_ffi.cli.tracing.source import NoSource, source_of
from fi_ffi.cli.tracing.subject import names, of_dump
from fi_ffi.errors import FiFfiError
from fi_ffi.ops.watch.dump import BEFORE
from fi_ffi.reference.exact import EXACT, MOVES

from plan_calls import KINDS, PAGE, Case, indptr
from prepared_calls import EVERY_OP, draw, placed


def trace(*arguments: object, code: int = 0) -> Result:
    done = CliRunner().invoke(main, ["trace", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def traced(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(trace(*arguments).stdout)
    return found


def dumped(folder: Path, call: Callable[[], object]) -> list[Path]:
    with fi_ffi.call_log(0, dump=folder):
        call()
    return sorted(folder.glob(f"*{BEFORE}"))


def run_of(definition: dict[str, Any]) -> Callable[..., Any]:
    """What its reference defines, in a module of its own."""
    names: dict[str, Any] = {}
    exec(compile(definition["reference"], definition["name"], "exec"), names)
    run: Callable[..., Any] = names["run"]
    return run


def results(definition: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """What `run` gives, by the names of the outputs."""
    found = run_of(definition)(*(inputs[name] for name in definition["inputs"]))
    outputs = [*definition["outputs"]]
    return dict(zip(outputs, (found,) if len(outputs) == 1 else found, strict=True))


def check_shapes(definition: dict[str, Any], inputs: dict[str, Any], got: dict[str, Any]) -> None:
    """Axes are what arrays have; constant ones their values."""
    sizes: dict[str, int] = {}
    for of, arrays in (("inputs", inputs), ("outputs", got)):
        for name, entry in definition[of].items():
            if entry["shape"] is None:
                continue
            array = arrays[name]
            assert len(entry["shape"]) == array.ndim
            assert entry["dtype"] == array.dtype.name
            for axis, size in zip(entry["shape"], array.shape, strict=True):
                assert sizes.setdefault(axis, size) == size, axis
    assert definition["axes"].keys() == sizes.keys()
    for name, axis in definition["axes"].items():
        assert axis == (
            {"type": "var"} if axis["type"] == "var" else {"type": "const", "value": sizes[name]}
        )
    for constraint in definition.get("constraints", ()):
        assert eval(constraint, {}, sizes), constraint


# ---------------------------------------------------------------- typed ops


@pytest.mark.parametrize(("op", "dtypes", "more"), EVERY_OP)
def test_every_op(tmp_path, op, dtypes, more):
    """Its reference gives what the formula does, rounded."""
    (made,) = placed(draw(op.row, dtypes, more), more, 1)
    (path,) = dumped(tmp_path, lambda: op(**made.values))
    subject = of_dump(path)
    case = definition_of(op.row, load(path), fill=0)
    if not all(isinstance(of, tuple) for of in case.expected.values()):
        with pytest.raises(NoSource):
            define(subject)
        return
    definition = define(subject)
    assert json.loads(json.dumps(definition)) == definition
    published = subject.published
    inputs = {published.inputs.get(name, name): of for name, of in case.arrays.items()}
    inputs |= {name: value for name, value in subject.values.items() if name not in inputs}
    got = results(definition, inputs)
    for name, expected in case.expected.items():
        if name not in subject.tensors:
            continue
        value = got[published.outputs.get(name, name)]
        assert isinstance(expected, tuple)
        wanted = expected[0] if expected[1] is None else expected[0].astype(value.dtype)
        assert value.dtype == case.arrays[name].dtype
        assert value.tobytes() == np.ascontiguousarray(wanted).tobytes(), name
    check_shapes(definition, {**inputs}, got)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_references_take_torchs_tensors(tmp_path, dtype):
    torch = pytest.importorskip("torch")

    def tensor(array: np.ndarray) -> Any:
        bits = torch.from_numpy(array.view(f"i{array.itemsize}"))
        return bits.view(getattr(torch, array.dtype.name))

    def made_of(op: Any, variables: dict[str, str], folder: Path) -> Path:
        (made,) = placed(draw(op.row, variables, {}), {}, 1)
        (path,) = dumped(folder, lambda: op(**made.values))
        return path

    for name in ("rmsnorm", "fused_add_rmsnorm", "append_paged_kv_cache", "rmsnorm_quant"):
        op = fi_ffi.OPS[name]
        variables = {variable: of[0] for variable, of in op.row.dtypes.items()} | {"T": dtype}
        path = made_of(op, variables, tmp_path / name)
        definition, subject = define(of_dump(path)), of_dump(path)
        case = definition_of(op.row, load(path), fill=0)
        inputs = {subject.published.inputs.get(n, n): of for n, of in case.arrays.items()}
        got = results(definition, {n: tensor(array.copy()) for n, array in inputs.items()})
        plain = results(definition, inputs)
        for output, value in got.items():
            assert str(value.dtype) == f"torch.{definition['outputs'][output]['dtype']}"
            with np.errstate(invalid="ignore"):  # any bits are moved, signalling NaN as well
                wanted = plain[output].astype(np.float64)
            wide = value.to(torch.float64).numpy()
            assert np.array_equal(wide, wanted, equal_nan=True)


def test_what_a_definition_says():
    found = traced("rmsnorm", "--size", "h=96", "--dtype", "T=bfloat16")
    assert [*found] == [
        "name", "description", "op_type", "tags", "axes", "inputs", "outputs", "reference",
    ]  # fmt: skip
    assert found["name"] == "rmsnorm_h96"
    assert found["op_type"] == "rmsnorm"
    assert found["tags"] == ["fi_api:flashinfer.norm.rmsnorm", "fi_ffi:rmsnorm"]
    assert found["axes"] == {
        "batch_size": {"type": "var"},
        "hidden_size": {"type": "const", "value": 96},
    }
    assert found["inputs"]["weight"]["shape"] == ["hidden_size"]
    assert found["outputs"]["output"]["dtype"] == "bfloat16"
    x = np.random.default_rng().standard_normal((7, 96)).astype(ml_dtypes.bfloat16)
    out = run_of(found)(x, np.ones(96, ml_dtypes.bfloat16)).astype(np.float64)
    assert np.allclose((out**2).mean(axis=1), 1, atol=0.02)


def test_numbers_are_part_of_it():
    """Other than the default they are told and named, and the reference has them."""
    usual, other = (
        traced("rmsnorm", "--size", "h=64", *more) for more in ((), ("--set", "eps=0.5"))
    )
    assert other["name"] == "rmsnorm_h64_eps0p5"
    assert other["description"].endswith("Here eps = 0.5.")
    assert "Here" not in usual["description"]
    x, w = np.full((1, 64), 0.5, np.float16), np.ones(64, np.float16)
    assert abs(float(run_of(usual)(x, w)[0, 0]) - 1) < 1e-3
    assert abs(float(run_of(other)(x, w)[0, 0]) - 0.5 / 0.75**0.5) < 1e-3


def test_several_are_written_to_files(tmp_path):
    x = np.ones((4, 16), np.float16)

    def calls():
        for rows in (4, 4, 2):
            fi_ffi.rmsnorm(np.zeros_like(x[:rows]), x[:rows], x[0])
        fi_ffi.fused_add_rmsnorm(x, x.copy(), x[0].copy())

    paths = dumped(tmp_path / "dumps", calls)
    done = trace(*paths, "-o", tmp_path / "out")
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == ["fused_add_rmsnorm_h16.json", "rmsnorm_h16.json"]
    assert [*map(Path, done.output.split())] == files[::-1]
    for file in files:
        found = json.loads(file.read_text())
        assert found["name"] == file.stem
        run_of(found)
    many = json.loads(trace(*paths).stdout)
    assert [of["name"] for of in many] == ["rmsnorm_h16", "fused_add_rmsnorm_h16"]


# ---------------------------------------------------------------- attention


def published_inputs(case: Case, definition: dict[str, Any]) -> dict[str, Any]:
    """A batch's arrays by what definitions call them."""
    arrays = {**case.memory}
    arrays |= {
        "k_cache": arrays.get("paged_k_cache"), "v_cache": arrays.get("paged_v_cache"),
        "qo_indptr": case.qo_indptr, "kv_indices": case.indices, "kv_last_page_len": case.last,
        "kv_indptr": indptr(case.kv_lens) if case.kind == "ragged" else case.page_indptr,
        "kv_len": np.int32(case.kv_lens),
    }  # fmt: skip
    arrays["sm_scale"] = (128 + 64) ** -0.5 if case.kind == "mla" else 64**-0.5
    return {name: arrays[name] for name in definition["inputs"]}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_runs_of_plans(tmp_path, kind, causal):
    if causal and kind == "decode":
        pytest.skip("decode has no other")
    options = {"causal": True} if causal else {}
    case = Case(kind, **options)
    paths = dumped(tmp_path, lambda: case.run(case.plan()))
    case.check(**options)
    definition = define(of_dump(paths[1]))
    name = {"ragged": "gqa_ragged", "paged": "gqa_paged_prefill", "decode": "gqa_paged_decode",
            "mla": "mla_paged_prefill"}[kind]  # fmt: skip
    assert definition["name"].startswith(name)
    assert definition["name"].endswith("_causal") == causal
    inputs = published_inputs(case, definition)
    got = results(definition, inputs)
    # Its result in the place of the plan's is right as well.
    case.memory["o"][...], case.memory["lse"][...] = got["output"], got["lse"]
    case.check(**options)
    # Room for indices that the batch does not use is part of the plan's array, and not of this.
    check_shapes(definition, inputs, got)
    case.memory["o"][0] += 1
    with pytest.raises(AssertionError):
        case.check(**options)


def test_mla_of_one_query_a_request_is_decoding(tmp_path):
    case = Case("mla", qo_lens=(1, 1, 1, 1))
    paths = dumped(tmp_path, lambda: case.run(case.plan()))
    definition = define(of_dump(paths[1]))
    assert definition["name"] == f"mla_paged_decode_h16_ckv512_kpe64_ps{PAGE}"
    inputs = published_inputs(case, definition)
    assert "qo_indptr" not in inputs and "total_q" not in definition["axes"]
    case.memory["o"][...] = results(definition, inputs)["output"]
    case.check()


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_single_requests(tmp_path, layout):
    rng = np.random.default_rng()
    q, k, v = (
        rng.standard_normal(shape).astype(np.float16) for shape in ((5, 4, 64), *[(9, 2, 64)] * 2)
    )
    tmp, out, lse = np.zeros(64, np.uint8), np.zeros_like(q), np.zeros((5, 4), np.float32)
    if layout == "HND":
        k, v = (np.ascontiguousarray(x.transpose(1, 0, 2)) for x in (k, v))

    def calls():
        fi_ffi.single_prefill(
            q, k, v, tmp, out, lse, causal=True, kv_layout=layout, sm_scale=0.25, window_left=2
        )
        fi_ffi.single_decode(q[0], k, v, tmp, out[0], kv_layout=layout)

    prefill, decode = (define(of_dump(path)) for path in dumped(tmp_path, calls))
    decoded, kept = out[0].copy(), out[1:].copy()
    hnd = {"k": k, "v": v}
    nhd = {name: x.transpose(1, 0, 2) for name, x in hnd.items()} if layout == "HND" else hnd
    # Prefill's kernels see tokens before heads in either layout.
    got = results(prefill, {"q": q, **nhd})
    assert [*prefill["outputs"]] == ["output", "lse"]
    assert np.abs(got["output"][1:].astype(np.float64) - kept).max() < 4e-3
    assert np.abs(got["lse"] - lse).max() < 1e-4
    got = results(decode, {"q": q[0], **hnd})
    assert np.abs(got["output"].astype(np.float64) - decoded).max() < 4e-3
    order = ["kv_len", "num_kv_heads", "head_dim"]
    assert prefill["inputs"]["k"]["shape"] == order
    if layout == "HND":
        order[:2] = order[1::-1]
    assert decode["inputs"]["k"]["shape"] == order
    assert ("hnd" in decode["name"]) == (layout == "HND")


def test_options_that_have_no_word(tmp_path):
    case = Case("paged", use_custom_mask=True)
    mask = np.full(200, 0xFF, np.uint8)

    def run():
        plan = case.plan()
        need = int(plan.mask_indptr[-1]) if hasattr(plan, "mask_indptr") else len(mask)
        case.run(plan, custom_mask=mask[:need])

    try:
        paths = dumped(tmp_path, run)
    except fi_ffi.ArgumentError as error:  # it says how many bytes it wants
        need = int(str(error.expected).split()[0])
        paths = dumped(tmp_path / "again", lambda: case.run(case.plan(), custom_mask=mask[:need]))
    with pytest.raises(fi_ffi.ArgumentError, match="maybe_custom_mask.*have no word for it"):
        define(of_dump(paths[-1]))


def test_encodings_that_only_the_module_tells(tmp_path):
    """All of such a call's numbers are as without."""
    case = Case("decode", pos_encoding_mode="ROPE_LLAMA")
    paths = dumped(tmp_path, lambda: case.run(case.plan()))
    with pytest.raises(fi_ffi.ArgumentError, match="pos_encoding_mode.*got 1"):
        define(of_dump(paths[1]))


# ---------------------------------------------------------------- of an op and sizes

ATTENTION = ("num_qo_heads=8", "num_kv_heads=2", "head_dim_qk=64")
BY_NAME = {
    "single_decode": (*ATTENTION,), "single_prefill": (*ATTENTION,),
    "gqa_paged_decode": (*ATTENTION, "page_size=16"),
    "gqa_paged_prefill": (*ATTENTION, "page_size=16"), "gqa_ragged": (*ATTENTION,),
    "mla_paged_decode": ("num_heads=16", "page_size=1"),
    "mla_paged_prefill": ("num_heads=16", "page_size=1"),
    "gdn_prefill": ("num_q_heads=4", "num_v_heads=8"),
    "append_paged_mla_kv_cache": ("page_size=4",), "silu_and_mul": ("d=64",),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_NAME)
def test_definitions_by_name(name):
    sizes = [word for size in BY_NAME[name] for word in ("--size", size)]
    found = traced(name, *sizes)
    assert found["name"].startswith(name)
    assert callable(run_of(found))
    assert "_m1" not in found["name"] and "0p0" not in found["name"], "what is not asked for"


def test_attention_by_name_is_what_a_call_gives(tmp_path):
    case = Case("decode", pos_encoding_mode="NONE", window_left=3)
    paths = dumped(tmp_path, lambda: case.run(case.plan()))
    called = define(of_dump(paths[1]))
    sizes = ("num_qo_heads=4", "num_kv_heads=2", "head_dim_qk=64", f"page_size={PAGE}")
    asked = traced(
        "gqa_paged_decode", *(word for size in sizes for word in ("--size", size)),
        "--with", "maybe_lse", "--set", "window_left=3",
    )  # fmt: skip
    for key in ("name", "description", "op_type", "tags", "axes", "inputs", "outputs"):
        assert called[key] == asked[key], key


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("rmsnrom",), "rmsnrom, expected a dumped call, or one of"),
        (("rmsnorm",), "argument `size`: got none of h"),
        (("rmsnorm", "--size", "h=many"), "argument `size`: got h=many"),
        (("rmsnorm", "--size", "h=8", "--dtype", "T=float64"), "got T=float64, expected float16"),
        (("rmsnorm", "--size", "h=8", "--dtype", "X=float16"), "argument `dtype`: got X"),
        (("rmsnorm", "--size", "h=8", "--set", "epsilon=1"), "argument `set`: got epsilon"),
        (("gqa_ragged", "--size", "num_qo_heads=8"), "head_dim_qk, num_kv_heads"),
    ],
)
def test_what_cannot_be_traced(arguments, told):
    assert told in trace(*arguments, code=1).output


def test_options_are_pairs():
    assert "is not NAME=VALUE" in trace("rmsnorm", "--size", "h", code=2).output


def test_a_plan_and_a_run_without_its_plan(tmp_path):
    case = Case("mla")
    plan = case.plan()
    (run,) = dumped(tmp_path / "run", lambda: case.run(plan))
    with pytest.raises(fi_ffi.ArgumentError, match="plan was made while the log was open"):
        of_dump(run)
    (planning,) = dumped(tmp_path / "plan", case.plan)
    with pytest.raises(fi_ffi.ArgumentError, match="no plan"):
        of_dump(planning)


def test_every_name_is_told():
    assert {*fi_ffi.OPS, *BY_NAME} <= {*names()}


# ---------------------------------------------------------------- sources


def test_every_formula_stands_for_itself():
    """Its text alone defines it, with nothing of the package."""
    for name, formula in {**EXACT, **MOVES, **attention.EXACT}.items():
        try:
            text = source_of(formula)
        except NoSource:
            assert name not in ("rmsnorm", "gdn_prefill", "batch_mla.run")
            continue
        assert "import fi_ffi" not in text and "from fi_ffi" not in text
        made: dict[str, Any] = {}
        exec(compile(text, name, "exec"), made)
        assert callable(made[formula.__name__])


def test_what_has_no_text_of_its_own():
    def local() -> None: ...

    for function in (local, len, json.dumps, lambda: None, Case.check):
        with pytest.raises(NoSource):
            source_of(function)
    assert issubclass(NoSource, FiFfiError)


def test_text_that_is_taken(monkeypatch):
    """What is used is in it, before what uses it at once; what is not used, and annotations,
    are not."""
    import sys
    import types

    text = """
from __future__ import annotations

import math as m
import json
from itertools import pairwise
from typing import Any

_A = 2.0
_B, _C = _A * 2, [0]
_C[0] = 1
_D = []
for _ in range(3):
    _D.append(_)


def decorated(function: Any) -> Any:
    return function


class Kept:
    size: Any = _B


@decorated
def used(x: json.JSONDecoder = _C) -> Any:
    return m.sqrt(x[0]) + Kept.size


def unused() -> None:
    return json


def unclear() -> list:
    return _D


def formula(a: dict[str, Any]) -> float:
    return used() + len(list(pairwise(a))) + (formula(a) if not a else 0)
"""
    module = types.ModuleType("fi_ffi.reference.pretended")
    exec(compile(text, "pretended", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(source.inspect, "getsource", lambda _: text)
    source._module.cache_clear()
    try:
        found = source_of(module.formula)
        with pytest.raises(NoSource, match="_D of fi_ffi.reference.pretended"):
            source_of(module.unclear)
    finally:
        source._module.cache_clear()
    assert "json" not in found.replace("json.JSONDecoder", "")
    assert "unused" not in found
    assert found.count("_B, _C =") == 1
    made: dict[str, Any] = {}
    exec(found, made)
    assert made["formula"]({1: 2, 3: 4}) == 1 + 4 + 1
