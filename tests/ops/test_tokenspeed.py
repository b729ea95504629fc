"""What is special about the ops of tokenspeed-kernel."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.functions import OPS
from fi_ffi.reference import tokenspeed

from tests.helpers.cases import default_dtypes, make_case
from tests.helpers.inputs import inputs_of
from tests.ops.test_boundaries import WORKSPACES
from tests.ops.test_limits import described


@pytest.mark.parametrize(("n", "h", "size"), WORKSPACES)
def test_bytes_of_topk_topp(n, h, size):
    """As the library's own function told."""
    assert fi_ffi.fused_topk_topp_workspace_size(n, h) == size


def test_bytes_of_topk_topp_refused():
    for wrong in (-1, 1.5, "1", None):
        with pytest.raises(fi_ffi.ArgumentError, match="batch_size"):
            fi_ffi.fused_topk_topp_workspace_size(wrong, 4096)
        with pytest.raises(fi_ffi.ArgumentError, match="vocab_size"):
            fi_ffi.fused_topk_topp_workspace_size(1, wrong)


def test_the_judge_of_topk_topp(rng):
    """It takes what float32 may keep, and no token more, less or other."""
    p = np.sort(rng.uniform(1, 2, 200))[::-1].astype(np.float32).astype(np.float64)
    p /= p.sum()

    def error(count, k, top_p, first=0):
        kept = np.zeros_like(p)
        kept[first : first + count] = p[first : first + count]
        (judged,) = tokenspeed.fused_topk_topp_renorm(
            {"probs": p[None], "top_ks": np.array([k]), "top_ps": np.array([top_p])}
        ).values()
        return judged((kept / max(kept.sum(), 1e-30))[None])[1]

    half = (p[:20].sum() + p[19] / 2) / p[:50].sum()  # between the sums of 20 and of 21
    assert error(21, 50, half) <= 1 and error(50, 50, 1.0) <= 1
    assert min(error(count, 50, half) for count in (20, 22, 50)) > 1
    assert error(21, 50, half, first=1) > 1 and error(51, 50, 1.0) > 1 and error(0, 1, 1.0) > 1


TRANSFERS = [OPS[name] for name in OPS if name.startswith("transfer_kv_")]


@pytest.mark.parametrize("op", TRANSFERS, ids=lambda op: op.row.name)
def test_where_a_cache_may_be(op):
    """Page-locked memory does beside a GPU's, and no other host memory; indices are on the GPU."""
    arrays = [arg.name for arg in op.row.tensors if arg.name[:3] in ("src", "dst")]
    caches = [name for name in arrays if not name.endswith("indices")]

    def error_of(device, *names, beside="cuda:0"):
        on = {name: {"device": device if name in names else beside} for name in arrays}
        try:
            CompiledRow(op.row).check(**described(op.row, **on))
        except fi_ffi.ArgumentError as error:
            return error
        return None

    assert error_of("cuda:0") is None and error_of("cpu", beside="cpu") is None
    for names in (caches[:1], caches[-1:], caches):
        assert error_of("cuda_host", *names) is None and error_of("cuda_managed", *names) is None
        words = "expected cuda:0, or page-locked memory: a TensorDesc on cuda_host"
        error = error_of("cpu", *names)
        assert error.argument == names[0] and words in str(error)
        assert error_of("cuda:1", *names).argument == names[0]
        error = error_of("cuda_host", *names, beside="cpu")  # the CPU's kernels take its own
        assert error.argument == names[0]
    assert error_of("cuda_host", "src_indices").argument == "src_indices"


ROUTES = [name for name in OPS if name.endswith("topk_flash")]


@pytest.mark.parametrize("name", ROUTES)
def test_the_judge_of_routes(name, rng):
    """Nearly every token's experts are told apart from others, in another order too."""
    row = OPS[name].row
    case = make_case(row, inputs_of(row).usual, default_dtypes(row), rng)
    right = {result: of(case, result) for result in case.expected}

    def caught(result, change):
        """The part of the changed tokens, each alone, that are found to be wrong."""
        found = []
        for i in range(100):
            got = right[result].copy()
            change(got[i])
            if (got != right[result]).any():  # not two of those that do nothing
                found.append(case.error(result, got)[1] > 1)
        assert len(found) > 50
        return np.mean(found)

    def turn(row):
        row[[0, -1]] = row[[-1, 0]]

    def other(row):
        row[-1] = next(e for e in range(256) if e not in row)

    def same(row):
        row[0] = row[1]

    def idle(row):
        row[np.argmax(row)] = -1

    for result, got in right.items():
        assert case.error(result, got)[1] <= 1
    for change in (turn, other, same, idle):
        assert caught("topk_indices", change) >= 0.95, change.__name__
    for factor in (1 + 2.0**-12, np.nan, np.inf, 0):
        assert caught("topk_weights", lambda row, factor=factor: row.__imul__(factor)) >= 0.95


def of(case, result):
    """A right result, as its dtype has it."""
    expected = case.expected[result]
    value = expected[0] if isinstance(expected, tuple) else expected.value()
    return np.asarray(value).astype(case.arrays[result].dtype)
