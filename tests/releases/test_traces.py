"""Definitions of ours beside those that FlashInfer publishes: axes, inputs, outputs, dtypes.

Theirs are made by FlashInfer's own code, from its wheel, with a stand-in for torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fi_ffi.cli import main

RELEASE = "0.6.13"
_FILES = (
    "trace/__init__.py", "trace/template.py", "trace/templates/__init__.py",
    "trace/templates/_init_helpers.py",
    *(f"trace/templates/{name}.py" for name in
      ("activation", "attention", "cascade", "gdn", "norm", "page")),
)  # fmt: skip
# As much of torch as the templates look at: dtypes by name, and tensors' shapes.
_TORCH = """
import sys
import types


class dtype(str):
    pass


class Tensor:
    def __init__(self, shape, kind):
        self.shape, self.ndim, self.dtype = tuple(shape), len(shape), getattr(torch, kind)


class no_grad:
    def __call__(self, function):
        return function


class _Torch(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return dtype(f"torch.{name}")


torch = _Torch("torch")
torch.__path__ = []
torch.Tensor, torch.no_grad, torch.dtype = Tensor, no_grad, dtype
functional = _Torch("torch.nn.functional")
nn = _Torch("torch.nn")
nn.functional, nn.__path__ = functional, []
torch.nn = nn
sys.modules.update({"torch": torch, "torch.nn": nn, "torch.nn.functional": functional})
"""
_ASK = """
import importlib
import json
import sys

import stand_in
from stand_in import Tensor


def value(given):
    # A tensor of a shape and a dtype, or several.
    return tuple(map(value, given)) if isinstance(given[1], list) else Tensor(*given)


found = []
for module, name, api, given in json.load(sys.stdin):
    template = getattr(importlib.import_module(f"flashinfer.trace.templates.{module}"), name)
    tensors = {key: value(of) for key, of in given.items()}
    made = template.build_fi_trace_fn(api)(**tensors)
    made.pop("check", None), made.pop("init", None)
    found.append(made)
json.dump(found, sys.stdout)
"""

B16, F32, I32, I64 = "bfloat16", "float32", "int32", "int64"
_ROWS = {"input": [[7, 128], B16], "weight": [[128], B16]}
_FUSED = {**_ROWS, "residual": [[7, 128], B16]}
_SCALE = {"scale": [[], F32]}
_CACHE = [[9, 16, 2, 64], B16]
_QO, _ONE = [[5, 8, 64], B16], [[8, 64], B16]
_KV = {"k": [[11, 2, 64], B16], "v": [[11, 2, 64], B16]}
_PAGED = {
    "paged_kv_cache": [_CACHE, _CACHE], "kv_indptr": [[6], I32], "kv_indices": [[9], I32],
}  # fmt: skip
_MLA = {
    "q_nope": [[5, 16, 512], B16], "q_pe": [[5, 16, 64], B16], "ckv_cache": [[9, 16, 512], B16],
    "kpe_cache": [[9, 16, 64], B16], "kv_indptr": [[6], I32], "kv_indices": [[9], I32],
}  # fmt: skip
_INDICES = {
    "batch_indices": [[5], I32], "positions": [[5], I32], "kv_indices": [[9], I32],
    "kv_indptr": [[4], I32], "kv_last_page_len": [[3], I32],
}  # fmt: skip
_STATE = {"v_a": [[7, 8, 64], B16], "s_a": [[7, 8], F32],
          "v_b": [[7, 8, 64], B16], "s_b": [[7, 8], F32]}  # fmt: skip
_HEADS = ("num_qo_heads=8", "num_kv_heads=2", "head_dim_qk=64")
_QKV = ("Q=bfloat16", "KV=bfloat16", "O=bfloat16")
_T = ("T=bfloat16",)
_LSE = ("maybe_lse",)

# Our name: FlashInfer's module and template, its arguments; our sizes, dtypes and what is given.
CASES: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...], tuple[str, ...], tuple[str, ...]]]
CASES = {
    "rmsnorm": ("norm", "rmsnorm_trace", _ROWS, ("h=128",), _T, ()),
    "gemma_rmsnorm": ("norm", "gemma_rmsnorm_trace", _ROWS, ("h=128",), _T, ()),
    "fused_add_rmsnorm": ("norm", "fused_add_rmsnorm_trace", _FUSED, ("h=128",), _T, ()),
    "gemma_fused_add_rmsnorm": (
        "norm", "gemma_fused_add_rmsnorm_trace", _FUSED, ("h=128",), _T, (),
    ),
    "rmsnorm_quant": (
        "norm", "rmsnorm_quant_trace", {**_ROWS, **_SCALE}, ("h=128",), _T, (),
    ),
    "fused_add_rmsnorm_quant": (
        "norm", "fused_add_rmsnorm_quant_trace", {**_FUSED, **_SCALE}, ("h=128",), _T, (),
    ),
    "layernorm": (
        "norm", "layernorm_trace",
        {"input": [[7, 128], B16], "gemma": [[128], F32], "beta": [[128], F32]}, ("h=128",),
        _T, (),
    ),
    **{
        name: ("activation", f"{name}_trace", {"input": [[7, 128], B16]}, ("d=64",), _T, ())
        for name in ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul")
    },
    "merge_state": (
        "cascade", "merge_state_trace", _STATE, ("num_heads=8", "head_dim=64"), _T, (),
    ),
    "merge_states": (
        "cascade", "merge_states_trace", {"v": [[7, 3, 8, 64], B16], "s": [[7, 3, 8], F32]},
        ("num_heads=8", "head_dim=64"), _T, (),
    ),
    "append_paged_kv_cache": (
        "page", "append_paged_kv_cache_trace",
        {"append_key": [[5, 2, 64], B16], "append_value": [[5, 2, 64], B16],
         "paged_kv_cache": _CACHE, **_INDICES},
        ("num_kv_heads=2", "head_dim=64", "page_size=16"), _T, (),
    ),
    "append_paged_mla_kv_cache": (
        "page", "append_paged_mla_kv_cache_trace",
        {"append_ckv": [[5, 512], B16], "append_kpe": [[5, 64], B16],
         "ckv_cache": [[9, 16, 512], B16], "kpe_cache": [[9, 16, 64], B16], **_INDICES},
        (), _T, (),
    ),
    "gdn_prefill": (
        "gdn", "gdn_prefill_trace",
        {"q": [[9, 4, 128], B16], "k": [[9, 4, 128], B16], "v": [[9, 8, 128], B16],
         "initial_state": [[2, 8, 128, 128], F32], "g": [[9, 8], F32], "beta": [[9, 8], F32],
         "cu_seqlens": [[3], I64]},
        ("num_q_heads=4", "num_v_heads=8"), _T, ("input_state", "alpha", "beta"),
    ),
    "single_decode": (
        "attention", "single_decode_with_kv_cache_trace", {"q": _ONE, **_KV}, _HEADS, _QKV, (),
    ),
    "single_prefill": (
        "attention", "single_prefill_with_kv_cache_trace", {"q": _QO, **_KV}, _HEADS, _QKV, (),
    ),
    "gqa_paged_decode": (
        "attention", "gqa_paged_decode_trace", {"q": _QO, **_PAGED},
        (*_HEADS, "page_size=16"), _QKV, _LSE,
    ),
    "gqa_paged_prefill": (
        "attention", "gqa_paged_prefill_trace",
        {"q": _QO, **_PAGED, "qo_indptr": [[6], I32]}, (*_HEADS, "page_size=16"), _QKV, _LSE,
    ),
    "gqa_ragged": (
        "attention", "gqa_ragged_prefill_trace",
        {"q": _QO, **_KV, "qo_indptr": [[6], I32], "kv_indptr": [[6], I32]}, _HEADS, _QKV, _LSE,
    ),
    "mla_paged_decode": (
        "attention", "mla_paged_decode_trace", _MLA, ("num_heads=16", "page_size=16"),
        ("Q=bfloat16", "KV=bfloat16"), _LSE,
    ),
    "mla_paged_prefill": (
        "attention", "mla_paged_prefill_trace", {**_MLA, "qo_indptr": [[6], I32]},
        ("num_heads=16", "page_size=16"), ("Q=bfloat16", "KV=bfloat16"), _LSE,
    ),
}  # fmt: skip

# Where ours are not theirs, and why.
# Theirs take every page as full.
_LENGTHS = {"kv_last_page_len": (["batch_size"], I32)}
_KV_LEN = {"kv_len": (["batch_size"], I32)}
_BATCH = {"batch_size": ("var", None)}
MORE_INPUTS: dict[str, dict[str, Any]] = {
    "gqa_paged_decode": _LENGTHS, "gqa_paged_prefill": _LENGTHS, "mla_paged_decode": _KV_LEN,
    "mla_paged_prefill": _KV_LEN,
}  # fmt: skip
MORE_AXES: dict[str, dict[str, Any]] = {
    "gqa_paged_prefill": _BATCH, "mla_paged_prefill": _BATCH,
}  # fmt: skip
# Theirs has the gates' parameters, which the kernel is not given.
FEWER_INPUTS = {"gdn_prefill": ("A_log", "dt_bias")}
# Theirs takes the first input's dtype for that of the output that was given.
_QUANTISED = {"out": (["batch_size", "hidden_size"], "float8_e4m3fn")}
OUTPUTS = {"rmsnorm_quant": _QUANTISED, "fused_add_rmsnorm_quant": _QUANTISED}
# Theirs has one name for keys and values together.
_TWO_CACHES = {"append_paged_kv_cache": ("paged_kv_cache", ("paged_k_cache", "paged_v_cache"))}


@pytest.fixture(scope="module")
def theirs(sources, tmp_path_factory) -> dict[str, Any]:
    """FlashInfer's definitions of the same calls."""
    folder: Path = tmp_path_factory.mktemp("flashinfer")
    (folder / "stand_in.py").write_text(_TORCH)
    package = folder / "flashinfer"
    for name in _FILES:
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Of the package itself, which would import every template, nothing is needed.
        path.write_text("" if name.endswith("__init__.py") else sources(RELEASE, name))
    (package / "__init__.py").write_text("")
    asked = [[module, name, ours, given] for ours, (module, name, given, *_) in CASES.items()]
    done = subprocess.run(
        [sys.executable, "-c", _ASK], input=json.dumps(asked), cwd=folder, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


def _ours(name: str) -> dict[str, Any]:
    _, _, _, sizes, dtypes, given = CASES[name]
    words = [name]
    for option, values in (("--size", sizes), ("--dtype", dtypes), ("--with", given)):
        words += [word for value in values for word in (option, value)]
    done = CliRunner().invoke(main, ["trace", *words])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _axes(definition: dict[str, Any]) -> dict[str, Any]:
    return {name: (of["type"], of.get("value")) for name, of in definition["axes"].items()}


def _tensors(definition: dict[str, Any], of: str) -> dict[str, Any]:
    return {name: (entry["shape"], entry["dtype"]) for name, entry in definition[of].items()}


@pytest.mark.parametrize("name", CASES)
def test_definitions_are_those_that_flashinfer_publishes(theirs, name):
    mine, other = _ours(name), theirs[name]
    assert mine["op_type"] == other["op_type"]
    assert mine["name"] == other["name"]
    axes = _axes(mine)
    assert axes == _axes(other) | MORE_AXES.get(name, {})
    wanted = {of: _tensors(other, of) for of in ("inputs", "outputs")}
    if name in _TWO_CACHES:
        one, two = _TWO_CACHES[name]
        for of in wanted.values():
            both = of.pop(one)
            of |= dict.fromkeys(two, both)
    for left_out in FEWER_INPUTS.get(name, ()):
        del wanted["inputs"][left_out]
    assert _tensors(mine, "inputs") == wanted["inputs"] | MORE_INPUTS.get(name, {})
    assert _tensors(mine, "outputs") == wanted["outputs"] | OUTPUTS.get(name, {})
    order = [key for key in mine["inputs"] if key in other["inputs"]]
    assert order == [key for key in other["inputs"] if key in order], "the order of run's arguments"
    assert mine["outputs"].keys() == wanted["outputs"].keys()


def test_a_difference_is_seen(theirs):
    mine = _ours("rmsnorm")
    assert _tensors(mine, "inputs") == _tensors(theirs["rmsnorm"], "inputs")
    assert _tensors(mine, "inputs") != _tensors(theirs["fused_add_rmsnorm"], "inputs")
    assert _axes(mine) != _axes(theirs["silu_and_mul"])
