"""`recurrent_kda` on the CPU and on a GPU, and what is refused."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.cli.cases import bound, case_of
from fi_ffi.loader.building.names import parse_request
from fi_ffi.ops.kda import names, row_of

from tests.helpers.calls import called, of_bound, refused

BF16 = np.dtype(ml_dtypes.bfloat16)
WRITTEN = ("initial_state", "output")
# Requests of which the definition is computed.
MOST = 16


class Call:
    """Random arrays of a call."""

    def __init__(
        self, rng: np.random.Generator, b: int = 3, h: int = 2, hv: int = 4, size: int = 128,
        is_gated: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        self.rng, self.size, self.is_gated = rng, size, is_gated
        normal = rng.standard_normal
        g = normal((b, 1, hv, size), np.float32)
        self.arrays = {
            "q": normal((b, 1, h, size)).astype(BF16),
            "k": normal((b, 1, h, size)).astype(BF16),
            "v": normal((b, 1, hv, size)).astype(BF16),
            "g": (g if is_gated else -np.abs(g)).astype(BF16),
            "beta": rng.uniform(0, 1, (b, 1, hv)).astype(BF16),
            "initial_state": normal((b, hv, size, size), np.float32).astype(BF16),
            "output": np.full((b, 1, hv, size), np.nan, BF16),
        }
        if is_gated:
            self.arrays |= {
                "A_log": rng.uniform(-4, 2, h).astype(np.float32),
                "dt_bias": rng.uniform(-3, 3, h * size).astype(np.float32),
            }
        self.options: dict[str, Any] = {"use_gate_in_kernel": is_gated} | options

    def run(self, machine: Any) -> dict[str, np.ndarray]:
        if machine.is_gpu:
            machine.need(names(self.size, self.is_gated, (9, 0))[0])
        return called(fi_ffi.recurrent_kda, self.arrays, machine.place, WRITTEN, **self.options,
                      stream=machine.stream)  # fmt: skip

    def worst(self, machine: Any) -> float:
        """The worst error as a fraction of its bound, of some requests where there are many."""
        got, b = self.run(machine), len(self.arrays["q"])
        chosen = self.rng.permutation(b)[:MOST]
        arrays = {
            name: array if name in ("A_log", "dt_bias") else array[chosen]
            for name, array in self.arrays.items()
        }
        scale = self.options.get("scale") or self.size**-0.5
        case = case_of(row_of(self.size, self.is_gated), arrays, {"scale": scale})
        worst = 0.0
        for name, expected in case.expected.items():
            assert expected[1] is not None
            found = of_bound(got[name][chosen], expected[0], bound(*expected, BF16))
            worst = max(worst, found)
        return worst


@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_a_token(number, size, is_gated, machine, rng):
    """Of few requests, and of many: one module serves both."""
    b, h, hv = [(1, 1, 1), (3, 2, 4), (5, 3, 3), (2, 2, 2)][number]
    if machine.is_gpu:
        b, h, hv = [(1, 1, 1), (3, 2, 4), (64, 32, 32), (300, 16, 32)][number]
    assert Call(rng, b, h, hv, size, is_gated).worst(machine) <= 1


def test_another_scale(machine, rng):
    assert Call(rng, scale=0.5).worst(machine) <= 1


def test_tokens_one_after_another(machine, rng):
    """The state of the first call is the second's."""
    call = Call(rng)
    once = call.run(machine)
    call.arrays["initial_state"] = once["initial_state"].copy()
    assert call.worst(machine) <= 1


