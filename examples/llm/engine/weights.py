"""Weights out of safetensors files in the hub's layout, in the form that the model wants."""

import json
import struct
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from .config import HEAD_NORMS, check_pointer, read_object

BLOCK = 128
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


class Fours(NamedTuple):
    """Matrices in MXFP4: numbers of 4 bits and a power of 2 for each 32; here or on a device."""

    values: object  # [..., n, k / 2] uint8: two numbers, the first in the lower half
    scales: object  # [..., n, k / 32] uint8: exponents, and 127

    def widened(self):
        with np.errstate(over="ignore"):
            powers = np.ldexp(1.0, np.arange(256)[:, None] - 127)
            known = (powers * np.array(E2M1)).astype(ml_dtypes.bfloat16)
        both = np.stack([self.values & 15, self.values >> 4], axis=-1)
        both = both.reshape(*self.scales.shape, 32)
        return known[self.scales[..., None], both].reshape(*self.scales.shape[:-1], -1)


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
        index, whole = path / "model.safetensors.index.json", path / "model.safetensors"
        if index.exists() and not whole.exists():  # or it is of other files, left behind
            files = read_object(index).get("weight_map")
            if not isinstance(files, dict):
                raise ValueError(f"{index} has no weight_map")
            for file in files.values():  # of this folder, and of no other
                if not isinstance(file, str) or file != Path(file).name or file == "..":
                    raise ValueError(f"{index} names {file!r}, which is no name of a file")
        else:
            files = dict.fromkeys(mapped(whole)[0], whole.name)
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
        return tuple(self._find(name)[0]["shape"])

    def _find(self, name):
        """What its file tells of a tensor, and the bytes of all that are in it."""
        file = self.files.get(name, "")
        if file and file not in self.opened:
            self.opened[file] = mapped(self.path / file)
        header, body = self.opened.get(file, ({}, None))
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
    return json.loads(bytes(raw[8 : 8 + size])), raw[8 + size :]


def shapes(config):
    """The names and shapes of all tensors of a checkpoint."""
    yield "model.embed_tokens.weight", (config.vocab, config.hidden)
    yield "model.norm.weight", (config.hidden,)
    if not config.tied:
        yield "lm_head.weight", (config.vocab, config.hidden)
    for i in range(len(config.layers)):
        for tensors in config.table(i).values():
            for name, shape in tensors.items():
                for owner in config.owners() if "{}" in name else [""]:
                    yield f"model.layers.{i}.{name.format(owner)}", shape


def verify(config, weights):
    """ValueError where tensors are not as large as config.json says; by the files' headers."""
    for name, shape in shapes(config):
        if f"{name}_blocks" in weights:  # in 4 bits: transposed, 32 numbers in 16 bytes
            name, shape = f"{name}_blocks", (shape[0], shape[2], shape[1] // 32, 16)
        # One that is missing is named by what reads it.
        if name in weights and (found := weights.shape(name)) != shape:
            raise ValueError(f"{weights.path}: {name} has shape {found}; config.json says {shape}")


def of_layer(weights, config, i):
    """A layer's tensors by short names, what is multiplied together in one matrix."""
    layer = {}
    for short, tensors in config.table(i).items():
        names = [f"model.layers.{i}.{name}" for name in tensors]
        is_stack = "{}" in names[0]
        owners = config.owners() if is_stack else [""]
        each = [joined(weights, [name.format(owner) for name in names]) for owner in owners]
        layer[short] = together(each, is_stack=True) if is_stack else each[0]
    return layer | config.arranged(layer, i)


def joined(weights, names):
    """Tensors one below another: an array, or `Blocks` where they are in fp8."""
    parts = [one(weights, name) for name in names]
    if len(parts) == 1:
        return parts[0]
    in_blocks = [part.shape[0] % BLOCK == 0 for part in parts if isinstance(part, Blocks)]
    if in_blocks and not (all(in_blocks) and len(in_blocks) == len(parts)):
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
    return type(array)(*map(whole, array)) if isinstance(array, tuple) else np.asarray(array)


def with_one(layer):
    """Norms of heads by 1 + weight for a kernel that adds none: they are rounded once more."""
    known = {name: whole(layer[name]) for name in HEAD_NORMS if name in layer}
    return {name: (norm.astype(np.float32) + 1).astype(norm.dtype) for name, norm in known.items()}


def one(weights, name):
    """A tensor.  One in fp8 has scales of its blocks, or one of all, which each block gets."""
    if f"{name}_blocks" in weights:
        return fours(weights(f"{name}_blocks"), weights(f"{name}_scales"))
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


def fours(blocks, scales):
    """Of [..., n, k / 32, 16] bytes."""
    return Fours(blocks.reshape(*scales.shape[:-1], -1), scales)
