"""Ops from their definitions, by their formulas' names: plain arithmetic on float64 arrays."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np

DEFINITIONS: dict[str, Callable[[dict], dict]] = {}


def defines(*names: str):
    def register(definition):
        DEFINITIONS.update(dict.fromkeys(names, definition))
        return definition

    return register


def empty(like: np.ndarray) -> np.ndarray:
    return np.full(like.shape, np.nan)


# ---------------------------------------------------------------- norms


def _over_root(x: np.ndarray, eps: float, axis: int | tuple[int, ...] = -1) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis, keepdims=True) + eps)


def _rms(a: dict, x: np.ndarray, bias: float = 0.0) -> np.ndarray:
    return _over_root(x, a["eps"]) * (bias + a["weight"])


def _in_range(x: np.ndarray, limit: float) -> np.ndarray:
    return np.clip(x, -limit, limit)


@defines("rmsnorm", "qk_rmsnorm")
def _(a):
    return {"out": _rms(a, a["input"])}


@defines("gemma_rmsnorm")
def _(a):
    return {"out": _rms(a, a["input"], 1.0)}


@defines("fused_add_rmsnorm")
def _(a):
    total = a["input"] + a["residual"]
    return {"residual": total, "input": _rms(a, total)}


@defines("gemma_fused_add_rmsnorm")
def _(a):
    total = a["input"] + a["residual"]
    return {"residual": total, "input": _rms(a, total, 1.0)}


def _quantised(limit: float | None):
    def definition(a):
        most = limit or a["largest"]["out"]
        total = a["input"] + a.get("residual", 0.0)
        made = {"out": _in_range(_rms(a, total) / float(np.ravel(a["scale"])[0]), most)}
        return made | ({"residual": total} if "residual" in a else {})

    return definition


for _name in ("rmsnorm_quant", "fused_add_rmsnorm_quant"):
    defines(_name)(_quantised(448.0))
    defines(f"{_name}_full_range")(_quantised(None))


def _standardised(x: np.ndarray, eps: float) -> np.ndarray:
    return _over_root(x - x.mean(-1, keepdims=True), eps)


@defines("layernorm")
def _(a):
    return {"out": _standardised(a["input"], a["eps"]) * a["gamma"] + a["beta"]}


@defines(
    "fused_dit_gate_residual_layernorm_gamma_beta",
    "fused_dit_residual_layernorm_scale_shift",
    "fused_dit_gate_residual_layernorm_scale_shift",
)
def _(a):
    total = a["input"] * a.get("input_sf_scale", np.ones(1))[0]
    if "gate" in a:
        total = total * (a["gate"] + a.get("gate_bias", 0.0))
    total = total + a.get("residual", 0.0)
    out = _standardised(total, a["epsilon"])
    if "gamma" in a:
        out = out * a["gamma"] + a["beta"]
    else:
        scale, shift = (a[name] + a.get(f"{name}_bias", 0.0) for name in ("scale", "shift"))
        out = out * (1 + scale) + shift
    return {"residual_out": total, "norm_out": out}


def _yarn(a: dict, pair: int, channels: int) -> float:
    """YaRN: full speed up to `low`, that over `factor` from `high` on, a ramp in between."""
    speed = a["base"] ** (-2 * pair / channels)
    if pair <= a["low"]:
        return speed
    if pair >= a["high"]:
        return speed / a["factor"]
    slow = (pair - a["low"]) / (a["high"] - a["low"])
    return speed * ((1 - slow) + slow / a["factor"])


@defines("fused_qk_rmsnorm_rope")
def _(a):
    (nq, _), nk = a["q_weight"].shape, len(a["k_weight"])
    tokens = np.arange(len(a["qkv_in"]))
    whole = (a["ppf"] * a["pph"] * a["ppw"], a["pph"] * a["ppw"], a["ppw"], 1)
    channels = [a[f"num_{axis}_channels"] for axis in ("frame", "height", "width")]
    angles = np.stack([
        tokens % before // after * _yarn(a, pair, count)
        for (before, after), count in zip(itertools.pairwise(whole), channels, strict=True)
        for pair in range(count // 2)
    ], axis=-1)  # fmt: skip
    scale = a["output_quant_scale"] if a["output_fp8"] else 1.0
    of_v = a["v_quant_scale"] if a["output_fp8"] else 1.0
    limit = 448.0 if a["output_fp8"] else math.inf
    found = {}
    for name, x in (("q", a["qkv_in"][:, :nq]), ("k", a["qkv_in"][:, nq : nq + nk])):
        if a["is_qk_norm"] and x.size:
            x = _over_root(x, a["eps"], (1, 2)) * a[f"{name}_weight"]
        if a["factor"] != 1:
            x = x * a["attention_factor"]
        turned = _turned(x, np.cos(angles), np.sin(angles), a["interleave"])
        found[f"{name}_out"] = _in_range(turned * scale, limit)
    return found | {"v_out": _in_range(a["qkv_in"][:, nq + nk :] * of_v, limit)}


# ---------------------------------------------------------------- activations


def _gated(activation: Callable[[float], float]):
    def definition(a):
        gate, x = np.split(a["input"], 2, axis=1)
        return {"out": np.vectorize(activation)(gate) * x}

    return definition


def _gelu_tanh(x: float) -> float:
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


defines("silu_and_mul")(_gated(lambda x: x / (1 + math.exp(-x))))
defines("gelu_and_mul")(_gated(lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2))
defines("gelu_tanh_and_mul")(_gated(_gelu_tanh))


# ---------------------------------------------------------------- rotary embeddings


def _turned(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleave: bool) -> np.ndarray:
    """The first pairs of each token's heads turned, [tokens, heads, size] by [tokens, pairs]."""
    found, pairs = x.copy(), cos.shape[1]
    cos, sin = cos[:, None], sin[:, None]
    one, two = (np.s_[0 : 2 * pairs : 2], np.s_[1 : 2 * pairs : 2]) if interleave else (
        np.s_[:pairs], np.s_[pairs : 2 * pairs]
    )  # fmt: skip
    found[..., one] = x[..., one] * cos - x[..., two] * sin
    found[..., two] = x[..., two] * cos + x[..., one] * sin
    return found


