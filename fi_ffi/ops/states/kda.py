"""`recurrent_kda`: advances states of Kimi's delta attention by one token or several.

The kernels are written in CuTe DSL (`flashinfer/kda_kernels/recurrent_kda.py`). A module for one
token of each request is compiled for a head size and for some options, and serves any number of
requests and heads. FlashInfer also compiles it for tiles that are fast for a given number of
requests and heads, and has another kernel for few of them; fi_ffi uses one module of each kind for
all. Several tokens take that other kernel, which is compiled for numbers of heads and tokens too.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.abi.tensor import Device, TensorDesc, viewed
from fi_ffi.errors import ArgumentError
from fi_ffi.loader import generation, machine
from fi_ffi.ops.call.arguments import (
    INT32_MAX,
    Refusal,
    check_flag,
    check_int,
    check_number,
    shown,
)
from fi_ffi.ops.call.row import Absent, Arg, Row, Scalar, Tensor, Vector
from fi_ffi.ops.call.values import Values, compiled_row
from fi_ffi.ops.steps import memory
from fi_ffi.ops.steps.keyword_call import KeywordCall

_OP = FAMILY = "recurrent_kda"
_refuse = Refusal(_OP)
SIZES = (64, 128)  # sizes of a head of keys and values
_GRID = 2**16 - 1  # blocks along a grid's second dimension
# The requests and heads for which `fi-ffi build kda_decode` compiles by default.
_REQUESTS, _HEADS = 64, 16
CAPABILITY = (9, 0)  # the GPU for which calls are judged on a machine without one


@dataclass(frozen=True)
class KdaKernel:
    """The parameters that a module is compiled for."""

    head_size: int = 128
    use_gate_in_kernel: bool = True
    has_bias: bool = True
    has_bound: bool = False
    use_qk_l2norm_in_kernel: bool = True
    beta_is_logit: bool = False
    # For one token: whether tokens lie side by side, with starts of requests and indices of states.
    is_packed: bool = False
    # Tokens of each request; for several, heads of q and k, and of v and states.
    t: int = 1
    h: int = _HEADS
    hv: int = _HEADS

    @property
    def is_grouped(self) -> bool:
        return self.t > 1

    def names(self, capability: tuple[int, int]) -> tuple[str, str]:
        """Return the names of the module for this GPU, and of its function."""
        major, minor = capability
        parts = [f"b{_REQUESTS}", f"t{self.t}", f"h{self.h if self.is_grouped else _HEADS}"]
        if self.is_grouped:
            parts.append(f"g{self.hv // max(self.h, 1)}")
        parts += [f"d{self.head_size}", "gate" if self.use_gate_in_kernel else "nogate"]
        flags = {
            "nobias": self.use_gate_in_kernel and not self.has_bias,
            "bound": self.has_bound,
            "nonorm": not self.use_qk_l2norm_in_kernel,
            "logit": self.beta_is_logit,
            "packed": self.is_packed,
        }
        launch = "grouped_kda_host" if self.is_grouped else "recurrent_kda_launch"
        kernel = "_".join((launch, *parts, *(name for name, is_on in flags.items() if is_on)))
        return f"{FAMILY}_sm{major}{minor}a_cute_dsl_{kernel}", f"{FAMILY}_{kernel}"


# What is compiled into modules, and the CPU's reference takes as arguments.
_CONSTANTS = ("use_qk_l2norm_in_kernel", "has_bound", "beta_is_logit")


@functools.cache
def row_of(kernel: KdaKernel, symbol: str = "") -> Row:
    """Return the row of the kernel's function; without a `symbol`, that of the CPU's reference,
    which takes the compiled-in values as arguments."""
    size, grouped = kernel.head_size, kernel.is_grouped
    is_packed = grouped or kernel.is_packed
    count = "n" if is_packed else "b"
    most_blocks = size // 8  # of a state
    # Bytes of the widest load. numpy aligns CPU memory to 16 bytes only.
    width = 32 if symbol and not grouped else 16
    order = (_grouped if grouped else _one_token)(_arguments(kernel, width))
    if not symbol:
        order += [Scalar(name, bool, None, "") for name in _CONSTANTS]
    return Row(
        _OP,
        FAMILY,
        symbol or _OP,
        "flashinfer/kda_kernels/recurrent_kda.py",
        "",
        tuple(order),
        {},
        ">=0.7.2",
        variant="_tokens" if grouped else "_packed" if is_packed else "",
        vector=Vector(("D",), width),
        offset_limit=2**31 if grouped else 2**63,
        nothing_axis="tokens" if is_packed else "b",
        capabilities=(9, 10),
        in_place=(("initial_state", "initial_state_source"),),
        requires=(
            *("H >= 1", "HV % H == 0", f"D in ({size},)"),
            *(("n >= 1",) if is_packed else ()),
            f"n <= {_GRID}" if grouped else f"{count} * HV <= {INT32_MAX // most_blocks}",
        ),
    )


def _arguments(kernel: KdaKernel, width: int) -> dict[str, Arg]:
    """Return the arguments by name, for loads of up to `width` bytes."""
    size, grouped = kernel.head_size, kernel.is_grouped
    is_packed = grouped or kernel.is_packed
    tokens, slots = ("1 tokens", "slots") if is_packed else ("b 1", "b")
    flat: dict[str, Any] = {"doc": "", "contiguous": True, "alignment": width, "in_vectors": False}
    half: dict[str, Any] = {"dtype": "bfloat16", **flat}
    of_g: dict[str, Any] = {"alignment": width, "packed": 2, "in_vectors": not grouped}
    of_state: dict[str, Any] = {"dtype": "bfloat16", "doc": "", "packed": 3}
    state = f"{slots} HV {size} D"

    def required(
        name: str, axes: str, dtype: str, is_required: bool, *index: str, **more: Any
    ) -> Arg:
        if not is_required:
            return Absent(name, dtype=dtype)
        return Tensor(name, axes, dtype, **flat, index=index, **more)

    # The slots of a request's tokens, and of the state that it starts with.
    column, place = "columns(ssm_state_indices)", "ssm_state_indices < slots"
    if grouped:
        place += f" where ({column} < steps(cu_seqlens)[:, None]) | "
        place += f"({column} == clip(num_accepted_tokens - 1, 0, {kernel.t - 1})[:, None])"

    args = (
        Tensor("q", f"{tokens} H {size}", **half),
        Tensor("k", f"{tokens} H {size}", **half),
        Tensor("v", f"{tokens} HV {size}", **half),
        Tensor("g", f"{tokens} HV D", "bfloat16", "", **of_g),
        Tensor("beta", f"{tokens} HV", **half),
        Tensor("initial_state", state, writes=True, **of_state),
        Tensor("initial_state_source", state, **of_state),
        Tensor("output", f"{tokens} HV {size}", writes=True, reads=False, **half),
        required("A_log", "H", "float32", kernel.use_gate_in_kernel),
        required("dt_bias", f"{size}*H", "float32", kernel.use_gate_in_kernel and kernel.has_bias),
        required("cu_seqlens", "n+1", "int32", is_packed, "0 <= cu_seqlens <= tokens"),
        required("ssm_state_indices", f"n {kernel.t}" * grouped or "n", "int32", is_packed, place),
        required("num_accepted_tokens", "n", "int32", grouped, no_index="clamped"),
        *(Scalar(name, float, None, "") for name in ("scale", "eps", "lower_bound")),
    )
    return {arg.name: arg for arg in args}


def _one_token(args: dict[str, Arg]) -> list[Arg]:
    order = list(args.values())
    order.insert(7, Absent("initial_state_indices", dtype="int32"))
    return order


def _grouped(args: dict[str, Arg]) -> list[Arg]:
    """Return the arguments of the kernel for several tokens, which takes strides as numbers."""
    names = (
        *("q", "k", "v", "g", "beta", "A_log", "dt_bias"),
        *("cu_seqlens", "ssm_state_indices", "num_accepted_tokens"),
        *("initial_state", "initial_state_source"),
    )
    return [
        *(args[name] for name in names),
        Absent("initial_state_indices", dtype="int32"),
        args["output"],
        Absent("n_seq", "int", of="n"),
        Absent("q_total", "int", of="tokens"),
        Scalar("g_stride_q", int, None, ""),
        Scalar("state_stride0", int, None, ""),
        Scalar("src_stride0", int, None, ""),
        Absent("src_idx_stride", "int", 1),
        args["scale"],
        args["lower_bound"],
    ]


@generation.cached
def _values_of(kernel: KdaKernel, device: Device) -> Values:
    """Return the values that all calls of a kernel share."""
    module, symbol = FAMILY, ""
    if device.is_cuda:
        module, symbol = kernel.names(machine.capability(device.index))
    values = Values(_OP, compiled_row(row_of(kernel, symbol), module, {}, _OP, device))
    constants = {name: getattr(kernel, name) for name in _CONSTANTS}
    values.put(scale=kernel.head_size**-0.5, eps=1e-6, lower_bound=0.0, **constants)
    return values


def _only(name: str, value: object, expected: str) -> ArgumentError:
    """Make the error for an argument that only other calls have."""
    return _refuse(name, shown(value), f"None but {expected}")


def _check_gate(
    is_gated: bool, A_log: object, dt_bias: object, lower_bound: object
) -> float | None:
    """Check the arguments of a computed gate; return its bound."""
    if is_gated:
        if A_log is None:
            raise _refuse("A_log", None, "a tensor with use_gate_in_kernel=True")
    else:
        for name, value in (("A_log", A_log), ("dt_bias", dt_bias), ("lower_bound", lower_bound)):
            if value is not None:
                raise _only(name, value, "with use_gate_in_kernel=True")
    if lower_bound is None:
        return None
    bound = check_number(_OP, "lower_bound", lower_bound)
    if bound >= 0:
        raise _refuse("lower_bound", bound, "a number below 0")
    return bound


def _requests(
    q: TensorDesc,
    t: int,
    cu_seqlens: TensorLike | None,
    ssm_state_indices: TensorLike | None,
    state: TensorDesc,
) -> dict[str, TensorDesc]:
    """Return where requests of packed tokens start, and their slots."""
    b, each = q.shape[:2]
    if cu_seqlens is None:
        if each != t:
            expected = f"{t} token{'s' * (t > 1)} of each request, without cu_seqlens"
            raise _refuse("q", q.layout, expected)
        starts = memory.counting(q.device, b + 1, step=t)
    else:
        if b != 1:
            raise _refuse("q", q.layout, "[1, tokens, ...] with cu_seqlens")
        starts = as_desc(cu_seqlens, _OP, "cu_seqlens")
        if len(starts.shape) != 1 or not starts.shape[0]:
            raise _refuse("cu_seqlens", starts.layout, "rank 1 with an element or more")
    count = starts.shape[0] - 1
    if ssm_state_indices is not None:
        slots = as_desc(ssm_state_indices, _OP, "ssm_state_indices")
    else:
        if state.shape[:1] < (count * t,):
            expected = f"{count * t} states or more, one for each token, without ssm_state_indices"
            raise _refuse("initial_state", state.layout, expected)
        slots = memory.counting(q.device, count * t)
        slots = slots if t == 1 else viewed(slots, (count, t), (t, 1))
    return {"cu_seqlens": starts, "ssm_state_indices": slots}


def _side_by_side(name: str, tensor: TensorLike, b: int, t: int) -> TensorDesc:
    """View a tensor of tokens of each request as [1, tokens, ...]."""
    desc = as_desc(tensor, _OP, name)
    if desc.shape[:2] != (b, t) or len(desc.shape) < 3:
        expected = f"[{b}, {t}, ...], as q has requests and tokens"
        raise _refuse(name, desc.layout, expected)
    of_request, of_token = desc.strides[:2]
    step = of_request if t == 1 else of_token
    if b > 1 and t > 1 and of_request != t * of_token:
        raise _refuse(name, f"strides {desc.strides}", "tokens at equal distances")
    return viewed(desc, (1, b * t, *desc.shape[2:]), (b * t * step, step, *desc.strides[2:]))


def _strides(g: TensorDesc, state: TensorDesc) -> dict[str, int]:
    """Return the strides that the kernel for several tokens takes as numbers."""
    # A single state has the stride of adjacent ones.
    step = state.strides[0] if state.shape[:1] > (1,) else math.prod(state.shape[1:])
    return {"g_stride_q": g.strides[1], "state_stride0": step, "src_stride0": step}


@KeywordCall
def recurrent_kda(
    q: TensorLike,
    k: TensorLike,
    v: TensorLike,
    g: TensorLike,
    beta: TensorLike,
    A_log: TensorLike | None = None,
    dt_bias: TensorLike | None = None,
    scale: float | None = None,
    *,
    initial_state: TensorLike,
    output: TensorLike,
    use_qk_l2norm_in_kernel: bool = True,
    use_gate_in_kernel: bool = False,
    lower_bound: float | None = None,
    cu_seqlens: TensorLike | None = None,
    ssm_state_indices: TensorLike | None = None,
    num_spec_tokens: int | None = None,
    num_accepted_tokens: TensorLike | None = None,
    beta_is_logit: bool = False,
    stream: object = None,
) -> Values:
    """Advance states of Kimi's delta attention by one token or several, and read them.

    This is `gdn_decode` with a decay for each key. For each head of v, with the head of q and k
    that it shares, q and k normalised (`x / sqrt(sum(x * x) + 1e-6)`): `state *= decay`, `state +=
    beta * outer(v - state @ k, k)`, `output = scale * state @ q`. The decay is `exp(g)`. With
    `use_gate_in_kernel` it is `exp(-exp(A_log) * softplus(g + dt_bias))`, or with `lower_bound`
    `exp(lower_bound * sigmoid(exp(A_log) * (g + dt_bias)))`.

    Args:
        q, k: [b, t, H, D] bfloat16, t tokens of each request; D is 64 or 128. With `cu_seqlens`
            [1, tokens, H, D], the tokens of all requests in order.
        v: [b, t, HV, D] bfloat16; HV is a multiple of H.
        g: [b, t, HV, D] bfloat16: the logarithms of the decays, or what they are computed from.
            Tokens may lie apart, for t = 1 by multiples of 32 bytes.
        beta: [b, t, HV] bfloat16: how much of the token is written, 0 to 1.
        A_log: [H] float32, with `use_gate_in_kernel`.
        dt_bias: [H * D] float32, with `use_gate_in_kernel`; None for 0.
        scale: factor of the output; None for 1 / sqrt(D).
        initial_state: [slots, HV, D, D] bfloat16 as [value, key], updated in place. Slots may lie
            apart, by multiples of 32 bytes (16 for several tokens).
        output: as v, written.
        use_qk_l2norm_in_kernel: normalise q and k.
        use_gate_in_kernel: compute the decays in the kernel.
        lower_bound: a negative number, with `use_gate_in_kernel`.
        cu_seqlens: [n+1] int32: where each request's tokens start, and the end. A request has at
            most t tokens; those without any come last.
        ssm_state_indices: int32, each request's slots: [n], or with `num_spec_tokens` [n, t]: the
            state after token i goes to the i-th. By default they are counted from 0. No request may
            write a slot that another reads or writes. A token with a negative index is no token.
            Its `output` is unchanged, or 0 with `num_spec_tokens`, which also clears tokens after
            the last request.
        num_spec_tokens: t - 1, for several tokens.
        num_accepted_tokens: [n] int32, with `num_spec_tokens`: which of a request's slots to start
            from, counted from 1; the first by default.
        beta_is_logit: write `sigmoid(beta)` of the token.

    The options, and with `num_spec_tokens` t, H and HV, are compiled into modules, which
    `recurrent_kda.supports(...)` names. Indices and starts are on the GPU and not checked. On a GPU
    tensors are aligned to 32 bytes (16 for several tokens).

    Raises `ArgumentError` and `ArgumentTypeError` before anything is launched, and
    `KernelNotFoundError` if the kernels in use lack the module.
    Upstream: flashinfer/kda_decode.py, flashinfer/kda_kernels/recurrent_kda.py.
    """
    first = as_desc(q, _OP, "q")
    if len(first.shape) != 4 or first.shape[3] not in SIZES:
        raise _refuse("q", first.layout, "[b, t, heads, 64] or [b, t, heads, 128]")
    flags = {
        "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel,
        "use_gate_in_kernel": use_gate_in_kernel,
        "beta_is_logit": beta_is_logit,
    }
    flags = {name: check_flag(_OP, name, value) for name, value in flags.items()}
    bound = _check_gate(use_gate_in_kernel, A_log, dt_bias, lower_bound)
    t = 1
    if num_spec_tokens is not None:
        t += check_int(_OP, "num_spec_tokens", num_spec_tokens, 1)
    elif num_accepted_tokens is not None:
        raise _only("num_accepted_tokens", num_accepted_tokens, "with num_spec_tokens")
    kernel = KdaKernel(
        first.shape[3], has_bias=dt_bias is not None, has_bound=bound is not None, t=t, **flags
    )
    tensors: dict[str, Any] = {"q": first, "k": k, "v": v, "g": g, "beta": beta, "output": output}
    if t > 1 or cu_seqlens is not None or ssm_state_indices is not None:
        state = as_desc(initial_state, _OP, "initial_state")
        of_requests = _requests(first, t, cu_seqlens, ssm_state_indices, state)
        b, each = first.shape[:2]
        tensors = {name: _side_by_side(name, tensor, b, each) for name, tensor in tensors.items()}
        kernel = replace(kernel, is_packed=t == 1)
        if t > 1:
            kernel = replace(kernel, h=first.shape[2], hv=tensors["v"].shape[2])
            tensors |= _strides(tensors["g"], state)
            if num_accepted_tokens is None:
                count = of_requests["cu_seqlens"].shape[0] - 1
                num_accepted_tokens = memory.counting(first.device, count, step=0)
            tensors["num_accepted_tokens"] = num_accepted_tokens
        tensors |= of_requests
    values = _values_of(kernel, first.device).fresh()
    values.put(**tensors, A_log=A_log, dt_bias=dt_bias)
    values.put(initial_state=initial_state, initial_state_source=initial_state)
    if bound is not None:
        values.put(lower_bound=bound)
    if scale is not None:
        values.put(scale=check_number(_OP, "scale", scale))
    return values
