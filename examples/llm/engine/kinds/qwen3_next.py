"""Qwen3-Next: gated DeltaNet in most layers, a gate on attention, an expert of all tokens."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from ..config import FULL, LINEAR, MOST_EXPERTS, Size, named, within
from ..weights import whole, with_one
from .mixtral import Qwen3Moe


class Qwen3Next(Qwen3Moe, kind="qwen3_next"):
    adds_one: ClassVar = True
    has_gate: ClassVar = True
    has_shared: ClassVar = True
    turns: ClassVar = {"partial_rotary_factor": 0.25}
    quantised: ClassVar = None

    # One less: the last is of all tokens.
    experts: within(1, MOST_EXPERTS - 1) = named("num_experts", "num_local_experts")
    norm_topk: bool = named("norm_topk_prob", default=True)
    shared: Size = named("shared_expert_intermediate_size")
    decoder_sparse_step: Literal[1] = 1
    key_heads: Size = named("linear_num_key_heads")
    value_heads: Size = named("linear_num_value_heads")
    has_biases: Literal[False] = named("attention_bias", default=False)
    layer_types: list[Literal[FULL, LINEAR]] = Field([])
    full_attention_interval: Size = 4
    linear_key_head_dim: Literal[128]
    linear_value_head_dim: Literal[128]
    linear_conv_kernel_dim: Literal[4]

    @model_validator(mode="after")
    def _has_one_size(self):
        if self.shared != self.expert_intermediate:
            raise ValueError("shared_expert_intermediate_size differs from moe_intermediate_size")
        return self

    @property
    def linear_sizes(self):
        """Of a token's q, k and v in linear attention."""
        return self.key_heads * 128, self.key_heads * 128, self.value_heads * 128

    def kind_of(self, i):
        return LINEAR if (i + 1) % self.full_attention_interval else FULL

    def owners(self):
        return [*super().owners(), "shared_expert"]

    def sparse(self):
        """The router's last row is the gate of the expert of all tokens."""
        found = super().sparse()
        found["router"]["mlp.shared_expert_gate.weight"] = (1, self.hidden)
        return found

    def outer(self, i):
        if self.layers[i] != LINEAR:
            return super().outer(i)
        hidden, heads, values = self.hidden, self.value_heads, self.linear_sizes[2]
        inputs = sum(self.linear_sizes)
        return {
            "qkvz": {"linear_attn.in_proj_qkvz.weight": (inputs + values, hidden)},
            "ba": {"linear_attn.in_proj_ba.weight": (2 * heads, hidden)},
            "conv": {"linear_attn.conv1d.weight": (inputs, 1, 4)},
            "a_log": {"linear_attn.A_log": (heads,)},
            "dt_bias": {"linear_attn.dt_bias": (heads,)},
            "norm": {"linear_attn.norm.weight": (128,)},
            "out": {"linear_attn.out_proj.weight": (hidden, values)},
        }

    def arranged(self, layer, i):
        layer = layer | super().arranged(layer, i)
        return layer | (self._by_kind if self.layers[i] == LINEAR else self._gates_last)(layer)

    def _gates_last(self, layer):
        """Each head's query comes with its gate: all gates after the values."""
        size = self.heads * self.head_dim
        q, kv = np.split(whole(layer["qkv"]), [2 * size])
        q, gate = q.reshape(self.heads, 2, self.head_dim, -1).swapaxes(0, 1)
        q, gate = (part.reshape(size, -1) for part in (q, gate))
        return {"qkv": np.concatenate([q, kv, gate])} | with_one(layer)

    def _by_kind(self, layer):
        """Rows come by key head: its q and k, then v and z of its value heads; likewise b and a."""
        layer = {name: whole(layer[name]) for name in ("qkvz", "ba", "conv", "a_log", "dt_bias")}
        each = self.value_heads // self.key_heads
        by_head = layer["qkvz"].reshape(self.key_heads, -1, self.hidden)
        ends = np.cumsum([128, 128, each * 128])
        qkvz = [part.reshape(-1, self.hidden) for part in np.split(by_head, ends, axis=1)]
        by_head = layer["ba"].reshape(self.key_heads, 2, each, self.hidden)
        return {
            "qkvz": np.concatenate(qkvz),
            "ba": by_head.swapaxes(0, 1).reshape(-1, self.hidden),
            "conv": layer["conv"].reshape(-1, 4).astype(np.float32),
            "a_log": layer["a_log"].astype(np.float32),
            "dt_bias": layer["dt_bias"].astype(np.float32),
        }
