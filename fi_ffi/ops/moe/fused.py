"""`FusedMoe`, mixtures of experts in one quantisation on one device, and `cutlass_fused_moe`, which
picks the `FusedMoe` for its dtypes, flags and device."""

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
from fi_ffi.loader import generation
from fi_ffi.ops.call.arguments import check_flag, check_int, shown
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.call.keyword_call import arguments_by_name, keyword_function, prepare_row
from fi_ffi.ops.call.providers import entry_for
from fi_ffi.ops.call.releases import is_in
from fi_ffi.ops.call.row import Row
from fi_ffi.ops.call.support import Support, supports
from fi_ffi.ops.moe import profile
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

if TYPE_CHECKING:
    from fi_ffi.ops.call.prepared import Prepared

_OP = "cutlass_fused_moe"
# The `swiglu_` tensors that an activation takes.
_LIMITS = {"Swiglu": SWIGLU, "SwigluBias": SWIGLU, "SwigluStep": SWIGLU[2:]}


class Tactics(NamedTuple):
    """The number of tactics for each of the two multiplications."""

    gemm1: int
    gemm2: int


@functools.cache
def _pair(first: int, second: int) -> tuple[Array, int]:
    """Return an Array of two ints, and its address."""
    array = make_array([first, second])
    return array, int(ffi.cast("uintptr_t", array.handle))


def _activation(op: str, value: object) -> str:
    """Return an activation's name, from a str or FlashInfer's `ActivationType`.

    A plain int is refused: the numbers differ between releases.
    """
    name = value if isinstance(value, str) else getattr(value, "name", None)
    if isinstance(name, str) and name in ACTIVATIONS:
        return name
    expected = " or ".join(map(repr, ACTIVATIONS))
    if not isinstance(name, str):
        raise ArgumentTypeError(op, "activation_type", got=shown(value), expected=expected)
    raise ArgumentError(op, "activation_type", got=printed(name), expected=expected)


def _flags(op: str, *asked: object) -> frozenset[str]:
    """Return the flags that are on."""
    given = zip(FLAGS, asked, strict=True)
    return frozenset([name for name, value in given if check_flag(op, name, value)])


