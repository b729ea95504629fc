"""What a model is, from its config.json in the hub's layout: Llama 3, Qwen3, Qwen3-Next."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

FULL, LINEAR = "full_attention", "linear_attention"


@dataclass(frozen=True)
class Config:
    dtype: str
    vocab: int
    hidden: int
    intermediate: int
    layers: tuple[str, ...]
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    eps: float
    tied: bool  # the output projection is the embedding table
    rotary_dim: int
    rope_theta: float
    rope_scaling: dict = field(hash=False)
    qk_norm: bool
    is_next: bool  # Qwen3-Next: norms by 1 + weight, a gate on attention's output
    key_heads: int = 0  # of linear attention, whose heads have 128 elements
    value_heads: int = 0
    eos: tuple[int, ...] = ()

    @property
    def is_hybrid(self):
        return LINEAR in self.layers

    @property
    def key_size(self):
        return self.key_heads * 128

    @property
    def value_size(self):
        return self.value_heads * 128

    @property
    def conv_size(self):
        return 2 * self.key_size + self.value_size

    @classmethod
    def read(cls, path):
        """Of a folder with config.json; ValueError for what this engine has no code for."""
        raw = json.loads((Path(path) / "config.json").read_text())
        kind, count = raw["model_type"], raw["num_hidden_layers"]
        scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        cls._check(raw, kind, scaling)
        is_next = kind == "qwen3_next"
        heads = raw["num_attention_heads"]
        head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
        partial = raw.get("partial_rotary_factor", scaling.get("partial_rotary_factor", 1.0))
        linear = {}
        if is_next:
            linear = {
                "key_heads": raw["linear_num_key_heads"],
                "value_heads": raw["linear_num_value_heads"],
            }
        eos = raw.get("eos_token_id")
        return cls(
            dtype=raw.get("torch_dtype") or raw.get("dtype") or "bfloat16",
            vocab=raw["vocab_size"],
            hidden=raw["hidden_size"],
            intermediate=raw["intermediate_size"],
            layers=tuple(raw.get("layer_types") or (cls._types(count, raw))),
            heads=heads,
            kv_heads=raw["num_key_value_heads"],
            head_dim=head_dim,
            max_positions=raw["max_position_embeddings"],
            eps=raw["rms_norm_eps"],
            tied=raw.get("tie_word_embeddings", False),
            rotary_dim=int(head_dim * partial),
            rope_theta=raw.get("rope_theta") or scaling.get("rope_theta", 10000.0),
            rope_scaling=scaling,
            qk_norm=kind != "llama",
            is_next=is_next,
            eos=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            **linear,
        )

    @staticmethod
    def _check(raw, kind, scaling):
        """ValueError for what there is no code for."""

        def refuse(name, known):
            raise ValueError(f"config.json: {name} is {raw.get(name)!r}; here it is {known}")

        if kind not in ("llama", "qwen3", "qwen3_next"):
            refuse("model_type", "llama, qwen3 or qwen3_next")
        for name in ("attention_bias", "mlp_bias", "quantization_config", "use_sliding_window"):
            if raw.get(name):
                refuse(name, "none")
        if scaling.get("rope_type", scaling.get("type", "default")) not in ("default", "llama3"):
            refuse("rope_scaling", "of rope_type default or llama3")
        if kind != "qwen3_next":
            return
        dense = len(raw.get("mlp_only_layers", ())) == raw["num_hidden_layers"]
        if raw.get("num_experts") and not dense:
            refuse("num_experts", "0: layers are dense")
        for name, known in (
            ("linear_key_head_dim", 128), ("linear_value_head_dim", 128),
            ("linear_conv_kernel_dim", 4),
        ):  # fmt: skip
            if raw[name] != known:
                refuse(name, known)

    @staticmethod
    def _types(count, raw):
        every = raw.get("full_attention_interval", 1)
        return [LINEAR if (i + 1) % every else FULL for i in range(count)]

    def cos_sin_cache(self, positions):
        """[positions, rotary_dim] float32: the cosines of a position's angles, then their sines."""
        pairs = np.arange(0, self.rotary_dim, 2, dtype=np.float64) / self.rotary_dim
        frequencies = self.rope_theta**-pairs
        if self.rope_scaling.get("rope_type") == "llama3":
            frequencies = self._llama3(frequencies)
        angles = np.arange(positions)[:, None] * frequencies
        return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    def _llama3(self, frequencies):
        """Slow ones are `factor` times slower, quick ones as they were, with a ramp between."""
        scaling = self.rope_scaling
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        quick = np.clip((turns - low) / (high - low), 0, 1)
        return frequencies * (quick + (1 - quick) / scaling["factor"])
