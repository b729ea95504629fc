"""`FusedMoe`: mixtures of experts of one quantisation, on one device; `cutlass_fused_moe` calls
the one for its dtypes, flags and device."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import Entry, make_array
from fi_ffi.abi.interop import TensorLike, as_desc
from fi_ffi.abi.objects import Array
from fi_ffi.abi.streams import handle_for
from fi_ffi.abi.tensor import Device, TensorDesc, parse_device, parse_dtype
from fi_ffi.errors import (
    ArgumentError,
    ArgumentTypeError,
    KernelError,
    KernelNotFoundError,
    printed,
)
from fi_ffi.ops.call.arguments import check_flag, check_int, shown
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.call.launching import given_by_name, launching, prepare_row
from fi_ffi.ops.moe import profile, weights
from fi_ffi.ops.moe.interface import (
    ACTIVATIONS,
    FLAGS,
    GATED,
    MODULE,
    Interface,
    Runner,
    activation_numbers,
    make_runner,
    of_release,
)
from fi_ffi.ops.moe.modes import SWIGLU, Mode, mode_of, row_of
from fi_ffi.ops.moe.profile import Profile
from fi_ffi.ops.providers import entry_for
from fi_ffi.ops.releases import is_in
from fi_ffi.ops.row import Row

if TYPE_CHECKING:
    from fi_ffi.ops.call.prepared import Prepared
    from fi_ffi.ops.capability.judgement import Support

_OP = "cutlass_fused_moe"
# Which of alpha, beta and limit an activation takes.
_LIMITS = {"Swiglu": SWIGLU, "SwigluBias": SWIGLU, "SwigluStep": SWIGLU[2:]}


class Tactics(NamedTuple):
    """How many ways there are to run each of the two multiplications."""

    gemm1: int
    gemm2: int


@functools.cache
def _pair(first: int, second: int) -> tuple[Array, int]:
    """An Array of two ints, and its address."""
    array = make_array([first, second])
    return array, int(ffi.cast("uintptr_t", array.handle))


def _activation(op: str, value: object) -> str:
    """An activation's name: of a str, or of FlashInfer's `ActivationType`.

    Their numbers are others in other releases, so a plain int is none.
    """
    name = value if isinstance(value, str) else getattr(value, "name", None)
    if isinstance(name, str) and name in ACTIVATIONS:
        return name
    expected = " or ".join(map(repr, ACTIVATIONS))
    if not isinstance(name, str):
        raise ArgumentTypeError(op, "activation_type", got=shown(value), expected=expected)
    raise ArgumentError(op, "activation_type", got=printed(name), expected=expected)


def _flags(op: str, *asked: object) -> frozenset[str]:
    """The flags that are on."""
    given = zip(FLAGS, asked, strict=True)
    return frozenset([name for name, value in given if check_flag(op, name, value)])


def _with_limits(op: str, name: str, *tensors: object) -> str:
    """The activation that serves one with these `swiglu_` tensors; raises where it takes none.

    `Swiglu` with any of them is `SwigluBias`: said here, because releases before 0.6.13 do not
    see it for `swiglu_limit` with every other activation.
    """
    taken = _LIMITS.get(name, ())
    for argument, tensor in zip(SWIGLU, tensors, strict=True):
        if tensor is not None and argument not in taken:
            expected = f"None: {name} takes {' and '.join(taken) or 'none of them'}"
            raise ArgumentError(op, argument, got="a tensor", expected=expected)
    return "SwigluBias" if name == "Swiglu" else name


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
        use_mxfp8_act_scaling: float8_e4m3fn activations with a scale for every 32 of a row, and
            weights of MXFP4 (int64) or MXFP8.

    Of int64 are NVFP4 and MXFP4 weights, 16 numbers in each; with uint8 or int64 activations
    these come as NVFP4 too.  They are for Blackwell, built and never run.

    docs/moe.md has the modes, and what weights and scales have to look like.  Its calls may be
    made from several threads; the kernels' own object makes them one after the other.

    Raises `ArgumentError` and `ArgumentTypeError`.  Kernels are looked for with the first call,
    which raises `ArchitectureError` for a GPU that the mode is not for.
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
        self._op = op = "FusedMoe"
        flags = _flags(
            op, use_deepseek_fp8_block_scale, use_w4_group_scaling, use_mxfp8_act_scaling,
            use_packed_weights,
        )  # fmt: skip
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
        # The compiled calls of the kernels' profiler, by whether the activation has a gate, and
        # what was found, by all that it is told.
        self._profiling: dict[bool, CompiledRow] = {}
        self._profiles: dict[object, Profile] = {}
        self._profile_lock = threading.Lock()  # one at a time: they would be in each other's way
        self._lock = threading.Lock()
        self._runner: Runner | None = None
        self._tactics: Tactics | None = None
        # Calls by whether the activation has a gate, and the forms of the scales.
        self._calls: dict[tuple[bool, tuple[int, ...]], CompiledRow] = {}
        self._numbers: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"<fi_ffi FusedMoe {self.mode.name} ({', '.join(self.dtypes)}) on {self.device}>"

    def make_runner(self) -> Runner:
        """Make another object of the kernels, whose allocations are its own."""
        return make_runner(self._op, self.mode, self.dtypes, self.device)

    @property
    def runner(self) -> Runner:
        """The object of the kernels, made once."""
        if self._runner is None:
            with self._lock:
                if self._runner is None:
                    self._runner = self.make_runner()
        return self._runner

    @property
    def interface(self) -> Interface:
        """The interface of its kernels; on the CPU, that of the default release."""
        return self.runner.interface if self.has_kernels else of_release(None)

    @property
    def has_kernels(self) -> bool:
        """Whether calls run kernels rather than the CPU's reference."""
        return self.device.is_cuda or self._runner is not None

    @property
    def tactics(self) -> Tactics:
        """How many tactics there are, of which `profile_ids` names two; one of each on the CPU."""
        if self._tactics is None:
            self._tactics = Tactics(*(self.runner.counts() if self.has_kernels else (1, 1)))
        return self._tactics

    def number_of(self, op: str, activation: str) -> int:
        """The number of an activation in the release of its kernels."""
        if not self._numbers:
            release = self.runner.release_in_use if self.has_kernels else None
            has_gateless = release is None or is_in(release, self.mode.gateless)
            self._numbers = {
                name: number
                for name, number in activation_numbers(release).items()
                if has_gateless or name in GATED
            }
        if activation not in self._numbers:
            release = self.runner.release_in_use
            with_ = f" with {self.mode.about}" if self.mode.gateless else ""
            raise KernelNotFoundError(
                f"{op}: {MODULE} of FlashInfer {release} has no {activation}{with_}"
            )
        return self._numbers[activation]

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
        """Compute; the arguments are those of `cutlass_fused_moe`."""
        op = self._op
        compiled, values = self._fill(
            output, input, token_selected_experts, token_final_scales, fc1_expert_weights,
            fc2_expert_weights, quant_scales, fc1_expert_biases, fc2_expert_biases, input_sf,
            swiglu_alpha, swiglu_beta, swiglu_limit, tp_size, tp_rank, ep_size, ep_rank,
            enable_alltoall, activation_type, profile_ids, enable_pdl, swizzled_input_sf, stream,
        )  # fmt: skip
        try:
            compiled.call(self, *values, stream=stream)
        except KernelError as error:
            if self.device.is_cuda or error.kind != "ValueError":
                raise
            # The CPU's reference looks at the experts; on a GPU nobody can.
            name, expected = "token_selected_experts", "distinct experts for each token"
            raise ArgumentError(op, name, got=error.message, expected=expected) from None

    def prepare(self, *args: Any, **kwargs: Any) -> Prepared:
        """A call with these arguments that is packed once, to be launched many times: see
        `fi_ffi.prepare`."""
        given = given_by_name(self.__call__, self._op, args, kwargs)
        compiled, values = self._fill(**given, is_launched=False)
        return prepare_row(compiled, given["stream"], *values)

    @classmethod
    def supports(cls, sm: Any = None, **asked: Any) -> Support:
        """Whether one can be made for a GPU (`sm=90`): see `Op.supports`, which takes the same."""
        from fi_ffi.ops.capability.matrix import judge_call

        return judge_call(cls.__name__, sm, **asked)

    def _fill(
        self, output: Any, input: Any, token_selected_experts: Any, token_final_scales: Any,
        fc1_expert_weights: Any, fc2_expert_weights: Any, quant_scales: Any,
        fc1_expert_biases: Any, fc2_expert_biases: Any, input_sf: Any, swiglu_alpha: Any,
        swiglu_beta: Any, swiglu_limit: Any, tp_size: Any, tp_rank: Any, ep_size: Any,
        ep_rank: Any, enable_alltoall: Any, activation_type: Any, profile_ids: Any,
        enable_pdl: Any, swizzled_input_sf: Any, stream: object, is_launched: bool = True,
    ) -> tuple[CompiledRow, tuple[Any, ...]]:  # fmt: skip
        """The compiled row of a call, and what it is given."""
        op, x = self._op, as_desc(input, self._op, "input")
        if x.device is not self.device:
            raise ArgumentError(op, "input", got=x.device, expected=self.device)
        activation = _activation(op, activation_type)
        if not (swiglu_alpha is swiglu_beta is swiglu_limit is None):
            activation = _with_limits(op, activation, swiglu_alpha, swiglu_beta, swiglu_limit)
        scales = self._scales(op, quant_scales)
        sf = self._input_sf(op, input_sf, swizzled_input_sf)
        key = activation in GATED, self.mode.forms_of([*scales, *sf]) if scales else ()
        compiled = self._calls.get(key)
        if compiled is None:
            if is_launched:
                handle_for(stream, self.device, op)  # a missing one is told first
            compiled = self._add_call(key)
        number = self._numbers.get(activation)
        if number is None:
            number = self.number_of(op, activation)
        ids = 0 if profile_ids is None else self._ids(op, profile_ids)
        order = self._order(op, swizzled_input_sf) if sf else ()
        return compiled, (
            output, x, token_selected_experts, token_final_scales, fc1_expert_weights,
            fc1_expert_biases, fc2_expert_weights, fc2_expert_biases, *sf, swiglu_alpha,
            swiglu_beta, swiglu_limit, *order, tp_size, tp_rank, ep_size, ep_rank,
            enable_alltoall, ids, enable_pdl, number, *scales,
        )  # fmt: skip

    def _order(self, op: str, is_swizzled: object) -> tuple[object, ...]:
        """What the kernels are told of the order of `input_sf`: nothing, where they have one."""
        if "swizzled_input_sf" in self.interface.methods["run_moe"].names:
            return (is_swizzled,)
        if not check_flag(op, "swizzled_input_sf", is_swizzled):
            releases = self.interface.releases
            raise KernelNotFoundError(
                f"{op}: {MODULE} of FlashInfer {releases} has no swizzled_input_sf: scales are in "
                "tiles there"
            )
        return ()

    def _input_sf(self, op: str, given: Any, is_swizzled: object) -> list[TensorDesc]:
        """The scales of `input` in a list, which is empty where the mode has none."""
        if self.mode.input_sf is None:
            if given is not None:
                expected = f"None with {self.mode.about}"
                raise ArgumentError(op, "input_sf", got="a tensor", expected=expected)
            check_flag(op, "swizzled_input_sf", is_swizzled)
            return []
        if given is None:
            expected = f"the scales of input, with {self.mode.about}"
            raise ArgumentError(op, "input_sf", got=None, expected=expected)
        return [as_desc(given, op, "input_sf")]

    def _scales(self, op: str, given: object) -> list[TensorDesc]:
        if given is not None and not isinstance(given, (list, tuple)):
            got, expected = type(given).__name__, "a list or tuple of tensors, or None"
            raise ArgumentTypeError(op, "quant_scales", got=got, expected=expected)
        scales: Sequence[Any] = given or ()
        wanted = self.mode.scales
        if len(scales) != len(wanted):
            names = ", ".join(scale.name for scale in wanted)
            expected = f"{len(wanted)} with {self.mode.about}{': ' if names else ''}{names}"
            raise ArgumentError(op, "quant_scales", got=f"{len(scales)} tensors", expected=expected)
        return [
            one if type(one) is TensorDesc else as_desc(one, op, f"quant_scales[{i}]")
            for i, one in enumerate(scales)
        ]

    def _add_call(self, key: tuple[bool, tuple[int, ...]]) -> CompiledRow:
        row = row_of(self.interface, "run_moe", self.mode, self.dtypes, *key)
        names, find = self.mode.scale_names, self._find_entry
        made = CompiledRow(row, op=self._op, names=names, find_entry=find)
        return self._calls.setdefault(key, made)

    def _find_entry(self, row: Row, device: Device) -> Entry:
        return self.runner.entry(row.signature) if self.has_kernels else entry_for(row, device)

    def _ids(self, op: str, value: object) -> int:
        """The address of an Array of two tactics, each counted from 0, as the release numbers them;
        -1 is the kernel's own choice.

        Before 0.6.15 a number of GEMM2's that its own count does not exceed is taken as counted
        from 0, even where it was meant to follow GEMM1's; later all follow GEMM1's.
        """
        name, counts = "profile_ids", self.tactics
        if not isinstance(value, (tuple, list)):
            raise ArgumentTypeError(op, name, got=shown(value), expected="two ints, or None")
        if len(value) != 2:
            raise ArgumentError(op, name, got=f"{len(value)} of them", expected="two ints")
        first, second = (check_int(op, name, one, -1) for one in value)
        if first >= counts.gemm1 or second >= counts.gemm2:
            expected = f"from -1 to {counts.gemm1 - 1} and from -1 to {counts.gemm2 - 1}"
            raise ArgumentError(op, name, got=(first, second), expected=expected)
        if second >= 0 and self.interface.absolute_ids:
            second += counts.gemm1
        return _pair(first, second)[1]

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
        activation = _activation(op, activation_type)
        x = as_desc(input, op, "input")
        if x.device is not self.device:
            raise ArgumentError(op, "input", got=x.device, expected=self.device)
        tensors = {
            "input": x, "fc1_expert_weights": fc1_expert_weights,
            "fc1_expert_biases": fc1_expert_biases, "fc2_expert_weights": fc2_expert_weights,
            "fc2_expert_biases": fc2_expert_biases,
        }  # fmt: skip
        numbers = {
            "top_k": top_k, "tp_size": tp_size, "tp_rank": tp_rank, "ep_size": ep_size,
            "ep_rank": ep_rank, "enable_alltoall": enable_alltoall, "enable_pdl": enable_pdl,
        }  # fmt: skip
        repeats = check_int(op, "repeats", repeats, 1)
        is_gated = activation in GATED
        row = row_of(self.interface, profile.METHOD, self.mode, self.dtypes, is_gated)
        number = self.number_of(op, activation)
        given = {**tensors, **numbers, **profile.STEP, "activation_type": number}
        compiled = self._profiling.get(is_gated)
        if compiled is None:
            compiled = self._profiling.setdefault(is_gated, CompiledRow(row, op=op))
        descs, sizes = compiled.check(**given)
        if not self.has_kernels or not self.mode.has_tactics:
            return Profile((profile.DEFAULT, profile.DEFAULT), (), ())
        release = self.runner.release_in_use
        if release is not None and not is_in(release, self.mode.profiled):
            raise KernelNotFoundError(
                f"{op}: the profiler of FlashInfer {release} does not run {self.mode.about}: those "
                f"of {self.mode.profiled} do"
            )
        has_biases = descs["fc1_expert_biases"] is not None
        key = (*sizes.values(), *numbers.values(), activation, has_biases)
        with self._profile_lock:
            if key not in self._profiles:
                self._profiles[key] = profile.measure(
                    self.make_runner, compiled, given, self.device, repeats, stream
                )
            return self._profiles[key]

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
        sizes = [check_int(op, name, value, 1) for name, value in given.items()]
        ranks = {"tp_size": tp_size, "tp_rank": tp_rank, "ep_size": ep_size, "ep_rank": ep_rank}
        for kind in ("tp", "ep"):
            size = check_int(op, f"{kind}_size", ranks[f"{kind}_size"], 1)
            check_int(op, f"{kind}_rank", ranks[f"{kind}_rank"], 0, size - 1)
        activation = _activation(op, activation_type)
        if not self.device.is_cuda:
            return 0
        if not self.runner.has("get_workspace_size"):
            releases = self.runner.interface.releases
            raise KernelNotFoundError(f"{op}: {MODULE} of FlashInfer {releases} does not tell it")
        names = ("num_rows", "hidden_size", "inter_size", "num_experts_total", "experts_per_token")
        return self.runner.ask(
            "get_workspace_size", **dict(zip(names, sizes, strict=True)), **ranks,
            base_activation_type=self.number_of(op, activation),
        )  # fmt: skip


