"""`recurrent_kda` on the CPU and on a GPU, and what is refused."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fi_ffi
from fi_ffi.catalogue.requests import parse_request
from fi_ffi.cli.cases import bound, case_of
from fi_ffi.ops.states.kda import KdaKernel, row_of
from fi_ffi_build.questions import question_of

from tests.helpers.calls import called, of_bound, refused
from tests.helpers.gates import with_edges

BF16 = np.dtype(ml_dtypes.bfloat16)
WRITTEN = ("initial_state", "output")
# Requests of which the definition is computed.
MOST = 16


def apart(array: np.ndarray, axis: int, pad: int) -> np.ndarray:
    """The same values, with `pad` elements of poison after each of this axis."""
    shape = (*array.shape[: axis + 1], -1)
    rows = np.ascontiguousarray(array).reshape(shape)
    wide = np.full((*rows.shape[:-1], rows.shape[-1] + pad), np.nan, array.dtype)
    wide[..., : rows.shape[-1]] = rows
    inner = np.empty(array.shape[axis + 1 :], array.dtype).strides
    return np.lib.stride_tricks.as_strided(wide, array.shape, (*wide.strides[: axis + 1], *inner))


class Call:
    """Random arrays of a call.

    `form` says where the tokens of requests are: "dense", all have as many; "slots", and states are
    chosen by indices; "starts", also tokens lie side by side, and some requests have fewer.
    """

    def __init__(
        self, rng: np.random.Generator, b: int = 3, h: int = 2, hv: int = 4, size: int = 128,
        is_gated: bool = True, *, t: int = 1, form: str = "dense", has_bias: bool = True,
        is_accepted: bool = False, pads: tuple[int, int] = (0, 0), **options: Any,
    ) -> None:  # fmt: skip
        self.rng, self.size, self.is_gated, self.t = rng, size, is_gated, t
        normal = rng.standard_normal
        axes: tuple[int, ...] = (b, t)
        if form == "starts":
            lengths = np.sort(rng.integers(0, t + 1, b))[::-1]
            lengths[0] = t
            starts = np.concatenate([[0], np.cumsum(lengths)])
            axes = (1, int(starts[-1]) + 2)  # two tokens are nobody's
        states = b * t if form == "dense" else 2 * b * t + 3
        g = with_edges(rng, normal((*axes, hv, size)))
        self.arrays = {
            "q": normal((*axes, h, size)).astype(BF16),
            "k": normal((*axes, h, size)).astype(BF16),
            "v": normal((*axes, hv, size)).astype(BF16),
            "g": (g if is_gated else -np.abs(g)).astype(BF16),
            "beta": rng.uniform(0, 1, (*axes, hv)).astype(BF16),
            "initial_state": normal((states, hv, size, size), np.float32).astype(BF16),
            "output": np.full((*axes, hv, size), np.nan, BF16),
        }
        if is_gated:
            self.arrays["A_log"] = rng.uniform(-4, 2, h).astype(np.float32)
            if has_bias:
                self.arrays["dt_bias"] = rng.uniform(-3, 3, h * size).astype(np.float32)
        if options.get("use_qk_l2norm_in_kernel") is False:  # longer keys make states grow
            for name in ("q", "k"):
                x = self.arrays[name].astype(np.float32)
                x /= np.sqrt((x * x).sum(-1, keepdims=True))
                self.arrays[name] = x.astype(BF16)
        if form != "dense":
            slots = 1 + rng.permutation(states - 1)[: b * t].astype(np.int32)
            if b > 1:
                slots[-1] = -1  # no token
            self.arrays["ssm_state_indices"] = slots.reshape(b, t) if t > 1 else slots
        if form == "starts":
            self.arrays["cu_seqlens"] = starts.astype(np.int32)
        if is_accepted:
            self.arrays["num_accepted_tokens"] = rng.integers(-1, t + 3, b).astype(np.int32)
        for name, axis, pad in (("g", 1, pads[0]), ("initial_state", 0, pads[1])):
            if pad:
                self.arrays[name] = apart(self.arrays[name], axis, pad)
        if t == 1 and form != "starts":  # the stride of an axis of one token is any
            g = self.arrays["g"]
            strides = (g.strides[0], 2, *g.strides[2:])
            self.arrays["g"] = np.lib.stride_tricks.as_strided(g, g.shape, strides)
        self.options: dict[str, Any] = {"use_gate_in_kernel": is_gated} | options
        if t > 1:
            self.options["num_spec_tokens"] = t - 1

    @property
    def kernel(self) -> KdaKernel:
        arrays, options = self.arrays, self.options
        return KdaKernel(
            self.size, self.is_gated, "dt_bias" in arrays, "lower_bound" in options,
            options.get("use_qk_l2norm_in_kernel", True), options.get("beta_is_logit", False),
            self.t == 1 and "ssm_state_indices" in arrays, self.t, *self._heads,
        )  # fmt: skip

    @property
    def _heads(self) -> tuple[int, int]:
        return self.arrays["q"].shape[2], self.arrays["v"].shape[2]

    def run(self, machine: Any) -> dict[str, np.ndarray]:
        if machine.is_gpu:
            machine.need(self.kernel.names((9, 0))[0])
        return called(fi_ffi.recurrent_kda, self.arrays, machine.place, WRITTEN, **self.options,
                      stream=machine.stream)  # fmt: skip

    def requests(self) -> list[tuple[int, list[tuple[int, int]]]]:
        """For each request the slot where it starts; its tokens, and the slot after each."""
        arrays, t = self.arrays, self.t
        b = len(arrays.get("ssm_state_indices", arrays["q"]))
        starts = arrays.get("cu_seqlens", np.arange(b + 1) * t)
        slots = arrays.get("ssm_state_indices", np.arange(b * t)).reshape(b, t)
        at = np.clip(arrays.get("num_accepted_tokens", np.ones(b, int)), 1, t) - 1
        return [
            (max(int(slots[i, at[i]]), 0),
             [(int(starts[i]) + j, int(slots[i, j])) for j in range(starts[i + 1] - starts[i])])
            for i in range(b)
        ]  # fmt: skip

    def rule(self) -> dict[str, np.ndarray]:
        """What the call must give, written down a head at a time."""
        x = {name: array.astype(np.float64) for name, array in self.arrays.items()}
        h, hv = self._heads
        states, out = x["initial_state"].copy(), x["output"].reshape(-1, hv, self.size).copy()
        if self.t > 1:
            out[:] = 0  # what is nobody's, too
        for source, tokens in self.requests():
            for head in range(hv):
                state = x["initial_state"][source, head].copy()
                for token, target in tokens:
                    if target >= 0:
                        self._token(x, head, head * h // hv, token, state, out)
                        states[target, head] = state
        return {"initial_state": states, "output": out.reshape(x["output"].shape)}

    def _token(self, x: Any, head: int, shared: int, token: int, state: Any, out: Any) -> None:
        def of(name: str, at: int) -> Any:
            return x[name].reshape(-1, *x[name].shape[2:])[token, at]

        q, k = (of(name, shared) for name in "qk")
        if self.options.get("use_qk_l2norm_in_kernel", True):
            q, k = (one / np.sqrt((one * one).sum() + 1e-6) for one in (q, k))
        decay, share = of("g", head), of("beta", head)
        if self.is_gated:
            rate = np.exp(x["A_log"][shared])
            if "dt_bias" in x:
                decay = decay + x["dt_bias"].reshape(-1, self.size)[shared]
            if "lower_bound" in self.options:
                decay = self.options["lower_bound"] / (1 + np.exp(-rate * decay))
            else:
                decay = -rate * np.logaddexp(0, decay)
        if self.options.get("beta_is_logit"):
            share = 1 / (1 + np.exp(-share))
        state *= np.exp(decay)
        state += share * np.outer(of("v", head) - state @ k, k)
        out[token, head] = (self.options.get("scale") or self.size**-0.5) * state @ q

    def check(self, machine: Any) -> None:
        """The call gives what the rule says, and is within the bounds of its formula."""
        got, rule = self.run(machine), self.rule()
        for name, value in rule.items():
            near = np.isclose(got[name].astype(float), value, 2**-7, 4e-3, equal_nan=True)
            assert near.all(), (name, np.argwhere(~near)[:3])
        assert self._of_bounds(got) <= 1

    def worst(self, machine: Any) -> float:
        """The worst error as a fraction of its bound, of some requests where there are many."""
        got, b = self.run(machine), len(self.arrays["q"])
        chosen = self.rng.permutation(b)[:MOST]
        arrays = {
            name: array if name in ("A_log", "dt_bias") else array[chosen]
            for name, array in self.arrays.items()
        }
        return self._of_bounds({name: got[name][chosen] for name in WRITTEN}, arrays)

    def _of_bounds(self, got: Any, arrays: Any = None) -> float:
        arrays, options = dict(arrays or self.arrays), self.options
        b = len(arrays.get("ssm_state_indices", arrays["q"]))
        kernel = self.kernel
        if kernel.is_packed or self.t > 1:  # as the entry has them
            arrays.setdefault("cu_seqlens", np.arange(b + 1) * self.t)
            arrays.setdefault("ssm_state_indices", np.arange(b * self.t).reshape(b, self.t))
        if self.t > 1:
            arrays.setdefault("num_accepted_tokens", np.ones(b, np.int32))
        constants = {
            "scale": options.get("scale") or self.size**-0.5, "has_bound": kernel.has_bound,
            "lower_bound": options.get("lower_bound", 0.0),
            "use_qk_l2norm_in_kernel": kernel.use_qk_l2norm_in_kernel,
            "beta_is_logit": kernel.beta_is_logit,
        }  # fmt: skip
        case = case_of(row_of(kernel), arrays, constants)
        worst = 0.0
        for name, expected in case.expected.items():
            assert expected[1] is not None
            found, value, allowed = got[name], expected[0], bound(*expected, BF16)
            there = ~(np.isnan(value) & np.isnan(found.astype(float)))
            worst = max(worst, of_bound(found[there], value[there], allowed[there]))
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
    """The first request's keys are hardly any length."""
    call = Call(rng, is_gated=is_gated)
    for name in ("q", "k"):
        call.arrays[name][0] = (call.arrays[name][0].astype(np.float32) * 1e-4).astype(BF16)
    call.check(machine)


