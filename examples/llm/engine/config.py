"""What a model is, from its config.json and generation_config.json in the hub's layout."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
KINDS = ("llama", "qwen3", "qwen3_next", "qwen3_moe", "gpt_oss")

LARGEST = 2**24  # of any of these sizes
MOST_LAYERS, MOST_HEAD_DIM = 2**10, 256
# Fields by their names in config.json; and those that kinds have besides.
SIZES = {
    "vocab": "vocab_size", "hidden": "hidden_size", "intermediate": "intermediate_size",
    "heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
    "max_positions": "max_position_embeddings",
}  # fmt: skip
SIZES_OF = {
    "qwen3_next": {"key_heads": "linear_num_key_heads", "value_heads": "linear_num_value_heads"},
    "qwen3_moe": {
        "experts": "num_experts", "top_k": "num_experts_per_tok",
        "expert_intermediate": "moe_intermediate_size",
    },
    "gpt_oss": {
        "experts": "num_local_experts", "top_k": "num_experts_per_tok",
        "expert_intermediate": "intermediate_size",
    },
}  # fmt: skip
# What a field may be that is given and not null: whole numbers, numbers, yes or no, objects.
BOUNDS = {
    "decoder_sparse_step": (1, LARGEST), "full_attention_interval": (1, LARGEST),
    "max_window_layers": (0, LARGEST), "sliding_window": (0, LARGEST),
    "original_max_position_embeddings": (1, LARGEST), "rms_norm_eps": (0.0, 1.0),
    "rope_theta": (1.0, 1e12), "partial_rotary_factor": (0.0, 1.0), "swiglu_limit": (0.0, 1e6),
    "factor": (1e-3, 1e6), "low_freq_factor": (1e-3, 1e6), "high_freq_factor": (1e-3, 1e6),
    "beta_fast": (1e-3, 1e6), "beta_slow": (1e-3, 1e6), "attention_factor": (0.0, 1e6),
    "mscale": (0.0, 1e6), "mscale_all_dim": (0.0, 1e6),
}  # fmt: skip
TOP = 20  # the most tokens that are told beside the one drawn
# Of the parameters of a request; of whole numbers where the limits are.
LIMITS = {
    "temperature": (0.0, 100.0), "top_k": (0, 2**31 - 1), "top_p": (1e-6, 1.0),
    "min_p": (0.0, 1.0), "max_tokens": (1, 2**31 - 1), "min_tokens": (0, 2**31 - 1),
    "presence_penalty": (-2.0, 2.0), "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (1e-2, 100.0), "logprobs": (0, TOP),
}  # fmt: skip
# Those of them that generation_config.json may have.
SAMPLED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
FLAGS = (
    "tie_word_embeddings", "norm_topk_prob", "attention_bias", "mlp_bias", "use_sliding_window",
)  # fmt: skip
OBJECTS = ("rope_parameters", "rope_scaling", "quantization_config")
NEEDED = {"yarn": ("factor",)}
NEEDED["llama3"] = (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
)  # fmt: skip


def read_object(path):
    """What a file of JSON has, by name; ValueError where it is no object."""
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as wrong:
        raise ValueError(f"{path.parent} is no checkpoint: {path.name}: {wrong}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path.parent}: {path.name} is no object")
    return raw


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
    experts: int = 0  # of each layer that is `sparse`; a token goes to `top_k` of them
    top_k: int = 0
    expert_intermediate: int = 0
    norm_topk: bool = True  # the weights of a token's experts add up to 1
    sparse: tuple[bool, ...] = ()
    window: int = 0  # keys that a query of a sliding layer sees, its own among them; 0: all
    has_biases: bool = False  # of attention's products
    is_gpt_oss: bool = False  # sinks, and experts with biases and a limit of their own
    swiglu_limit: float = 0.0
    eos: tuple[int, ...] = ()
    # What generation_config.json gives for requests that do not say, by the names of `Sampling`.
    sampling: dict = field(default_factory=dict, hash=False)

    @property
    def is_hybrid(self):
        return LINEAR in self.layers

    def is_sparse(self, i):
        """Whether layer i is a mixture of experts."""
        return bool(self.sparse) and self.sparse[i]

    @property
    def windows(self):
        """By kind of layer, how many keys before its own a query sees; -1: all."""
        return {kind: self.window - 1 if kind == SLIDING else -1 for kind in self.layers}

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
        raw = read_object(Path(path) / "config.json")
        cls._check_kinds(raw)
        drawn = Path(path) / "generation_config.json"
        drawn = read_object(drawn) if drawn.exists() else {}
        limits = {name: LIMITS[name] for name in SAMPLED}
        cls._check_kinds(drawn, "generation_config.json", limits)
        raw["dtype"] = raw.get("torch_dtype") or raw.get("dtype") or "bfloat16"
        names = SIZES | SIZES_OF.get(raw.get("model_type"), {})
        cls._check_numbers(raw, names.values())
        kind, count = raw["model_type"], raw["num_hidden_layers"]
        scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        scaling = {"rope_type": scaling.get("type", "default")} | scaling
        cls._check(raw, kind, names, scaling["rope_type"])
        more = {field: raw[name] for field, name in names.items()}
        if kind == "qwen3_moe":
            step, dense = raw.get("decoder_sparse_step") or 1, raw.get("mlp_only_layers") or ()
            more["sparse"] = tuple((i + 1) % step == 0 and i not in dense for i in range(count))
            more["norm_topk"] = raw.get("norm_topk_prob", False)
        if kind == "gpt_oss":
            more |= {"sparse": (True,) * count, "swiglu_limit": raw.get("swiglu_limit", 7.0)}
        if raw.get("use_sliding_window", kind == "gpt_oss"):
            more["window"] = raw.get("sliding_window") or 0
        head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
        partial = raw.get("partial_rotary_factor", scaling.get("partial_rotary_factor", 1.0))
        rotary_dim = int(head_dim * partial)
        if head_dim % 8 or rotary_dim % 8 or head_dim > MOST_HEAD_DIM:
            raise ValueError(
                f"config.json: head_dim is {head_dim}, and RoPE is of {rotary_dim} numbers; here "
                f"both are multiples of 8, {MOST_HEAD_DIM} at most"
            )
        ends = []
        for end in (raw.get("eos_token_id"), drawn.get("eos_token_id")):
            ends += end if isinstance(end, list) else [] if end is None else [end]
        return cls(
            dtype=raw["dtype"],
            layers=tuple(raw.get("layer_types") or cls._types(count, raw)),
            head_dim=head_dim,
            eps=raw["rms_norm_eps"],
            tied=raw.get("tie_word_embeddings", False),
            rotary_dim=rotary_dim,
            rope_theta=raw.get("rope_theta") or scaling.get("rope_theta", 10000.0),
            rope_scaling=scaling,
            qk_norm=kind.startswith("qwen3"),
            has_biases=raw.get("attention_bias", kind == "gpt_oss"),
            is_next=kind == "qwen3_next",
            is_gpt_oss=kind == "gpt_oss",
            eos=tuple(dict.fromkeys(ends)),
            sampling={name: drawn[name] for name in SAMPLED if drawn.get(name) is not None},
            **more,
        )

    @staticmethod
    def _check_kinds(raw, file="config.json", bounds=BOUNDS):
        """ValueError where a field is of another kind than it can be."""

        def check(given, name, is_right, known):
            if given.get(name) is not None and not is_right(given[name]):
                raise ValueError(f"{file}: {name} is {given[name]!r:.100}; it is {known}")

        for name in OBJECTS:
            check(raw, name, lambda x: isinstance(x, dict), "an object")
        for given in (raw, raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}):
            for name, (low, high) in bounds.items():
                kinds = (int,) if type(low) is int else (int, float)
                check(given, name, lambda x: type(x) in kinds and low <= x <= high,  # noqa: B023
                      f"from {low} to {high}")  # fmt: skip
        for name in FLAGS:
            check(raw, name, lambda x: isinstance(x, bool), "true or false")
        for name in ("torch_dtype", "dtype"):
            check(raw, name, lambda x: x in ("float16", "bfloat16"), "float16 or bfloat16")
        check(raw, "model_type", lambda x: isinstance(x, str), "text")

        def are_tokens(x):
            return all(type(n) is int and 0 <= n <= LARGEST for n in x)

        check(raw, "mlp_only_layers", lambda x: isinstance(x, list) and are_tokens(x), "layers")
        check(raw, "eos_token_id", lambda x: are_tokens(x if isinstance(x, list) else [x]),
              "a token, or a list of tokens")  # fmt: skip
        count, kinds = raw.get("num_hidden_layers"), (FULL, SLIDING, LINEAR)
        check(raw, "layer_types",
              lambda x: isinstance(x, list) and len(x) == count and all(k in kinds for k in x),
              f"for each layer {FULL}, {SLIDING} or {LINEAR}")  # fmt: skip

    @staticmethod
    def _check_numbers(raw, sizes):
        """ValueError where a size is missing, or no size."""
        optional = ("head_dim",) if raw.get("head_dim") is not None else ()
        for name in (*sizes, "num_hidden_layers", *optional):
            if type(value := raw.get(name)) is not int or not 1 <= value <= LARGEST:
                raise ValueError(f"config.json: {name} is {value!r}; it is from 1 to {LARGEST}")
        if raw["num_hidden_layers"] > MOST_LAYERS:
            raise ValueError(f"config.json: num_hidden_layers is more than {MOST_LAYERS}")
        if raw["num_attention_heads"] % raw["num_key_value_heads"]:
            raise ValueError("config.json: num_key_value_heads does not divide num_attention_heads")

    @staticmethod
    def _check(raw, kind, names, rope):
        """ValueError for what there is no code for."""

        def refuse(name, known):
            raise ValueError(f"config.json: {name} is {raw.get(name)!r}; here it is {known}")

        if kind not in KINDS:
            refuse("model_type", " or ".join(KINDS))
        for name in ("mlp_bias", *(("attention_bias",) if kind == "qwen3_next" else ())):
            if raw.get(name):
                refuse(name, "none")
        of_weights = raw.get("quantization_config") or {}
        method = {"qwen3_next": None, "gpt_oss": "mxfp4"}.get(kind, "fp8")
        is_known = of_weights.get("quant_method") == method
        is_known &= of_weights.get("weight_block_size") in (None, [128, 128])
        if of_weights and not (is_known and raw["dtype"] == "bfloat16"):
            known = "fp8 of a tensor or of blocks of 128, of gpt_oss mxfp4, with bfloat16"
            refuse("quantization_config", known)
        if rope not in ("default", "llama3", "yarn"):
            refuse("rope_scaling", "of rope_type default, llama3 or yarn")
        scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        for name in NEEDED.get(rope, ()):
            if scaling.get(name) is None:
                refuse("rope_scaling", f"with {name}")
        of_experts = names.get("experts")
        if of_experts and not 0 < raw["num_experts_per_tok"] <= raw[of_experts] <= 1024:
            refuse(of_experts, "1024 at most, and num_experts_per_tok at least")
        if kind != "qwen3_next":
            return
        dense = len(raw.get("mlp_only_layers") or ()) == raw["num_hidden_layers"]
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
        if raw["model_type"] == "gpt_oss":
            return [FULL if i % 2 else SLIDING for i in range(count)]
        if raw.get("use_sliding_window"):
            return [FULL if i < raw["max_window_layers"] else SLIDING for i in range(count)]
        every = raw.get("full_attention_interval") or 1
        return [LINEAR if (i + 1) % every else FULL for i in range(count)]

    def cos_sin_cache(self, positions):
        """[positions, rotary_dim] float32: the cosines of a position's angles, then their sines."""
        pairs = np.arange(0, self.rotary_dim, 2, dtype=np.float64) / self.rotary_dim
        frequencies = self.rope_theta**-pairs
        kind, factor = self.rope_scaling["rope_type"], 1.0
        if kind == "llama3":
            frequencies = self._llama3(frequencies)
        if kind == "yarn":
            frequencies, factor = self._yarn(frequencies)
        angles = np.arange(positions)[:, None] * frequencies
        both = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        return (factor * both).astype(np.float32)

    def _yarn(self, frequencies):
        """Slow ones are `factor` times slower, with a ramp; and how much larger all is then."""
        scaling = self.rope_scaling
        old = scaling.get("original_max_position_embeddings") or self.max_positions
        # The pair that turns so often over the length that the model was first made for.
        low, high = (
            self.rotary_dim
            * math.log(old / (turns * 2 * math.pi))
            / (2 * math.log(self.rope_theta))
            for turns in (scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1)
        )
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.rotary_dim - 1)
        pairs = np.arange(len(frequencies))
        slow = np.clip((pairs - low) / (high - low or 0.001), 0, 1)
        larger = scaling.get("attention_factor")
        if larger is None:
            larger = self._mscale(scaling.get("mscale"))
            if scaling.get("mscale") and scaling.get("mscale_all_dim"):
                larger /= self._mscale(scaling["mscale_all_dim"])
        return frequencies * (1 - slow + slow / scaling["factor"]), larger

    def _mscale(self, by):
        factor = self.rope_scaling["factor"]
        return 0.1 * (by or 1) * math.log(factor) + 1 if factor > 1 else 1.0

    def _llama3(self, frequencies):
        """Slow ones are `factor` times slower, quick ones as they were, with a ramp between."""
        scaling = self.rope_scaling
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        quick = np.clip((turns - low) / (high - low), 0, 1)
        return frequencies * (quick + (1 - quick) / scaling["factor"])
