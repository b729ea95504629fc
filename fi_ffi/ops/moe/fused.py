"""`FusedMoe`: mixtures of experts of one quantisation, on one device."""

from __future__ import annotations

import threading
from typing import NamedTuple

from fi_ffi.abi.device import Device, parse_device
from fi_ffi.abi.dtypes import parse_dtype
from fi_ffi.abi.interop import TensorLike
from fi_ffi.errors import ArgumentError, KernelNotFoundError
from fi_ffi.ops.moe import options
from fi_ffi.ops.moe.arrays import TensorArrays
from fi_ffi.ops.moe.calls import (
    SWIGLU,
    Asked,
    Settled,
    call,
    described,
    described_scales,
    release_of,
)
from fi_ffi.ops.moe.interface import MODULE
from fi_ffi.ops.moe.modes import FLAGS, Mode, mode_of
from fi_ffi.ops.moe.options import Parallel
from fi_ffi.ops.moe.profile import Profile, Profiles
from fi_ffi.ops.moe.runner import Runner, make_runner


class Tactics(NamedTuple):
    """How many ways there are to run each of the two multiplications."""

    gemm1: int
    gemm2: int


class FusedMoe:
    """Mixtures of experts of one quantisation, on one device.

    Args:
        activation_dtype: of `input`.
        weight_dtype: of both weights; the activations' where it is None.
        output_dtype: of `output`; the activations' where it is None.
        device: "cuda:0", ..., or "cpu", where numpy computes the same.
        use_deepseek_fp8_block_scale: bfloat16 activations, fp8 weights with a scale for every
            128 by 128 of them.
        use_w4_group_scaling: weights of 4 bits, two in a uint8: MXFP4, or with
            `use_packed_weights` int4, for which activations are quantised to fp8.
        use_mxfp8_act_scaling: refused: FlashInfer has kernels for it from SM100 on.

    docs/moe.md has the modes, and what weights and scales have to look like.  Its calls may be
    made from several threads; the kernels' own object makes them one after the other.

    Raises `ArgumentError`, `ArgumentTypeError`, and `ArchitectureError` for what is not of
    Hopper.  Kernels are looked for with the first call.
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
        asked = (
            use_deepseek_fp8_block_scale, use_w4_group_scaling, use_mxfp8_act_scaling,
            use_packed_weights,
        )  # fmt: skip
        given = zip(FLAGS, asked, strict=True)
        flags = frozenset(name for name, value in given if options.flag(op, name, value))
        act = parse_dtype(activation_dtype, op=op, argument="activation_dtype").name
        weight, output = (
            act if value is None else parse_dtype(value, op=op, argument=name).name
            for name, value in (("weight_dtype", weight_dtype), ("output_dtype", output_dtype))
        )
        self.mode: Mode = mode_of(op, act, weight, output, flags)
        self.device: Device = parse_device(device, op=op)
        if self.device.type not in ("cpu", "cuda"):
            raise ArgumentError(op, "device", got=self.device, expected="cpu or a CUDA device")
        # Of activations, weights and results.
        self.dtypes = (act, weight, output)
        self.arrays = TensorArrays()
        self.settled: dict[object, Settled] = {}
        self._profiles = Profiles()
        self._lock = threading.Lock()
        self._runner: Runner | None = None
        self._tactics: Tactics | None = None

    def __repr__(self) -> str:
        return f"<fi_ffi FusedMoe {self.mode.name} ({', '.join(self.dtypes)}) on {self.device}>"

    def make_runner(self) -> Runner:
        """The kernels' object anew, for who wants to keep what it allocates apart."""
        return make_runner("FusedMoe", self.mode, self.dtypes, self.device)

    @property
    def runner(self) -> Runner:
        """The kernels' object, made once."""
        if self._runner is None:
            with self._lock:
                if self._runner is None:
                    self._runner = self.make_runner()
        return self._runner

    @property
    def tactics(self) -> Tactics:
        """How many there are; `profile_ids` names one of each.  One of each on the CPU."""
        if self._tactics is None:
            counts = self.runner.counts() if self.device.is_cuda else (1, 1)
            self._tactics = Tactics(*counts)
        return self._tactics

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
        stream: object = None,
    ) -> None:
        """Compute; the arguments are those of `cutlass_fused_moe`."""
        op = "FusedMoe"
        descs = described(op, {
            "output": output, "input": input, "token_selected_experts": token_selected_experts,
            "token_final_scales": token_final_scales, "fc1_expert_weights": fc1_expert_weights,
            "fc1_expert_biases": fc1_expert_biases, "fc2_expert_weights": fc2_expert_weights,
            "fc2_expert_biases": fc2_expert_biases, "swiglu_alpha": swiglu_alpha,
            "swiglu_beta": swiglu_beta, "swiglu_limit": swiglu_limit,
        })  # fmt: skip
        parallel = {"tp_size": tp_size, "tp_rank": tp_rank, "ep_size": ep_size, "ep_rank": ep_rank}
        limits = tuple(name for name in SWIGLU if name in descs)
        asked = Asked.checked(op, parallel, enable_alltoall, activation_type, enable_pdl, limits)
        scales = described_scales(op, quant_scales)
        call(self, op, descs, scales, asked, profile_ids, stream)

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
        """Run every tactic for calls of this size and find the fastest: its `profile_ids`.

        Of `input` only the shape counts: the kernels' profiler makes tokens and routings of its
        own, and its memory, which is given back.  The weights are read.  It waits for the
        stream, and is done once for a size.  DeepSeek's block scales leave nothing to choose.

        Raises what calls raise, and `ArgumentError` while the stream records a graph.
        """
        op = "FusedMoe.profile"
        descs = described(op, {
            "input": input, "fc1_expert_weights": fc1_expert_weights,
            "fc1_expert_biases": fc1_expert_biases, "fc2_expert_weights": fc2_expert_weights,
            "fc2_expert_biases": fc2_expert_biases,
        })  # fmt: skip
        parallel = {"tp_size": tp_size, "tp_rank": tp_rank, "ep_size": ep_size, "ep_rank": ep_rank}
        asked = Asked.checked(op, parallel, enable_alltoall, activation_type, enable_pdl)
        counts = options.integer(op, "top_k", top_k, 1), options.integer(op, "repeats", repeats, 1)
        return self._profiles.find(self, op, descs, asked, *counts, stream)

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
        """Bytes that a call takes from the device's pool while it runs; 0 on the CPU.

        `num_experts` are those of all ranks.  Raises `KernelNotFoundError` for releases before
        0.6.16, which do not tell.
        """
        op = "FusedMoe.workspace_size"
        given = {
            "num_tokens": num_tokens, "hidden_size": hidden_size, "inter_size": inter_size,
            "num_experts": num_experts, "top_k": top_k,
        }  # fmt: skip
        sizes = [options.integer(op, name, value, 1) for name, value in given.items()]
        ranks = {"tp_size": tp_size, "tp_rank": tp_rank, "ep_size": ep_size, "ep_rank": ep_rank}
        parallel = Parallel.checked(op, **ranks)
        activation = options.activation(op, activation_type)
        if not self.device.is_cuda:
            return 0
        if not self.runner.has("get_workspace_size"):
            releases = self.runner.interface.releases
            raise KernelNotFoundError(f"{op}: {MODULE} of FlashInfer {releases} does not tell it")
        names = ("num_rows", "hidden_size", "inter_size", "num_experts_total", "experts_per_token")
        number = options.activation_number(op, activation, release_of(self.device))
        return self.runner.ask(
            "get_workspace_size", **dict(zip(names, sizes, strict=True)), **vars(parallel),
            base_activation_type=number,
        )  # fmt: skip