@pytest.mark.parametrize("is_gated", [True, False])
def test_the_rule_in_float64(is_gated, machine, rng):
    """Written down again, a head at a time; the first request's keys are hardly any length."""
    call = Call(rng, is_gated=is_gated)
    for name in ("q", "k"):
        call.arrays[name][0] = (call.arrays[name][0].astype(np.float32) * 1e-4).astype(BF16)
    got = call.run(machine)
    x = {name: array.astype(np.float64) for name, array in call.arrays.items()}
    for i, head in np.ndindex(x["v"].shape[0], x["v"].shape[2]):
        q, k = (x[name][i, 0, head // 2] for name in "qk")
        q, k = (one / np.sqrt((one * one).sum() + 1e-6) for one in (q, k))
        decay = x["g"][i, 0, head]
        if is_gated:
            bias = x["dt_bias"].reshape(2, -1)[head // 2]
            decay = -np.exp(x["A_log"][head // 2]) * np.logaddexp(0, decay + bias)
        state = x["initial_state"][i, head] * np.exp(decay)
        state += x["beta"][i, 0, head] * np.outer(x["v"][i, 0, head] - state @ k, k)
        read = state @ q / np.sqrt(128)
        assert np.allclose(got["initial_state"][i, head].astype(float), state, 2**-7, 2e-3)
        assert np.allclose(got["output"][i, 0, head].astype(float), read, 2**-7, 2e-3)


def wrong(call: Call, argument: str, **changes: Any) -> fi_ffi.ArgumentError:
    return refused(fi_ffi.recurrent_kda, call.arrays, argument, **{**call.options, **changes})


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("q", lambda a: a["q"][0]),
        ("q", lambda a: a["q"].astype(np.float16)),
        ("q", lambda a: a["q"][..., :96].copy()),
        ("q", lambda _: None),
        ("k", lambda a: np.repeat(a["k"], 2, axis=2)),
        ("k", lambda a: np.repeat(a["k"], 2, axis=3)[..., ::2]),
        ("v", lambda a: a["v"][:2]),
        ("v", lambda a: np.repeat(a["v"], 2, axis=1)),
        ("g", lambda a: a["g"][:, :, :3]),
        ("beta", lambda a: a["beta"].astype(np.float32)),
        ("A_log", lambda a: a["A_log"].astype(np.float64)),
        ("A_log", lambda a: a["A_log"][:1]),
        ("A_log", lambda _: None),
        ("dt_bias", lambda a: a["dt_bias"].reshape(2, -1)),
        ("dt_bias", lambda a: a["dt_bias"][:-1]),
        ("dt_bias", lambda _: None),
        ("scale", lambda _: "1"),
        ("scale", lambda _: float("nan")),
        ("initial_state", lambda a: a["initial_state"].astype(np.float32)),
        ("initial_state", lambda a: np.repeat(a["initial_state"], 2, axis=0)[::2]),
        ("initial_state", lambda a: a["initial_state"][:2]),
        ("output", lambda a: a["output"].astype(np.float32)),
        ("output", lambda a: a["v"]),
        ("use_gate_in_kernel", lambda _: 1),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_refusals(argument, change, rng):
    call = Call(rng)
    wrong(call, argument, **{argument: change(call.arrays)})


def test_refusals_of_some_kinds(rng):
    assert "multiple" in str(wrong(Call(rng, h=3, hv=4), "v").expected)
    call = Call(rng, is_gated=False)
    told = wrong(call, "A_log", A_log=np.zeros(2, np.float32))
    assert "expected None with use_gate_in_kernel=False" in str(told)


@pytest.mark.parametrize("size", [64, 128])
def test_blocks_are_counted_in_32_bits(size):
    """A state has one for each 8 of its values: as many states as that are refused."""
    b, at, given = 2**31 // (size // 8), 1 << 40, {}
    of = dict.fromkeys(("q", "k", "v", "g", "output"), (1, size))
    for name, shape in (of | {"beta": (1,), "initial_state": (size, size)}).items():
        given[name] = fi_ffi.TensorDesc(at, (b, 1, *shape), "bfloat16", device="cpu")
        at += given[name].span_bytes
    with pytest.raises(fi_ffi.ArgumentError, match=f"b \\* HV = {b} of at most {b - 1}"):
        fi_ffi.recurrent_kda(**given)


def test_no_requests(rng):
    assert fi_ffi.recurrent_kda(**Call(rng, b=0).arrays, use_gate_in_kernel=True) is None


def test_prepared(rng):
    first, second = Call(rng), Call(rng)
    call = fi_ffi.recurrent_kda.prepare(**first.arrays, **first.options)
    call()
    expected = {name: first.arrays[name].copy() for name in WRITTEN}
    fi_ffi.recurrent_kda(**second.arrays, **second.options)
    assert expected["output"].tobytes() != second.arrays["output"].tobytes()
    assert np.isfinite(expected["output"].astype(np.float32)).all()


def test_supports():
    found = fi_ffi.recurrent_kda.supports(90, release="0.7.2.post1")
    command = "fi-ffi build --release 0.7.2.post1 --arch 9.0a kda_decode"
    assert not found and found.build == command
    for size, is_gated, options in ((64, True, "head_size=64"), (128, False, "gate=0"),
                                    (64, False, "head_size=64,gate=0")):  # fmt: skip
        found = fi_ffi.recurrent_kda.supports(
            90, release="0.7.2.post1", head_size=size, use_gate_in_kernel=is_gated
        )
        assert found.build == f"{command}:{options}"
        made = parse_request(f"kda_decode:{options}").as_json("0.7.2.post1")["name"]
        assert found.module.endswith(f"recurrent_kda_launch_{made}")
    assert fi_ffi.recurrent_kda.supports(90, release="0.7.1").status == "refused"
    assert fi_ffi.recurrent_kda.supports(80, release="0.7.2.post1").status == "refused"
    blackwell = fi_ffi.recurrent_kda.supports(100, release="0.7.2.post1")
    assert blackwell.status == found.status and "sm100a" in blackwell.module
    with pytest.raises(fi_ffi.ArgumentError, match="head_size"):
        fi_ffi.recurrent_kda.supports(90, head_size=96)


def test_a_function_is_called_like_its_module():
    for capability, arch in (((9, 0), "sm90a"), ((10, 0), "sm100a")):
        name, symbol = names(128, True, capability)
        assert symbol == name.replace(f"_{arch}_cute_dsl", "")