_made: dict[tuple[object, ...], FusedMoe] = {}


def forget() -> None:
    """Drop the runners, after the source of kernels changed."""
    weights.forget()
    _made.clear()


def _prepare(**given: Any) -> Prepared:
    moe, given = _moe_of(**given)
    return moe.prepare(**given)


@launching(_prepare)
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
    """A layer of experts: route each token to its experts, and sum what they make of it.

    Args:
        output: [tokens, hidden], written.
        input: [tokens, hidden]; of NVFP4, [tokens, hidden / 2] uint8 or [tokens, hidden / 16]
            int64.
        token_selected_experts: [tokens, top_k] int32, distinct for each token.  One that is not
            of this rank adds nothing.
        token_final_scales: [tokens, top_k] float32; None is 1 for each.
        fc1_expert_weights: [experts, rows, hidden]; with a gated activation rows are twice the
            intermediate size: first what is multiplied, then the gate.
        fc2_expert_weights: [experts, hidden, inter].  4-bit weights are two in a byte: of uint8
            and interleaved for Hopper, 16 in an int64 for Blackwell.
        output_dtype: of `output`, which is compared with it; None takes what `output` has.
        quant_scales: a list of tensors, as the mode has it (docs/moe.md).
        fc1_expert_biases, fc2_expert_biases: [experts, rows], [experts, hidden] of the output's
            dtype; both or neither.  The second is added on tp_rank 0 only.
        input_sf: the scales of NVFP4 and MXFP8 activations, as `fp4_quantize` and
            `mxfp8_quantize` write them: in tiles of 128 rows and 4 columns.  uint8, or
            float8_e4m3fn of NVFP4 and float8_e8m0fnu of MXFP8.
        swiglu_alpha, swiglu_beta, swiglu_limit: [experts] float32.
        tp_size, tp_rank, ep_size, ep_rank: which part of the whole the weights are.
        enable_alltoall: leave rows of tokens alone that have no expert of this rank.
        activation_type: "Swiglu", "Geglu", "SwigluBias", "SwigluStep", "GegluTanh", "Gelu",
            "Relu", "Silu", "Relu2", "Identity", or FlashInfer's `ActivationType`.
        profile_ids: tactics of both multiplications, from `FusedMoe.profile`; None is the
            kernels' own choice.
        swizzled_input_sf: False where `input_sf` is in rows, each of a multiple of 4 scales.
        flags: as in `FusedMoe`.

    The workspace comes from the device's pool, in the stream's order, while the call runs.

    Raises `ArgumentError` and `ArgumentTypeError` before anything is launched.
    Upstream: flashinfer/fused_moe/core.py, csrc/fused_moe/cutlass_backend.
    """
    moe, given = _moe_of(
        output, input, fc1_expert_weights, output_dtype, use_deepseek_fp8_block_scale,
        use_w4_group_scaling, use_mxfp8_act_scaling, use_packed_weights,
    )  # fmt: skip
    moe(
        **given, input_sf=input_sf, swizzled_input_sf=swizzled_input_sf,
        token_selected_experts=token_selected_experts,
        token_final_scales=token_final_scales, fc2_expert_weights=fc2_expert_weights,
        quant_scales=quant_scales, fc1_expert_biases=fc1_expert_biases,
        fc2_expert_biases=fc2_expert_biases, swiglu_alpha=swiglu_alpha, swiglu_beta=swiglu_beta,
        swiglu_limit=swiglu_limit, tp_size=tp_size, tp_rank=tp_rank, ep_size=ep_size,
        ep_rank=ep_rank, enable_alltoall=enable_alltoall, activation_type=activation_type,
        profile_ids=profile_ids, enable_pdl=enable_pdl, stream=stream,
    )  # fmt: skip