@pytest.mark.parametrize("pads", [(16, 0), (0, 16), (256, 8192), (12800, 16)], ids=str)
@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("size", [64, 128])
def test_gates_and_states_that_lie_apart(size, is_gated, pads, machine, rng):
    """Gates as parts of a wider projection, and slots as parts of pages."""
    for b in (1, 3):
        Call(rng, b, size=size, is_gated=is_gated, pads=pads).check(machine)


OPTIONS = [
    {"lower_bound": -5.0}, {"use_qk_l2norm_in_kernel": False}, {"has_bias": False},
    {"is_gated": False, "use_qk_l2norm_in_kernel": False}, {"beta_is_logit": True},
]  # fmt: skip
ALL_BUT_BIAS = {"lower_bound": -0.5, "use_qk_l2norm_in_kernel": False, "beta_is_logit": True}


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_options(options, machine, rng):
    """Each is compiled into a module of its own."""
    Call(rng, pads=(256, 8192), **options).check(machine)


@pytest.mark.parametrize("form", ["slots", "starts"])
@pytest.mark.parametrize(
    "options", [{}, {"is_gated": False}, {"size": 64}, ALL_BUT_BIAS], ids=lambda o: "-".join(o)
)
def test_a_token_of_some_slots(options, form, machine, rng):
    for b, pads in ((1, (0, 0)), (5, (0, 16)), (33, (256, 8192))):
        Call(rng, b, form=form, pads=pads, **options).check(machine)