def _with_limits(op: str, name: str, *tensors: object) -> str:
    """Return the activation to use with these `swiglu_` tensors; raise if it takes none of them.

    `Swiglu` with any of them becomes `SwigluBias` here: releases before 0.6.13 do that themselves,
    but overlook `swiglu_limit` with all other activations.
    """
    taken = _LIMITS.get(name, ())
    for argument, tensor in zip(SWIGLU, tensors, strict=True):
        if tensor is not None and argument not in taken:
            expected = f"None: {name} takes {' and '.join(taken) or 'none of them'}"
            raise ArgumentError(op, argument, got="a tensor", expected=expected)
    return "SwigluBias" if name == "Swiglu" else name


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
        # The dtypes of activations, weights and results.
        self.dtypes = (act, weight, output)
        # The profiler's compiled calls, by whether the activation is gated; and results, by all
        # arguments that matter.
        self._profiling: dict[bool, CompiledRow] = {}
        self._profiles: dict[object, Profile] = {}
        self._profile_lock = threading.Lock()  # concurrent profiles would disturb each other
        self._lock = threading.Lock()
        self._runner: Runner | None = None
        self._tactics: Tactics | None = None
        # Compiled calls, by whether the activation is gated and by the forms of the scales.
        self._calls: dict[tuple[bool, tuple[int, ...]], CompiledRow] = {}
        self._numbers: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"<fi_ffi FusedMoe {self.mode.name} ({', '.join(self.dtypes)}) on {self.device}>"

    def make_runner(self) -> Runner:
        """Make a new kernel object, with allocations of its own."""
        return make_runner(self._op, self.mode, self.dtypes, self.device)

    @property
    def runner(self) -> Runner:
        """The kernel object, made on first use."""
        if self._runner is None:
            with self._lock:
                if self._runner is None:
                    self._runner = self.make_runner()
        return self._runner

    @property
    def interface(self) -> Interface:
        """The interface of the kernels in use; on the CPU, that of the default release."""
        return self.runner.interface if self.has_kernels else of_release(None)

    @property
    def has_kernels(self) -> bool:
        """Whether calls run kernels rather than the CPU's reference."""
        return self.device.is_cuda or self._runner is not None

    @property
    def tactics(self) -> Tactics:
        """The number of tactics of each multiplication, from which `profile_ids` chooses; (1, 1) on
        the CPU."""
        if self._tactics is None:
            self._tactics = Tactics(*(self.runner.counts() if self.has_kernels else (1, 1)))
        return self._tactics

    def number_of(self, op: str, activation: str) -> int:
        """Return the number of an activation in the release of the kernels."""
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
        """Run the layer on `stream`. The arguments are those of `cutlass_fused_moe`, and so are the
        errors."""
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
            # The CPU's reference checks the experts; on a GPU they cannot be read before the call.
            name, expected = "token_selected_experts", "distinct experts for each token"
            raise ArgumentError(op, name, got=error.message, expected=expected) from None

    def prepare(self, *args: Any, **kwargs: Any) -> Prepared:
        """Pack a call with these arguments, to launch it many times: see `fi_ffi.prepare`."""
        given = arguments_by_name(self.__call__, self._op, args, kwargs)
        compiled, values = self._fill(**given, is_launched=False)
        return prepare_row(compiled, given["stream"], *values)

    @classmethod
    def supports(cls, sm: Any = None, **asked: Any) -> Support:
        """Ask whether one can be made for a GPU (`sm=90`), with the arguments of `Op.supports`."""
        return supports(cls.__name__, sm=sm, **asked)

    def _fill(
        self, output: Any, input: Any, token_selected_experts: Any, token_final_scales: Any,
        fc1_expert_weights: Any, fc2_expert_weights: Any, quant_scales: Any,
        fc1_expert_biases: Any, fc2_expert_biases: Any, input_sf: Any, swiglu_alpha: Any,
        swiglu_beta: Any, swiglu_limit: Any, tp_size: Any, tp_rank: Any, ep_size: Any,
        ep_rank: Any, enable_alltoall: Any, activation_type: Any, profile_ids: Any,
        enable_pdl: Any, swizzled_input_sf: Any, stream: object, is_launched: bool = True,
    ) -> tuple[CompiledRow, tuple[Any, ...]]:  # fmt: skip
        """Return the compiled row of a call, and its arguments."""
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
                handle_for(stream, self.device, op)  # refuse a missing stream before loading
            compiled = self._add_call(key)
        number = self._numbers.get(activation)
        if number is None:
            number = self.number_of(op, activation)
        ids = 0
        if profile_ids is not None:
            fc1_expert_weights = as_desc(fc1_expert_weights, op, "fc1_expert_weights")
            fc2_expert_weights = as_desc(fc2_expert_weights, op, "fc2_expert_weights")
            ids = self._ids(op, profile_ids, fc1_expert_weights, fc2_expert_weights)
        order = self._order(op, swizzled_input_sf) if sf else ()
        return compiled, (
            output, x, token_selected_experts, token_final_scales, fc1_expert_weights,
            fc1_expert_biases, fc2_expert_weights, fc2_expert_biases, *sf, swiglu_alpha,
            swiglu_beta, swiglu_limit, *order, tp_size, tp_rank, ep_size, ep_rank,
            enable_alltoall, ids, enable_pdl, number, *scales,
        )  # fmt: skip

    def _order(self, op: str, is_swizzled: object) -> tuple[object, ...]:
        """Return the argument for the order of `input_sf`, or nothing for kernels with a fixed
        order."""
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
        """Return the scales of `input` in a list; an empty list if the mode has none."""
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
        made = CompiledRow(row, op=self._op, names=names, find_entry=find, follows=False)
        return self._calls.setdefault(key, made)

    def _find_entry(self, row: Row, device: Device) -> Entry:
        return self.runner.entry(row.signature) if self.has_kernels else entry_for(row, device)

    def _ids(self, op: str, value: object, *weights: TensorDesc) -> int:
        """Return the address of an Array of two tactics, numbered as the release numbers them.

        Each given tactic counts from 0; -1 is the kernels' own choice. GEMM2's tactics are numbered
        after GEMM1's. Before 0.6.15, a GEMM2 number that is within its own count is taken as
        counted from 0.
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
        last = second + counts.gemm1 if second >= 0 else second
        for gemm, tactic, weight in zip((1, 2), (first, last), weights, strict=True):
            if tactic >= 0 and self.has_kernels and weight.kind.rank == 3:
                _, rows, columns = weight.shape
                serving = self.runner.serving(gemm, rows, columns * self.mode.pack)
                if serving is not None and tactic not in serving:
                    expected = "tactics whose tiles divide these weights, as `profile` finds them"
                    raise ArgumentError(op, name, got=(first, second), expected=expected)
        return _pair(first, last if self.interface.absolute_ids else second)[1]

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
        hidden, inter = sizes["hidden_size"], sizes["inter_size"]
        shapes = ((2 * inter if is_gated else inter, hidden), (hidden, inter))
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
                    self.make_runner, compiled, given, self.device, repeats, stream, shapes
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
        """Return the bytes that a call takes from the device's pool while it runs; 0 on the CPU.

        `num_experts` counts the experts of all ranks. Raises `KernelNotFoundError` for releases
        before 0.6.16, which do not report the size.
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
            raise KernelNotFoundError(f"{op}: {MODULE} of FlashInfer {releases} does not report it")
        names = ("num_rows", "hidden_size", "inter_size", "num_experts_total", "experts_per_token")
        return self.runner.ask(
            "get_workspace_size", **dict(zip(names, sizes, strict=True)), **ranks,
            base_activation_type=self.number_of(op, activation),
        )  # fmt: skip


_made: dict[tuple[object, ...], FusedMoe] = {}


def _prepare(**given: Any) -> Prepared:
    moe, given = _moe_of(**given)
    return moe.prepare(**given)


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
        profile_ids: the tactics of both multiplications, from `FusedMoe.profile`; None is the
            kernels' own choice.
        swizzled_input_sf: False if `input_sf` is in rows, each of a multiple of 4 scales.
        use_deepseek_fp8_block_scale, use_w4_group_scaling, use_mxfp8_act_scaling,
            use_packed_weights: as in `FusedMoe`.

    While it runs, the call takes a workspace from the device's pool, in stream order.

    Raises `ArgumentError` and `ArgumentTypeError` before anything is launched, `ArchitectureError`
    for a GPU that the mode is not for, and `KernelNotFoundError` if the kernels in use lack the
    mode.
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
    """Return the `FusedMoe` of a call, and the arguments for it."""
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
    """Return the `FusedMoe` for these dtypes, flags and device, made once."""
    key = (x.device, x.dtype, weights.dtype, out.dtype, flags, generation.number)
    moe = _made.get(key)
    if moe is None:
        dtypes = (x.dtype.name, weights.dtype.name, out.dtype.name)
        # Check here first, so that errors name the arguments of the call.
        mode_of(_OP, *dtypes, flags, ("input", "fc1_expert_weights", "output"))
        made = FusedMoe(*dtypes, device=x.device, **dict.fromkeys(flags, True))
        made._op = _OP
        moe = _made.setdefault(key, made)
    return moe
