"""Ops from their definitions, by their formulas' names: loops over elements, Python's numbers."""

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


def _root(row, eps: float) -> float:
    return math.sqrt(math.fsum(x * x for x in row) / len(row) + eps)


def _rms(a: dict, rows: np.ndarray, bias: float = 0.0) -> np.ndarray:
    out = empty(rows)
    for at in np.ndindex(rows.shape[:-1]):
        root = _root(rows[at], a["eps"])
        out[at] = [x / root * (bias + w) for x, w in zip(rows[at], a["weight"], strict=True)]
    return out


def _in_range(x: np.ndarray, limit: float) -> np.ndarray:
    return np.array([max(-limit, min(limit, each)) for each in x.flat]).reshape(x.shape)


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


def _standardised(row, eps: float) -> list[float]:
    mean = math.fsum(row) / len(row)
    root = _root([x - mean for x in row], eps)
    return [(x - mean) / root for x in row]


@defines("layernorm")
def _(a):
    out = empty(a["input"])
    for i, row in enumerate(a["input"]):
        columns = zip(_standardised(row, a["eps"]), a["gamma"], a["beta"], strict=True)
        out[i] = [x * gamma + beta for x, gamma, beta in columns]
    return {"out": out}


@defines(
    "fused_dit_gate_residual_layernorm_gamma_beta",
    "fused_dit_residual_layernorm_scale_shift",
    "fused_dit_gate_residual_layernorm_scale_shift",
)
def _(a):
    total, out = empty(a["input"]), empty(a["input"])
    for at in np.ndindex(total.shape[:-1]):
        for j, x in enumerate(a["input"][at]):
            if "input_sf_scale" in a:
                x *= a["input_sf_scale"][0]
            if "gate" in a:
                x *= a["gate"][at][j] + a["gate_bias"][j]
            total[at][j] = x + (a["residual"][at][j] if "residual" in a else 0.0)
        for j, x in enumerate(_standardised(total[at], a["epsilon"])):
            if "gamma" in a:
                out[at][j] = x * a["gamma"][j] + a["beta"][j]
            else:
                factor = 1 + a["scale"][at][j] + a["scale_bias"][j]
                out[at][j] = x * factor + a["shift"][at][j] + a["shift_bias"][j]
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
    whole = (a["ppf"] * a["pph"] * a["ppw"], a["pph"] * a["ppw"], a["ppw"], 1)
    channels = [a[f"num_{axis}_channels"] for axis in ("frame", "height", "width")]
    scale = a["output_quant_scale"] if a["output_fp8"] else 1.0
    of_v = a["v_quant_scale"] if a["output_fp8"] else 1.0
    limit = 448.0 if a["output_fp8"] else math.inf
    found = {"q_out": empty(a["q_out"]), "k_out": empty(a["k_out"])}
    for t, token in enumerate(a["qkv_in"]):
        places = [t % before // after for before, after in itertools.pairwise(whole)]
        angles = [
            place * _yarn(a, pair, count)
            for place, count in zip(places, channels, strict=True)
            for pair in range(count // 2)
        ]
        for name, x in (("q", token[:nq]), ("k", token[nq : nq + nk])):
            weight = a[f"{name}_weight"]
            if a["is_qk_norm"]:
                x = x / _root(x.ravel(), a["eps"]) * weight
            if a["factor"] != 1:
                x = x * a["attention_factor"]
            turned = [_turned(head, angles, a["interleave"]) for head in x]
            found[f"{name}_out"][t] = _in_range(np.array(turned) * scale, limit)
    return found | {"v_out": _in_range(a["qkv_in"][:, nq + nk :] * of_v, limit)}


# ---------------------------------------------------------------- activations


def _gated(activation: Callable[[float], float]):
    def definition(a):
        size = a["input"].shape[1] // 2
        rows = [
            [activation(gate) * x for gate, x in zip(row[:size], row[size:], strict=True)]
            for row in a["input"]
        ]
        return {"out": np.array(rows)}

    return definition


def _gelu_tanh(x: float) -> float:
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


defines("silu_and_mul")(_gated(lambda x: x / (1 + math.exp(-x))))
defines("gelu_and_mul")(_gated(lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2))
defines("gelu_tanh_and_mul")(_gated(_gelu_tanh))


# ---------------------------------------------------------------- rotary embeddings


def _turned(head, angles, interleave: bool) -> list[float]:
    """The first pairs of a head turned, each by its angle."""
    found = [float(x) for x in head]
    for i, angle in enumerate(angles):
        one, two = (2 * i, 2 * i + 1) if interleave else (i, i + len(angles))
        cos, sin = (angle.real, angle.imag) if isinstance(angle, complex) else (
            math.cos(angle), math.sin(angle)
        )  # fmt: skip
        found[one] = head[one] * cos - head[two] * sin
        found[two] = head[two] * cos + head[one] * sin
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


def _roped(a: dict, positions: list) -> dict:
    dim = a["rotary_dim"] or a["q"].shape[2]
    speeds = [_frequency(a, pair, dim) for pair in range(dim // 2)]
    found = {f"{name}_rope": empty(a[name]) for name in "qk"}
    for name, token in itertools.product("qk", range(len(a["q"]))):
        angles = [] if positions[token] is None else [positions[token] * s for s in speeds]
        found[f"{name}_rope"][token] = [
            _turned(head, angles, a["interleave"]) for head in a[name][token]
        ]
    return found


@defines("apply_rope", "apply_llama31_rope")
def _(a):
    positions: list = [None] * len(a["q"])
    for request, offset in enumerate(a["offsets"]):
        for step, token in enumerate(range(*map(int, a["indptr"][request : request + 2]))):
            positions[token] = int(offset) + step
    return _roped(a, positions)


@defines("apply_rope_pos_ids", "apply_llama31_rope_pos_ids")
def _(a):
    return _roped(a, [int(position) for position in a["pos_ids"]])


def _of_table(a: dict, token: int) -> list[complex]:
    row = a["cos_sin_cache"][int(a["pos_ids"][token])]
    half = len(row) // 2
    return [complex(row[i], row[half + i]) for i in range(half)]


@defines("apply_rope_pos_ids_cos_sin_cache")
def _(a):
    return {
        f"{name}_rope": np.array([
            [_turned(head, _of_table(a, token), a["interleave"]) for head in heads]
            for token, heads in enumerate(a[name])
        ])
        for name in "qk"
    }  # fmt: skip


def _quantised_parts(a: dict, token: int, of: str) -> tuple[np.ndarray, np.ndarray]:
    limit = a["largest"]["q_rope_out"]
    scale = a["quant_scale_q" if of == "q" else "quant_scale_kv"]
    angles = _of_table(a, token)
    turned = [_turned(head, angles, a["interleave"]) for head in a[f"{of}_rope_in"][token]]
    return _in_range(np.array(turned) * scale, limit), _in_range(
        a[f"{of}_nope_in"][token] * scale, limit
    )


@defines(
    "rope_quantize",
    "rope_quantize_append_paged_kv_cache",
    "rope_quantize_append_paged_mla_kv_cache",
)
def _(a):
    names = [
        name for name in ("q_rope_out", "q_nope_out", "k_rope_out", "k_nope_out", "k_cache",
                          "v_cache", "ckv_cache", "kpe_cache") if name in a
    ]  # fmt: skip
    found = {name: a[name].copy() for name in names}
    for token in range(len(a["pos_ids"])):
        if "batch_indices" in a and a["batch_indices"][token] < 0:
            continue
        found["q_rope_out"][token], found["q_nope_out"][token] = _quantised_parts(a, token, "q")
        rope, nope = _quantised_parts(a, token, "k")
        if "k_rope_out" in a:
            found["k_rope_out"][token], found["k_nope_out"][token] = rope, nope
            continue
        if "ckv_cache" in a:
            page, entry = _place(a, token, a["ckv_cache"].shape[1])
            found["kpe_cache"][page, entry], found["ckv_cache"][page, entry] = rope[0], nope[0]
            continue
        is_hnd = a["kv_layout"] == "HND"
        page, entry = _place(a, token, a["k_cache"].shape[2 if is_hnd else 1])
        v = _in_range(a["v_in"][token] * a["quant_scale_kv"], a["largest"]["q_rope_out"])
        for head in range(len(v)):
            where = (page, head, entry) if is_hnd else (page, entry, head)
            found["k_cache"][where] = [*rope[head], *nope[head]]
            found["v_cache"][where] = v[head]
    return found


# ---------------------------------------------------------------- what only moves


def _place(a: dict, token: int, page_size: int) -> tuple[int, int]:
    """The page of a token, and its entry in it."""
    request, position = int(a["batch_indices"][token]), int(a["positions"][token])
    slot = int(a["kv_indptr"][request]) + position // page_size
    return int(a["kv_indices"][slot]), position % page_size


@defines("append_paged_kv_cache")
def _(a):
    found = {f"paged_{x}_cache": a[f"paged_{x}_cache"].copy() for x in "kv"}
    is_hnd = a["kv_layout"] == "HND"
    for name, new in (("k", a["append_key"]), ("v", a["append_value"])):
        cache = found[f"paged_{name}_cache"]
        for token, head in itertools.product(*map(range, new.shape[:2])):
            page, entry = _place(a, token, cache.shape[2 if is_hnd else 1])
            cache[(page, head, entry) if is_hnd else (page, entry, head)] = new[token, head]
    return found


@defines("append_paged_mla_kv_cache")
def _(a):
    found = {name: a[f"{name}_cache"].copy() for name in ("ckv", "kpe")}
    for name, cache in found.items():
        for token, new in enumerate(a[f"append_{name}"]):
            cache[_place(a, token, cache.shape[1])] = new
    return {f"{name}_cache": cache for name, cache in found.items()}


@defines("concat_mla_k")
def _(a):
    k = a["k"].copy()
    for token, head in itertools.product(*map(range, k.shape[:2])):
        own = a["k_nope"].shape[2]
        k[token, head, :own] = a["k_nope"][token, head]
        k[token, head, own:] = a["k_rope"][token, 0]
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


def _product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[n, k] times [k, m], one k after another."""
    total = np.zeros((len(x), y.shape[1]))
    for column, row in zip(x.T, y, strict=True):
        total += np.multiply.outer(column, row)
    return total


@defines("bmm_fp8")
def _(a):
    scale = a["A_scale"][0] * a["B_scale"][0]
    products = [_product(x, y) * scale for x, y in zip(a["A"], a["B"], strict=True)]
    return {"D": np.array(products)}


@defines("tinygemm2", "tinygemm2_nobias")
def _(a):
    return {"output": _product(a["input"], a["weight"].T) + a.get("bias", 0.0)}


@defines("mm_M1_16_K7168_N256", "mm_M1_16_K7168_N128", "mm_M1_16_K6144_N256")
def _(a):
    return {"out": _product(a["mat_a"], a["mat_b"])}


@defines("fp8_quantize_1x128")
def _(a):
    values, scales = empty(a["input"]), a["outScaleFP8SF"].copy()
    for i, j in np.ndindex(len(values), a["input"].shape[1] // 128):
        piece = a["input"][i, 128 * j : 128 * j + 128]
        scales[j, i] = max(map(abs, piece)) / 448 if any(piece) else 1.0
        values[i, 128 * j : 128 * j + 128] = [x / scales[j, i] for x in piece]
    return {"outValueE4M3": values, "outScaleFP8SF": scales}


# ---------------------------------------------------------------- merged states


def _of_states(states) -> tuple[np.ndarray, float]:
    """Of (value, log-sum-exp) pairs: each is its sum of powers, and the powers' mean of values."""
    sums = [2.0**s for _, s in states]
    total = math.fsum(sums)
    value = sum(of_one / total * v for of_one, (v, _) in zip(sums, states, strict=True))
    return value, math.log2(total)


def _merges(value: str, s: str, *states: tuple[str, str]):
    def definition(a):
        found = {value: a[value].copy(), s: a[s].copy()}
        for at in np.ndindex(found[s].shape):
            if "mask" in a and not a["mask"][at[0]]:
                continue
            given = [(a[of_v][at], a[of_s][at]) for of_v, of_s in states]
            found[value][at], found[s][at] = _of_states(given)
        return found

    return definition


for _suffix in ("", "_of_empty_ones"):
    defines(f"merge_state{_suffix}")(
        _merges("v_merged", "s_merged", ("v_a", "s_a"), ("v_b", "s_b"))
    )
    defines(f"merge_state_in_place{_suffix}")(_merges("v", "s", ("v", "s"), ("v_other", "s_other")))


@defines("merge_states", "merge_states_of_empty_ones")
def _(a):
    found = {"v_merged": empty(a["v_merged"]), "s_merged": empty(a["s_merged"])}
    for i, head in np.ndindex(found["s_merged"].shape):
        states = list(zip(a["v"][i, :, head], a["s"][i, :, head], strict=True))
        found["v_merged"][i, head], found["s_merged"][i, head] = _of_states(states)
    return found


# ---------------------------------------------------------------- the gated delta rule


@defines("gdn_prefill")
def _(a):
    """Token by token: the state fades, its value at a key is corrected, a query reads it."""
    heads, size = a["output_state"].shape[1:3]
    scale, every = a["scale"] or size**-0.5, a.get("checkpoint_every_n_tokens", 0)
    names = ("output", "output_state", "state_checkpoints")
    found = {name: empty(a[name]) for name in names if name in a}
    for (i, (start, end)), head in itertools.product(
        enumerate(itertools.pairwise(map(int, a["cu_seqlens"]))), range(heads)
    ):
        # A head of q, k or v serves as many of the output's as there are more of those.
        q, k, v = (a[name][:, head * a[name].shape[1] // heads] for name in "qkv")
        state = a["input_state"][i, head].copy() if "input_state" in a else np.zeros((size, size))
        for token in range(start, end):
            state *= a["alpha"][token, head] if "alpha" in a else 1.0
            wrong = v[token] - (state * k[token]).sum(axis=1)
            beta = a["beta"][token, head] if "beta" in a else 1.0
            state += np.multiply.outer(beta * wrong, k[token])
            found["output"][token, head] = scale * (state * q[token]).sum(axis=1)
            done = token - start + 1
            # After each tile that completes `every` tokens, and after the last, if it is such.
            tiles = -(-done // 64)
            is_end = done % 64 == 0 or token + 1 == end
            if "state_checkpoints" in a and every and is_end and tiles * 64 % every == 0:
                first = int(a["checkpoint_cu_starts"][i])
                found["state_checkpoints"][first + tiles * 64 // every - 1, head] = state
        found["output_state"][i, head] = state
    return found


# ---------------------------------------------------------------- the greatest of a row


def _greatest(a: dict, x, k: int) -> list[int]:
    """The greatest first, of equal ones the first, or with a tie break of 2 the last."""
    sign = -1 if a.get("tie_break") == 2 else 1
    return sorted(range(len(x)), key=lambda i: (-x[i], sign * i))[:k]


@defines("radix_topk")
def _(a):
    k = a["output_indices"].shape[1]
    chosen = [_greatest(a, x, k) for x in a["input"]]
    found = {"output_indices": np.array(chosen)}
    if "output_values" in a:
        rows = zip(a["input"], chosen, strict=True)
        found["output_values"] = np.array([[x[i] for i in row] for x, row in rows])
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


@defines("radix_topk_ragged_transform")
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


@defines("nvfp4_kv_quant")
def _(a):
    quotients, codes = _blocks(a["input"], 16, 6, 1 / float(a["global_scale"][0]), False)
    return {"fp4_output": _bytes_of_halves(quotients), "block_scales": codes}
