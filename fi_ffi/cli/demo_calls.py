"""The calls of `fi-ffi demo`: ops of a language model, with random arguments and judges.

Each result is compared with its definition in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

import fi_ffi
from fi_ffi.abi.tensor import Device
from fi_ffi.cli.cases import case_of, within
from fi_ffi.ops.functions import OPS
from fi_ffi.reference.arrays import Array
from fi_ffi.reference.attention.formula import Options, exact
from fi_ffi.reference.formula import Judge

_HEADS, _KV_HEADS, _HEAD_DIM, _PAGE = 32, 8, 128, 16
_HEAD_COUNTS: dict[str, Any] = {"num_qo_heads": _HEADS, "num_kv_heads": _KV_HEADS}
# Relative to the sum of magnitudes. Tensor cores round the exponentials, their sum, and the partial
# results of a request to float16.
_ATTENTION_SLACK = 3 * 2.0**-11
# For experts: both halves of the first product, the activation, and the second product are rounded.
_EXPERTS_SLACK = 4 * 2.0**-11
_EXPERTS, _OF_TOKEN, _EXPERT_HIDDEN, _EXPERT_INTER = 8, 2, 256, 512

Arguments: TypeAlias = "tuple[dict[str, Array], dict[str, Any]]"
# Binds tensors on a device, the device and a stream into a repeatable call.
Bind: TypeAlias = "Callable[[Mapping[str, Any], Device, Any], Callable[[], object]]"


@dataclass(frozen=True)
class DemoCall:
    """A call of the demo: its tensors on the host, and a judge for each tensor that it writes."""

    family: str
    name: str
    arrays: dict[str, Array]
    judges: dict[str, Judge]
    bind: Bind
    # Bytes of keys and values read, for a call whose time is spent on reading them.
    cache_bytes: int = 0

    @property
    def first(self) -> Array:
        """The tensor whose shape and dtype represent the call."""
        return next(iter(self.arrays.values()))


# Families of the demo, and the ops that represent them.
_OPS_OF = {
    "norms": ("rmsnorm", "fused_add_rmsnorm"),
    "activations and positions": ("silu_and_mul", "apply_rope_pos_ids"),
    "attention": ("merge_state",),
    "caches": ("append_paged_kv_cache",),
    "experts": ("fused_topk_deepseek",),
    "sampling": ("softmax",),
}


COUNT = sum(map(len, _OPS_OF.values())) + 4  # number of calls that `calls` yields


def calls(
    tokens: int, hidden: int, rng: np.random.Generator, *, is_cuda: bool = False
) -> Iterator[DemoCall]:
    """Yield every call, by family; each is created when it is requested."""
    by_op = arguments(tokens, hidden, rng)
    for family, names in _OPS_OF.items():
        if family == "attention":
            yield _prefill(tokens, rng)
            yield _decode(tokens, 2048 if is_cuda else 64, rng)
        elif family == "experts":
            yield _experts(tokens, rng)
        for name in names:
            yield _call_of(family, name, *by_op[name])
    yield _graph(by_op)


def _call_of(family: str, name: str, arrays: dict[str, Array], scalars: dict[str, Any]) -> DemoCall:
    op = OPS[name]
    case = case_of(op.row, arrays, scalars)

    def bind(tensors: Mapping[str, Any], device: Device, stream: Any) -> Callable[[], object]:
        return partial(op, **tensors, **scalars, stream=stream)

    shown = next(arg.name for arg in op.row.tensors if not arg.is_scratch)
    arrays = {shown: case.arrays[shown]} | case.arrays
    return DemoCall(family, name, arrays, _judges(case), bind)


def _judges(case: Any) -> dict[str, Judge]:
    return {name: partial(case.error, name) for name in case.expected}


def _graph(by_op: dict[str, Arguments]) -> DemoCall:
    """Return a graph of two captured ops; one launch makes both calls."""
    ops = {name: by_op[name] for name in ("rmsnorm", "silu_and_mul")}
    arrays: dict[str, Array] = {}
    judges: dict[str, Judge] = {}
    for name, (tensors, scalars) in ops.items():
        case = case_of(OPS[name].row, {key: each.copy() for key, each in tensors.items()}, scalars)
        arrays |= {f"{name} {key}": each for key, each in case.arrays.items()}
        judges |= {f"{name} {key}": judge for key, judge in _judges(case).items()}

    def bind(tensors: Mapping[str, Any], device: Device, stream: Any) -> Callable[[], object]:
        with fi_ffi.capture(stream, device=device) as graph:
            for name, (named, scalars) in ops.items():
                OPS[name](**{key: tensors[f"{name} {key}"] for key in named}, **scalars)
        return partial(graph.launch, stream)

    return DemoCall("graphs", "capture of two ops", arrays, judges, bind)


def _normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> Array:
    values: Array = (rng.standard_normal(shape, np.float32) * scale).astype(np.float16)
    return values


def _attention(parts: list[tuple[Array, Array, Array]], *, causal: bool) -> Judge:
    """Return the judge of the attention of some requests."""
    options = Options(sm_scale=_HEAD_DIM**-0.5, causal=causal)
    results = [exact(q, k, v, options) for q, k, v in parts]
    out, magnitude = (
        np.concatenate([getattr(each, name) for each in results]) for name in ("out", "magnitude")
    )
    return within(out, magnitude, _ATTENTION_SLACK)


def _prefill(tokens: int, rng: np.random.Generator) -> DemoCall:
    """Return a prefill of two requests with `tokens` queries in total and some earlier keys."""
    queries = [tokens - tokens // 2, tokens // 2] if tokens > 1 else [1]
    keys = [count + int(rng.integers(0, 33)) for count in queries]
    starts, key_starts = (
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int32) for counts in (queries, keys)
    )
    q = _normal(rng, sum(queries), _HEADS, _HEAD_DIM)
    k, v = (_normal(rng, sum(keys), _KV_HEADS, _HEAD_DIM) for _ in "kv")
    of = [slice(*ends) for ends in itertools.pairwise(key_starts)]
    parts = [
        (q[slice(*ends)], k[mine], v[mine])
        for ends, mine in zip(itertools.pairwise(starts), of, strict=True)
    ]

    def bind(tensors: Mapping[str, Any], device: Device, stream: Any) -> Callable[[], object]:
        plan = fi_ffi.BatchPrefillPlan(
            starts,
            kv_indptr=key_starts,
            head_dim_qk=_HEAD_DIM,
            causal=True,
            **_HEAD_COUNTS,
            device=device,
            stream=stream,
        )
        return partial(plan.ragged_run, **tensors, stream=stream)

    arrays = {"q": q, "k": k, "v": v, "o": np.full_like(q, np.nan)}
    judges = {"o": _attention(parts, causal=True)}
    return DemoCall("attention", "BatchPrefillPlan", arrays, judges, bind)


def _decode(requests: int, keys: int, rng: np.random.Generator) -> DemoCall:
    """Return a decode of requests with up to `keys` keys, whose pages are in random order."""
    requests = min(requests, 16)
    lens = rng.integers(keys // 2, keys + 1, requests)
    pages = -(-lens // _PAGE)
    indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
    indices = rng.permutation(int(indptr[-1])).astype(np.int32)
    last = ((lens - 1) % _PAGE + 1).astype(np.int32)
    shape = len(indices), _PAGE, _KV_HEADS, _HEAD_DIM
    k, v = (_normal(rng, *shape) for _ in "kv")
    q = _normal(rng, requests, _HEADS, _HEAD_DIM)

    def keys_of(cache: Array, i: int) -> Array:
        rows = cache[indices[indptr[i] : indptr[i + 1]]].reshape(-1, _KV_HEADS, _HEAD_DIM)
        keys: Array = rows[: lens[i]]
        return keys

    parts = [(q[i : i + 1], keys_of(k, i), keys_of(v, i)) for i in range(requests)]

    def bind(tensors: Mapping[str, Any], device: Device, stream: Any) -> Callable[[], object]:
        plan = fi_ffi.BatchDecodePlan(
            indptr,
            indices,
            last,
            head_dim=_HEAD_DIM,
            page_size=_PAGE,
            **_HEAD_COUNTS,
            device=device,
            stream=stream,
        )
        return partial(plan.run, **tensors, stream=stream)

    arrays = {"q": q, "paged_k_cache": k, "paged_v_cache": v, "o": np.full_like(q, np.nan)}
    read = int(lens.sum()) * 2 * _KV_HEADS * _HEAD_DIM * k.itemsize
    judges = {"o": _attention(parts, causal=False)}
    return DemoCall("attention", "BatchDecodePlan", arrays, judges, bind, read)


def _experts(tokens: int, rng: np.random.Generator) -> DemoCall:
    """Return a layer of experts in float16, each token through its own experts."""
    hidden, inter = _EXPERT_HIDDEN, _EXPERT_INTER
    x = _normal(rng, tokens, hidden)
    first = _normal(rng, _EXPERTS, 2 * inter, hidden, scale=hidden**-0.5)
    second = _normal(rng, _EXPERTS, hidden, inter, scale=inter**-0.5)
    chosen = np.argsort(rng.random((tokens, _EXPERTS)), axis=1)[:, :_OF_TOKEN].astype(np.int32)
    scales = rng.dirichlet(np.ones(_OF_TOKEN), tokens).astype(np.float32)
    value, magnitude = np.zeros((2, tokens, hidden))
    for i, (experts, of) in enumerate(zip(chosen, scales.astype(np.float64), strict=True)):
        for expert, scale in zip(experts, of, strict=True):
            rows = first[expert].astype(np.float64) @ x[i].astype(np.float64)
            linear, gate = rows[:inter], rows[inter:]
            down = second[expert].astype(np.float64)
            value[i] += scale * (down @ (linear * gate / (1 + np.exp(-gate))))
            magnitude[i] += scale * (np.abs(down) @ np.abs(linear * gate))

    def bind(tensors: Mapping[str, Any], device: Device, stream: Any) -> Callable[[], object]:
        return partial(fi_ffi.cutlass_fused_moe, **tensors, stream=stream)

    arrays = {
        "input": x,
        "output": np.full_like(x, np.nan),
        "token_selected_experts": chosen,
        "token_final_scales": scales,
        "fc1_expert_weights": first,
        "fc2_expert_weights": second,
    }
    judges = {"output": within(value, magnitude, _EXPERTS_SLACK)}
    return DemoCall("experts", "cutlass_fused_moe", arrays, judges, bind)


def arguments(tokens: int, hidden: int, rng: np.random.Generator) -> dict[str, Arguments]:
    """Return random arguments of each op of the demo; write-only tensors are poisoned."""

    def normal(*shape: int, dtype: Any = np.float16) -> Array:
        # Rows of different scales, so that normalising a row by another row's scale is detected.
        spread = np.exp(rng.uniform(-2, 2, [*shape[:-1], 1])) if len(shape) > 1 else 1.0
        values: Array = (rng.standard_normal(shape) * spread).astype(dtype)
        return values

    def poison(*shape: int, dtype: Any = np.float16) -> Array:
        return np.full(shape, np.nan, dtype)

    eps = {"eps": 1e-6, "enable_pdl": False}
    norm = {"out": poison(tokens, hidden), "input": normal(tokens, hidden)}
    residual = {"input": normal(tokens, hidden), "residual": normal(tokens, hidden)}
    gate = normal(tokens, 2 * hidden, dtype=ml_dtypes.bfloat16)
    of_gate = {"out": poison(tokens, hidden, dtype=ml_dtypes.bfloat16), "input": gate}
    heads = {"q": (tokens, _HEADS, _HEAD_DIM), "k": (tokens, _KV_HEADS, _HEAD_DIM)}
    rope = {name: normal(*shape) for name, shape in heads.items()}
    rope |= {f"{name}_rope": poison(*shape) for name, shape in heads.items()}
    states = {f"v_{of}": normal(*heads["q"]) for of in "ab"}
    states |= {f"s_{of}": normal(tokens, _HEADS, dtype=np.float32) for of in "ab"}
    merged = {"v_merged": poison(*heads["q"])}
    merged["s_merged"] = poison(tokens, _HEADS, dtype=np.float32)
    logits = normal(tokens, hidden, dtype=np.float32)
    scores = {"scores": normal(tokens, 64, dtype=np.float32), "bias": normal(64, dtype=np.float32)}
    routed = {"topk_values": poison(tokens, 4, dtype=np.float32)}
    routed["topk_indices"] = np.full((tokens, 4), -1, np.int32)
    return {
        "rmsnorm": (norm | {"weight": normal(hidden)}, eps),
        "fused_add_rmsnorm": (residual | {"weight": normal(hidden)}, eps),
        "silu_and_mul": (of_gate, {"enable_pdl": False}),
        "apply_rope_pos_ids": (
            rope | {"pos_ids": rng.integers(0, 4096, tokens).astype(np.int32)},
            {"rotary_dim": _HEAD_DIM, "interleave": False, "rope_scale": 1.0, "rope_theta": 1e4},
        ),
        "append_paged_kv_cache": (_cache(tokens, rng), {"kv_layout": "NHD"}),
        "merge_state": (states | merged, {}),
        "fused_topk_deepseek": (
            scores | routed,
            {"n_group": 4, "topk_group": 2, "topk": 4, "routed_scaling_factor": 2.5},
        ),
        "softmax": (
            {
                "workspace_buffer": np.zeros(2**20, np.uint8),
                "logits": logits,
                "output": np.full_like(logits, np.nan),
            },
            {"temperature_val": 0.7, "enable_pdl": False},
        ),
    }


def _cache(tokens: int, rng: np.random.Generator) -> dict[str, Array]:
    """Return a paged cache of random bits; one request gets all tokens in random order."""

    def bits(*shape: int) -> Array:
        return rng.integers(0, 2**16, shape, np.uint16).view(np.float16)

    pages = -(-tokens // _PAGE)
    tables = {
        "batch_indices": np.zeros(tokens),
        "positions": rng.permutation(tokens),
        "kv_indices": rng.permutation(pages + 3)[:pages],
        "kv_indptr": np.array([0, pages]),
        "kv_last_page_len": np.array([(tokens - 1) % _PAGE + 1]),
    }
    return {
        "append_key": bits(tokens, _KV_HEADS, _HEAD_DIM),
        "append_value": bits(tokens, _KV_HEADS, _HEAD_DIM),
        "paged_k_cache": bits(pages + 3, _PAGE, _KV_HEADS, _HEAD_DIM),
        "paged_v_cache": bits(pages + 3, _PAGE, _KV_HEADS, _HEAD_DIM),
        **{name: table.astype(np.int32) for name, table in tables.items()},
    }
