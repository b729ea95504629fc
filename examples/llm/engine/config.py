"""What a model is, from its config.json and generation_config.json in the hub's layout.

A class for each kind of model, in `kinds`, is the schema of its config.json. Unsupported fields are
refused, by name.
"""

import json
import math
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic.aliases import AliasChoices

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
LARGEST = 2**24  # of any size
BLOCK = 256  # positions
MOST_LAYERS, MOST_EXPERTS, MOST_HEAD_DIM = 2**10, 2**10, 256
TOP = 20  # the most tokens that are told beside the one drawn
# Of the parameters of a request; of whole numbers where the limits are.
LIMITS = {
    "temperature": (0.0, 100.0), "top_k": (0, 2**31 - 1), "top_p": (1e-6, 1.0),
    "min_p": (0.0, 1.0), "max_tokens": (1, 2**31 - 1), "min_tokens": (0, 2**31 - 1),
    "presence_penalty": (-2.0, 2.0), "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (1e-2, 100.0), "logprobs": (0, TOP),
}  # fmt: skip


def within(low, high):
    """A number in these limits; a whole one where they are."""
    return Annotated[type(high), Field(ge=low, le=high)]


def model_of(name, base, /, **fields):
    """A pydantic model with these fields; those that may be null may be left out."""
    last = [None if type(None) in get_args(kind) else ... for kind in fields.values()]
    given = dict(zip(fields, zip(fields.values(), last, strict=True), strict=True))
    return create_model(name, __base__=base, **given)


def limited(base, *names):
    """`base` with these parameters of a request."""
    return model_of(base.__name__, base, **{n: within(*LIMITS[n]) | None for n in names})


def named(name, *others, **default):
    """A field that has another name, or others, in config.json."""
    return Field(validation_alias=AliasChoices(name, *others), **default)


# What models have that are near to these and compute something else, where it is not one of these.
OTHERS = (
    "alibi", "attention_chunk_size", "attention_multiplier", "attn_logit_softcapping",
    "clip_qkv", "embedding_multiplier", "final_logit_softcapping", "logit_scale",
    "logits_scaling", "no_rope_layers", "parallel_attn", "position_embedding_type", "qk_layernorm",
    "residual_multiplier", "rope_interleaved", "shared_expert_intermediate_size", "use_qk_norm",
)  # fmt: skip
NEUTRAL = None, False, 0, 1, 1.0, [], "rope"
Size, Count = within(1, LARGEST), within(0, LARGEST)
Factor, Gain = within(1e-3, 1e6), within(0.0, 1e6)


class Checked(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, defer_build=True)


POINTER = b"version https://git-lfs.github.com/spec/"


def check_pointer(path):
    """ValueError where a file is what Git LFS leaves in place of one that is not fetched."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise ValueError(f"{path} is a pointer of Git LFS: fetch the file by git lfs pull")


def read_object(path):
    """What a file of JSON has, by name; ValueError where it is no object."""
    check_pointer(path)
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as wrong:
        raise ValueError(f"{path.parent} is no checkpoint: {path.name}: {wrong}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path.parent}: {path.name} is no object")
    return raw


def given(raw):
    """Fields that are not null, which stands for those that are not there."""
    return {name: value for name, value in raw.items() if value is not None}


def words(error):
    """What one of pydantic's errors says, without Python's terms."""
    if error["type"] in ("model_type", "dict_type"):
        return "Input should be an object"
    if error["type"] == "extra_forbidden":
        return "there is no such field"
    return error["msg"].removeprefix("Value error, ")


def checked(kind, raw, file):
    """A file's fields as `kind` has them; ValueError with the first that is wrong."""
    try:
        return kind.model_validate(given(raw))
    except ValidationError as wrong:
        error = wrong.errors(include_url=False)[0]
    where = ".".join(map(str, error["loc"]))
    if isinstance(error["input"], dict):  # the file: a field is missing, or some do not fit
        raise ValueError(": ".join(filter(None, (file, where, words(error)))))
    raise ValueError(f"{file}: {where} is {error['input']!r:.100}: {words(error)}")


