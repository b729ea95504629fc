"""Weights out of safetensors files in the hub's layout, in the form that the model wants."""

import json
import struct
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from .config import LINEAR, check_pointer, read_object

BLOCK = 128
HEAD_NORMS = "q_norm", "k_norm"
MOST_HEADER = 16 << 20  # bytes of the header of a file
# What safetensors calls dtypes; its reader into numpy has none for fp8.
DTYPES = {
    "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "U8": np.uint8,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}  # fmt: skip


class Blocks(NamedTuple):
    """Matrices in fp8, and what each 128 x 128 of them is multiplied with; here or on a device."""

    values: object  # [..., n, k] float8_e4m3fn
    scales: object  # [..., n / 128 rounded up, k / 128] float32

    @property
    def shape(self):
        return self.values.shape


class Parts:
    """An array that nobody has put together: its parts, as they follow each other in memory."""

    def __init__(self, shape, parts):
        self.shape, self.parts, self.dtype = shape, parts, parts[0].dtype

    def __len__(self):
        return self.shape[0]

    def __array__(self, dtype=None, copy=None):
        flat = np.concatenate([part.reshape(-1) for part in self.parts])
        return flat.reshape(self.shape).astype(dtype or self.dtype, copy=False)


class Weights:
    """The tensors of a folder: one model.safetensors, or shards with an index."""

    def __init__(self, path):
        path = Path(path)
        index, whole = path / "model.safetensors.index.json", "model.safetensors"
        if index.exists():
            files = read_object(index).get("weight_map")
            if not isinstance(files, dict):
                raise ValueError(f"{index} has no weight_map")
            for file in files.values():  # of this folder, and of no other
                if not isinstance(file, str) or file != Path(file).name or file == "..":
                    raise ValueError(f"{index} names {file!r}, which is no name of a file")
        else:
            files = dict.fromkeys(mapped(path / whole)[0], whole)
        self.path, self.files, self.opened = path, files, {}

    def __reduce__(self):
        return type(self), (self.path,)  # another process maps the files itself

    def __contains__(self, name):
        return name in self.files

    def __call__(self, name):
        """One tensor as a numpy array, mapped from its file (bfloat16 and fp8 are ml_dtypes')."""
        told, body = self._find(name)
        if told["dtype"] not in DTYPES:
            raise ValueError(f"{name} is {told['dtype']}; here tensors are {', '.join(DTYPES)}")
        start, end = told["data_offsets"]
        return body[start:end].view(DTYPES[told["dtype"]]).reshape(told["shape"])

    def shape(self, name):
        """That of a tensor, by the header of its file."""
        return tuple(self._find(name)[0]["shape"])

    def _find(self, name):
        """What its file tells of a tensor, and the bytes of all that are in it."""
        if name not in self:
            raise KeyError(f"{self.path} has no tensor {name}")
        file = self.files[name]
        if file not in self.opened:
            self.opened[file] = mapped(self.path / file)
        header, body = self.opened[file]
        if name not in header:
            raise KeyError(f"{self.path / file} has no tensor {name}")
        return header[name], body


def mapped(path):
    """A file's header, and the bytes of its tensors."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    check_pointer(path)
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
    if size > MOST_HEADER:
        raise ValueError(f"{path}: its header has {MOST_HEADER} bytes at most")
    try:
        with safe_open(path, "np"):  # which refuses a header that does not fit the file
            raw = np.memmap(path, np.uint8, "r")
    except SafetensorError as wrong:
        raise ValueError(f"{path}: {wrong}") from None
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    return json.loads(bytes(raw[8:end])), raw[end:]


# A layer's matrices and vectors by short names: the hub's tensors, one below another, with their
# shapes.  Of experts {} is the number.


def table(config, i):
    """All of layer i."""
    norms = {
        "input_norm": {"input_layernorm.weight": (config.hidden,)},
        "post_norm": {"post_attention_layernorm.weight": (config.hidden,)},
    }
    inner = (gpt_oss if config.is_gpt_oss else experts) if config.is_sparse(i) else dense
    outer = linear_attention if config.layers[i] == LINEAR else attention
    return norms | inner(config) | outer(config)


def dense(config):
    hidden, size = config.hidden, config.intermediate
    return {
        "gate_up": {"mlp.gate_proj.weight": (size, hidden), "mlp.up_proj.weight": (size, hidden)},
        "down": {"mlp.down_proj.weight": (hidden, size)},
    }


def experts(config):
    hidden, size = config.hidden, config.expert_intermediate
    return {
        "router": {"mlp.gate.weight": (config.experts, hidden)},
        "fc1": {  # first what the gate is multiplied with
            "mlp.experts.{}.up_proj.weight": (size, hidden),
            "mlp.experts.{}.gate_proj.weight": (size, hidden),
        },
        "fc2": {"mlp.experts.{}.down_proj.weight": (hidden, size)},
    }


def gpt_oss(config):
    """Gate and what it is multiplied with take turns in a row, and matrices are transposed."""
    count, hidden, size = config.experts, config.hidden, config.expert_intermediate
    return {
        "router": {"mlp.router.weight": (count, hidden)},
        "router_bias": {"mlp.router.bias": (count,)},
        "fc1": {"mlp.experts.gate_up_proj": (count, hidden, 2 * size)},
        "fc1_bias": {"mlp.experts.gate_up_proj_bias": (count, 2 * size)},
        "fc2": {"mlp.experts.down_proj": (count, size, hidden)},
        "fc2_bias": {"mlp.experts.down_proj_bias": (count, hidden)},
        "sinks": {"self_attn.sinks": (config.heads,)},
    }


def attention(config):
    hidden, inner = config.hidden, config.heads * config.head_dim
    kv = config.kv_heads * config.head_dim
    sizes = {"q": 2 * inner if config.is_next else inner, "k": kv, "v": kv}
    found = {
        "qkv": {f"self_attn.{name}_proj.weight": (n, hidden) for name, n in sizes.items()},
        "out": {"self_attn.o_proj.weight": (hidden, inner)},
    }
    if config.has_biases:
        found["qkv_bias"] = {f"self_attn.{name}_proj.bias": (n,) for name, n in sizes.items()}
        found["out_bias"] = {"self_attn.o_proj.bias": (hidden,)}
    for name in HEAD_NORMS if config.qk_norm else ():
        found[name] = {f"self_attn.{name}.weight": (config.head_dim,)}
    return found


def linear_attention(config):
    hidden, heads, values = config.hidden, config.value_heads, config.value_size
    return {
        "qkvz": {"linear_attn.in_proj_qkvz.weight": (config.conv_size + values, hidden)},
        "ba": {"linear_attn.in_proj_ba.weight": (2 * heads, hidden)},
        "conv": {"linear_attn.conv1d.weight": (config.conv_size, 1, 4)},
        "a_log": {"linear_attn.A_log": (heads,)},
        "dt_bias": {"linear_attn.dt_bias": (heads,)},
        "norm": {"linear_attn.norm.weight": (128,)},
        "out": {"linear_attn.out_proj.weight": (hidden, values)},
    }


def shapes(config):
    """The names and shapes of all tensors of a checkpoint."""
    yield "model.embed_tokens.weight", (config.vocab, config.hidden)
    yield "model.norm.weight", (config.hidden,)
    if not config.tied:
        yield "lm_head.weight", (config.vocab, config.hidden)
    for i in range(len(config.layers)):
        for tensors in table(config, i).values():
            for name, shape in tensors.items():
                for expert in range(config.experts if "{}" in name else 1):
                    yield f"model.layers.{i}.{name.format(expert)}", shape


def verify(config, weights):
    """ValueError where tensors are not as large as config.json says; by the files' headers."""
    for name, shape in shapes(config):
        if f"{name}_blocks" in weights:  # in 4 bits: transposed, 32 numbers in 16 bytes
            name, shape = f"{name}_blocks", (shape[0], shape[2], shape[1] // 32, 16)
        # One that is missing is named by what reads it.
        if name in weights and (found := weights.shape(name)) != shape:
            raise ValueError(
                f"{weights.path}: {name} is of shape {found}; by config.json it is {shape}"
            )


def of_layer(weights, config, i):
    """A layer's tensors by short names, what is multiplied together in one matrix."""
    layer = {}
    for short, tensors in table(config, i).items():
        names = [f"model.layers.{i}.{name}" for name in tensors]
        count = config.experts if "{}" in names[0] else 1
        each = [joined(weights, [name.format(e) for name in names]) for e in range(count)]
        layer[short] = together(each, is_stack=True) if "{}" in names[0] else each[0]
    if config.is_gpt_oss or config.is_next:
        layer = {short: whole(array) for short, array in layer.items()}
    if config.is_gpt_oss:
        return layer | _gpt_oss(layer, config)
    if config.is_sparse(i):
        layer["router_bias"] = np.zeros(config.experts, np.float32)
    if config.layers[i] == LINEAR:
        return layer | _by_kind(layer, config)
    return layer | _gates_last(layer, config) if config.is_next else layer


def joined(weights, names):
    """Tensors one below another: an array, or `Blocks` where they are in fp8."""
    parts = [one(weights, name) for name in names]
    if len(parts) == 1:
        return parts[0]
    of_blocks = [isinstance(part, Blocks) for part in parts]
    if any(of_blocks) and not (
        all(of_blocks) and all(part.shape[0] % BLOCK == 0 for part in parts)
    ):
        raise ValueError(f"{' and '.join(names)}: here all or none are in fp8, in whole blocks")
    return together(parts)


def together(arrays, is_stack=False):
    """Arrays one below another, or each an item of one more dimension; of `Blocks` both."""
    if isinstance(arrays[0], Blocks):
        return Blocks(*(together(each, is_stack) for each in zip(*arrays, strict=True)))
    if len({(array.dtype, array.shape[int(not is_stack) :]) for array in arrays}) > 1:
        raise ValueError(f"{[f'{a.dtype}{a.shape}' for a in arrays]} are not of one kind")
    first = arrays[0].shape
    shape = (len(arrays), *first) if is_stack else (sum(map(len, arrays)), *first[1:])
    return Parts(shape, [part for array in arrays for part in getattr(array, "parts", [array])])


def whole(array):
    """The array itself, of `Parts` and of `Blocks` of them."""
    return Blocks(*map(whole, array)) if isinstance(array, Blocks) else np.asarray(array)


def one(weights, name):
    """A tensor.  One in fp8 has scales of its blocks, or one of all, which each block gets."""
    if f"{name}_blocks" in weights:
        return mxfp4(weights(f"{name}_blocks"), weights(f"{name}_scales")).swapaxes(1, 2)
    tensor, known = weights(name), [f"{name}_{end}" for end in ("scale_inv", "scale")]
    if tensor.dtype.name != "float8_e4m3fn":
        return tensor
    found = [weights(scale) for scale in known if scale in weights]
    if len(found) != 1:
        raise ValueError(f"{name} is in fp8, and there is not one of {' and '.join(known)}")
    (n, k), scales = tensor.shape, found[0].astype(np.float32)
    grid = (-(-n // BLOCK), k // BLOCK)
    if n % 64 or k % BLOCK or (scales.size > 1 and scales.shape != grid):
        raise ValueError(f"{name} {tensor.shape} has scales {scales.shape}; here {grid} or one")
    return Blocks(tensor, np.broadcast_to(scales.reshape(grid if scales.size > 1 else 1), grid))


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def mxfp4(blocks, scales):
    """[..., n, 16] bytes of two numbers and [..., n] exponents, as bfloat16, which has them all."""
    with np.errstate(over="ignore"):
        powers = np.ldexp(1.0, np.arange(256)[:, None] - 127)
        known = (powers * np.array(E2M1)).astype(ml_dtypes.bfloat16)
    both = np.stack([blocks & 15, blocks >> 4], axis=-1)
    return known[scales[..., None, None], both].reshape(*scales.shape[:-1], -1)


def _gpt_oss(layer, config):
    def up_and_gate(x):  # rows, what the gate is multiplied with first
        return np.concatenate([x[:, 1::2], x[:, ::2]], axis=1)

    every = np.ones(config.experts, np.float32)
    return {
        "fc1": up_and_gate(layer["fc1"].swapaxes(1, 2)),
        "fc1_bias": up_and_gate(layer["fc1_bias"]),
        "fc2": layer["fc2"].swapaxes(1, 2),
        "router_bias": layer["router_bias"].astype(np.float32),
        "sinks": layer["sinks"].astype(np.float32),
        "swiglu_alpha": np.float32(1.702) * every,
        "swiglu_beta": every,
        "swiglu_limit": np.float32(config.swiglu_limit) * every,
    }


def _gates_last(layer, config):
    """Each head's query comes with its gate: all gates after the values."""
    size = config.heads * config.head_dim
    q, kv = np.split(layer["qkv"], [2 * size])
    q, gate = q.reshape(config.heads, 2, config.head_dim, -1).swapaxes(0, 1)
    q, gate = (part.reshape(size, -1) for part in (q, gate))
    layer = {"qkv": np.concatenate([q, kv, gate])} | {name: layer[name] for name in HEAD_NORMS}
    for name in HEAD_NORMS:  # rounded once more than the layers' norms, whose kernel adds the 1
        layer[name] = (layer[name].astype(np.float32) + 1).astype(layer[name].dtype)
    return layer


def _by_kind(layer, config):
    # Rows come by key head: its q and k, then v and z of its value heads; likewise b and a.
    each = config.value_heads // config.key_heads
    by_head = layer["qkvz"].reshape(config.key_heads, -1, config.hidden)
    ends = np.cumsum([128, 128, each * 128])
    qkvz = [part.reshape(-1, config.hidden) for part in np.split(by_head, ends, axis=1)]
    by_head = layer["ba"].reshape(config.key_heads, 2, each, config.hidden)
    return {
        "qkvz": np.concatenate(qkvz),
        "ba": by_head.swapaxes(0, 1).reshape(-1, config.hidden),
        "conv": layer["conv"].reshape(-1, 4).astype(np.float32),
        "a_log": layer["a_log"].astype(np.float32),
        "dt_bias": layer["dt_bias"].astype(np.float32),
    }