def _moe_of(
    output: TensorLike, input: TensorLike, fc1_expert_weights: TensorLike, output_dtype: object,
    use_deepseek_fp8_block_scale: bool, use_w4_group_scaling: bool, use_mxfp8_act_scaling: bool,
    use_packed_weights: bool, **others: Any,
) -> tuple[FusedMoe, dict[str, Any]]:  # fmt: skip
    """The `FusedMoe` of a call, and what that is called with."""
    flags = _flags(
        _OP, use_deepseek_fp8_block_scale, use_w4_group_scaling, use_mxfp8_act_scaling,
        use_packed_weights,
    )  # fmt: skip
    x, out = as_desc(input, _OP, "input"), as_desc(output, _OP, "output")
    weights = as_desc(fc1_expert_weights, _OP, "fc1_expert_weights")
    if output_dtype is not None:
        wanted = parse_dtype(output_dtype, op=_OP, argument="output_dtype")
        if out.dtype is not wanted:
            raise ArgumentError(_OP, "output", got=out.layout, expected=f"output_dtype {wanted}")
    given = {"output": out, "input": x, "fc1_expert_weights": weights, **others}
    return _moe_for(x, weights, out, flags), given


def _moe_for(
    x: TensorDesc, weights: TensorDesc, out: TensorDesc, flags: frozenset[str]
) -> FusedMoe:
    """The `FusedMoe` for these dtypes and flags on this device, made once."""
    key = (x.device, x.dtype, weights.dtype, out.dtype, flags)
    moe = _made.get(key)
    if moe is None:
        dtypes = (x.dtype.name, weights.dtype.name, out.dtype.name)
        # Refused here, errors name the arguments of the call.
        mode_of(_OP, *dtypes, flags, ("input", "fc1_expert_weights", "output"))
        made = FusedMoe(*dtypes, device=x.device, **dict.fromkeys(flags, True))
        made._op = _OP
        moe = _made.setdefault(key, made)
    return moe