def _frequency(a: dict, pair: int, rotary_dim: int) -> float:
    own = a["rope_theta"] ** (-2 * pair / rotary_dim)
    if "low_freq_factor" not in a:
        return own / a["rope_scale"]
    wavelength = 2 * math.pi / own
    low, high, length = a["low_freq_factor"], a["high_freq_factor"], a["old_context_length"]
    if wavelength < length / high:
        return own
    if wavelength > length / low:
        return own / a["rope_scale"]
    smooth = (length / wavelength - low) / (high - low)
    return (1 - smooth) * own / a["rope_scale"] + smooth * own


def _roped(a: dict, positions: np.ndarray) -> dict:
    dim = a["q"].shape[2] if a["rotary_dim"] is None else a["rotary_dim"]
    speeds = np.array([_frequency(a, pair, dim) for pair in range(dim // 2)])
    angles = np.multiply.outer(positions, speeds)
    return {
        f"{name}_rope": _turned(a[name], np.cos(angles), np.sin(angles), a["interleave"])
        for name in "qk"
    }


@defines("apply_rope", "apply_llama31_rope")
def _(a):
    positions = np.zeros(len(a["q"]))  # what no request has is not turned
    for request, offset in enumerate(a["offsets"]):
        start, end = map(int, a["indptr"][request : request + 2])
        positions[start:end] = offset + np.arange(end - start)
    return _roped(a, positions)


@defines("apply_rope_pos_ids", "apply_llama31_rope_pos_ids")
def _(a):
    return _roped(a, a["pos_ids"].astype(float))


def _by_table(a: dict, x: np.ndarray) -> np.ndarray:
    cos, sin = np.split(a["cos_sin_cache"][a["pos_ids"].astype(int)], 2, axis=1)
    return _turned(x, cos, sin, a["interleave"])


@defines("apply_rope_pos_ids_cos_sin_cache")
def _(a):
    return {f"{name}_rope": _by_table(a, a[name]) for name in "qk"}


@defines(
    "rope_quantize",
    "rope_quantize_append_paged_kv_cache",
    "rope_quantize_append_paged_mla_kv_cache",
)
def _(a):
    limit = a["largest"]["q_rope_out"]
    names = [
        name for name in ("q_rope_out", "q_nope_out", "k_rope_out", "k_nope_out", "k_cache",
                          "v_cache", "ckv_cache", "kpe_cache") if name in a
    ]  # fmt: skip
    found = {name: a[name].copy() for name in names}
    kept = a.get("batch_indices", np.zeros(len(a["pos_ids"]))) >= 0

    def parts(of: str, scale: float) -> tuple[np.ndarray, np.ndarray]:
        turned = _by_table(a, a[f"{of}_rope_in"]) * scale
        return tuple(_in_range(x, limit)[kept] for x in (turned, a[f"{of}_nope_in"] * scale))

    found["q_rope_out"][kept], found["q_nope_out"][kept] = parts("q", a["quant_scale_q"])
    rope, nope = parts("k", a["quant_scale_kv"])
    if "k_rope_out" in a:
        found["k_rope_out"][kept], found["k_nope_out"][kept] = rope, nope
    elif "ckv_cache" in a:
        _append(a, found["kpe_cache"], rope[:, 0], kept)
        _append(a, found["ckv_cache"], nope[:, 0], kept)
    else:
        v = _in_range(a["v_in"] * a["quant_scale_kv"], limit)[kept]
        _append(a, found["k_cache"], np.concatenate((rope, nope), axis=-1), kept)
        _append(a, found["v_cache"], v, kept)
    return found


# ---------------------------------------------------------------- what only moves


def _append(a: dict, cache: np.ndarray, new: np.ndarray, kept: np.ndarray | slice) -> None:
    """Each token's entry into its page, in place."""
    is_hnd = a.get("kv_layout") == "HND"
    size = cache.shape[2 if is_hnd else 1]
    request, position = (a[name][kept].astype(int) for name in ("batch_indices", "positions"))
    page = a["kv_indices"].astype(int)[a["kv_indptr"].astype(int)[request] + position // size]
    if is_hnd:
        cache[page, :, position % size] = new
    else:
        cache[page, position % size] = new


@defines("append_paged_kv_cache")
def _(a):
    found = {f"paged_{x}_cache": a[f"paged_{x}_cache"].copy() for x in "kv"}
    for cache, new in zip(found.values(), ("append_key", "append_value"), strict=True):
        _append(a, cache, a[new], np.s_[:])
    return found


@defines("append_paged_mla_kv_cache")
def _(a):
    found = {f"{name}_cache": a[f"{name}_cache"].copy() for name in ("ckv", "kpe")}
    for name in ("ckv", "kpe"):
        _append(a, found[f"{name}_cache"], a[f"append_{name}"], np.s_[:])
    return found


@defines("concat_mla_k")
def _(a):
    k, own = a["k"].copy(), a["k_nope"].shape[2]
    k[..., :own], k[..., own:] = a["k_nope"], a["k_rope"]
    return {"k": k}


def _bits_of(x, bitorder: str) -> list[int]:
    found = [0] * -(-len(x) // 8)
    for i, bit in enumerate(x):
        if bit:
            found[i // 8] |= 1 << (i % 8 if bitorder == "little" else 7 - i % 8)
    return found


@defines("packbits")
def _(a):
    return {"y": np.array(_bits_of(a["x"], a["bitorder"]), np.uint8)}


@defines("segment_packbits")
def _(a):
    y = a["y"].copy()
    for (start, stop), first in zip(
        itertools.pairwise(a["input_indptr"]), a["output_indptr"], strict=False
    ):
        for i, byte in enumerate(_bits_of(a["x"][start:stop], a["bitorder"])):
            y[first + i] = byte
    return {"y": y}


# ---------------------------------------------------------------- products


@defines("bmm_fp8")
def _(a):
    return {"D": a["A"] @ a["B"] * a["A_scale"][0] * a["B_scale"][0]}


@defines("tinygemm2", "tinygemm2_nobias")
def _(a):
    return {"output": a["input"] @ a["weight"].T + a.get("bias", 0.0)}


@defines("mm_M1_16_K7168_N256", "mm_M1_16_K7168_N128", "mm_M1_16_K6144_N256")
def _(a):
    return {"out": a["mat_a"] @ a["mat_b"]}


@defines("fp8_quantize_1x128")
def _(a):
    pieces, scales = a["input"].reshape(len(a["input"]), -1, 128), a["outScaleFP8SF"].copy()
    largest = abs(pieces).max(axis=-1)
    of_pieces = np.where(largest > 0, largest / 448, 1.0)
    scales[:, : len(pieces)] = of_pieces.T
    return {
        "outValueE4M3": (pieces / of_pieces[..., None]).reshape(a["input"].shape),
        "outScaleFP8SF": scales,
    }


# ---------------------------------------------------------------- merged states


def _of_states(v: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of sets along the first axis: each is its sum of powers, and the powers' mean of values."""
    powers = 2.0**s
    total = powers.sum(axis=0)
    return (powers[..., None] * v).sum(axis=0) / total[..., None], np.log2(total)


def _merges(value: str, s: str, *states: tuple[str, str]):
    def definition(a):
        found = {value: a[value].copy(), s: a[s].copy()}
        kept = a["mask"] != 0 if "mask" in a else np.s_[:]
        given = (np.stack([a[name][kept] for name in names]) for names in zip(*states, strict=True))
        found[value][kept], found[s][kept] = _of_states(*given)
        return found

    return definition


for _suffix in ("", "_of_empty_ones"):
    defines(f"merge_state{_suffix}")(
        _merges("v_merged", "s_merged", ("v_a", "s_a"), ("v_b", "s_b"))
    )
    defines(f"merge_state_in_place{_suffix}")(_merges("v", "s", ("v", "s"), ("v_other", "s_other")))


@defines("merge_states", "merge_states_of_empty_ones")
def _(a):
    v, s = _of_states(*(a[name].swapaxes(0, 1) for name in "vs"))
    return {"v_merged": v, "s_merged": s}


# ---------------------------------------------------------------- the gated delta rule


def _prefill(a: dict, of_tiles: bool) -> dict:
    """Token by token: the state fades, its value at a key is corrected, a query reads it.

    Kernels in tiles of 64 tokens keep a state after the tile that completes `every` tokens, short
    as the last one may be; others after just as many.
    """
    heads, size = a["output_state"].shape[1:3]
    scale, every = a["scale"] or size**-0.5, a.get("checkpoint_every_n_tokens", 0)
    names = ("output", "output_state", "state_checkpoints")
    found = {name: empty(a[name]) for name in names if name in a}
    if not of_tiles:  # of sequences without tokens, and of pools
        found["output_state"] = a["output_state"].copy()
    for (i, (start, end)), head in itertools.product(
        enumerate(itertools.pairwise(map(int, a["cu_seqlens"]))), range(heads)
    ):
        slot = int(a["state_indices"][i]) if "state_indices" in a else i
        # A head of q, k or v serves as many of the output's as there are more of those.
        q, k, v = (a[name][:, head * a[name].shape[1] // heads] for name in "qkv")
        state = np.zeros((size, size))
        if "input_state" in a:
            state = a["input_state"][slot, head].copy()
        for token in range(start, end):
            state *= a["alpha"][token, head] if "alpha" in a else 1.0
            wrong = v[token] - (state * k[token]).sum(axis=1)
            beta = a["beta"][token, head] if "beta" in a else 1.0
            state += np.multiply.outer(beta * wrong, k[token])
            found["output"][token, head] = scale * (state * q[token]).sum(axis=1)
            done = token - start + 1
            if of_tiles and token + 1 == end:
                done = 64 * -(-done // 64)
            if "state_checkpoints" in a and every and done % every == 0:
                first = int(a["checkpoint_cu_starts"][i])
                found["state_checkpoints"][first + done // every - 1, head] = state
        if of_tiles or end > start:
            found["output_state"][slot, head] = state
    return found


defines("gdn_prefill")(lambda a: _prefill(a, of_tiles=True))
defines("gdn_prefill_cute")(lambda a: _prefill(a, of_tiles=False))


# ---------------------------------------------------------------- the greatest of a row


def _greatest(a: dict, x, k: int) -> list[int]:
    """The greatest first, of equal ones the first, or with a tie break of 2 the last; with a tie
    break, or all of them, in the order of their places unless they are sorted."""
    tie_break, is_sorted = a.get("tie_break", 0), a.get("sorted_output", False)
    sign = -1 if tie_break == 2 else 1
    chosen = sorted(range(len(x)), key=lambda i: (-x[i], sign * i))[:k]
    if tie_break:
        return sorted(chosen, key=lambda i: (-x[i] if is_sorted else 0, i))
    return chosen if is_sorted or k < len(x) else sorted(chosen)


@defines("radix_topk", "radix_topk_in_any_order")
def _(a):
    k = a["output_indices"].shape[1]
    chosen = [_greatest(a, x, k) for x in a["input"]]
    found = {"output_indices": np.array(chosen)}
    for name in ("output_values", "maybe_output_values"):
        if name in a:
            rows = zip(a["input"], chosen, strict=True)
            found[name] = np.array([[x[i] for i in row] for x, row in rows])
    return found


def _of_windows(a: dict, k: int) -> list[list[int]]:
    """Of each row's window, whose elements are counted from 0; whole where it is short."""
    found = []
    for i, x in enumerate(a["input"]):
        start, length = int(a.get("maybe_row_starts", [0] * (i + 1))[i]), int(a["lengths"][i])
        window = x[start : start + length]
        found.append(list(range(length)) if length <= k else _greatest(a, window, k))
    return found


def _padded(rows: list[list[int]], k: int) -> np.ndarray:
    return np.array([row + [-1] * (k - len(row)) for row in rows])


@defines("radix_topk_page_table_transform", "radix_topk_page_table_transform_with_page_size")
def _(a):
    k, size = a["output_page_table"].shape[1], a.get("page_size", 1)
    windows = _of_windows(a, k)
    starts = a.get("maybe_page_table_row_starts", a.get("maybe_row_starts", [0] * len(windows)))
    pages = []
    for i, chosen in enumerate(windows):
        table = a["src_page_table"][int(a.get("maybe_row_to_batch", range(len(windows)))[i])]
        pages.append([
            int(table[int(starts[i]) + at // size]) * size + at % size for at in chosen
        ])  # fmt: skip
    found = {"output_page_table": _padded(pages, k)}
    if "maybe_output_raw_indices" in a:
        found["maybe_output_raw_indices"] = _padded(windows, k)
    return found


@defines("radix_topk_ragged_transform", "radix_topk_ragged_transform_in_any_order")
def _(a):
    k = a["output_indices"].shape[1]
    rows = zip(_of_windows(a, k), a["offsets"], strict=True)
    return {"output_indices": _padded([[int(of) + at for at in row] for row, of in rows], k)}


# ---------------------------------------------------------------- blocks with a scale each


def _small_float(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """A sign, an exponent and a mantissa, as IEEE 754 has them."""
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = (code & (1 << mantissa_bits) - 1) / (1 << mantissa_bits)
    bias = (1 << exponent_bits - 1) - 1
    return sign * (mantissa * 2.0 ** (1 - bias) if not exponent
                   else (1 + mantissa) * 2.0 ** (exponent - bias))  # fmt: skip


@defines("nvfp4_kv_dequant")
def _(a):
    found = empty(a["output"])
    is_bytes = "block_scales" not in a["largest"]
    for i, j in np.ndindex(found.shape):
        byte, scale = int(a["fp4_data"][i, j // 2]), a["block_scales"][i, j // 16]
        scale = _small_float(int(scale), 4, 3) if is_bytes else scale
        code = byte >> 4 if j % 2 else byte & 15
        found[i, j] = _small_float(code, 2, 1) * scale * a["global_scale"][0]
    return {"output": found}


def _tiled(row: int, column: int, columns: int, tile: int = 128) -> int:
    """Where a scale goes: tiles of 128 rows, or 8, and 4 columns, in which groups of 32 rows lie
    side by side."""
    first = 4 * tile * (row // tile * -(-columns // 4) + column // 4)
    if tile == 8:
        return first + row % 8 * 4 + column % 4
    return first + row % 32 * 16 + row % 128 // 32 * 4 + column % 4


@defines("block_scale_interleave")
def _(a):
    scales, found = a["blockScale"], np.zeros_like(a["interleavedBlockScale"])
    experts, _, columns = scales.shape
    each = found.size // experts
    for expert, row, column in np.ndindex(scales.shape):
        found[expert * each + _tiled(row, column, columns)] = scales[expert, row, column]
    return {"interleavedBlockScale": found}


@defines("block_scale_interleave_reverse")
def _(a):
    tiled, found = a["blockScale"], np.zeros_like(a["reversedBlockScale"])
    for expert, row, column in np.ndindex(tiled.shape):
        flat = tiled[expert].reshape(-1)
        found[expert, row, column] = flat[_tiled(row, column, tiled.shape[2])]
    return {"reversedBlockScale": found}


_HALVES = [_small_float(code, 2, 1) for code in range(8)]
_BYTES = [_small_float(code, 4, 3) for code in range(127)]


def _nearest(x: float, table: list[float]) -> int:
    """The code of the number nearest to one that is not negative; of two the even one."""
    x = float(np.float32(x))  # numpy's extensions round by way of it
    return min(range(len(table)), key=lambda code: (abs(table[code] - x), code % 2))


def _power(x: float) -> int:
    """The exponent, and 127, of the least power of 2 that is no less; 0 of 0."""
    return next(code for code in range(255) if 2.0 ** (code - 127) >= x)


def _blocks(x: np.ndarray, size: int, largest: float, of_all: float, is_power: bool):
    """Elements over their block's scale, and the scales' bytes."""
    quotients = empty(x)
    codes = np.zeros((len(x), x.shape[1] // size))
    for i, j in np.ndindex(codes.shape):
        block = x[i, size * j : size * (j + 1)]
        wanted = max(map(abs, block)) / largest * of_all
        codes[i, j] = code = _power(wanted) if is_power else _nearest(wanted, _BYTES)
        scale = 2.0 ** (code - 127) if is_power else _BYTES[code]
        quotients[i, size * j : size * (j + 1)] = [each * of_all / scale for each in block]
    return quotients, codes


def _bytes_of_halves(quotients: np.ndarray) -> np.ndarray:
    codes = [_nearest(abs(x), _HALVES) + 8 * (math.copysign(1, x) < 0) for x in quotients.flat]
    pairs = zip(codes[0::2], codes[1::2], strict=True)
    return np.array([low + 16 * high for low, high in pairs]).reshape(len(quotients), -1)


def _ordered(codes: np.ndarray, layout: int, columns: int, like: np.ndarray) -> np.ndarray:
    found = np.zeros(like.shape)
    for (row, column), code in np.ndenumerate(codes):
        in_rows = row * columns + column
        at = in_rows if layout == 2 else _tiled(row, column, columns, (128, 8)[layout])
        found[at] = code
    return found


@defines("mxfp8_quantize")
def _(a):
    quotients, codes = _blocks(a["input"], 32, 448, 1.0, True)
    elements = np.zeros(a["valMxFP8"].shape)
    elements[:, : quotients.shape[1]] = _in_range(quotients, 448)
    layout = a["sfSwizzleLayout"] if "sfSwizzleLayout" in a else 0 if a["isSfSwizzledLayout"] else 2
    scales = _ordered(codes, layout, elements.shape[1] // 32, a["scaleFP8SF"])
    return {"valMxFP8": elements, "scaleFP8SF": scales}


@defines("fp4_quantize")
def _(a):
    of_all = 1.0 if a["sfUseUE8M0"] else float(a["globalScale"][0])
    of_all = 1 / of_all if a.get("isGlobalScaleInversed") else of_all
    quotients, codes = _blocks(a["input"], a["sfVecSize"], 6, of_all, a["sfUseUE8M0"])
    layout = 2 if not a["isSfSwizzledLayout"] else 1 if a["isSf8x4Layout"] else 0
    scales = _ordered(codes, layout, codes.shape[1], a["scaleFP8SF"])
    return {"valueE2M1": _bytes_of_halves(quotients), "scaleFP8SF": scales}


@defines("fp4_batched_quantize")
def _(a):
    halves, scales = np.zeros(a["valueE2M1"].shape), np.zeros(a["scaleFP8SF"].shape)
    for i, matrix in enumerate(a["input"]):
        of_rows = np.broadcast_to(a["globalScale"], len(matrix)).tolist()
        made = [_blocks(row[None], 16, 6, of_all, False)
                for row, of_all in zip(matrix, of_rows, strict=True)]  # fmt: skip
        halves[i] = np.vstack([_bytes_of_halves(quotients) for quotients, _ in made])
        codes = np.vstack([each for _, each in made])
        scales[i] = _ordered(codes, 0, codes.shape[1], scales[i])
    return {"valueE2M1": halves, "scaleFP8SF": scales}


@defines("nvfp4_quantize_append_paged_kv_cache_with_slot_mapping")
def _(a):
    names = ("paged_k_cache", "paged_v_cache", "k_scale_cache", "v_scale_cache")
    found = {name: a[name].copy() for name in names}
    size = a["paged_k_cache"].shape[2 if a["kv_layout"] == "HND" else 1]
    for token, slot in enumerate(map(int, a["slot_mapping"])):
        if not 0 <= slot < size * len(a["paged_k_cache"]):
            continue
        page, entry = divmod(slot, size)
        at = np.s_[page, :, entry] if a["kv_layout"] == "HND" else np.s_[page, entry]
        for x, new in (("k", a["append_key"]), ("v", a["append_value"])):
            of_all = 1 / float(a[f"{x}_scale"][0])
            quotients, codes = _blocks(new[token], 16, 6, of_all, False)
            found[f"paged_{x}_cache"][at] = _bytes_of_halves(quotients)
            found[f"{x}_scale_cache"][at] = np.array(_BYTES)[codes.astype(int)]
    return found


@defines("nvfp4_kv_quant")
def _(a):
    quotients, codes = _blocks(a["input"], 16, 6, 1 / float(a["global_scale"][0]), False)
    return {"fp4_output": _bytes_of_halves(quotients), "block_scales": codes}


# ---------------------------------------------------------------- experts of a token


@defines("fused_topk_deepseek")
def _(a):
    n, k = a["topk_indices"].shape
    chosen, weights = np.zeros((n, k)), np.zeros((n, k))
    experts = range(a["scores"].shape[1])
    each = len(experts) // a["n_group"]
    for i, logits in enumerate(a["scores"]):
        share = [1 / (1 + math.exp(-x)) for x in logits]
        rank = [share[j] + a["bias"][j] for j in experts]
        groups = [[j for j in experts if j // each == group] for group in range(a["n_group"])]
        if a["n_group"] > 1:
            groups.sort(key=lambda those: -sum(sorted(rank[j] for j in those)[-2:]))
        left = [j for those in groups[: a["topk_group"]] for j in those]
        best = sorted(left, key=lambda j: -rank[j])[:k]
        total = sum(share[j] for j in best)
        chosen[i], weights[i] = best, [a["routed_scaling_factor"] * share[j] / total for j in best]
    found = {"topk_values": weights, "topk_indices": chosen}
    if "routing_replay_out" in a:
        found["routing_replay_out"] = a["routing_replay_out"].copy()
        found["routing_replay_out"][:n] = chosen
    return found


# ---------------------------------------------------------------- pieces of sequences


@defines("seq_chunk_cumsum")
def _(a):
    """Each sequence's pieces counted one by one."""
    found = [0]
    starts = zip(a["chunk_indices"], a["chunk_offsets"], strict=True)
    of_pieces = [int(a["seq_idx"][int(c * a["chunk_size"] + at)]) for c, at in starts]
    for sequence in range(len(a["output"]) - 1):
        found.append(found[-1] + of_pieces.count(sequence))
    return {"output": np.array(found)}


# ---------------------------------------------------------------- products for SM100


def _scaled(a: dict, name: str, value: Callable, scale: Callable, size: int) -> np.ndarray:
    """Each element times its block's scale, which is looked up in its place."""
    codes, scales = a[name], a[f"{name}Scale"]
    columns = codes.shape[1] * (2 if size == 16 else 1)
    found = np.zeros((len(codes), columns))
    for i, j in np.ndindex(found.shape):
        at = _tiled(i, j // size, columns // size)
        found[i, j] = value(codes, i, j) * scale(int(scales[at]))
    return found


@defines("fp4_gemm")
def _(a):
    def number(codes, i, j):
        byte = int(codes[i, j // 2])
        return _small_float(byte >> 4 if j % 2 else byte & 15, 2, 1)

    left, right = (
        _scaled(a, name, number, lambda code: _small_float(code, 4, 3), 16)
        for name in ("mat1", "mat2")
    )
    return {"out": a["globalScale"][0] * left @ right.T}


@defines("mxfp8_gemm")
def _(a):
    left, right = (
        _scaled(a, name, lambda x, i, j: x[i, j], lambda code: 2.0 ** (code - 127), 32)
        for name in ("mat1", "mat2")
    )
    return {"out": left @ right.T}


@defines("bf16_gemm")
def _(a):
    return {"out": np.einsum("mk,nk->mn", a["mat1"], a["mat2"])}


@defines("bmm_bf16")
def _(a):
    return {"out": np.einsum("bmk,bnk->bmn", a["mat1"], a["mat2"])}


@defines("bmm_mxfp8")
def _(a):
    """As of one tall matrix, of which each product has its rows."""
    (b, m, k), n = a["mat1"].shape, a["mat2"].shape[1]
    tall = a | {"mat1": a["mat1"].reshape(b * m, k), "mat2": a["mat2"].reshape(b * n, k)}
    left, right = (
        _scaled(tall, name, lambda x, i, j: x[i, j], lambda code: 2.0 ** (code - 127), 32)
        for name in ("mat1", "mat2")
    )
    return {"out": np.einsum("bmk,bnk->bmn", left.reshape(b, m, k), right.reshape(b, n, k))}


@defines("tgv_gemm")
def _(a):
    return {"out": np.einsum("mk,kn->nm", a["mat1"], a["mat2"]) + a.get("bias", 0.0)}


# ---------------------------------------------------------------- states of tokens one by one


def _slot_of(indices: np.ndarray | None, request: int, token: int) -> int:
    """A request's slot, which may be another for each of its tokens."""
    if indices is None:
        return request
    return int(indices[request] if indices.ndim == 1 else indices[request, token])


def selective_state_update(a: dict) -> dict:
    """Arguments as callers have them: one number for each head, and a pad that is no slot.

    A state decays by `exp(dt * A)` and gets `dt * x * B`; `C` reads it, `D` adds to it, `z` gates.
    Kernels for one token write no state with `disable_state_update`, others still those elsewhere.
    """
    if "cu_seqlens" in a:
        requests = [range(*map(int, ends)) for ends in itertools.pairwise(a["cu_seqlens"])]
        of_tokens = [[(token,) for token in tokens] for tokens in requests]
    elif a["x"].ndim == 3:
        of_tokens = [[(i,)] for i in range(len(a["x"]))]
    else:
        of_tokens = [[(i, t) for t in range(a["x"].shape[1])] for i in range(len(a["x"]))]
    is_one = a["x"].ndim == 3 and "cu_seqlens" not in a
    each = a.get("intermediate_states_buffer")
    found = {"out": a["out"].copy(), "state": a["state"].copy()}
    if each is not None:
        found["intermediate_states_buffer"] = each.copy()
    heads = a["state"].shape[1]
    for i, tokens in enumerate(of_tokens):
        accepted = int(a["num_accepted_tokens"][i]) if "num_accepted_tokens" in a else 1
        slot = _slot_of(a.get("state_batch_indices"), i, max(accepted - 1, 0))
        is_kept = slot != a["pad"]
        state = a["state"][slot].copy() if is_kept else np.zeros(a["state"].shape[1:])
        for number, token in enumerate(tokens):
            for h in range(heads):
                group = h * a["B"].shape[-2] // heads
                dt = a["dt"][token][h] + (a["dt_bias"][h] if "dt_bias" in a else 0.0)
                dt = math.log1p(math.exp(dt)) if a["dt_softplus"] else dt
                x = a["x"][token][h]
                state[h] = state[h] * math.exp(dt * a["A"][h])
                state[h] += dt * np.multiply.outer(x, a["B"][token][group])
                out = state[h] @ a["C"][token][group] + a["D"][h] * x
                if "z" in a:
                    z = a["z"][token][h]
                    out = out * z / (1 + np.exp(-z))
                found["out"][token][h] = out
            is_last, targets = number == len(tokens) - 1, a.get("dst_state_batch_indices")
            is_off = a.get("disable_state_update", False)
            if not is_kept:
                continue
            if each is not None:
                row = _slot_of(a.get("intermediate_state_indices"), i, 0)
                found["intermediate_states_buffer"][row, number] = state
            elif targets is not None:
                target = _slot_of(targets, i, number)
                if target != a["pad"] and not (is_off and is_one):
                    found["state"][target] = state
            elif is_last and not is_off:
                found["state"][slot] = state
    return found