DRAWN = "temperature", "top_k", "top_p", "min_p", "repetition_penalty"


class Generation(limited(Checked, *DRAWN)):
    """What generation_config.json gives, by the names of `Sampling`, and tokens that end a text."""

    eos_token_id: Count | list[Count] = Field([])


LLAMA3 = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
NEEDED = {"linear": LLAMA3[:1], "yarn": LLAMA3[:1], "llama3": LLAMA3}  # with a rope_type
RopeType = Literal["default", "linear", "llama3", "yarn"]


class Rope(Checked):
    rope_type: RopeType = named("rope_type", "type", default="default")
    rope_theta: within(1.0, 1e12) = 10000.0
    partial_rotary_factor: within(0.0, 1.0) = 1.0
    factor: Factor | None = None
    low_freq_factor: Factor | None = None
    high_freq_factor: Factor | None = None
    original_max_position_embeddings: Size | None = None
    beta_fast: Factor = 32.0
    beta_slow: Factor = 1.0
    attention_factor: Gain | None = None
    mscale: Gain | None = None
    mscale_all_dim: Gain | None = None
    truncate: bool = True

    @model_validator(mode="after")
    def _has_all(self):
        for name in NEEDED.get(self.rope_type, ()):
            if getattr(self, name) is None:
                raise ValueError(f"{self.rope_type} comes with {name}")
        if self.factor is not None and self.rope_type not in NEEDED:
            raise ValueError("a factor comes with a rope_type that has one")
        return self

    def cos_sin(self, positions, dim, most):
        """[positions, dim] float32: cosines, then sines, in a model for `most` positions."""
        frequencies, larger = self.rope_theta ** -(np.arange(0, dim, 2) / dim), 1.0
        if self.rope_type == "linear":
            frequencies = frequencies / self.factor
        if self.rope_type == "llama3":
            frequencies = self._llama3(frequencies)
        if self.rope_type == "yarn":
            frequencies, larger = self._yarn(frequencies, dim, most)
        # A position is a block and a place in it, whose turns are multiplied.
        places = larger * np.exp(1j * np.arange(BLOCK)[:, None] * frequencies)
        out = np.empty((positions, dim), np.float32)
        for start in range(0, positions, BLOCK):
            turns = np.exp(1j * start * frequencies) * places[: positions - start]
            out[start : start + BLOCK] = np.concatenate([turns.real, turns.imag], axis=1)
        return out

    def _yarn(self, frequencies, dim, most):
        """Slow ones are `factor` times slower, with a ramp; and how much larger all is then."""
        old = self.original_max_position_embeddings or most
        # The pair that turns so often over the length that the model was first made for.
        low, high = (
            dim * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(self.rope_theta))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        slow = np.clip((np.arange(len(frequencies)) - low) / (high - low or 0.001), 0, 1)
        larger = self.attention_factor
        if larger is None:
            larger = self._larger(1)
            if self.mscale and self.mscale_all_dim:
                larger = self._larger(self.mscale) / self._larger(self.mscale_all_dim)
        return frequencies * (1 - slow + slow / self.factor), larger

    def _larger(self, by):
        return 0.1 * by * math.log(self.factor) + 1 if self.factor > 1 else 1.0

    def _llama3(self, frequencies):
        """Slow ones are `factor` times slower, quick ones as they were, with a ramp between."""
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        ramp = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        quick = np.clip(ramp, 0, 1)
        return frequencies * (quick + (1 - quick) / self.factor)


QUANTISED = {"quant_method": str | None, "weight_block_size": list[int] | None}
Quantised = model_of("Quantised", Checked, **QUANTISED)
KINDS = {}  # the classes of `kinds`, by model_type
HEAD_NORMS = "q_norm", "k_norm"


