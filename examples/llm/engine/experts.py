"""Mixtures of experts by FlashInfer's kernels; 4-bit weights in the order that these read."""

import numpy as np

import fi_ffi
from fi_ffi.loader.distributions import is_in
from fi_ffi.ops.call.releases import release_in_force
from fi_ffi.ops.moe.interface import FOLDED_RELEASES

from .device import columns
from .weights import Blocks, Fours

HOPPER = 90  # whose kernels the CPU computes as
# By what weights are: their dtype, and the flag of their kernels.
KINDS = {Blocks: ("float8_e4m3fn", "use_deepseek_fp8_block_scale"),
         Fours: ("uint8", "use_w4_group_scaling")}  # fmt: skip
EACH, LEAST = 128, 256  # sizes of 4-bit weights are multiples of the one, and not below the other


def room(size):
    return max(-(-size // EACH) * EACH, LEAST)


def grown(x, halves, rows, columns, fill=0):
    """[experts, halves * rows, columns] of fewer in each half, and fewer columns."""
    parts = x.reshape(len(x), halves, -1, x.shape[-1])
    more = [(0, 0), (0, 0), (0, rows - parts.shape[2]), (0, columns - parts.shape[3])]
    return np.pad(parts, more, constant_values=fill).reshape(len(x), -1, columns)


def fitted(weight, halves, rows, columns):
    """`Fours` of these sizes, which are multiples of what kernels take."""
    scales = grown(weight.scales, halves, rows, columns // 32, 127)
    return Fours(grown(weight.values, halves, rows, columns // 2), ordered(scales))


class Experts:
    """The experts of a model on a device; `placed` gives a layer's weights as kernels want them."""

    def __init__(self, device, config, max_tokens):
        self.device, self.config, self.max_tokens = device, config, max_tokens
        self.moe, self.wide = None, None

    def placed(self, layer):
        """A layer with weights as there are kernels for: in 4 bits, or else widened."""
        if not isinstance(layer.get("fc1"), Fours):
            return layer
        sm = None if self.device.is_gpu else HOPPER
        if not fi_ffi.cutlass_fused_moe.supports(sm=sm, mode="mxfp4"):
            return layer | {name: layer[name].widened() for name in ("fc1", "fc2")}
        hidden, inner = room(self.config.hidden), room(self.config.expert_intermediate)
        for name, *sizes in (("fc1", 2, inner, hidden), ("fc2", 1, hidden, inner)):
            bias = grown(layer[f"{name}_bias"][..., None], *sizes[:2], 1)[..., 0]
            layer = layer | {name: fitted(layer[name], *sizes), f"{name}_bias": bias}
        return layer

    def arrange(self, layers):
        """Put 4-bit weights, which are on the device by now, in the order of the kernels."""
        for layer in layers:
            for name in ("fc1", "fc2"):
                if not isinstance(weight := layer.get(name), Fours):
                    continue
                for e in range(weight.values.shape[0]):
                    one = weight.values.rows(e, e + 1)
                    spare = self.device.scratch(f"an expert's {name}", one.shape, "uint8")
                    self.device.copy(spare, one)
                    fi_ffi.interleave_moe_weights_for_sm90_mixed_gemm(
                        spare, one, "fp4", stream=self.device.stream
                    )

    def __call__(self, out, x, chosen, shares, layer):
        fc1, fc2, scales = layer["fc1"], layer["fc2"], None
        if self.moe is None:
            self.moe = self._kernels(fc1)
        if isinstance(fc1, tuple):
            (fc1, *scales), (fc2, scale) = fc1, fc2
            scales.append(scale)
        more = {f"{name}_expert_biases": layer.get(f"{name}_bias") for name in ("fc1", "fc2")}
        more |= {name: layer.get(name) for name in ("swiglu_alpha", "swiglu_beta", "swiglu_limit")}
        n, hidden = x.shape
        if not self.wide:
            self.moe(out, x, chosen, shares, fc1, fc2, scales, **more)
            return
        every, wide, mixed = (part.rows(0, n) for part in self.wide)
        self.device.give(columns(wide, 0, hidden), x, every)
        self.moe(mixed, wide, chosen, shares, fc1, fc2, scales, **more)
        self.device.take(out, columns(mixed, 0, hidden), every)

    def _kernels(self, fc1):
        kind, device, hidden = self.config.dtype, self.device, room(self.config.hidden)
        weight, flag = KINDS.get(type(fc1), (kind, None))
        if isinstance(fc1, Fours) and hidden != self.config.hidden:  # rows end with zeros
            every = device.put(np.arange(self.max_tokens, dtype=np.int32))
            self.wide = every, *(device.zeros((self.max_tokens, hidden), kind) for _ in "xy")
        flags = {flag: True} if flag else {}
        return fi_ffi.FusedMoe(kind, weight, kind, device=device.name, **flags)


def ordered(scales):
    """Scales as the kernels in use read them: those of some releases are in blocks."""
    experts, rows, groups = scales.shape
    is_folded = is_in(release_in_force(), FOLDED_RELEASES)
    shape = (rows // 64, groups // 4, 16, 16) if is_folded else (groups // 4, rows * 4)
    out = np.empty((experts, *shape), np.uint8)
    fi_ffi.interleave_moe_scales_for_sm90_mixed_gemm(scales, out)
    return out
