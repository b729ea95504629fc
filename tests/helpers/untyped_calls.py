"""What kernels without a row compute, in float64, and how far from it float32 may be.

FlashInfer compiles with fast math: exponentials, logarithms and divisions are off by a few
last bits, tanh by `TANH`.  Bounds are sums of the roundings on the way, each written beside it.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

import fi_ffi

from tests.helpers.prepared_calls import or_skip

BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
# Half a step, of the value rounded.
HALF = {np.dtype(np.float16): 2.0**-11, BF16: 2.0**-8, np.dtype(np.float32): 2.0**-24}
# A float32 sum of some hundred products, of the sum of their magnitudes.
SUM = 2.0**-17
# tanh.approx, of its result.
TANH = 2.0**-11
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def module(name):
    return or_skip(fi_ffi.module, name)


# Last arguments that later releases have more, as those before do without.
_LATER = {
    "fp4_quantize": (0,), "fp4_batched_quantize": (0,), "nvfp4_quant_and_per_token_scale": (0,),
    "silu_and_mul_scaled_nvfp4_experts_quantize": (0,),
    "e2m1_and_ufp8sf_scale_to_float_sm100": (False,),
}  # fmt: skip


def call(entry, *args, stream):
    """Calls with what `to_gpu` made and values; answers what the function does."""
    given = [arg.desc() if hasattr(arg, "get") else arg for arg in args]
    if len(entry.signature.params) > len(given):
        given += _LATER.get(entry.__name__, ())
    return entry(*given, stream=stream)


def poisoned(shape, dtype):
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.full(size, 0xFF, np.uint8).view(dtype).reshape(shape)


def float64(array):
    return np.asarray(array).astype(np.float64)


def worst(got, expected, bound):
    """The largest error as a fraction of its bound; NaN where something was not written."""
    return float(np.max(np.abs(float64(got) - expected) / bound))


def judged(array, expected, bound):
    """Holds a result to its bound, and the bound to seeing an error of a twentieth."""
    assert worst(1.05 * expected, expected, bound) > 1, "the check sees a scale 5 % off"
    assert worst(array.get(), expected, bound) <= 1
    assert array.intact()


def rounded(dtype, expected):
    return HALF[np.dtype(dtype)] * 1.001 * np.abs(expected) + 1e-30


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def mhc_post(x, residual, post, comb):
    """The new four streams, and the sum of their terms' magnitudes."""
    x, residual, post, comb = map(float64, (x, residual, post, comb))
    terms = [x[:, None, :] * post[:, :, None], np.einsum("toh,ton->tnh", residual, comb)]
    sizes = np.abs(x)[:, None, :] * np.abs(post)[:, :, None]
    return sum(terms), sizes + np.einsum("toh,ton->tnh", np.abs(residual), np.abs(comb))


def mhc_pre(dots, squares, residual, scale, base, *, k, eps, post_factor, repeats):
    """post_mix, comb_mix, layer_input, its magnitude, and the largest logit of each token."""
    residual, scale, base = map(float64, (residual, scale, base))
    wide = np.repeat(scale, [4, 4, 16])
    logits = dots * wide / np.sqrt(squares / k + eps["rms"])[:, None] + base
    pre = sigmoid(logits[:, :4]) + eps["pre"]
    post = sigmoid(logits[:, 4:8]) * post_factor
    comb = np.exp(logits[:, 8:]).reshape(-1, 4, 4)
    comb = comb / comb.sum(2, keepdims=True) + eps["sinkhorn"]
    comb /= comb.sum(1, keepdims=True) + eps["sinkhorn"]
    for _ in range(repeats - 1):
        comb /= comb.sum(2, keepdims=True) + eps["sinkhorn"]
        comb /= comb.sum(1, keepdims=True) + eps["sinkhorn"]
    layer = np.einsum("to,toh->th", pre, residual)
    magnitude = np.einsum("to,toh->th", pre, np.abs(residual))
    return post, comb, layer, magnitude, np.abs(logits).max(1)


def unpacked(packed):
    """Two e2m1 numbers of each byte, the low half first."""
    halves = np.stack([packed & 15, packed >> 4], axis=-1)
    return E2M1[halves.reshape(*packed.shape[:-1], -1)]


def swizzled(scales):
    """Rows by 128 and columns by 4: [rows / 128, cols / 4, 32, 4, 4], padded with zeros."""
    rows, cols = (-(-n // of) * of for n, of in zip(scales.shape, (128, 4), strict=True))
    wide = np.zeros((rows, cols), scales.dtype)
    wide[: scales.shape[0], : scales.shape[1]] = scales
    tiles = wide.reshape(rows // 128, 4, 32, cols // 4, 4)
    return np.ascontiguousarray(tiles.transpose(0, 3, 2, 1, 4)).reshape(-1)


def exchanged(targets, starts, rank, ranks, room):
    """What a rank sends and receives: of tokens [n, top_k] with the ranks they go to.

    Tokens of rank r are `targets[starts[r]:starts[r + 1]]`.  Answers arrays by their
    names in `moe_comm_prepare_indices`, -1 where there is nothing.
    """
    top_k = targets.shape[1]
    sent, back, gathered = [], [], []
    send_count, recv_count = [], []
    for peer in range(ranks):
        own = targets[starts[rank] : starts[rank + 1]]
        going = [i for i, to in enumerate(own) if peer in to]
        sent += going
        back += [i * top_k + int(np.argmax(own[i] == peer)) for i in going]
        theirs = targets[starts[peer] : starts[peer + 1]]
        coming = [starts[peer] + i for i, to in enumerate(theirs) if rank in to]
        gathered += coming
        send_count.append(len(going))
        recv_count.append(len(coming))
    most = room * max(ranks, top_k)

    def filled(values, size):
        return np.array([*values] + [-1] * (size - len(values)), np.int32)

    return {
        "localGatherIndices": filled(gathered, room * ranks),
        "sendRankCountCumSum": np.cumsum(send_count, dtype=np.int32),
        "sendRankLocalIndices": filled(sent, most),
        "recvRankCountCumSum": np.cumsum(recv_count, dtype=np.int32),
        "recvRankLocalIndices": filled(range(len(gathered)), room * ranks),
        "backwardRecvRankLocalIndices": filled(back, most),
    }
