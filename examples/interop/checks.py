"""What the examples here compute on, and what they are checked with.

A decode step of three requests: a norm over what the layers before have added, a projection to
queries, and attention over a paged cache.  `rmsnorm` and `attention` are the same in float32, in
the library that is given as `xp`: numpy, cupy, torch or jax.numpy.
"""

import numpy as np

import fi_ffi

REQUESTS, QO_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, NUM_PAGES = 3, 8, 2, 128, 16, 8
HIDDEN = QO_HEADS * HEAD_DIM
HEADS = REQUESTS, QO_HEADS, HEAD_DIM  # a row of HIDDEN, as queries
SIZES = {"num_qo_heads": QO_HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM,
         "page_size": PAGE_SIZE, "q_data_type": "float16"}  # fmt: skip
# indptr, indices and last_page_len: 23, 16 and 33 tokens, in pages anywhere in the cache.
PAGES = tuple(np.array(a, np.int32) for a in ([0, 2, 3, 6], [4, 0, 5, 1, 7, 2], [7, 16, 1]))
# Rounding to float16 twice, on the way and at the end, is 2^-10 of the magnitude; twice that.
BOUND = 2.0**-9


def inputs():
    """x, residual, weight, the projection, keys and values: float16, on the host."""
    rng, cache = np.random.default_rng(), (NUM_PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM)
    shapes = [(REQUESTS, HIDDEN), (REQUESTS, HIDDEN), (HIDDEN,), (HIDDEN, HIDDEN), cache, cache]
    x, residual, weight, project, k, v = (rng.standard_normal(s, np.float32) for s in shapes)
    project /= HIDDEN**0.5
    return [a.astype(np.float16) for a in (x, residual, weight, project, k, v)]


def tokens(xp, cache, request, last):
    """A request's keys, or values, one after the other."""
    indptr, indices, _ = PAGES
    pages = [cache[int(page)] for page in indices[indptr[request] : indptr[request + 1]]]
    return xp.concatenate(pages)[: (len(pages) - 1) * PAGE_SIZE + int(last[request])]


def float32(xp, array):
    return xp.asarray(array, dtype=xp.float32)


def rmsnorm(xp, x, residual, weight):
    """The sum, and the sum normalised: what fused_add_rmsnorm makes of residual and of x."""
    total = float32(xp, x) + float32(xp, residual)
    mean = xp.mean(total * total, axis=1, keepdims=True)
    return total, total / xp.sqrt(mean + 1e-6) * float32(xp, weight)


def attention(xp, q, k, v):
    """One request's output, and the sum that is rounded on the way: weights times |values|."""
    q, k, v = (float32(xp, a) for a in (q, k, v))
    groups = q.reshape(KV_HEADS, QO_HEADS // KV_HEADS, HEAD_DIM)
    logits = xp.einsum("kgd,tkd->kgt", groups, k) * HEAD_DIM**-0.5
    weights = xp.exp(logits - xp.amax(logits, axis=2, keepdims=True))
    weights = weights / xp.sum(weights, axis=2, keepdims=True)
    sums = (xp.einsum("kgt,tkd->kgd", weights, values) for values in (v, xp.abs(v)))
    return [values.reshape(QO_HEADS, HEAD_DIM) for values in sums]


def check(xp, what, got, exact, magnitude=None):
    """Raise `AssertionError` unless each element is within the bound, and is a number."""
    # Nothing is rounded finer than float16's smallest normal number, 2^-14.
    magnitude = xp.abs(exact if magnitude is None else magnitude) + 2.0**-14
    error = float(xp.amax(xp.abs(float32(xp, got) - exact) / magnitude))
    print(f"{what}: largest error {error:.1e} of the magnitude ({BOUND:.1e} allowed)")
    assert error < BOUND, f"{what} is wrong"


def check_step(xp, expected, residual, x, q, k_cache, v_cache, out, last_page_len=PAGES[2]):
    """`expected` is what `rmsnorm` gave; the other six are what there is after the step."""
    check(xp, "residual", residual, expected[0])
    check(xp, "normalised", x, expected[1])
    for request in range(REQUESTS):
        k, v = (tokens(xp, cache, request, last_page_len) for cache in (k_cache, v_cache))
        check(xp, f"request {request}", out[request], *attention(xp, q[request], k, v))


class HostMemory:
    """For --cpu: addresses of numpy's memory in place of a GPU's, and no stream."""

    device, stream = "cpu", None

    def __init__(self):
        self.arrays = {}

    def put(self, array, stream=None):
        array = array.copy()
        self.arrays[array.ctypes.data] = array
        return fi_ffi.TensorDesc(array.ctypes.data, array.shape, array.dtype, device="cpu")

    def get(self, desc, stream=None):
        return self.arrays[desc.ptr]

    def close(self, stream=None):
        self.arrays.clear()
