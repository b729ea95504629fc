"""What is special about the ops of tokenspeed-kernel."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.functions import OPS
from fi_ffi.reference import EXACT, tokenspeed
from fi_ffi.reference.formula import as_inputs

from tests.helpers.cases import default_dtypes, make_case
from tests.helpers.every_op import check_on
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


@pytest.mark.parametrize("is_ep", [False, True])
@pytest.mark.parametrize("block", [8, 16, 64])
@pytest.mark.parametrize(("tokens", "experts"), [(1, 5), (33, 5), (90, 70)])
@pytest.mark.parametrize("group", [0, 32, 64, 128])
def test_experts_in_4_bits(machine, rng, tokens, experts, block, is_ep, group):
    """Weights packed, routes in blocks, and their products, each by the op that is for it: MXFP4,
    or integers of so many rows with one scale."""
    name = f"moe_wna16_marlin_gemm_bf16{'_ep' * is_ep}{'_uint4b8' * bool(group)}"
    for op in ("gptq_marlin_repack", "moe_align_block_size", name):
        machine.need(OPS[op].row)
    top_k, k, n = 2, 256, 128

    def call(op, written, **arguments):
        arrays = {key: x for key, x in arguments.items() if isinstance(x, np.ndarray)}
        placed = {key: machine.place(array) for key, array in arrays.items()}
        descs = {key: array.desc() for key, array in placed.items()}
        OPS[op](**arguments | descs, stream=machine.stream)
        machine.synchronize()
        return [placed[key].get() for key in written]

    codes = rng.integers(0, 16, (experts, k, n))
    packed = (codes.reshape(experts, k // 8, 8, n) << 4 * np.arange(8)[:, None]).sum(axis=2)
    weights = np.stack([
        *(call("gptq_marlin_repack", ["out"], b_q_weight=one.astype(np.uint32).view(np.int32),
               out=np.zeros((k // 16, 2 * n), np.int32), num_bits=4)[0] for one in packed)
    ])  # fmt: skip
    dtype = ml_dtypes.bfloat16 if group else ml_dtypes.float8_e8m0fnu
    each = rng.uniform(0.01, 0.1, (experts, k // (group or 32), n))
    each = (each if group else 2.0 ** rng.integers(-9, -2, each.shape)).astype(dtype)
    ordered = each.reshape(-1, 8, 8).swapaxes(1, 2).reshape(-1, 4)
    scales = (ordered if group else ordered[:, [0, 2, 1, 3]]).reshape(each.shape)
    ids = rng.integers(-1 if is_ep else 0, experts, (tokens, top_k)).astype(np.int32)
    most = -(-(ids.size + min(ids.size, experts + 1) * (block - 1)) // 4) * 4
    routes, blocks, count = call(
        "moe_align_block_size", ["sorted_token_ids", "expert_ids", "num_tokens_post_pad"],
        topk_ids=ids, num_experts=experts + 1, block_size=block,
        sorted_token_ids=np.full(most, -9, np.int32),
        expert_ids=np.full(-(-most // block), -9, np.int32),
        num_tokens_post_pad=np.full(1, -9, np.int32),
    )  # fmt: skip
    a = rng.standard_normal((tokens, k)).astype(ml_dtypes.bfloat16)
    shares = rng.uniform(0.1, 1, (tokens, top_k)).astype(np.float32)
    before = np.full((ids.size, n), 7, ml_dtypes.bfloat16)
    (got,) = call(
        name, ["c"], a=a, c=before, b_q_weight=weights, b_scales=scales, sorted_token_ids=routes,
        expert_ids=blocks, num_tokens_post_padded=count, topk_weights=shares,
        moe_block_size=block, mul_topk_weights=True,
    )  # fmt: skip
    e2m1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    exact = (codes - 8.0 if group else e2m1[codes]) * each.astype(float).repeat(group or 32, axis=1)
    exact = exact.astype(ml_dtypes.bfloat16).astype(float)
    for route, expert in enumerate(ids.ravel()):
        token, choice = divmod(route, top_k)
        if expert < 0:
            assert (got[route] == 7).all()
            continue
        x = a[token].astype(np.float64)
        wanted = x @ exact[expert] * float(shares[token, choice])
        sums = np.abs(x) @ np.abs(exact[expert])
        error = np.abs(got[route].astype(np.float64) - wanted)
        assert (error <= np.abs(wanted) * 3.1 * 2.0**-8 + sums * 2.0**-18).all()


@pytest.mark.parametrize(
    ("experts", "k"), [(384, 1), (384, 8), (384, 384), (576, 4), (576, 128), (576, 576), (768, 12),
                       (896, 16)]
)  # fmt: skip
@pytest.mark.parametrize("real", [1, 100, 383])
def test_routes_of_every_size(machine, rng, experts, k, real):
    row = OPS["softmax_topk_flash"].row
    machine.need(row)
    for scaled in {False, experts == 576 and k <= 128}:
        for dtype in row.dtypes["I"]:
            case = make_case(
                row, {"n": 9, "experts": experts, "k": k, "vocab": 1}, {"I": dtype}, rng,
                num_experts_real=real, renormalize=scaled,
            )  # fmt: skip
            assert case.arrays["topk_indices"].shape == (9, k)
            assert check_on(machine, case) <= 1


@pytest.mark.parametrize("name", [name for name in OPS if "marlin_gemm" in name and "_ep" in name])
def test_the_judge_of_experts(name, rng):
    """A code, a scale, a token or a weight of another makes a wrong result; so does a rounding."""
    row = OPS[name].row
    sizes = inputs_of(row).small | {"m": 20}
    case = make_case(row, sizes, {}, rng, mul_topk_weights=True)
    right = case.expected["c"].value()
    bf16 = ml_dtypes.bfloat16
    assert case.error("c", right.astype(bf16))[1] <= 1
    written = (right != case.arrays["c"].astype(np.float64)).all(axis=1)
    assert 0 < written.sum() < len(written)

    def others(name, change):
        array = case.arrays[name].copy()
        change(array)
        values = {**case.arrays, **case.scalars, name: array}
        return EXACT[row.formula](as_inputs(values))["c"].value().astype(bf16)

    def next_one(array):
        array[...] = np.roll(array, 1, axis=-1)

    for given in ("b_q_weight", "b_scales", "a", "topk_weights"):
        assert case.error("c", others(given, next_one))[1] > 1, given
    for i in np.flatnonzero(~written)[:3]:
        got = right.astype(bf16)
        got[i, 5] *= bf16(1.01)
        assert case.error("c", got)[1] > 1
    got = right * np.where(rng.random(right.shape) < 0.01, 1.02, 1)
    assert case.error("c", got.astype(bf16))[1] > 1


def test_the_judge_of_routes_that_rounding_decides(rng):
    """Either of two experts that are the same in float32 may be chosen, and no third."""
    row = OPS["softmax_topk_flash"].row
    case = make_case(row, inputs_of(row).small | {"n": 1}, default_dtypes(row), rng)
    given = {**case.arrays, **case.scalars, "num_experts_real": 380}
    given["correction_bias"] = np.zeros(384)
    given["topk_indices"] = np.zeros((1, 1), np.int32)
    given["input"] = np.clip(case.arrays["input"], -9, 9).astype(np.float64)
    given["input"][0, [7, 300]] = [20, 20 + 1e-9]
    judge = EXACT[row.formula](as_inputs(given))["topk_indices"]
    assert [judge(np.array([[one]]))[1] for one in (7, 300)] == [0, 0]
    assert min(judge(np.array([[one]]))[1] for one in (8, -1, 380, -2)) > 1
