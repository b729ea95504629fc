"""The three architectures once more, in float64, a request at a time and without a cache.

Written from the hub's layout (config.json, names of tensors), not from examples/llm.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import safe_open


def read(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    tensors = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, "np") as opened:
            tensors |= {name: opened.get_tensor(name).astype(np.float64) for name in opened.keys()}  # noqa: SIM118
    return json.loads((Path(path) / "config.json").read_text()), tensors


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


class Forward:
    """Called with tokens; `step` is what a number may be off after each operation (see `off`)."""

    def __init__(self, path: Path) -> None:
        self.raw, self.weights = read(path)
        self.is_next = self.raw["model_type"] == "qwen3_next"
        self.step, self.rng = 0.0, np.random.default_rng()

    def off(self, x):
        """x as it is, or each number off by a part of up to `step`, as rounding leaves it."""
        return x * (1 + self.rng.uniform(-self.step, self.step, x.shape)) if self.step else x

    def norm(self, x, name, adds_one=None):
        weight = self.weights[name + ".weight"]
        adds_one = self.is_next if adds_one is None else adds_one
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.raw["rms_norm_eps"])
        return self.off(x * (1 + weight if adds_one else weight))

    def rotate(self, x):
        """x: (tokens, heads, dim), turned as complex numbers."""
        raw, dim = self.raw, x.shape[-1]
        dim = int(dim * raw.get("partial_rotary_factor", 1))
        speed = np.array([raw["rope_theta"] ** (-2 * i / dim) for i in range(dim // 2)])
        scaling = raw.get("rope_scaling")
        if scaling:
            old = scaling["original_max_position_embeddings"]
            for i, f in enumerate(speed):
                length = 2 * np.pi / f
                low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
                if length > old / low:
                    speed[i] = f / scaling["factor"]
                elif length >= old / high:
                    smooth = (old / length - low) / (high - low)
                    speed[i] = (1 - smooth) * f / scaling["factor"] + smooth * f
        angle = np.arange(len(x))[:, None, None] * speed
        z = (x[..., : dim // 2] + 1j * x[..., dim // 2 : dim]) * np.exp(1j * angle)
        return self.off(np.concatenate([z.real, z.imag, x[..., dim:]], -1))

    def attention(self, x, at):
        raw, w, n = self.raw, self.weights, len(x)
        heads, kv, dim = raw["num_attention_heads"], raw["num_key_value_heads"], raw["head_dim"]
        q = self.off(x @ w[at + "q_proj.weight"].T).reshape(n, heads, -1)
        gate = None
        if self.is_next:
            q, gate = q[..., :dim], q[..., dim:].reshape(n, -1)
        k, v = (self.off(x @ w[f"{at}{name}_proj.weight"].T) for name in "kv")
        k, v = k.reshape(n, kv, dim), v.reshape(n, kv, dim)
        if raw["model_type"] != "llama":
            q, k = self.norm(q, at + "q_norm"), self.norm(k, at + "k_norm")
        q, k = self.rotate(q), self.rotate(k)
        out = np.empty((n, heads, dim))
        for h in range(heads):
            g = h * kv // heads
            scores = q[:, h] @ k[:, g].T / dim**0.5
            scores[np.triu_indices(n, 1)] = -np.inf
            out[:, h] = softmax(scores) @ v[:, g]
        out = self.off(out.reshape(n, -1))
        if gate is not None:
            out = self.off(out / (1 + np.exp(-gate)))
        return self.off(out @ w[at + "o_proj.weight"].T)

    def delta(self, x, at):
        raw, w, n = self.raw, self.weights, len(x)
        kh, vh = raw["linear_num_key_heads"], raw["linear_num_value_heads"]
        each, d = vh // kh, 128
        mixed = self.off(x @ w[at + "in_proj_qkvz.weight"].T).reshape(n, kh, (2 + 2 * each) * d)
        q, k = mixed[..., :d], mixed[..., d : 2 * d]
        v, z = mixed[..., 2 * d : (2 + each) * d], mixed[..., (2 + each) * d :]
        ba = self.off(x @ w[at + "in_proj_ba.weight"].T).reshape(n, kh, 2 * each)
        b, a = ba[..., :each].reshape(n, vh), ba[..., each:].reshape(n, vh)
        flat = np.concatenate([part.reshape(n, -1) for part in (q, k, v)], 1)
        conv, seen = np.zeros_like(flat), np.concatenate([np.zeros((3, flat.shape[1])), flat])
        for t in range(n):
            conv[t] = (seen[t : t + 4].T * w[at + "conv1d.weight"][:, 0]).sum(1)
        q, k, v = np.split(self.off(silu(conv)), [kh * d, 2 * kh * d], 1)
        q, k, v = q.reshape(n, kh, d), k.reshape(n, kh, d), v.reshape(n, vh, d)
        q, k = (self.off(p / np.sqrt((p * p).sum(-1, keepdims=True) + 1e-6)) for p in (q, k))
        decay = np.exp(-np.exp(w[at + "A_log"]) * np.log1p(np.exp(a + w[at + "dt_bias"])))
        write, out = 1 / (1 + np.exp(-b)), np.empty((n, vh, d))
        for h in range(vh):
            state = np.zeros((d, d))  # (key, value)
            for t in range(n):
                key = k[t, h // each]
                state = state * decay[t, h]
                state += write[t, h] * np.outer(key, v[t, h] - key @ state)
                out[t, h] = q[t, h // each] @ state / d**0.5
        out = self.norm(self.off(out), at + "norm", adds_one=False)
        out = self.off(out * silu(z.reshape(n, vh, d)))
        return self.off(out.reshape(n, -1) @ w[at + "out_proj.weight"].T)

    def spread(self, tokens, step: float, runs: int = 3) -> np.ndarray:
        """Of each token's logits, how far they move where every operation is off by `step`.

        The root of the mean square, the most of some runs: what no computation with such
        numbers can be asked to be better than.
        """
        exact, worst = self(tokens), np.zeros(len(tokens))
        self.step = step
        for _ in range(runs):
            worst = np.maximum(worst, np.sqrt(((self(tokens) - exact) ** 2).mean(1)))
        self.step = 0.0
        return worst

    def __call__(self, tokens) -> np.ndarray:
        """Logits of every token, float64 (tokens, vocabulary)."""
        w, raw = self.weights, self.raw
        x = w["model.embed_tokens.weight"][np.asarray(tokens)]
        for i in range(raw["num_hidden_layers"]):
            at = f"model.layers.{i}."
            y = self.norm(x, at + "input_layernorm")
            if at + "linear_attn.A_log" in w:
                x = x + self.delta(y, at + "linear_attn.")
            else:
                x = x + self.attention(y, at + "self_attn.")
            x = self.off(x)
            y = self.norm(x, at + "post_attention_layernorm")
            gate, up = (self.off(y @ w[f"{at}mlp.{name}_proj.weight"].T) for name in ("gate", "up"))
            product = self.off(silu(gate) * up)
            x = self.off(x + self.off(product @ w[at + "mlp.down_proj.weight"].T))
        head = "model.embed_tokens.weight" if raw.get("tie_word_embeddings") else "lm_head.weight"
        return self.norm(x, "model.norm") @ w[head].T
