"""Models of random weights, in the shapes of published ones, for benchmarks/llm.py."""

from __future__ import annotations

import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from engine import Config
from engine.weights import shapes

# As their config.json.
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024,
        "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
    "llama-3.2-1b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048,
        "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
    "llama-3-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 5e5, "torch_dtype": "bfloat16",
    },
    "llama-3-70b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192,
        "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 5e5, "torch_dtype": "bfloat16",
    },
    "tiny": {
        "model_type": "qwen3", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        "rope_theta": 1e4, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    },
}  # fmt: skip


def config_of(raw: dict[str, Any]) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw))
        return Config.read(folder)


class RandomWeights:
    """Tensors by name, in bfloat16; the same name gives the same numbers.

    All are one block of normal numbers over and over, begun elsewhere in each: billions of
    fresh ones would take minutes.  The block's length is prime, so that no two rows of a
    matrix begin at the same place of it.
    """

    BLOCK = 1_000_003

    def __init__(self, raw: dict[str, Any], rng: np.random.Generator) -> None:
        self.shapes = dict(shapes(config_of(raw)))
        self.block = rng.standard_normal(self.BLOCK, np.float32)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def __call__(self, name: str) -> np.ndarray:
        shape = self.shapes[name]
        center, size = scale(name, shape)
        turned = np.roll(self.block, zlib.crc32(name.encode()) % self.BLOCK)
        # As words of 16 bits, which numpy copies faster than numbers of a type it did not bring.
        block = (turned * size + center).astype(ml_dtypes.bfloat16).view(np.uint16)
        out = np.empty(int(np.prod(shape)), np.uint16)
        whole = out.size - out.size % self.BLOCK
        out[:whole].reshape(-1, self.BLOCK)[:] = block
        out[whole:] = block[: out.size - whole]
        return out.view(ml_dtypes.bfloat16).reshape(shape)


def scale(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and deviation: logits get one of about 3, and attention has favourites."""
    if len(shape) == 1:
        return (1.5 if "self_attn" in name else 1.0), 0.1
    if "embed" in name:
        return 0.0, 0.1
    gain = (
        3.0
        if "lm_head" in name
        else 1.5
        if name.endswith(("q_proj.weight", "k_proj.weight"))
        else 1.0
    )
    return 0.0, gain / shape[1] ** 0.5
