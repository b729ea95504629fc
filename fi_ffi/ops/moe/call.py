"""A call of a layer: its arguments checked, bound to the row of `run_moe`, and launched."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fi_ffi.abi.interop import as_desc
from fi_ffi.abi.streams import handle_for
from fi_ffi.abi.tensor import TensorDesc
from fi_ffi.errors import KernelError, KernelNotFoundError
from fi_ffi.ops.call.arguments import Refusal, check_flag
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.call.prepared import Prepared
from fi_ffi.ops.moe.activations import GATED, activation_name, with_limits
from fi_ffi.ops.moe.interface import MODULE
from fi_ffi.ops.moe.kernels import Kernels
from fi_ffi.ops.moe.tactics import array_of
from fi_ffi.ops.steps.keyword_call import prepare_row

# Arguments of `cutlass_fused_moe` by name; others among them are ignored.
Arguments = Mapping[str, Any]
# Picks the arguments of a row, in its order.
_Pick = Callable[[Arguments], tuple[Any, ...]]


class MoeCall:
    """Calls of `run_moe` in one mode, on one device."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels, self.refuse = kernels, Refusal(kernels.op)
        # By whether the activation is gated and by the shapes of the scales.
        self._rows: dict[tuple[bool, tuple[int, ...]], tuple[CompiledRow, _Pick]] = {}

    def launch(self, arguments: Arguments) -> None:
        """Check a call and launch it."""
        compiled, values = self._bind(arguments, is_launched=True)
        try:
            compiled.call(self, *values, stream=arguments["stream"])
        except KernelError as error:
            if self.kernels.device.is_cuda or error.kind != "ValueError":
                raise
            # The CPU's reference checks the experts; on a GPU they cannot be read before the call.
            expected = "distinct experts for each token"
            raise self.refuse("token_selected_experts", error.message, expected) from None

    def prepare(self, arguments: Arguments) -> Prepared:
        """Check and pack a call, to launch it many times."""
        compiled, values = self._bind(arguments, is_launched=False)
        return prepare_row(compiled, arguments["stream"], *values)

    def _bind(self, arguments: Arguments, is_launched: bool) -> tuple[CompiledRow, tuple[Any, ...]]:
        """Return the compiled row of a call, and its arguments."""
        kernels, refuse = self.kernels, self.refuse
        op, bound = refuse.op, {**arguments}
        bound["input"] = x = as_desc(arguments["input"], op, "input")
        if x.device is not kernels.device:
            raise refuse("input", x.device, kernels.device)
        activation = activation_name(refuse, arguments["activation_type"])
        alpha, beta = arguments["swiglu_alpha"], arguments["swiglu_beta"]
        if not (alpha is beta is arguments["swiglu_limit"] is None):
            activation = with_limits(refuse, activation, arguments)
        scales = self._scales(arguments["quant_scales"])
        sf = self._input_sf(arguments["input_sf"], arguments["swizzled_input_sf"])
        key = activation in GATED, kernels.mode.shapes_of([*scales, *sf]) if scales else ()
        row = self._rows.get(key)
        if row is None:
            if is_launched:  # refuse a missing stream before loading
                handle_for(arguments["stream"], kernels.device, op)
            row = self._add_row(key)
        number = kernels.numbers.get(activation)
        if number is None:
            number = kernels.number_of(op, activation)
        bound["base_activation_type"] = number
        if arguments["profile_ids"] is None:
            bound["profile_ids"] = 0
        else:
            weights = ("fc1_expert_weights", "fc2_expert_weights")
            bound |= {name: as_desc(arguments[name], op, name) for name in weights}
            bound["profile_ids"] = array_of(kernels, refuse, bound)
        if sf:
            self._check_order(arguments["swizzled_input_sf"])
            bound["input_sf"] = sf[0]
        compiled, pick = row
        return compiled, (*pick(bound), *scales)

    def _add_row(self, key: tuple[bool, tuple[int, ...]]) -> tuple[CompiledRow, _Pick]:
        kernels = self.kernels
        compiled = CompiledRow(
            kernels.row("run_moe", *key),
            op=kernels.op,
            names=kernels.mode.scale_names,
            find_entry=kernels.find_entry,
            follows=False,
        )
        names = [arg.name for arg in compiled.row.given if arg.name not in kernels.mode.scale_names]
        return self._rows.setdefault(key, (compiled, operator.itemgetter(*names)))

    def _scales(self, quant_scales: object) -> list[TensorDesc]:
        mode = self.kernels.mode
        if quant_scales is None and not mode.scales:
            return []
        if quant_scales is not None and not isinstance(quant_scales, (list, tuple)):
            expected = "a list or tuple of tensors, or None"
            raise self.refuse.type("quant_scales", quant_scales, expected)
        scales: Sequence[Any] = quant_scales or ()
        if len(scales) != len(mode.scales):
            names = ", ".join(scale.name for scale in mode.scales)
            expected = f"{len(mode.scales)} with {mode.about}{': ' if names else ''}{names}"
            raise self.refuse("quant_scales", f"{len(scales)} tensors", expected)
        return [
            one if type(one) is TensorDesc else as_desc(one, self.refuse.op, f"quant_scales[{i}]")
            for i, one in enumerate(scales)
        ]

    def _input_sf(self, input_sf: Any, is_swizzled: object) -> list[TensorDesc]:
        """Return the scales of `input` in a list; an empty list if the mode has none."""
        mode = self.kernels.mode
        if mode.input_sf is None:
            if input_sf is not None:
                raise self.refuse("input_sf", "a tensor", f"None with {mode.about}")
            if type(is_swizzled) is not bool:
                check_flag(self.refuse.op, "swizzled_input_sf", is_swizzled)
            return []
        if input_sf is None:
            raise self.refuse("input_sf", None, f"the scales of input, with {mode.about}")
        return [as_desc(input_sf, self.refuse.op, "input_sf")]

    def _check_order(self, is_swizzled: object) -> None:
        """Refuse an order of `input_sf` that the kernels lack."""
        interface, op = self.kernels.interface, self.refuse.op
        if "swizzled_input_sf" in interface.methods["run_moe"].names:
            return
        if not check_flag(op, "swizzled_input_sf", is_swizzled):
            raise KernelNotFoundError(
                f"{op}: {MODULE} of FlashInfer {interface.releases} has no swizzled_input_sf: "
                "scales are in tiles there"
            )
