"""Random values for a run's options: as arguments, and as the formula takes them."""

from __future__ import annotations

from typing import Any

import numpy as np

from fi_ffi.reference.attention.formula import Options

from tests.attention.batches import Batch
from tests.attention.machines import Cpu
from tests.attention.tables import Spec


def draw_extras(spec: Spec, batch: Batch, rng: np.random.Generator) -> dict[str, Any]:
    """What the options need beside the spec."""
    made: dict[str, Any] = {}
    if spec.mode == "ALIBI":
        made["alibi_slopes"] = (2.0 ** -rng.uniform(1, 8, spec.heads)).astype(np.float32)
    if spec.sink:
        made["sink"] = rng.normal(0, 2, spec.heads).astype(np.float32)
    if spec.mask:
        made["mask"] = [rng.random((q, k)) < 0.5 for q, k in zip(batch.qo, batch.kv, strict=True)]
        for mask in made["mask"]:
            mask[:1] = False  # the first row sees no key
    if spec.items:
        made["items"] = [draw_items(kv, rng) for kv in batch.kv]
    which, _, kind = spec.scales.partition(" ")
    for of in which:
        count = spec.heads if of == "q" else spec.kv_heads
        numbers = rng.uniform(0.6, 1.4, count)
        made[f"{of}_scale"] = numbers.astype(np.float32) if kind == "heads" else float(numbers[0])
    return made


def draw_items(kv: int, rng: np.random.Generator) -> tuple[int, np.ndarray]:
    """A prefix of one token or more, then items of a delimiter and some tokens each."""
    prefix = int(rng.integers(1, max(kv // 2, 1) + 1))
    counts: list[int] = []
    while len(counts) < kv - prefix:
        counts += range(int(rng.choice([2, 7, 30, 200])))
    return prefix, np.array(counts[: max(kv - prefix, 0)], np.uint16)


def as_arguments(spec: Spec, extras: dict[str, Any], machine: Cpu) -> dict[str, Any]:
    """Keyword arguments of a run."""
    made: dict[str, Any] = {}
    if spec.family == "batch_mla":
        made["return_lse_base_on_e"] = spec.base_e
    else:
        made["kv_layout"] = spec.layout
    if spec.sm_scale is not None:
        made["sm_scale"] = spec.sm_scale
    if spec.rope is not None:
        made["rope_scale"], made["rope_theta"] = spec.rope
    if spec.pdl:
        made["enable_pdl"] = True
    for name in ("alibi_slopes", "sink", "q_scale", "k_scale", "v_scale"):
        if name in extras:
            value = extras[name]
            made[name] = value if isinstance(value, float) else machine.place(value).desc()
    if spec.mask:
        packed = [np.packbits(mask.ravel(), bitorder="little") for mask in extras["mask"]]
        made["custom_mask"] = machine.place(np.concatenate(packed)).desc()
    if spec.items:
        made |= _items_as_arguments(extras["items"], extras["batch"].qo[-1], machine)
    return made


def _items_as_arguments(
    items: list[tuple[int, np.ndarray]], last_queries: int, machine: Cpu
) -> dict[str, Any]:
    """Positions end where the last request's do: nothing reads those that would fill its row."""
    prefixes = np.array([prefix for prefix, _ in items], np.uint32)
    width = 1 + max(len(counts) for _, counts in items)
    positions = np.zeros((len(items), width), np.uint16)
    for row, (_, counts) in zip(positions, items, strict=True):
        row[: len(counts)] = counts
    longest = np.array([counts.max(initial=0) for _, counts in items], np.uint16)
    unread = width - max(len(items[-1][1]), min(last_queries, width))
    return {
        "prefix_len_ptr": machine.place(prefixes).desc(),
        "token_pos_in_items_ptr": machine.place(
            positions.ravel()[: positions.size - unread]
        ).desc(),
        "token_pos_in_items_len": width,
        "max_item_len_ptr": machine.place(longest).desc(),
    }


def _each(value: Any, heads: int) -> Any:
    """A scale by the queries' head."""
    return value if np.ndim(value) == 0 else np.repeat(value, heads // len(value)).astype(float)


def seen_of_items(prefix: int, counts: np.ndarray, rows: int, keys: int) -> np.ndarray:
    """What the last queries of a request see of so many keys: the prefix, and their own item;
    `counts` says of each token after the prefix how many of its item it sees, itself the last."""
    place, j = keys - rows + np.arange(rows)[:, None], np.arange(keys)
    own = np.array([0] * prefix + [int(n) for n in counts] + [0])[np.maximum(place, 0)]
    in_other = (place >= prefix) & (j >= prefix) & (place - j >= own)
    return (j <= place) & ~in_other


def exact_options(
    spec: Spec, extras: dict[str, Any], request: int, rows: tuple[int, int], end: int,
    no_sink: bool,
) -> Options:  # fmt: skip
    """The formula's options for some rows of a request, and its first `end` keys."""
    default = (128 + 64 if spec.family == "batch_mla" else spec.dim) ** -0.5
    scale: Any = default if spec.sm_scale is None else spec.sm_scale
    for name in ("q_scale", "k_scale"):
        scale = scale * _each(extras.get(name, 1.0), spec.heads)
    rope = None
    if spec.mode == "ROPE_LLAMA":
        rope = spec.rope or (1.0, 1e4)
    mask = extras["mask"][request][slice(*rows), :end] if spec.mask else None
    if spec.items:
        mask = seen_of_items(*extras["items"][request], rows[1] - rows[0], end)
    return Options(
        sm_scale=scale,
        causal=spec.causal,
        window_left=spec.window_left,
        logits_soft_cap=spec.cap,
        mask=mask,
        alibi_slopes=extras.get("alibi_slopes"),
        rope=rope,
        sink=None if no_sink else extras.get("sink"),
        v_scale=_each(extras.get("v_scale", 1.0), spec.heads),
    )
