"""Weights out of safetensors files in the hub's layout, in the form that the model wants."""

import json
from pathlib import Path

import numpy as np
from safetensors import safe_open


class Weights:
    """The tensors of a folder: one model.safetensors, or shards with an index."""

    def __init__(self, path):
        path = Path(path)
        index = path / "model.safetensors.index.json"
        if index.exists():
            files = json.loads(index.read_text())["weight_map"]
        else:
            with safe_open(path / "model.safetensors", "np") as one:
                files = dict.fromkeys(one.keys(), "model.safetensors")
        self.path, self.files, self.opened = path, files, {}

    def __call__(self, name):
        """One tensor as a numpy array (bfloat16 is ml_dtypes')."""
        if name not in self.files:
            raise KeyError(f"{self.path} has no tensor {name}")
        file = self.files[name]
        if file not in self.opened:
            self.opened[file] = safe_open(self.path / file, "np").__enter__()
        return self.opened[file].get_tensor(name)


def of_layer(weights, config, i):
    """A layer's tensors by short names, what is multiplied together in one matrix."""
    prefix = f"model.layers.{i}."

    def get(*names):
        return np.concatenate([weights(f"{prefix}{name}.weight") for name in names])

    layer = {
        "input_norm": get("input_layernorm"),
        "post_norm": get("post_attention_layernorm"),
        "gate_up": get("mlp.gate_proj", "mlp.up_proj"),
        "down": get("mlp.down_proj"),
    }
    if config.layers[i] == "linear_attention":
        return layer | _linear_attention(weights, config, prefix + "linear_attn.")
    return layer | _attention(get, config)


def _attention(get, config):
    q = get("self_attn.q_proj")
    if config.is_next:  # each head's query and then its gate: all gates after the values
        q, gate = q.reshape(config.heads, 2, config.head_dim, -1).swapaxes(0, 1)
        q, gate = (part.reshape(-1, part.shape[-1]) for part in (q, gate))
    parts = [q, get("self_attn.k_proj"), get("self_attn.v_proj")]
    parts += [gate] if config.is_next else []
    layer = {"qkv": np.concatenate(parts), "out": get("self_attn.o_proj")}
    if config.qk_norm:
        layer |= {"q_norm": get("self_attn.q_norm"), "k_norm": get("self_attn.k_norm")}
    if config.is_next:  # rounded once more than the layers' norms, whose kernel adds the 1
        for name in ("q_norm", "k_norm"):
            layer[name] = (layer[name].astype(np.float32) + 1).astype(layer[name].dtype)
    return layer


def _linear_attention(weights, config, prefix):
    def get(name):
        return weights(prefix + name)

    # Rows come by key head: its q and k, then v and z of its value heads; likewise b and a.
    each = config.value_heads // config.key_heads
    by_head = get("in_proj_qkvz.weight").reshape(config.key_heads, -1, config.hidden)
    ends = np.cumsum([128, 128, each * 128])
    qkvz = [part.reshape(-1, config.hidden) for part in np.split(by_head, ends, axis=1)]
    by_head = get("in_proj_ba.weight").reshape(config.key_heads, 2, each, config.hidden)
    return {
        "qkvz": np.concatenate(qkvz),
        "ba": by_head.swapaxes(0, 1).reshape(-1, config.hidden),
        "conv": get("conv1d.weight").reshape(-1, 4).astype(np.float32),
        "a_log": get("A_log").astype(np.float32),
        "dt_bias": get("dt_bias").astype(np.float32),
        "norm": get("norm.weight"),
        "out": get("out_proj.weight"),
    }