@pytest.mark.parametrize("form", ["dense", "slots", "starts"])
@pytest.mark.parametrize("is_accepted", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"is_gated": False}, {"size": 64}, {"has_bias": False}, ALL_BUT_BIAS],
    ids=lambda o: "-".join(o),
)  # fmt: skip
def test_several_tokens(options, is_accepted, form, machine, rng):
    """Of a draft: each state goes to a slot of its own."""
    for b, pads in ((1, (0, 0)), (4, (8, 8)), (4, (1, 8192))):
        Call(rng, b, t=3, form=form, is_accepted=is_accepted, pads=pads, **options).check(machine)


def test_many_tokens(machine, rng):
    Call(rng, 2, t=8, form="slots", is_accepted=True).check(machine)


def test_starts_without_slots(machine, rng):
    """The i-th request has the i-th state."""
    call = Call(rng, 5, form="starts")
    call.arrays["ssm_state_indices"] = np.arange(5, dtype=np.int32)
    expected = call.run(machine)
    del call.arrays["ssm_state_indices"]
    got = called(fi_ffi.recurrent_kda, call.arrays, machine.place, WRITTEN, **call.options,
                 stream=machine.stream)  # fmt: skip
    for name in WRITTEN:
        assert got[name].tobytes() == expected[name].tobytes()


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
        ("scale", lambda _: "1"),
        ("scale", lambda _: float("nan")),
        ("initial_state", lambda a: a["initial_state"].astype(np.float32)),
        ("initial_state", lambda a: a["initial_state"][:2]),
        ("output", lambda a: a["output"].astype(np.float32)),
        ("output", lambda a: a["v"]),
        ("use_gate_in_kernel", lambda _: 1),
        ("use_qk_l2norm_in_kernel", lambda _: 0),
        ("beta_is_logit", lambda _: None),
        ("g", lambda a: apart(a["g"], 1, 4)),
        ("g", lambda a: apart(a["g"], 2, 16)),
        ("initial_state", lambda a: apart(a["initial_state"], 0, 4)),
        ("initial_state", lambda a: apart(a["initial_state"], 1, 16)),
        ("lower_bound", lambda _: 0.0),
        ("lower_bound", lambda _: "0"),
        ("num_spec_tokens", lambda _: 0),
        ("num_spec_tokens", lambda _: 1.0),
        ("q", lambda a: np.repeat(a["q"], 2, axis=1)),
        ("num_accepted_tokens", lambda _: np.ones(3, np.int32)),
        ("ssm_state_indices", lambda _: np.arange(2, dtype=np.int32)),
        ("ssm_state_indices", lambda _: np.arange(3)),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_refusals(argument, change, rng):
    call = Call(rng)
    wrong(call, argument, **{argument: change(call.arrays)})


def test_refusals_of_some_kinds(rng):
    assert "multiple" in str(wrong(Call(rng, h=3, hv=4), "v").expected)
    call = Call(rng, is_gated=False)
    for name, value in (("A_log", np.zeros(2, np.float32)), ("lower_bound", -1.0)):
        told = wrong(call, name, **{name: value})
        assert "expected None but with use_gate_in_kernel=True" in str(told)


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


def test_refusals_of_packed_tokens(rng):
    one = Call(rng, form="starts")
    wrong(one, "q", cu_seqlens=one.arrays["cu_seqlens"], q=np.repeat(one.arrays["q"], 2, axis=0))
    wrong(one, "v", v=one.arrays["v"][:, 1:])
    wrong(one, "cu_seqlens", cu_seqlens=one.arrays["cu_seqlens"][:0])
    wrong(one, "cu_seqlens", cu_seqlens=one.arrays["cu_seqlens"].astype(np.int64))
    wrong(one, "ssm_state_indices", ssm_state_indices=one.arrays["ssm_state_indices"][:, None])
    several = Call(rng, t=3)
    wrong(several, "q", num_spec_tokens=3)
    wrong(several, "initial_state", initial_state=several.arrays["initial_state"][:8])
    wrong(several, "initial_state", initial_state=apart(several.arrays["initial_state"], 0, 4))
    wrong(several, "g", g=apart(several.arrays["g"], 0, 16))  # requests apart, not their tokens
    wrong(several, "beta", beta=several.arrays["beta"][..., 0])
    several = Call(rng, t=3, form="slots", is_accepted=True)
    for name in ("ssm_state_indices", "num_accepted_tokens"):
        wrong(several, name, **{name: several.arrays[name][:2]})
        wrong(several, name, **{name: several.arrays[name].astype(np.int64)})


@pytest.mark.parametrize("form", ["slots", "starts"])
@pytest.mark.parametrize("t", [1, 3])
def test_what_a_gpu_would_read_past_the_states(t, form, rng):
    call = Call(rng, t=t, form=form)
    call.arrays["ssm_state_indices"].flat[0] = len(call.arrays["initial_state"])
    words = "recurrent_kda: argument `ssm_state_indices`: got .* in element 0(, 0)?, .* less than"
    with pytest.raises(fi_ffi.ArgumentError, match=words):
        fi_ffi.recurrent_kda(**call.arrays, **call.options)


def test_slots_that_a_call_does_not_read(rng):
    """Those after a request's tokens, but for the one that it starts from."""
    call = Call(rng, t=3, form="starts", is_accepted=True)
    starts, slots = call.arrays["cu_seqlens"], call.arrays["ssm_state_indices"]
    far, last = 10**6, len(starts) - 2
    starts[-1] = starts[last] + 1
    call.arrays["num_accepted_tokens"][last] = 2
    slots[last, 2] = far
    fi_ffi.recurrent_kda(**call.arrays, **call.options)
    slots[last, 1] = far
    with pytest.raises(fi_ffi.ArgumentError, match=f"got {far} in element {last}, 1, .* less than"):
        fi_ffi.recurrent_kda(**call.arrays, **call.options)


@pytest.mark.parametrize(("at", "value"), [(0, -1), (-1, 10**6), (0, -(2**31))])
def test_starts_that_are_no_tokens(at, value, rng):
    call = Call(rng, t=3, form="starts")
    call.arrays["cu_seqlens"][at] = value
    with pytest.raises(fi_ffi.ArgumentError, match=f"recurrent_kda: .*`cu_seqlens`: got {value} "):
        fi_ffi.recurrent_kda(**call.arrays, **call.options)


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


COMPILED = [
    ({"head_size": 64}, "head_size=64"), ({"use_gate_in_kernel": False}, "gate=0"),
    ({"head_size": 64, "use_gate_in_kernel": False}, "head_size=64,gate=0"),
    ({"has_bias": False, "has_bound": True}, "bias=0,bound=1"),
    ({"is_packed": True, "beta_is_logit": True}, "logit=1,packed=1"),
    ({"use_qk_l2norm_in_kernel": False}, "norm=0"),
    ({"t": 3, "h": 2, "hv": 8}, "tokens=3,heads=2,group=4"),
    ({"t": 2, "h": 32, "hv": 32, "has_bound": True}, "tokens=2,heads=32,bound=1"),
]  # fmt: skip


def test_supports():
    found = fi_ffi.recurrent_kda.supports(90, release="0.7.2.post1")
    command = "fi-ffi build --release 0.7.2.post1 --arch 9.0a kda_decode"
    assert not found and found.build == command
    for compiled, options in COMPILED:
        found = fi_ffi.recurrent_kda.supports(90, release="0.7.2.post1", **compiled)
        assert found.build == f"{command}:{options}"
        made = question_of(parse_request(f"kda_decode:{options}"), "0.7.2.post1")["name"]
        function = "grouped_kda_host" if "t" in compiled else "recurrent_kda_launch"
        assert found.module.endswith(f"_cute_dsl_{function}_{made}")
    assert fi_ffi.recurrent_kda.supports(90, release="0.7.1").status == "refused"
    assert fi_ffi.recurrent_kda.supports(80, release="0.7.2.post1").status == "refused"
    blackwell = fi_ffi.recurrent_kda.supports(100, release="0.7.2.post1")
    assert blackwell.status == found.status and "sm100a" in blackwell.module
    with pytest.raises(fi_ffi.ArgumentError, match="head_size"):
        fi_ffi.recurrent_kda.supports(90, head_size=96)


def test_a_function_is_called_like_its_module():
    for capability, arch in (((9, 0), "sm90a"), ((10, 0), "sm100a")):
        name, symbol = KdaKernel().names(capability)
        assert symbol == name.replace(f"_{arch}_cute_dsl", "")
