"""A tiny checkpoint of random weights in the hub's layout: config.json, shards, tokenizer.json."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

COMMON = {
    "vocab_size": 257, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "eos_token_id": 256, "bos_token_id": 256,
}  # fmt: skip
LETTERS = 94  # tokens of visible ASCII, which come first
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
KINDS = {
    "llama": {"torch_dtype": "float16", "head_dim": 64, "rope_scaling": LLAMA3},
    "qwen3": {"torch_dtype": "bfloat16", "head_dim": 128, "tie_word_embeddings": True},
    "qwen3_next": {
        "torch_dtype": "float16", "head_dim": 256, "partial_rotary_factor": 0.25,
        "full_attention_interval": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
    },
}  # fmt: skip


def shapes(raw):
    """The names and shapes of all weights of a config.json."""
    hidden, mlp, dim = raw["hidden_size"], raw["intermediate_size"], raw["head_dim"]
    q, kv = raw["num_attention_heads"] * dim, raw["num_key_value_heads"] * dim
    yield "model.embed_tokens.weight", (raw["vocab_size"], hidden)
    yield "model.norm.weight", (hidden,)
    if not raw.get("tie_word_embeddings"):
        yield "lm_head.weight", (raw["vocab_size"], hidden)
    is_next = raw["model_type"] == "qwen3_next"
    for i in range(raw["num_hidden_layers"]):
        at = f"model.layers.{i}."
        yield at + "input_layernorm.weight", (hidden,)
        yield at + "post_attention_layernorm.weight", (hidden,)
        yield at + "mlp.gate_proj.weight", (mlp, hidden)
        yield at + "mlp.up_proj.weight", (mlp, hidden)
        yield at + "mlp.down_proj.weight", (hidden, mlp)
        if is_next and (i + 1) % raw["full_attention_interval"]:
            yield from _linear(at + "linear_attn.", raw)
            continue
        yield at + "self_attn.q_proj.weight", (q * (2 if is_next else 1), hidden)
        yield at + "self_attn.k_proj.weight", (kv, hidden)
        yield at + "self_attn.v_proj.weight", (kv, hidden)
        yield at + "self_attn.o_proj.weight", (hidden, q)
        if raw["model_type"] != "llama":
            yield at + "self_attn.q_norm.weight", (dim,)
            yield at + "self_attn.k_norm.weight", (dim,)


def _linear(at, raw):
    keys, values = raw["linear_num_key_heads"] * 128, raw["linear_num_value_heads"] * 128
    heads, hidden = raw["linear_num_value_heads"], raw["hidden_size"]
    yield at + "in_proj_qkvz.weight", (2 * keys + 2 * values, hidden)
    yield at + "in_proj_ba.weight", (2 * heads, hidden)
    yield at + "conv1d.weight", (2 * keys + values, 1, 4)
    yield at + "A_log", (heads,)
    yield at + "dt_bias", (heads,)
    yield at + "norm.weight", (128,)
    yield at + "out_proj.weight", (hidden, values)


def random_weight(name, shape, is_next, rng):
    """Numbers of a size such that what goes through a layer stays of its size."""
    if name.endswith("A_log"):
        return np.log(rng.uniform(1, 16, shape))
    if name.endswith("dt_bias"):
        return rng.uniform(-4, 0, shape)
    if len(shape) == 1:
        adds_one = is_next and "linear_attn" not in name
        return rng.standard_normal(shape) * 0.1 + (0 if adds_one else 1)
    if "embed" in name:  # small, lest a tied one answers each token with itself
        return rng.standard_normal(shape) * 0.2
    return rng.standard_normal(shape) / np.prod(shape[1:]) ** 0.5 * (4 if "lm_head" in name else 1)


def make_tiny(path, kind="qwen3", rng=None, **changes):
    """Write a checkpoint of `kind` to the folder `path`; `changes` are of its config.json."""
    path, rng = Path(path), rng or np.random.default_rng()
    path.mkdir(parents=True, exist_ok=True)
    raw = {"model_type": kind} | COMMON | KINDS[kind] | changes
    (path / "config.json").write_text(json.dumps(raw, indent=2))
    dtype = ml_dtypes.bfloat16 if raw["torch_dtype"] == "bfloat16" else np.float16
    is_next = kind == "qwen3_next"
    tensors = {
        name: random_weight(name, shape, is_next, rng).astype(dtype) for name, shape in shapes(raw)
    }
    # What is no visible letter is seldom written.
    tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])[LETTERS:] /= 4
    names, files = [*tensors], {}
    for n, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{n:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path / file)
        files |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return path


def byte_tokenizer():
    """A token for each byte, and one for the end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer
