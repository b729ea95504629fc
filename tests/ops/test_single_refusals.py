"""Wrong arguments of `single_prefill` and `single_decode`: told by name, and nothing written."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.loader import machine
from fi_ffi.reference.attention.formula import Options, exact

from tests.helpers.plan_calls import DIM, HEADS, KV_HEADS, changed, refused

E4M3 = "float8_e4m3fn"
OPS = ("single_prefill", "single_decode")
QUERIES, KEYS = 5, 9


class Single:
    """A call of one of the two that is right."""

    def __init__(self, op: str, dtype: str = "float16", heads: int = HEADS, **options: Any) -> None:
        self.op, self.options, rng = op, options, np.random.default_rng()
        rows = (QUERIES,) if op == "single_prefill" else ()
        kind = ml_dtypes.float8_e4m3fn if dtype == E4M3 else dtype
        shapes = {"q": (*rows, heads, DIM), "k": (KEYS, KV_HEADS, DIM), "v": (KEYS, KV_HEADS, DIM)}
        self.memory = {n: rng.standard_normal(shape).astype(kind) for n, shape in shapes.items()}
        self.memory["tmp"] = np.full(64, 0xA5, np.uint8)
        self.memory["o"] = np.full((*rows, heads, DIM), np.nan, np.float16)
        self.memory["lse"] = np.full((*rows, heads), np.nan, np.float32)

    def run(self, **changes: Any) -> None:
        getattr(fi_ffi, self.op)(**self.memory | self.options | changes)

    def check(self) -> None:
        q, k, v = (self.memory[name] for name in "qkv")
        expected = exact(q.reshape(-1, *q.shape[-2:]), k, v, Options(DIM**-0.5)).out
        error = np.abs(self.memory["o"].reshape(expected.shape) - expected)
        assert (error <= 2.0**-8).all() and np.isfinite(self.memory["lse"]).all()

    def bytes(self) -> dict[str, bytes]:
        return {name: array.tobytes() for name, array in self.memory.items()}


CALLS = [(op, name) for op in OPS for name in Single(op).memory]
WRONG = {
    "rank": lambda d: changed(d, shape=(*d.shape, 1)),
    "rank 0": lambda d: changed(d, shape=()),
    "dtype": lambda d: changed(d, dtype="float64"),
    "device": lambda d: changed(d, device="cuda:0"),
    "null": lambda d: changed(d, ptr=0),
    "last stride": lambda d: changed(d, strides=[2 * s for s in d.strides]),
    "None": lambda d: None,
    "text": lambda d: "q",
    "list": lambda d: [1.0],
}


@pytest.mark.parametrize("op", OPS)
def test_the_right_one_is_right(op):
    case = Single(op)
    case.run()
    case.check()
    case.run(lse=None)


@pytest.mark.parametrize(
    ("op", "name", "wrong"),
    [(*call, wrong) for call in CALLS for wrong in WRONG if (call[1], wrong) != ("lse", "None")],
)
def test_each_tensor(op, name, wrong):
    case = Single(op)
    value = WRONG[wrong](fi_ffi.as_desc(case.memory[name]))
    # The first tensor says which device: then it is the second that differs.
    argument = "k" if (name, wrong) == ("q", "device") else name
    refused(case, argument, "", case.run, **{name: value})


@pytest.mark.parametrize(("op", "name"), [call for call in CALLS if call[1] != "tmp"])
def test_sizes_and_addresses(op, name):
    case = Single(op)
    desc = fi_ffi.as_desc(case.memory[name])
    refused(case, name, "multiple of", case.run, **{name: changed(desc, ptr=desc.ptr + 1)})
    for axis in range(len(desc.shape)):
        shape = tuple(n + (i == axis) for i, n in enumerate(desc.shape))
        # One more of what only q and k say is told of the next tensor.
        refused(case, None, "", case.run, **{name: changed(desc, shape=shape)})
    for dtype in ("int32", "bfloat16"):
        other = changed(desc, dtype=dtype)
        # With queries of one dtype and keys of another it is no backend that has it.
        argument = name if dtype == "int32" or name in ("v", "lse") else None
        refused(case, argument, f"{dtype}|bf16", case.run, **{name: other})


@pytest.mark.parametrize("op", OPS)
def test_outputs(op):
    case = Single(op)
    for name in ("o", "lse", "tmp"):
        case.memory[name].flags.writeable = False
        refused(case, name, "got read-only memory", case.run)
        case.memory[name].flags.writeable = True
        if name != "tmp":
            desc = fi_ffi.as_desc(case.memory[name])
            for first in (0, 1, -8) if len(desc.shape) > 1 else (0, 2, -1):
                other = changed(desc, strides=(first, *desc.strides[1:]))
                refused(case, name, "strides", case.run, **{name: other})


@pytest.mark.parametrize("op", OPS)
def test_layouts(op):
    case = Single(op)
    hnd = {name: case.memory[name].swapaxes(0, 1).copy() for name in "kv"}
    refused(case, None, "heads", case.run, **hnd)
    refused(case, None, "heads", case.run, kv_layout="HND")
    for name in "kv":
        refused(case, None, "", case.run, **{name: hnd[name]})
    for value in ("nhd", "", None, 0, b"NHD", np.array(["NHD"])):
        refused(case, "kv_layout", "'NHD' or 'HND'", case.run, kv_layout=value)
    case.run(**hnd, kv_layout="HND")
    case.check()


NUMBERS = {
    "logits_soft_cap": (-1.0,), "sm_scale": (0, -1.0), "q_scale": (0, -1.0), "k_scale": (0.0,),
    "v_scale": (), "rope_scale": (0, -1.0, 1e-40), "rope_theta": (0, -1),
}  # fmt: skip
NOT_NUMBERS = (True, "1", [1.0], 1j, object())


@pytest.mark.parametrize(
    ("op", "name"),
    [(op, name) for op in OPS for name in NUMBERS if (op, name) != ("single_decode", "v_scale")],
)
def test_numbers(op, name):
    mode = "ROPE_LLAMA" if name.startswith("rope") else "NONE"
    case = Single(op, pos_encoding_mode=mode)
    if mode != "NONE":
        case.memory["k"], case.memory["v"] = (np.tile(case.memory[n], (2, 1, 1)) for n in "kv")
    for value in (*NOT_NUMBERS, float("nan"), float("inf"), 10**400, *NUMBERS[name]):
        error = refused(case, name, "", case.run, **{name: value})
        assert isinstance(error, fi_ffi.ArgumentTypeError) == (value in NOT_NUMBERS)


@pytest.mark.parametrize("op", OPS)
def test_other_options(op):
    case = Single(op)
    for value in (-2, 2**31, 1.0, True, None, "1"):
        refused(case, "window_left", "int", case.run, window_left=value)
    for value in ("none", "", None, 0, "ROPE"):
        refused(case, "pos_encoding_mode", "'NONE'", case.run, pos_encoding_mode=value)
    slopes = np.ones(HEADS, np.float32)
    refused(case, "alibi_slopes", "got ndarray, expected None", case.run, alibi_slopes=slopes)
    alibi = {"pos_encoding_mode": "ALIBI"}
    refused(case, "alibi_slopes", "expected slopes", case.run, **alibi)
    for wrong in (slopes[:-1], slopes.astype(np.float64), slopes[None], 3, "slopes"):
        refused(case, "alibi_slopes", "", case.run, **alibi, alibi_slopes=wrong)
    both = alibi | {"alibi_slopes": slopes, "logits_soft_cap": 1.0}
    refused(case, "logits_soft_cap", "ALIBI", case.run, **both)
    refused(case, "rope_theta", "ROPE_LLAMA", case.run, rope_theta=1e4)
    before = case.bytes()
    with pytest.raises(TypeError, match=rf"{op}\(\) .*'page_size'"):
        case.run(page_size=1)
    with pytest.raises(TypeError, match=rf"{op}\(\) missing"):
        getattr(fi_ffi, op)()
    assert case.bytes() == before


@pytest.mark.parametrize("name", ["causal", "use_fp16_qk_reduction"])
def test_flags(name):
    case = Single("single_prefill")
    for value in (None, 1, "yes", np.True_):
        refused(case, name, "expected bool", case.run, **{name: value})


def test_fewer_keys_than_queries():
    case = Single("single_prefill")
    few = {name: case.memory[name][: QUERIES - 1] for name in "kv"}
    for given in ({"causal": True}, {"pos_encoding_mode": "ROPE_LLAMA"}):
        refused(case, "k", "expected 5 keys or more", case.run, **few, **given)
    case.run(**few)


def test_masks():
    case = Single("single_prefill")
    need = (QUERIES * KEYS + 7) // 8
    mask = np.full(need, 255, np.uint8)
    for size in (0, need - 1, need + 1, QUERIES * KEYS):
        words = f"expected {need} bytes: see pack_custom_mask"
        other = {"custom_mask": np.resize(mask, size)}
        refused(case, "custom_mask", words, case.run, **other)
    for wrong in (mask[None], mask.astype(bool), np.repeat(mask, 2)[::2], 3, "mask"):
        refused(case, "custom_mask", "", case.run, custom_mask=wrong)
    refused(case, "causal", "False with custom_mask", case.run, custom_mask=mask, causal=True)
    words = "got 'fa3', expected 'fa2': fa3 has no custom masks"
    refused(case, "backend", words, case.run, custom_mask=mask, backend="fa3")
    case.run(custom_mask=mask)
    case.check()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"backend": "fa4"}, "got 'fa4', expected 'auto' or 'fa2' or 'fa3'"),
        ({"backend": None}, "got None"),
        ({"pos_encoding_mode": "ALIBI", "backend": "fa3"}, "'fa2': fa3 has no pos_encoding_mode"),
        ({"use_fp16_qk_reduction": True, "backend": "fa3"}, "'fa2': fa3 has no use_fp16"),
    ],
)
def test_backends(given, words):
    case = Single("single_prefill")
    refused(case, "backend", words, case.run, **given)


def test_fp8():
    case = Single("single_prefill", E4M3)
    words = f"got 'fa2', expected what a backend has: fa2 has no {E4M3} queries; fa3 has head"
    refused(case, "backend", words, case.run, backend="fa2")
    refused(
        Single("single_decode", E4M3), "q", "float16 or bfloat16", Single("single_decode", E4M3).run
    )
    mixed = {"k": case.memory["k"].astype(np.float16)}
    refused(case, None, "", case.run, **mixed)


def test_scales_that_fa2_lacks():
    case = Single("single_prefill", backend="fa2")
    words = r"expected None: fa2 lacks it \(backend='fa3' has it\)"
    for scale in (2, 0.5, np.ones(KV_HEADS, np.float32)):
        refused(case, "v_scale", words, case.run, v_scale=scale)
    words = r"\(backend='fa3' with fp8 queries has it\)"
    refused(case, "q_scale", words, case.run, q_scale=np.ones(HEADS, np.float32))


def test_head_counts():
    case = Single("single_prefill", heads=3)
    refused(case, None, "multiple of num_kv_heads = 2", case.run)
    for heads in (3, 10, 12, 14, 32):
        case = Single("single_decode", heads=heads)
        words = "expected 1, 2, 3, 4, 8 heads for each of k's 2; single_prefill has any"
        refused(case, "q", words, case.run)


@pytest.mark.parametrize("op", OPS)
def test_too_small_a_tmp(op, monkeypatch):
    case = Single(op)
    for name in "kv":
        case.memory[name] = np.tile(case.memory[name], (70, 1, 1))
    heads = {"num_qo_heads": HEADS, "num_kv_heads": KV_HEADS}
    sizes = {"kv_len": 70 * KEYS} | heads
    sizes |= {"head_dim": DIM} if op == "single_decode" else {"qo_len": QUERIES, "head_dim_vo": DIM}
    monkeypatch.setattr(machine, "multiprocessors", lambda index: 1)
    need = getattr(fi_ffi, f"{op}_workspace_size")(**sizes)
    assert need > 64
    words = f"got 64 bytes, expected {need} bytes or more, as {op}_workspace_size tells"
    refused(case, "tmp", words, case.run)
    case.run(tmp=np.zeros(need, np.uint8))
    case.check()


@pytest.mark.parametrize("op", OPS)
def test_sizes_of_tmp(op):
    sizes = {"kv_len": 300, "num_qo_heads": 4, "num_kv_heads": 2, "device": 0}
    sizes |= {"head_dim": 64} if op == "single_decode" else {"qo_len": 5, "head_dim_vo": 64}
    function = getattr(fi_ffi, f"{op}_workspace_size")
    case = Single(op)
    case.op = f"{op}_workspace_size"
    for name in sizes:
        for value in (-1, 1.5, "1", None, True, 2**31, *((0,) if "heads" in name else ())):
            refused(case, name, "int", function, **sizes | {name: value})
    refused(case, "num_qo_heads", "multiple", function, **sizes | {"num_qo_heads": 3})
