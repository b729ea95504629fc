"""`FusedMoe`, mixtures of experts in one quantisation on one device, and `cutlass_fused_moe`, which
finds the kernels for its dtypes, flags and device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.abi.tensor import Device, parse_device, parse_dtype
from fi_ffi.errors import KernelNotFoundError
from fi_ffi.loader import generation
from fi_ffi.ops.call.arguments import Refusal, check_flag, check_int
from fi_ffi.ops.call.support import Support, supports
from fi_ffi.ops.moe.activations import activation_name
from fi_ffi.ops.moe.call import MoeCall
from fi_ffi.ops.moe.interface import FLAGS, MODULE
from fi_ffi.ops.moe.kernels import Kernels, Runner, Tactics
from fi_ffi.ops.moe.modes import Mode, mode_of
from fi_ffi.ops.moe.tactics import Profile, Profiler
from fi_ffi.ops.steps.keyword_call import arguments_by_name, keyword_function

if TYPE_CHECKING:
    from fi_ffi.ops.call.prepared import Prepared

_OP = "cutlass_fused_moe"


def _flags(op: str, arguments: Mapping[str, Any]) -> frozenset[str]:
    """Return the flags that are on."""
    return frozenset([name for name in FLAGS if check_flag(op, name, arguments[name])])


class FusedMoe:
    """A mixture of experts in one quantisation, on one device; call it like `cutlass_fused_moe`.

    Args:
        activation_dtype: dtype of `input`.
        weight_dtype: dtype of both weights; by default that of the activations.
        output_dtype: dtype of `output`; by default that of the activations.
        device: "cuda:0", ..., or "cpu", where numpy computes the same.
        use_deepseek_fp8_block_scale: bfloat16 activations, and fp8 weights with a scale for each
            block of 128 by 128.
        use_w4_group_scaling: 4-bit weights, two in a uint8: MXFP4, or with `use_packed_weights`
            int4. Activations are quantised to fp8 for int4.
        use_mxfp8_act_scaling: float8_e4m3fn activations with a scale for each 32 elements of a row,
            and weights of MXFP4 (int64) or MXFP8.
        use_packed_weights: int4 weights, with `use_w4_group_scaling`.

    int64 weights are NVFP4 or MXFP4, 16 values in each; uint8 and int64 activations are NVFP4.
    These modes are for Blackwell: they are compiled, but have never run on a GPU.

    docs/moe.md describes the modes and their weights and scales. Several threads may call one
    object; the kernels' own object serialises the calls.

    Raises `ArgumentError` and `ArgumentTypeError`. The first call looks for kernels; it raises
    `ArchitectureError` for a GPU without kernels for the mode, and `KernelNotFoundError` if there
    are none.
    """

    def __init__(
        self,
        activation_dtype: object,
        weight_dtype: object = None,
        output_dtype: object = None,
        *,
        device: object = "cuda:0",
        use_deepseek_fp8_block_scale: bool = False,
        use_w4_group_scaling: bool = False,
        use_mxfp8_act_scaling: bool = False,
        use_packed_weights: bool = False,
    ) -> None:
        op = "FusedMoe"
        flags = _flags(op, locals())
        activation = parse_dtype(activation_dtype, op=op, argument="activation_dtype").name
        weight, output = (
            activation if value is None else parse_dtype(value, op=op, argument=name).name
            for name, value in (("weight_dtype", weight_dtype), ("output_dtype", output_dtype))
        )
        # The dtypes of activations, weights and results.
        self.dtypes = (activation, weight, output)
        self.mode: Mode = mode_of(op, self.dtypes, flags)
        self.device: Device = parse_device(device, op=op)
        self._kernels = Kernels(op, self.mode, self.dtypes, self.device)
        self._call, self._profiler = MoeCall(self._kernels), Profiler(self._kernels)

    def __repr__(self) -> str:
        return f"<fi_ffi FusedMoe {self.mode.name} ({', '.join(self.dtypes)}) on {self.device}>"

    def make_runner(self) -> Runner:
        """Make a new kernel object, with allocations of its own."""
        return self._kernels.make_runner()

    @property
    def runner(self) -> Runner:
        """The kernel object, made on first use."""
        return self._kernels.runner

    @property
    def tactics(self) -> Tactics:
        """The number of tactics of each multiplication, from which `profile_ids` chooses; (1, 1) on
        the CPU."""
        return self._kernels.tactics

    def __call__(
        self,
        output: TensorLike,
        input: TensorLike,
        token_selected_experts: TensorLike,
        token_final_scales: TensorLike | None,
        fc1_expert_weights: TensorLike,
        fc2_expert_weights: TensorLike,
        quant_scales: object = None,
        *,
        fc1_expert_biases: TensorLike | None = None,
        fc2_expert_biases: TensorLike | None = None,
        input_sf: TensorLike | None = None,
        swiglu_alpha: TensorLike | None = None,
        swiglu_beta: TensorLike | None = None,
        swiglu_limit: TensorLike | None = None,
        tp_size: int = 1,
        tp_rank: int = 0,
        ep_size: int = 1,
        ep_rank: int = 0,
        enable_alltoall: bool = False,
        activation_type: object = "Swiglu",
        profile_ids: object = None,
        enable_pdl: bool = False,
        swizzled_input_sf: bool = True,
        stream: object = None,
    ) -> None:
        """Run the layer on `stream`. The arguments are those of `cutlass_fused_moe`, and so are the
        errors."""
        self._call.launch(locals())  # the arguments by name

    def prepare(self, *args: Any, **kwargs: Any) -> Prepared:
        """Pack a call with these arguments, to launch it many times: see `fi_ffi.prepare`."""
        name = self._kernels.op
        return self._call.prepare(arguments_by_name(self.__call__, name, args, kwargs))

    @classmethod
    def supports(cls, sm: Any = None, **asked: Any) -> Support:
        """Ask whether one can be made for a GPU (`sm=90`), with the arguments of `Op.supports`."""
        return supports(cls.__name__, sm=sm, **asked)

    def profile(
        self,
        input: TensorLike,
        fc1_expert_weights: TensorLike,
        fc2_expert_weights: TensorLike,
        *,
        top_k: int,
        fc1_expert_biases: TensorLike | None = None,
        fc2_expert_biases: TensorLike | None = None,
        tp_size: int = 1,
        tp_rank: int = 0,
        ep_size: int = 1,
        ep_rank: int = 0,
        enable_alltoall: bool = False,
        activation_type: object = "Swiglu",
        enable_pdl: bool = False,
        repeats: int = 10,
        stream: object = None,
    ) -> Profile:
        """Time every tactic for calls of this size; pass the result's `profile_ids` to calls.

        The kernels' profiler generates tokens and routings, so only the shape of `input` matters;
        it reads the weights. It allocates device memory, and frees it at the end. The call waits
        for the stream. Results are cached for each size. DeepSeek's block scales have only one
        tactic.

        Args:
            input, fc1_expert_weights, fc2_expert_weights, fc1_expert_biases, fc2_expert_biases: as
                in `cutlass_fused_moe`.
            top_k: experts of each token.
            repeats: timed runs of each tactic.
            others: as in `cutlass_fused_moe`.

        Returns a `Profile`: `profile_ids`, and the milliseconds of each tactic in `gemm1` and
        `gemm2`. Raises what calls raise, and `ArgumentError` while the stream records a graph.
        """
        return self._profiler.profile(locals())

    def workspace_size(
        self,
        num_tokens: int,
        hidden_size: int,
        inter_size: int,
        num_experts: int,
        top_k: int,
        *,
        tp_size: int = 1,
        tp_rank: int = 0,
        ep_size: int = 1,
        ep_rank: int = 0,
        activation_type: object = "Swiglu",
    ) -> int:
        """Return the bytes that a call takes from the device's pool while it runs; 0 on the CPU.

        `num_experts` counts the experts of all ranks. Raises `KernelNotFoundError` for releases
        before 0.6.16, which do not report the size.
        """
        op, arguments = "FusedMoe.workspace_size", locals()
        names = ("num_tokens", "hidden_size", "inter_size", "num_experts", "top_k")
        sizes = [check_int(op, name, arguments[name], 1) for name in names]
        for size, rank, of in ((tp_size, tp_rank, "tp"), (ep_size, ep_rank, "ep")):
            check_int(op, f"{of}_rank", rank, 0, check_int(op, f"{of}_size", size, 1) - 1)
        activation = activation_name(Refusal(op), activation_type)
        if not self.device.is_cuda:
            return 0
        runner = self._kernels.runner
        if not runner.has("get_workspace_size"):
            releases = runner.interface.releases
            raise KernelNotFoundError(f"{op}: {MODULE} of FlashInfer {releases} does not report it")
        theirs = ("num_rows", "hidden_size", "inter_size", "num_experts_total", "experts_per_token")
        return runner.ask(
            "get_workspace_size",
            **dict(zip(theirs, sizes, strict=True)),
            **{name: arguments[name] for name in ("tp_size", "tp_rank", "ep_size", "ep_rank")},
            base_activation_type=self._kernels.number_of(op, activation),
        )


_calls: dict[tuple[object, ...], MoeCall] = {}


def _prepare(**arguments: Any) -> Prepared:
    call, arguments = _call_of(arguments)
    return call.prepare(arguments)


@keyword_function(_prepare)
def cutlass_fused_moe(
    output: TensorLike,
    input: TensorLike,
    token_selected_experts: TensorLike,
    token_final_scales: TensorLike | None,
    fc1_expert_weights: TensorLike,
    fc2_expert_weights: TensorLike,
    output_dtype: object = None,
    quant_scales: object = None,
    fc1_expert_biases: TensorLike | None = None,
    fc2_expert_biases: TensorLike | None = None,
    input_sf: TensorLike | None = None,
    swiglu_alpha: TensorLike | None = None,
    swiglu_beta: TensorLike | None = None,
    swiglu_limit: TensorLike | None = None,
    tp_size: int = 1,
    tp_rank: int = 0,
    ep_size: int = 1,
    ep_rank: int = 0,
    *,
    enable_alltoall: bool = False,
    use_deepseek_fp8_block_scale: bool = False,
    use_w4_group_scaling: bool = False,
    use_mxfp8_act_scaling: bool = False,
    use_packed_weights: bool = False,
    activation_type: object = "Swiglu",
    profile_ids: object = None,
    enable_pdl: bool = False,
    swizzled_input_sf: bool = True,
    stream: object = None,
) -> None:
    """A layer of experts: send each token to its experts and sum their weighted results.

    Args:
        output: [tokens, hidden], written.
        input: [tokens, hidden]; for NVFP4 [tokens, hidden / 2] uint8 or [tokens, hidden / 16]
            int64.
        token_selected_experts: [tokens, top_k] int32, distinct for each token. An expert of another
            rank adds nothing.
        token_final_scales: [tokens, top_k] float32; None is 1 for each.
        fc1_expert_weights: [experts, rows, hidden]. For a gated activation, `rows` is twice the
            intermediate size: first the linear half, then the gate.
        fc2_expert_weights: [experts, hidden, inter]. 4-bit weights for Hopper are uint8, two values
            each, and interleaved; for Blackwell int64, 16 values each.
        output_dtype: the expected dtype of `output`; None accepts any.
        quant_scales: a list of tensors that depends on the mode (docs/moe.md).
        fc1_expert_biases, fc2_expert_biases: [experts, rows] and [experts, hidden] of the output's
            dtype; both or neither. The second is added on tp_rank 0 only.
        input_sf: the scales of NVFP4 and MXFP8 activations, as `fp4_quantize` and `mxfp8_quantize`
            write them: in tiles of 128 rows and 4 columns. uint8, or for NVFP4 float8_e4m3fn and
            for MXFP8 float8_e8m0fnu.
        swiglu_alpha, swiglu_beta, swiglu_limit: [experts] float32.
        tp_size, tp_rank, ep_size, ep_rank: the part of the whole layer that the weights are.
        enable_alltoall: do not write rows of tokens without an expert of this rank.
        activation_type: "Swiglu", "Geglu", "SwigluBias", "SwigluStep", "GegluTanh", "Gelu", "Relu",
            "Silu", "Relu2", "Identity", or FlashInfer's `ActivationType`.
        profile_ids: the tactics of both multiplications, from `FusedMoe.profile`; None, or -1, is
            the kernels' own choice.
        swizzled_input_sf: False if `input_sf` is in rows, each of a multiple of 4 scales.
        use_deepseek_fp8_block_scale, use_w4_group_scaling, use_mxfp8_act_scaling,
            use_packed_weights: as in `FusedMoe`.

    While it runs, the call takes a workspace from the device's pool, in stream order.

    Raises `ArgumentError` and `ArgumentTypeError` before anything is launched, `ArchitectureError`
    for a GPU that the mode is not for, and `KernelNotFoundError` if the kernels in use lack the
    mode.
    Upstream: flashinfer/fused_moe/core.py, csrc/fused_moe/cutlass_backend.
    """
    call, arguments = _call_of(locals())
    call.launch(arguments)


def _call_of(arguments: Mapping[str, Any]) -> tuple[MoeCall, dict[str, Any]]:
    """Return what calls the kernels for these dtypes, flags and device, made once, and the
    arguments with tensors described."""
    flags = _flags(_OP, arguments)
    x, out = as_desc(arguments["input"], _OP, "input"), as_desc(arguments["output"], _OP, "output")
    weights = as_desc(arguments["fc1_expert_weights"], _OP, "fc1_expert_weights")
    if arguments["output_dtype"] is not None:
        expected = parse_dtype(arguments["output_dtype"], op=_OP, argument="output_dtype")
        if out.dtype is not expected:
            raise Refusal(_OP)("output", out.layout, f"output_dtype {expected}")
    key = (x.device, x.dtype, weights.dtype, out.dtype, flags, generation.number)
    call = _calls.get(key)
    if call is None:
        dtypes = (x.dtype.name, weights.dtype.name, out.dtype.name)
        mode = mode_of(_OP, dtypes, flags, ("input", "fc1_expert_weights", "output"))
        call = _calls.setdefault(key, MoeCall(Kernels(_OP, mode, dtypes, x.device)))
    return call, {**arguments, "input": x, "output": out, "fc1_expert_weights": weights}
