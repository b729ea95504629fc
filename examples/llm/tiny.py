"""A tiny checkpoint of random weights in the hub's layout: config.json, shards, tokenizer.json."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from engine import Config
from engine.weights import E2M1, shapes
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
YARN = {
    "rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 256,
}  # fmt: skip
GPT_OSS = {
    "model_type": "gpt_oss", "torch_dtype": "bfloat16", "head_dim": 64, "num_attention_heads": 8,
    "intermediate_size": 96, "num_local_experts": 8, "num_experts_per_tok": 4,
    "attention_bias": True, "sliding_window": 20, "swiglu_limit": 1.0, "rope_scaling": YARN,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
KINDS = {
    "llama": {"torch_dtype": "float16", "head_dim": 64, "rope_scaling": LLAMA3},
    "qwen3": {"torch_dtype": "bfloat16", "head_dim": 128, "tie_word_embeddings": True},
    # Weights in fp8, as they are published: a scale of each matrix, or of each 128 x 128.
    "llama_fp8": {
        "model_type": "llama", "torch_dtype": "bfloat16", "head_dim": 128, "hidden_size": 256,
        "intermediate_size": 384, "rope_scaling": LLAMA3,
        "quantization_config": {"quant_method": "fp8", "activation_scheme": "static"},
    },
    "qwen3_fp8": {
        "model_type": "qwen3", "torch_dtype": "bfloat16", "head_dim": 128, "hidden_size": 256,
        "intermediate_size": 384, "tie_word_embeddings": True,
        "quantization_config": {
            "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
            "weight_block_size": [128, 128],
        },
    },
    "qwen3_moe": {
        "torch_dtype": "bfloat16", "head_dim": 128, "num_experts": 8, "num_experts_per_tok": 3,
        "moe_intermediate_size": 96, "norm_topk_prob": True, "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
    },
    "qwen3_moe_fp8": {
        "model_type": "qwen3_moe", "torch_dtype": "bfloat16", "head_dim": 128,
        "hidden_size": 256, "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 128, "norm_topk_prob": False, "decoder_sparse_step": 2,
        "mlp_only_layers": [],
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    },
    "gpt_oss": GPT_OSS,
    "gpt_oss_mxfp4": GPT_OSS | {"quantization_config": {"quant_method": "mxfp4"}},
    "qwen2": {"torch_dtype": "float16", "num_attention_heads": 2, "num_key_value_heads": 1},
    "mistral": {"torch_dtype": "float16", "head_dim": 64, "sliding_window": 20},
    "mixtral": {
        "torch_dtype": "bfloat16", "head_dim": 128, "num_local_experts": 8,
        "num_experts_per_tok": 2, "intermediate_size": 96, "sliding_window": None,
    },
    "gemma3_text": {
        "torch_dtype": "bfloat16", "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 200, "sliding_window": 20, "sliding_window_pattern": 2,
        "rope_local_base_freq": 1000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "tie_word_embeddings": True,
    },
    "qwen3_next": {
        "torch_dtype": "float16", "head_dim": 256, "partial_rotary_factor": 0.25,
        "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 96, "norm_topk_prob": True,
        "full_attention_interval": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
    },
}  # fmt: skip

CHAT_TEMPLATE = """\
{%- for tool in tools or [] %}tool {{ tool | tojson }}
{% endfor %}
{%- for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}
{%- if add_generation_prompt %}assistant: {% endif %}"""


def random_weight(name, shape, adds_one, rng):
    """Numbers of a size such that what goes through a layer stays of its size."""
    if name.endswith("A_log"):
        return np.log(rng.uniform(1, 16, shape))
    if name.endswith("dt_bias"):
        return rng.uniform(-4, 0, shape)
    if name.endswith("sinks"):
        return rng.standard_normal(shape)
    if name.endswith("bias"):
        return rng.uniform(-0.1, 0.1, shape)
    if len(shape) == 1:
        is_whole = adds_one and "linear_attn" not in name
        return rng.standard_normal(shape) * 0.1 + (0 if is_whole else 1)
    if "embed" in name:  # small, lest a tied one answers each token with itself
        return rng.standard_normal(shape) * 0.2
    if name.endswith("gate.weight") and shape[0] == 1:  # of the expert of all tokens
        return rng.standard_normal(shape) / shape[1] ** 0.5
    inner = shape[1] if "experts" in name else np.prod(shape[1:])
    return rng.standard_normal(shape) / inner**0.5 * (4 if "lm_head" in name else 1)


def decided(name, weight, count, adds_one, rng):
    """A weight changed so that no rounding makes a router choose other experts.

    The first `count` places of an embedding are an order of the experts, far apart; layers
    add little to these places, and routers look at nothing else.
    """
    if "embed" in name:
        orders = np.tile(np.linspace(-2, 2, count), (len(weight), 1))
        weight[:, :count] = rng.permuted(orders, axis=1)
    elif name.endswith(
        ("o_proj.weight", "o_proj.bias", "out_proj.weight", "down_proj.weight", "w2.weight")
    ):
        weight[:count] *= 0.02
    elif name.endswith(("down_proj", "down_proj_bias")):
        weight[..., :count] *= 0.02
    elif "post_attention" in name:
        weight[:count] = 0 if adds_one else 1
    elif name.endswith(("mlp.gate.weight", "moe.gate.weight", "mlp.router.weight")):
        weight = np.eye(*weight.shape)[rng.permutation(count)]
    return weight


def in_fp8(name, weight, block, rng):
    """A matrix and its scales by name, as they are published; sizes differ between blocks."""
    n, k = block or weight.shape
    grid = [-(-size // each) for size, each in zip(weight.shape, (n, k), strict=True)]
    scales = np.empty(grid, ml_dtypes.bfloat16 if block else np.float32)
    values = np.empty(weight.shape, ml_dtypes.float8_e4m3fn)
    for i, j in np.ndindex(*grid):
        part = np.s_[i * n : (i + 1) * n, j * k : (j + 1) * k]
        sized = weight[part] * rng.uniform(0.5, 1.5)
        scales[i, j] = np.abs(sized).max() / 440  # of 448 at most, rounded as it will be
        values[part] = (sized / np.float64(scales[i, j])).astype(values.dtype)
    if block:
        return {name: values, f"{name}_scale_inv": scales}
    of_input = name.replace("weight", "input_scale")
    return {name: values, f"{name}_scale": scales[0], of_input: np.float32([0.05])}


def in_mxfp4(name, weight):
    """Experts in 4 bits: rows of blocks of 32 with a power of 2 each, two numbers a byte."""
    # In C order: `save_file` writes arrays as they lie in memory.
    weight = np.ascontiguousarray(weight.swapaxes(1, 2))
    of_block = weight.reshape(*weight.shape[:2], -1, 32)
    scales = np.ceil(np.log2(np.abs(of_block).max(-1) / 6))
    off = np.abs((of_block / 2 ** scales[..., None])[..., None] - np.array(E2M1))
    chosen = off.argmin(-1).astype(np.uint8)
    return {
        f"{name}_blocks": chosen[..., ::2] | chosen[..., 1::2] << 4,
        f"{name}_scales": (scales + 127).astype(np.uint8),
    }


def make_tiny(path, kind="qwen3", rng=None, **changes):
    """Write a checkpoint of `kind` to the folder `path`; `changes` are of its config.json."""
    path, rng = Path(path), rng or np.random.default_rng()
    path.mkdir(parents=True, exist_ok=True)
    raw = {"model_type": kind} | COMMON | KINDS[kind] | changes
    (path / "config.json").write_text(json.dumps(raw, indent=2))
    config, quantised = Config.read(path), raw.get("quantization_config", {})
    dtype = ml_dtypes.bfloat16 if config.dtype == "bfloat16" else np.float16
    tensors = {}
    for name, shape in shapes(config):
        weight = random_weight(name, shape, config.adds_one, rng)
        if config.experts:
            weight = decided(name, weight, config.experts, config.adds_one, rng)
        if quantised and name.endswith(("gate_up_proj", "down_proj")):
            tensors |= in_mxfp4(name, weight)
        elif quantised.get("quant_method") == "fp8" and name.endswith("_proj.weight"):
            tensors |= in_fp8(name, weight, quantised.get("weight_block_size"), rng)
        else:
            tensors[name] = weight.astype(dtype)
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
    words = {"eos_token": "<|end|>", "chat_template": CHAT_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(words))
    return path


def byte_tokenizer():
    """A token for each byte, and one for the end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer
