"""Names and calls of other libraries, or nearly right ones: the errors say what to use."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import fi_ffi
from fi_ffi.catalogue import api_map
from fi_ffi.errors import ArgumentError, ArgumentTypeError
from fi_ffi.ops.call.row import Required, Scalar
from fi_ffi.ops.functions import OPS

HINTS = {
    "BatchDecodeWithPagedKVCacheWrapper":
        "; FlashInfer's BatchDecodeWithPagedKVCacheWrapper is fi_ffi.BatchDecodePlan here "
        "(for tensor cores, `BatchPrefillPlan`)",
    "BatchPrefillWithPagedKVCacheWrapper": "is fi_ffi.BatchPrefillPlan here",
    "BatchMLAPagedAttentionWrapper": "is fi_ffi.BatchMlaPlan or fi_ffi.module(\"mla\").entry(",
    "single_decode_with_kv_cache": "is fi_ffi.single_decode here",
    "trtllm_fmha_v2_prefill": 'is fi_ffi.module("fmha_v2").entry("run") here',
    "rms_norm": "; use fi_ffi.rmsnorm",
    "RMSNorm": "; use fi_ffi.rmsnorm",
    "top_p_top_k_sampling_from_probs": "; use fi_ffi.top_k_top_p_sampling_from_probs",
    "BatchDecodeWithPagedKvCacheWrapper": "is fi_ffi.BatchDecodePlan here",
    "single_prefil": "; the nearest: ",
    "softmx": "; the nearest: softmax",
}  # fmt: skip


@pytest.mark.parametrize("name", HINTS)
def test_a_name_that_is_not_here_is_found(name: str) -> None:
    with pytest.raises(AttributeError) as caught:
        getattr(fi_ffi, name)
    text = str(caught.value)
    assert text.startswith(f"module 'fi_ffi' has no attribute {name!r}; ")
    assert HINTS[name] in text and caught.value.name == name


def test_every_name_of_flashinfer_gets_an_answer() -> None:
    """What the table says of it: an op's name, an entry, or why there is none."""
    names = [row for row in api_map.rows() if not row.section.startswith("vLLM: ")]
    assert len(names) > 300
    for row in names:
        if hasattr(fi_ffi, row.name):
            continue
        told = api_map.hint(row.name, fi_ffi.__all__)
        assert row.name in told, row.name
        assert any(f"fi_ffi.{op}" in told for op in row.ops) or not row.ops
        assert row.reason in told


def test_a_name_that_is_like_none_is_left_alone() -> None:
    for name in ("zebra", "__path__x", "_private"):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'$"):
            getattr(fi_ffi, name)


def test_an_import_of_a_subpackage_reads_no_table() -> None:
    program = (
        "import sys, fi_ffi\nfrom fi_ffi import comm, loader, reference\nimport fi_ffi.families\n"
        "assert not hasattr(fi_ffi, '__path2__')\n"
        "sys.exit('fi_ffi.catalogue.api_map' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_missing_argument_says_how_the_op_is_called() -> None:
    x = np.ones((2, 8), np.float32)
    how = (
        "softmax(workspace_buffer=None, logits, output, maybe_temperature_arr=None, "
        "temperature_val=1.0, enable_pdl=False, *, stream=None) writes output"
    )
    for call in (fi_ffi.softmax, fi_ffi.softmax.prepare):
        with pytest.raises(ArgumentTypeError) as caught:
            call(x)
        assert str(caught.value) == (
            f"softmax: argument `logits`: got no value, expected one: {how}"
        )
        assert (caught.value.op, caught.value.argument) == ("softmax", "logits")


RMSNORM = (
    "rmsnorm(out, input, weight, eps=1e-06, enable_pdl=False, *, stream=None) writes out: rmsnorm()"
)


@pytest.mark.parametrize("is_first", [True, False])
def test_pythons_own_errors_say_how_the_op_is_called(is_first: bool) -> None:
    """Before and after the first call, whose row is chosen."""
    x, weight = np.ones((2, 8), np.float16), np.ones(8, np.float16)
    if not is_first:
        fi_ffi.rmsnorm(np.empty_like(x), x, weight)
    wrong = {
        "missing 1 required positional argument: 'weight'": ((x, x), {}),
        "positional arguments but ": ((x, x, weight, 1e-6, False, 1, 2), {}),
        "got an unexpected keyword argument 'epsilon'": ((x, x, weight), {"epsilon": 1e-6}),
        "got multiple values for argument 'out'": ((x, x, weight), {"out": x}),
    }
    for words, (args, kwargs) in wrong.items():
        for call in (fi_ffi.rmsnorm, fi_ffi.rmsnorm.prepare):
            with pytest.raises(TypeError) as caught:
                call(*args, **kwargs)
            assert str(caught.value).startswith(f"{RMSNORM} ") and words in str(caught.value)


def test_no_error_shows_a_default_of_fi_ffis_own() -> None:
    """Every required argument that follows an optional one, left out alone."""
    tried = 0
    for name, op in OPS.items():
        row = op.rows[0]
        for arg, default in zip(row.given, row.defaults, strict=True):
            if default != "REQUIRED":
                continue
            value = Required("how")
            error = value.missing(name, arg.name)
            assert isinstance(error, TypeError) and str(error) == (
                f"{name}: argument `{arg.name}`: got no value, expected one: how"
            )
            tried += 1
            use = op.compiled.refuse.number if isinstance(arg, Scalar) else None
            with pytest.raises(ArgumentTypeError, match="got no value, expected one: how"):
                use(arg.name, value) if use else fi_ffi.as_desc(value, name, arg.name)
    assert tried > 20


def test_a_plans_unknown_option_names_the_nearest() -> None:
    indptr, pages = np.array([0, 1], np.int32), np.zeros(1, np.int32)
    common = {"num_qo_heads": 8, "num_kv_heads": 2, "page_size": 16, "device": "cpu"}
    with pytest.raises(TypeError, match="'head_dim_q'; the nearest: head_dim_qk, head_dim_vo"):
        fi_ffi.BatchPrefillPlan(indptr, head_dim_q=64, **common)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="'head_dim_vo'; the nearest: head_dim"):
        fi_ffi.BatchDecodePlan(indptr, pages, pages + 1, head_dim_vo=64, **common)  # type: ignore[call-arg]


def test_a_cascade_takes_either_name_of_a_size() -> None:
    starts, pages = np.array([0, 1], np.int32), np.zeros(1, np.int32)
    options = {"num_qo_heads": 8, "num_kv_heads": 2, "page_size": 16, "device": "cpu"}
    arrays = [starts], [starts], [pages], [pages + 1]
    for name in ("head_dim", "head_dim_qk"):
        plan = fi_ffi.MultiLevelCascadePlan(*arrays, **options, **{name: 64})
        assert plan.levels[0].options.head_dim_qk == 64
        assert fi_ffi.MultiLevelCascadePlan.supports(90, **{name: 64})


def test_an_axis_of_one_size_says_its_shape() -> None:
    probs, tokens = np.full((2, 8), 0.125, np.float32), np.zeros(2, np.int32)
    two = np.zeros(2, np.int64)
    with pytest.raises(ArgumentError, match=r"got int64\[2\] on cpu, expected shape \[1\]$"):
        fi_ffi.sampling_from_probs(
            probs, tokens, np.zeros(2, bool), maybe_seed_arr=two, maybe_offset_arr=two
        )