class Config(Checked):
    """What all kinds of model have; `read` gives one of `KINDS`."""

    # What kinds differ in.
    qk_norm: ClassVar = False
    adds_one: ClassVar = False  # norms are by 1 + weight
    has_gate: ClassVar = False  # on attention's output
    has_sinks: ClassVar = False
    has_out_bias: ClassVar = True  # with `has_biases`
    is_silu: ClassVar = True  # else GELU
    turns: ClassVar = {}  # what RoPE is where the file does not say
    quantised: ClassVar = "fp8"  # the quant_method that there may be
    embedding_scale: ClassVar = None  # what embeddings are multiplied with
    sm_scale: ClassVar = None  # of scores; else 1 / sqrt(head_dim)
    has_shared: ClassVar = False  # an expert of all tokens, after the others

    dtype: Literal["float16", "bfloat16"] = named("torch_dtype", "dtype", default="bfloat16")
    vocab: Size = named("vocab_size")
    hidden: Size = named("hidden_size")
    intermediate: Size = named("intermediate_size")
    count: within(1, MOST_LAYERS) = named("num_hidden_layers")
    heads: Size = named("num_attention_heads")
    kv_heads: Size = named("num_key_value_heads", default_factory=lambda told: told["heads"])
    head_dim: Size = Field(
        default_factory=lambda told: told["hidden"] // told["heads"], validate_default=True
    )
    max_positions: Size = named("max_position_embeddings")
    eps: within(0.0, 1.0) = named("rms_norm_eps")
    # The output projection is the embedding table.
    tied: bool = named("tie_word_embeddings", default=False)
    rope: Rope = named("rope_scaling")
    has_biases: bool = named("attention_bias", default=False)  # of attention's products
    mlp_bias: Literal[False] = False
    hidden_act: Literal["silu"] = "silu"
    layer_types: list[Literal[FULL, SLIDING]] = []
    use_sliding_window: bool = False
    sliding_window: Count = 0  # keys that a query of a sliding layer sees, its own among them
    max_window_layers: Count = 28
    quantization_config: Quantised | None = None
    eos_token_id: Count | list[Count] = []
    generation: Generation = Generation()

    def __init_subclass__(cls, kind=None):
        KINDS.update({kind: cls} if kind else {})

    @classmethod
    def read(cls, path):
        """Of a folder with config.json; ValueError for what this engine has no code for."""
        raw = read_object(Path(path) / "config.json")
        drawn = Path(path) / "generation_config.json"
        drawn = checked(Generation, read_object(drawn) if drawn.exists() else {}, drawn.name)
        if (of := raw.get("model_type")) not in [*KINDS]:
            raise ValueError(f"config.json: model_type is {of!r:.100}; here: {', '.join(KINDS)}")
        return checked(KINDS[of], raw | {"generation": drawn}, "config.json")

    @model_validator(mode="before")
    @classmethod
    def _has_no_other(cls, raw):
        aliases = (field.validation_alias for field in cls.model_fields.values())
        own = {name for alias in aliases if alias for name in alias.choices} | {*cls.model_fields}
        for name in [name for name in OTHERS if name not in own]:
            value = raw.get(name)
            if value is True or value not in NEUTRAL:
                raise ValueError(f"{name} is {value!r:.100}, which nothing here computes")
        # All of RoPE's fields together; some files have a few outside.
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if isinstance(rope, dict):
            names = ("rope_theta", "partial_rotary_factor")
            rope = cls.turns | given(rope) | {name: raw[name] for name in names if name in raw}
            if any(isinstance(value, dict) for value in rope.values()):
                raise ValueError("rope_parameters differ by kind of layer, which they may not here")
        return raw | {"rope_scaling": rope}

    @model_validator(mode="after")
    def _fits(self):
        if self.heads % self.kv_heads:
            raise ValueError("num_key_value_heads does not divide num_attention_heads")
        if self.head_dim % 8 or self.rotary_dim % 8 or self.head_dim > MOST_HEAD_DIM:
            raise ValueError(
                f"head_dim is {self.head_dim}, and RoPE is of {self.rotary_dim} numbers; here "
                f"both are multiples of 8, {MOST_HEAD_DIM} at most"
            )
        if len(self.layers) != self.count:
            raise ValueError(f"layer_types has {len(self.layers)} of {self.count} layers")
        of, known = self.quantization_config, (None, [128, 128])
        is_known = of and (of.quant_method, self.dtype) == (self.quantised, "bfloat16")
        if of and not (is_known and of.weight_block_size in known):
            raise ValueError("quantization_config: here it is fp8 of a tensor or of blocks of 128, "
                             "of gpt_oss mxfp4, with bfloat16")  # fmt: skip
        if self.top_k > self.experts:
            raise ValueError(f"num_experts_per_tok is {self.top_k}, of {self.experts} experts")
        return self

    @cached_property
    def layers(self):
        """The kind of attention of each layer."""
        return self.layer_types or [*map(self.kind_of, range(self.count))]

    def kind_of(self, i):
        """That of layer i, where there are no `layer_types`."""
        full = self.max_window_layers if self.use_sliding_window else self.count
        return FULL if i < full else SLIDING

    @property
    def window(self):
        """Keys that a query of a sliding layer sees, its own among them; 0: all."""
        return self.sliding_window if self.use_sliding_window else 0

    @property
    def windows(self):
        """By kind of layer, how many keys before its own a query sees; -1: all."""
        return {kind: self.window - 1 if kind == SLIDING else -1 for kind in self.layers}

    @property
    def rotary_dim(self):
        return int(self.head_dim * self.rope.partial_rotary_factor)

    def rope_of(self, kind):
        return self.rope

    @property
    def eos(self):
        both = (self.eos_token_id, self.generation.eos_token_id)
        ends = [end if isinstance(end, list) else [end] for end in both]
        return tuple(dict.fromkeys(ends[0] + ends[1]))

    @property
    def sampling(self):
        return self.generation.model_dump(exclude={"eos_token_id"}, exclude_none=True)

    def is_sparse(self, i):
        return bool(self.experts)

    # A layer's matrices and vectors by short names: the hub's tensors, one below another, with
    # their shapes.  Of experts {} is the name.

    def table(self, i):
        return self.norms() | (self.sparse() if self.is_sparse(i) else self.dense()) | self.outer(i)

    def arranged(self, layer, i):
        """Layer i by the same names, as the kernels want it."""
        return layer

    def norms(self):
        return {
            "input_norm": {"input_layernorm.weight": (self.hidden,)},
            "post_norm": {"post_attention_layernorm.weight": (self.hidden,)},
        }

    def dense(self):
        hidden, size = self.hidden, self.intermediate
        gate, up = (f"mlp.{name}_proj.weight" for name in ("gate", "up"))
        return {
            "gate_up": {gate: (size, hidden), up: (size, hidden)},
            "down": {"mlp.down_proj.weight": (hidden, size)},
        }

    def owners(self):
        """The experts of a layer, as {} in the names of their tensors."""
        return [f"experts.{e}" for e in range(self.experts)]

    def outer(self, i):
        """What there is around the rest of layer i."""
        hidden, inner = self.hidden, self.heads * self.head_dim
        kv = self.kv_heads * self.head_dim
        sizes = {"q": inner * (1 + self.has_gate), "k": kv, "v": kv}
        found = {
            "qkv": {f"self_attn.{name}_proj.weight": (n, hidden) for name, n in sizes.items()},
            "out": {"self_attn.o_proj.weight": (hidden, inner)},
        }
        if self.has_biases:
            found["qkv_bias"] = {f"self_attn.{name}_proj.bias": (n,) for name, n in sizes.items()}
        if self.has_biases and self.has_out_bias:
            found["out_bias"] = {"self_attn.o_proj.bias": (hidden,)}
        for name in HEAD_NORMS if self.qk_norm else ():
            found[name] = {f"self_attn.{name}.weight": (self.head_dim,)}
        return found


class WithoutExperts:
    experts = top_k = expert_intermediate = 0
