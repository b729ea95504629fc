"""gpt-oss: sinks, windows in turn, and experts with biases and a limit of their own."""

from typing import ClassVar

import numpy as np

from .. import config
from ..weights import Fours, whole


class GptOss(config.Config, kind="gpt_oss"):
    has_sinks: ClassVar = True
    turns: ClassVar = {"rope_theta": 150000.0}
    quantised: ClassVar = "mxfp4"
    norm_topk: ClassVar = True

    experts: config.within(1, config.MOST_EXPERTS) = config.named("num_local_experts")
    top_k: config.Size = config.named("num_experts_per_tok")
    expert_intermediate: config.Size = config.named("intermediate_size")
    swiglu_limit: config.Gain = 7.0
    has_biases: bool = config.named("attention_bias", default=True)
    use_sliding_window: bool = True
    sliding_window: config.Count = 128

    def kind_of(self, i):
        return config.FULL if i % 2 else config.SLIDING

    def sparse(self):
        """Rows of gate and up take turns; matrices that are not in 4 bits are transposed."""
        count, hidden, size = self.experts, self.hidden, self.expert_intermediate
        return {
            "router": {"mlp.router.weight": (count, hidden)},
            "router_bias": {"mlp.router.bias": (count,)},
            "fc1": {"mlp.experts.gate_up_proj": (count, hidden, 2 * size)},
            "fc1_bias": {"mlp.experts.gate_up_proj_bias": (count, 2 * size)},
            "fc2": {"mlp.experts.down_proj": (count, size, hidden)},
            "fc2_bias": {"mlp.experts.down_proj_bias": (count, hidden)},
            "sinks": {"self_attn.sinks": (self.heads,)},
        }

    def arranged(self, layer, i):
        layer = {short: whole(array) for short, array in layer.items()}
        every = np.ones(self.experts, np.float32)
        return layer | {
            "fc1": up_and_gate(upright(layer["fc1"])),
            "fc1_bias": up_and_gate(layer["fc1_bias"]),
            "fc2": upright(layer["fc2"]),
            "router_bias": layer["router_bias"].astype(np.float32),
            "sinks": layer["sinks"].astype(np.float32),
            "swiglu_alpha": np.float32(1.702) * every,
            "swiglu_beta": every,
            "swiglu_limit": np.float32(self.swiglu_limit) * every,
        }


def upright(x):
    return x if isinstance(x, Fours) else x.swapaxes(1, 2)


def up_and_gate(x):
    """Rows in turn as halves: first what the gate is multiplied with."""
    if isinstance(x, Fours):
        return Fours(*map(up_and_gate, x))
    return np.concatenate([x[:, 1::2], x[:, ::2]], axis=1)
