"""The architectures once more, in float64, a request at a time and without a cache.

Written from the hub's layout (config.json, names of tensors), not from examples/llm.
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import deserialize

KINDS = {
    "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32,
    "U8": np.uint8, "F8_E4M3": ml_dtypes.float8_e4m3fn,
}  # fmt: skip
MIXTRAL = "block_sparse_moe"
# Half a step of fp8, by which what is multiplied with weights of fp8 is rounded.
FP8 = 2.0**-4


def read(path: Path) -> tuple[dict, dict[str, np.ndarray], set[str]]:
    """config.json, the weights as the numbers that they stand for, and those stored in fp8."""
    tensors = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        for name, told in deserialize(file.read_bytes()):
            flat = np.frombuffer(told["data"], KINDS[told["dtype"]])
            tensors[name] = flat.astype(np.float64).reshape(told["shape"])
    in_fp8 = set()
    for name in [name for name in tensors if name.endswith(("weight_scale", "weight_scale_inv"))]:
        scales, of = tensors.pop(name), name[: name.rindex("_scale")]
        in_fp8.add(of)
        rows, columns = np.indices(tensors[of].shape) // 128
        tensors[of] *= scales[rows, columns] if scales.ndim > 1 else scales[0]
    for name in [name for name in tensors if name.endswith("_blocks")]:
        of = name.removesuffix("_blocks")
        pairs, powers = tensors.pop(name), tensors.pop(f"{of}_scales")
        low, high = pairs % 16, pairs // 16
        values = np.stack([e2m1(low), e2m1(high)], -1).reshape(*pairs.shape[:-1], 32)
        values = values * 2.0 ** (powers[..., None] - 127)
        tensors[of] = values.reshape(*powers.shape[:-1], -1).transpose(0, 2, 1)
    return json.loads((Path(path) / "config.json").read_text()), tensors, in_fp8


def e2m1(x):
    """Of a sign, two bits of exponent and one of mantissa."""
    sign, exponent, half = x // 8 % 2, x // 2 % 4, x % 2
    size = np.where(exponent > 0, 2.0 ** (exponent - 1) * (1 + half / 2), half / 2)
    return np.where(sign > 0, -size, size)


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


class Forward:
    """Called with tokens; `step` is what a number may be off after each operation (see `off`)."""

    def __init__(self, path: Path) -> None:
        self.raw, self.weights, self.in_fp8 = read(path)
        self.is_next = self.raw["model_type"] == "qwen3_next"
        self.is_gemma = self.raw["model_type"] == "gemma3_text"
        self.step, self.rng = 0.0, np.random.default_rng()

    def off(self, x, step=None):
        """x as it is, or each number off by a part of up to `step`, as rounding leaves it."""
        step = step or self.step
        return x * (1 + self.rng.uniform(-step, step, x.shape)) if self.step else x

    def times(self, x, name):
        """x times a weight, and what x becomes where that is of fp8."""
        if name in self.in_fp8:
            x = self.off(x, FP8)
        return self.off(x @ self.weights[name].T)

    def norm(self, x, name, adds_one=None):
        weight = self.weights[name + ".weight"]
        adds_one = self.is_next or self.is_gemma if adds_one is None else adds_one
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.raw["rms_norm_eps"])
        return self.off(x * (1 + weight if adds_one else weight))

    def rotate(self, x, base=None):
        """x: (tokens, heads, dim), turned as complex numbers; by `base` or as the file says."""
        raw, dim = self.raw, x.shape[-1]
        dim = int(dim * raw.get("partial_rotary_factor", 1))
        theta = base or raw["rope_theta"]
        speed = np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])
        scaling = None if base else raw.get("rope_scaling")
        larger = 1.0
        if scaling and scaling["rope_type"] == "linear":
            speed = speed / scaling["factor"]
        elif scaling and scaling["rope_type"] == "yarn":
            larger = 0.1 * np.log(scaling["factor"]) + 1
            old, base = scaling["original_max_position_embeddings"], np.log(raw["rope_theta"])
            fast, slow = (
                dim / 2 * np.log(old / (2 * np.pi * scaling[beta])) / base
                for beta in ("beta_fast", "beta_slow")
            )
            for i, f in enumerate(speed):
                part = min(max((i - max(fast, 0)) / (min(slow, dim - 1) - max(fast, 0)), 0), 1)
                speed[i] = (1 - part) * f + part * f / scaling["factor"]
        elif scaling:
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
        z = z * larger
        return self.off(np.concatenate([z.real, z.imag, x[..., dim:]], -1))

    def plus(self, x, name):
        return self.off(x + self.weights[name]) if name in self.weights else x

    def attention(self, x, at, window=None):
        raw, n = self.raw, len(x)
        heads, kv = raw["num_attention_heads"], raw["num_key_value_heads"]
        dim = raw.get("head_dim") or raw["hidden_size"] // heads
        q = self.plus(self.times(x, at + "q_proj.weight"), at + "q_proj.bias").reshape(n, heads, -1)
        gate = None
        if self.is_next:
            q, gate = q[..., :dim], q[..., dim:].reshape(n, -1)
        k, v = (self.times(x, f"{at}{name}_proj.weight") for name in "kv")
        k, v = self.plus(k, at + "k_proj.bias"), self.plus(v, at + "v_proj.bias")
        k, v = k.reshape(n, kv, dim), v.reshape(n, kv, dim)
        if at + "q_norm.weight" in self.weights:
            q, k = self.norm(q, at + "q_norm"), self.norm(k, at + "k_norm")
        base = raw["rope_local_base_freq"] if self.is_gemma and window else None
        q, k = self.rotate(q, base), self.rotate(k, base)
        of = np.arange(heads) * kv // heads  # whose keys and values a head has
        scores = q.transpose(1, 0, 2) @ k.transpose(1, 2, 0)[of]
        scores /= raw.get("query_pre_attn_scalar", dim) ** 0.5
        later = np.arange(n) - np.arange(n)[:, None]
        scores[:, (later > 0) | (later <= -(window or n))] = -np.inf
        if at + "sinks" in self.weights:
            sinks = self.weights[at + "sinks"][:, None, None]
            scores = np.concatenate([scores, np.broadcast_to(sinks, (heads, n, 1))], -1)
        out = (softmax(scores)[..., :n] @ v.transpose(1, 0, 2)[of]).transpose(1, 0, 2)
        out = self.off(out.reshape(n, -1))
        if gate is not None:
            out = self.off(out / (1 + np.exp(-gate)))
        return self.plus(self.times(out, at + "o_proj.weight"), at + "o_proj.bias")

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
        q, k = (np.repeat(part, each, axis=1) for part in (q, k))
        state = np.zeros((vh, d, d))  # (head, key, value)
        for t in range(n):
            state *= decay[t, :, None, None]
            new = v[t] - (k[t, :, None] @ state)[:, 0]
            state += (write[t, :, None] * k[t])[:, :, None] * new[:, None]
            out[t] = (q[t, :, None] @ state)[:, 0] / d**0.5
        out = self.norm(self.off(out), at + "norm", adds_one=False)
        out = self.off(out * silu(z.reshape(n, vh, d)))
        return self.off(out.reshape(n, -1) @ w[at + "out_proj.weight"].T)

    def mlp(self, x, at, names=("gate_proj", "up_proj", "down_proj")):
        gate, up = (self.times(x, f"{at}{name}.weight") for name in names[:2])
        if self.is_gemma:
            inner = gate / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
        else:
            inner = silu(gate)
        return self.times(self.off(inner * up), f"{at}{names[2]}.weight")

    def expert(self, x, at, e):
        """One of gpt-oss: gate and up take turns in a row, both limited, and up has 1 more."""
        w, limit = self.weights, self.raw["swiglu_limit"]
        both = self.off(x @ w[at + "gate_up_proj"][e] + w[at + "gate_up_proj_bias"][e])
        gate, up = np.minimum(both[:, ::2], limit), np.clip(both[:, 1::2], -limit, limit)
        inner = self.off(gate / (1 + np.exp(-1.702 * gate)) * (up + 1))
        return self.off(inner @ w[at + "down_proj"][e] + w[at + "down_proj_bias"][e])

    def mixture(self, x, at):
        is_oss = self.raw["model_type"] == "gpt_oss"
        router = at + ("router" if is_oss else "gate")
        scores = self.times(x, router + ".weight")
        shares = softmax(scores + self.weights[router + ".bias"] if is_oss else scores)
        out, chosen = np.zeros_like(x), np.zeros(shares.shape, bool)
        names = [("w1", "w3", "w2")] if "moe" in at else []
        for t, row in enumerate(shares):
            best = sorted(range(len(row)), key=lambda e: -row[e])
            chosen[t, best[: self.raw["num_experts_per_tok"]]] = True
        shares = np.where(chosen, shares, 0)
        if is_oss or self.raw.get("norm_topk_prob", True):
            shares /= shares.sum(1, keepdims=True)
        for e in range(shares.shape[1]):
            mine = chosen[:, e]
            if mine.any():
                y = x[mine]
                y = (
                    self.expert(y, f"{at}experts.", e)
                    if is_oss
                    else self.mlp(y, f"{at}experts.{e}.", *names)
                )
                out[mine] += shares[mine, e, None] * y
        if at + "shared_expert_gate.weight" in self.weights:
            gate = self.times(x, at + "shared_expert_gate.weight")
            out += self.mlp(x, at + "shared_expert.") / (1 + np.exp(-gate))
        return self.off(out)

    def spread(self, tokens, step: float, runs: int = 3) -> tuple[np.ndarray, np.ndarray]:
        """The logits, and of each token's how far they move where every operation is off by `step`.

        The root of the mean square, the most of some runs: what no computation with such
        numbers can be asked to be better than.
        """
        exact, worst = self(tokens), np.zeros(len(tokens))
        self.step = step
        for _ in range(runs):
            worst = np.maximum(worst, np.sqrt(((self(tokens) - exact) ** 2).mean(1)))
        self.step = 0.0
        return exact, worst

    def __call__(self, tokens) -> np.ndarray:
        """Logits of every token, float64 (tokens, vocabulary)."""
        w, raw = self.weights, self.raw
        x = w["model.embed_tokens.weight"][np.asarray(tokens)]
        if self.is_gemma:
            x = self.off(x * float(ml_dtypes.bfloat16(raw["hidden_size"] ** 0.5)))
        for i in range(raw["num_hidden_layers"]):
            at = f"model.layers.{i}."
            y = self.norm(x, at + "input_layernorm")
            if at + "linear_attn.A_log" in w:
                x = x + self.delta(y, at + "linear_attn.")
            else:
                is_sliding = raw.get("layer_types", {i: ""})[i] == "sliding_attention"
                is_sliding |= raw["model_type"] == "mistral"
                is_sliding |= bool((i + 1) % raw.get("sliding_window_pattern", 1))
                window = raw["sliding_window"] if is_sliding else None
                y = self.attention(y, at + "self_attn.", window)
                if self.is_gemma:
                    y = self.norm(y, at + "post_attention_layernorm")
                x = x + y
            x = self.off(x)
            before = "pre_feedforward" if self.is_gemma else "post_attention"
            y = self.norm(x, f"{at}{before}_layernorm")
            routers = [
                f"{at}{name}.weight" for name in ("mlp.gate", "mlp.router", MIXTRAL + ".gate")
            ]
            mlp = self.mixture if any(name in w for name in routers) else self.mlp
            y = mlp(y, at + ("mlp." if routers[-1] not in w else MIXTRAL + "."))
            if self.is_gemma:
                y = self.norm(y, at + "post_feedforward_layernorm")
            x = self.off(x + y)
        head = "model.embed_tokens.weight" if raw.get("tie_word_embeddings") else "lm_head.weight"
        return self.norm(x, "model.norm") @ w[head].T
