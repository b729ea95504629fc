"""Mixtures of experts, each of which is an MLP."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from ..config import MOST_EXPERTS, Config, Count, Size, named, within
from .llama import InWindow


class Sparse(Config):
    top_k: Size = named("num_experts_per_tok")
    expert_intermediate: Size = named("moe_intermediate_size")

    # The router and its expert's parts, in the hub's words.
    ROUTER: ClassVar = "mlp.gate"
    PARTS: ClassVar = {name: f"mlp.{{}}.{name}_proj.weight" for name in ("gate", "up", "down")}

    def sparse(self):
        hidden, size, parts = self.hidden, self.expert_intermediate, self.PARTS
        return {
            "router": {f"{self.ROUTER}.weight": (self.experts, hidden)},
            # First what the gate is multiplied with.
            "fc1": {parts["up"]: (size, hidden), parts["gate"]: (size, hidden)},
            "fc2": {parts["down"]: (hidden, size)},
        }

    def arranged(self, layer, i):
        bias = {"router_bias": np.zeros(self.experts, np.float32)} if self.is_sparse(i) else {}
        return super().arranged(layer, i) | bias


class Mixtral(InWindow, Sparse, kind="mixtral"):
    norm_topk: ClassVar = True
    turns: ClassVar = {"rope_theta": 1e6}

    experts: within(1, MOST_EXPERTS) = named("num_local_experts")
    expert_intermediate: Size = named("intermediate_size")

    ROUTER: ClassVar = "block_sparse_moe.gate"
    PARTS: ClassVar = {
        name: f"block_sparse_moe.{{}}.{of}.weight"
        for name, of in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    }


class Qwen3Moe(Sparse, kind="qwen3_moe"):
    qk_norm: ClassVar = True

    experts: within(1, MOST_EXPERTS) = named("num_experts", "num_local_experts")
    norm_topk: bool = named("norm_topk_prob", default=False)
    decoder_sparse_step: Size = 1
    mlp_only_layers: list[Count] = Field([])
    use_qk_norm: Literal[True] = True
    use_sliding_window: Literal[False] = False

    def is_sparse(self, i):
        return (i + 1) % self.decoder_sparse_step == 0 and i not in self.mlp_only_layers
