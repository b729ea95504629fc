"""`recurrent_kda`: advances states of Kimi's delta attention by one token.

The kernel is written in CuTe DSL (`flashinfer/kda_kernels/recurrent_kda.py`). A module is compiled
for a head size and for whether it computes the gate, and serves any number of requests and heads.
FlashInfer also compiles it for tiles that are fast for a given number of requests and heads, and
has another kernel for few of them; fi_ffi uses one module of each kind for all.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.abi.tensor import Device
from fi_ffi.errors import ArgumentError
from fi_ffi.loader import generation, machine
from fi_ffi.ops.attention.run import Launched, Values, compiled_row
from fi_ffi.ops.call.arguments import check_flag, check_number
from fi_ffi.ops.row import Absent, Arg, Row, Scalar, Tensor, Vector

if TYPE_CHECKING:
    from fi_ffi.ops.capability.judgement import Support

_OP = FAMILY = "recurrent_kda"
_SIZES = (64, 128)  # sizes of a head of keys and values
_INT = 2**31
# The tile for which `fi-ffi build kda_decode` compiles by default.
_MADE_FOR = "b64_t1_h16"
_CAPABILITY = (9, 0)  # the GPU for which calls are judged on a machine without one


def names(size: int, is_gated: bool, capability: tuple[int, int]) -> tuple[str, str]:
    """Return the names of the module for this GPU, and of its function."""
    major, minor = capability
    kernel = f"recurrent_kda_launch_{_MADE_FOR}_d{size}_{'gate' if is_gated else 'nogate'}"
    return f"{FAMILY}_sm{major}{minor}a_cute_dsl_{kernel}", f"{FAMILY}_{kernel}"


@functools.cache
def row_of(size: int, is_gated: bool, symbol: str = "") -> Row:
    """Return the row of the kernel's function; without a `symbol`, that of the CPU's reference."""
    # numpy aligns CPU memory to 16 bytes only.
    of: dict[str, Any] = {
        "contiguous": True,
        "alignment": 32 if symbol else 16,
        "in_vectors": False,
    }

    def half(name: str, axes: str, **more: Any) -> Tensor:
        return Tensor(name, axes, "bfloat16", "", **of | more)

    def gate(name: str, axes: str) -> Arg:
        return (
            Tensor(name, axes, "float32", "", **of) if is_gated else Absent(name, dtype="float32")
        )

    state = f"b HV {size} {size}"
    args: tuple[Arg, ...] = (
        half("q", f"b 1 H {size}"), half("k", f"b 1 H {size}"), half("v", f"b 1 HV {size}"),
        half("g", f"b 1 HV {size}"), half("beta", "b 1 HV"),
        half("initial_state", state, writes=True), half("initial_state_source", state),
        Absent("initial_state_indices", dtype="int32"),
        half("output", f"b 1 HV {size}", writes=True, reads=False),
        gate("A_log", "H"), gate("dt_bias", f"{size}*H"),
        *(Absent(name, dtype="int32")
          for name in ("cu_seqlens", "ssm_state_indices", "num_accepted_tokens")),
        *(Scalar(name, float, None, "") for name in ("scale", "eps", "lower_bound")),
    )  # fmt: skip
    blocks = size // 8  # the most blocks of a state
    return Row(
        _OP, FAMILY, symbol or _OP, "flashinfer/kda_kernels/recurrent_kda.py", "", args, {},
        ">=0.7.2", vector=Vector(()), offset_limit=2**63, nothing_axis="b", capabilities=(9, 10),
        in_place=(("initial_state", "initial_state_source"),),
        requires=("H >= 1", "HV % H == 0", f"b * HV <= {(_INT - 1) // blocks}"),
    )  # fmt: skip


@generation.cached
def _values_of(size: int, is_gated: bool, device: Device) -> Values:
    """Return the values that all calls of a kernel share."""
    module, symbol = FAMILY, ""
    if device.is_cuda:
        module, symbol = names(size, is_gated, machine.capability(device.index))
    values = Values(
        _OP, compiled_row(row_of(size, is_gated, symbol), module, {}, _OP, device), "", {}
    )
    values.put(scale=size**-0.5, eps=1e-6, lower_bound=0.0)
    return values


_SAMPLE: dict[str, Any] = {"head_size": 128, "use_gate_in_kernel": True}


def judge_kda(op: str, query: Any, compiled: Any) -> Support:
    """Judge whether there is a module compiled for these."""
    from fi_ffi.ops.capability.judgement import judge

    unknown = next((name for name in compiled if name not in _SAMPLE), None)
    if unknown is not None:
        raise TypeError(f"{op}.supports() got an unexpected keyword argument {unknown!r}")
    size, is_gated = (_SAMPLE | compiled).values()
    if size not in _SIZES:
        raise ArgumentError(op, "head_size", got=size, expected="64 or 128")
    module, symbol = names(size, is_gated, query.capability or _CAPABILITY)
    return judge(op, [row_of(size, is_gated, symbol)], query, lambda _: module)


@functools.partial(Launched, judge=judge_kda)
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
    use_gate_in_kernel: bool = False,
    stream: object = None,
) -> Values:
    """Advance states of Kimi's delta attention by one token, and read them.

    This is `gdn_decode` with a decay for each key. For each head of v, with the head of q and k
    that it shares, q and k normalised (`x / sqrt(sum(x * x) + 1e-6)`): `state *= decay`, `state +=
    beta * outer(v - state @ k, k)`, `output = scale * state @ q`. The decay is `exp(g)`, or with
    `use_gate_in_kernel` `exp(-exp(A_log) * softplus(g + dt_bias))`.

    Args:
        q, k: [b, 1, H, D] bfloat16, one token of each request; D is 64 or 128.
        v: [b, 1, HV, D] bfloat16; HV is a multiple of H.
        g: [b, 1, HV, D] bfloat16: the logarithms of the decays, or what they are computed from.
        beta: [b, 1, HV] bfloat16: how much of the token is written, 0 to 1.
        A_log: [H] float32, with `use_gate_in_kernel`.
        dt_bias: [H * D] float32, with `use_gate_in_kernel`.
        scale: factor of the output; None for 1 / sqrt(D).
        initial_state: [b, HV, D, D] bfloat16 as [value, key], updated in place.
        output: [b, 1, HV, D] bfloat16, written.
        use_gate_in_kernel: compute the decays in the kernel.

    On a GPU tensors are aligned to 32 bytes. Raises `ArgumentError` and `ArgumentTypeError` before
    anything is launched, and `KernelNotFoundError` if the kernels in use lack the module, which
    `recurrent_kda.supports(...)` names.
    Upstream: flashinfer/kda_decode.py, flashinfer/kda_kernels/recurrent_kda.py.
    """
    first = as_desc(q, _OP, "q")
    if len(first.shape) != 4 or first.shape[3] not in _SIZES:
        expected = "[b, 1, heads, 64] or [b, 1, heads, 128]"
        raise ArgumentError(_OP, "q", got=first.layout, expected=expected)
    is_gated = check_flag(_OP, "use_gate_in_kernel", use_gate_in_kernel)
    for name, value in (("A_log", A_log), ("dt_bias", dt_bias)):
        if (value is not None) != is_gated:
            got = None if value is None else as_desc(value, _OP, name).layout
            expected = f"{'a tensor' if is_gated else 'None'} with use_gate_in_kernel={is_gated}"
            raise ArgumentError(_OP, name, got=got, expected=expected)
    values = _values_of(first.shape[3], is_gated, first.device).fresh()
    values.put(
        q=first, k=k, v=v, g=g, beta=beta, initial_state=initial_state,
        initial_state_source=initial_state, output=output,
    )  # fmt: skip
    if is_gated:
        values.put(A_log=A_log, dt_bias=dt_bias)
    if scale is not None:
        values.put(scale=check_number(_OP, "scale", scale))
    return values
