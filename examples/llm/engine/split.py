"""Which part of each weight a rank has, and what is left of a model's sizes on it.

Attention is split by heads, the rest of a layer, each expert of it, by its inner width, embedding
and logits by the vocabulary: products that begin a block give each rank columns of their own, and
those that end it give sums, which the ranks add up.
"""

import numpy as np

# The dimension that is split, by the end of a tensor's name; all else is whole on every rank.
DIMENSIONS = {
    "embed_tokens": 0, "lm_head": 0,
    "q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1,
    "gate_proj": 0, "up_proj": 0, "down_proj": 1, "w1": 0, "w3": 0, "w2": 1,
    "in_proj_qkvz": 0, "in_proj_ba": 0, "conv1d": 0, "A_log": 0, "dt_bias": 0, "out_proj": 1,
    "q_proj.bias": 0, "k_proj.bias": 0, "v_proj.bias": 0, "sinks": 0,
    "gate_up_proj": 2, "gate_up_proj_bias": 1, "gate_up_proj_blocks": 1, "gate_up_proj_scales": 1,
    "down_proj_blocks": 2, "down_proj_scales": 2,
}  # fmt: skip
# The sizes of which each rank has a part.
SHARED = ("heads", "intermediate", "key_heads", "value_heads", "expert_intermediate")
PADDED = ("embed_tokens", "lm_head")  # the last rank's rows are filled up with zeros
KEPT = ("_scale", "_scale_inv", "A_log", "dt_bias")  # as they are: what is computed in float32
ONCE = ("o_proj.bias", "down_proj_bias")  # what is added to a sum: rank 0 has it, others zeros


def of_rank(config, size):
    """One rank's config, with the vocabulary as it was; ValueError for what does not divide."""
    fields, parts = type(config).model_fields, {}
    for name in (name for name in SHARED if name in fields):
        whole = getattr(config, name)
        parts[name], left = divmod(whole, size)
        if left:
            named = fields[name].validation_alias.choices[0]
            raise ValueError(f"config.json: {named} is {whole}, not a multiple of {size} ranks")
    if (heads := config.kv_heads) % size and size % heads:
        raise ValueError(f"config.json: num_key_value_heads is {heads}, neither a multiple nor a "
                         f"part of {size} ranks")  # fmt: skip
    parts["kv_heads"] = max(heads // size, 1)
    return config.model_copy(update=parts)


def key_of(name):
    """Of a tensor, in `DIMENSIONS`; the scales of a matrix have that of the matrix."""
    *_, owner, last = name.split(".")
    return f"{owner}.bias" if last == "bias" else owner if last.startswith("weight") else last


class Split:
    """One rank's part of each weight, in the model's dtype; what is not its part is not read."""

    def __init__(self, weights, config, rank, size):
        self.weights, self.config, self.rank, self.size = weights, config, rank, size

    def __contains__(self, name):
        return name in self.weights

    def __call__(self, name):
        whole, key = self.weights(name), key_of(name)
        kind = whole.dtype if whole.itemsize == 1 or name.endswith(KEPT) else self.config.dtype
        if key in ONCE and self.rank:
            return np.zeros_like(whole, kind)
        if key not in DIMENSIONS or whole.size == 1 or self.size == 1:
            return whole.astype(kind, copy=False)
        rank, size, axis = self.rank, self.size, DIMENSIONS[key]
        if key[:6] in ("k_proj", "v_proj") and self.config.kv_heads < size:  # some ranks share one
            rank, size = rank * self.config.kv_heads // size, self.config.kv_heads
        # A convolution is of q, k and v, each of which is split.
        sections = self.config.linear_sizes if key == "conv1d" else [whole.shape[axis]]
        if key not in PADDED and any(section > 1 and section % size for section in sections):
            raise ValueError(f"{name} has {whole.shape}, which {size} ranks cannot share")
        parts = []
        for part in np.split(whole, np.cumsum(sections)[:-1], axis):
            width = -(-part.shape[axis] // size)
            at = slice(rank * width, (rank + 1) * width)
            is_one = part.shape[axis] == 1  # of one block all have parts
            parts.append(part if is_one else part[(slice(None),) * axis + (at,)])
        if key in PADDED and len(parts[0]) < width:
            parts.append(np.zeros((width - len(parts[0]), *whole.shape[1:]), whole.dtype))
        part = np.ascontiguousarray(parts[0]) if len(parts) == 1 else np.concatenate(parts, axis)
        return part.astype(kind, copy=False)
