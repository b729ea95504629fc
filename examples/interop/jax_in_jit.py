"""The decode step of a small transformer in one `jax.jit`: norms, RoPE, the paged cache, attention,
the gate and sampling by fi_ffi; projections by jax.

The layers are a `lax.scan`, whose carry has the pages of all layers: XLA leaves it where it is, and
the op that appends writes into it.  A layer's pages have the numbers of the first layer's and an
offset, so one plan, which is given the pages by each run, is for all layers.

The plan is for graphs: XLA may record the step, and replay it without Python.  It is planned again
for each step, outside.  Wait for a step's results before that: nobody else knows when XLA runs it.

Each step is compared with jax's own layers, which keep keys and values of each request one after
the other.  Logits differ by what float16 rounds; tokens are the same where the best logit is
farther from the second than that.

With --cpu: jax's CPU arrays, and reference kernels.
"""

import argparse
import os

import numpy as np

import fi_ffi

LAYERS, HIDDEN, QO_HEADS, KV_HEADS, HEAD_DIM, GATE, VOCABULARY = 3, 512, 8, 2, 128, 768, 1000
PAGE_SIZE, MAX_PAGES = 16, 6  # of a request
LENGTHS = (23, 16, 33)  # tokens that the cache has of each request
REQUESTS, PAGES = len(LENGTHS), len(LENGTHS) * MAX_PAGES  # of a layer
ROOM = MAX_PAGES * PAGE_SIZE
EPS, THETA = 1e-6, 10000.0
# Some 40 roundings to float16 add up at random: sqrt(40) * 2^-11 is 2^-8.3 of the largest logit.
BOUND = 2.0**-7


def weights(rng):
    """Each layer's weights, stacked, and the others."""

    def normal(*shape):
        return (rng.standard_normal(shape, np.float32) * shape[-2] ** -0.5).astype(np.float16)

    def near_one(*shape):
        return (1 + rng.standard_normal(shape, np.float32) / 10).astype(np.float16)

    heads = (QO_HEADS + 2 * KV_HEADS) * HEAD_DIM
    layers = {
        "attention_norm": near_one(LAYERS, HIDDEN),
        "qkv": normal(LAYERS, HIDDEN, heads),
        "out": normal(LAYERS, QO_HEADS * HEAD_DIM, HIDDEN),
        "gate_norm": near_one(LAYERS, HIDDEN),
        "gate_up": normal(LAYERS, HIDDEN, 2 * GATE),
        "down": normal(LAYERS, GATE, HIDDEN),
    }
    embedding, head = normal(VOCABULARY, HIDDEN), normal(HIDDEN, VOCABULARY)
    return layers, {"embedding": embedding, "norm": near_one(HIDDEN), "head": head}


def split_heads(qkv):
    """Queries, keys and values, each [requests, heads, HEAD_DIM]."""
    heads = qkv.reshape(REQUESTS, -1, HEAD_DIM)
    return heads[:, :QO_HEADS], heads[:, QO_HEADS:-KV_HEADS], heads[:, -KV_HEADS:]


def decode_step(jax, plan):
    """The step by fi_ffi: the caches, the logits, and the tokens."""
    import fi_ffi.jax as ops

    jnp = jax.numpy

    def step(layers, rest, k_cache, v_cache, tokens, pages):
        indices, indptr, last_page_len, positions = pages

        def layer(carry, given):
            x, residual, k_cache, v_cache = carry
            number, of = given
            x, residual = ops.fused_add_rmsnorm(x, residual, of["attention_norm"], eps=EPS)
            q, k, v = split_heads(x @ of["qkv"])
            q, k = ops.apply_rope_pos_ids(q, k, positions, rope_theta=THETA)
            own = indices + number * PAGES
            requests = jnp.arange(REQUESTS, dtype=jnp.int32)
            k_cache, v_cache = ops.append_paged_kv_cache(
                k, v, requests, positions, k_cache, v_cache, own, indptr, last_page_len
            )
            attended = ops.run(plan, q, k_cache, v_cache, paged_kv_indices=own)
            x = attended.reshape(REQUESTS, -1) @ of["out"]
            x, residual = ops.fused_add_rmsnorm(x, residual, of["gate_norm"], eps=EPS)
            x = ops.silu_and_mul(x @ of["gate_up"]) @ of["down"]
            return (x, residual, k_cache, v_cache), None

        residual = rest["embedding"][tokens]
        carry = jnp.zeros_like(residual), residual, k_cache, v_cache
        numbers = jnp.arange(LAYERS, dtype=jnp.int32)
        (x, residual, k_cache, v_cache), _ = jax.lax.scan(layer, carry, (numbers, layers))
        x, _ = ops.fused_add_rmsnorm(x, residual, rest["norm"], eps=EPS)
        logits = (x @ rest["head"]).astype(jnp.float32)
        probs = jax.nn.softmax(logits)
        tokens, _ = ops.top_k_sampling_from_probs(probs, top_k_val=1)
        return k_cache, v_cache, logits, tokens

    return jax.jit(step, donate_argnums=(2, 3))


def own_step(jax):
    """The same by jax's own layers, in float32 within a layer: the caches, and the logits."""
    jnp = jax.numpy

    def norm(x, weight):
        return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + EPS) * weight

    def turn(x, positions):
        angles = positions[:, None] * THETA ** (-jnp.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def step(layers, rest, keys, values, tokens, positions):
        def layer(residual, given):
            of, keys, values = given
            q, k, v = split_heads(norm(residual, of["attention_norm"]) @ of["qkv"])
            q, k = turn(q, positions), turn(k, positions)
            requests = jnp.arange(REQUESTS)
            keys, values = (
                keys.at[requests, positions].set(k),
                values.at[requests, positions].set(v),
            )
            groups = q.reshape(REQUESTS, KV_HEADS, -1, HEAD_DIM)
            logits = jnp.einsum("rkgd,rtkd->rkgt", groups, keys) * HEAD_DIM**-0.5
            is_there = jnp.arange(ROOM) <= positions[:, None, None, None]
            shares = jax.nn.softmax(jnp.where(is_there, logits, -jnp.inf))
            attended = jnp.einsum("rkgt,rtkd->rkgd", shares, values).reshape(REQUESTS, -1)
            residual = residual + attended @ of["out"]
            gate, up = jnp.split(norm(residual, of["gate_norm"]) @ of["gate_up"], 2, axis=-1)
            return residual + (jax.nn.silu(gate) * up) @ of["down"], (keys, values)

        layers, rest = jax.tree.map(lambda x: x.astype(jnp.float32), (layers, rest))
        x, (keys, values) = jax.lax.scan(layer, rest["embedding"][tokens], (layers, keys, values))
        return keys, values, norm(x, rest["norm"]) @ rest["head"]

    return jax.jit(step)


class Pages:
    """The pages of the first layer that each request has."""

    def __init__(self, rng):
        self.numbers = rng.permutation(PAGES).astype(np.int32).reshape(REQUESTS, MAX_PAGES)

    def of(self, lengths):
        """`indptr`, `indices` with room for any lengths, and `last_page_len`."""
        counts = [-(-length // PAGE_SIZE) for length in lengths]
        indices = np.zeros(PAGES, np.int32)
        indptr = np.cumsum([0, *counts]).astype(np.int32)
        indices[: indptr[-1]] = np.concatenate(
            [own[:count] for own, count in zip(self.numbers, counts, strict=True)]
        )
        last = [(length - 1) % PAGE_SIZE + 1 for length in lengths]
        return indptr, indices, np.array(last, np.int32)

    def place(self, cache):
        """[layers, requests, tokens, ...] in pages of all layers."""
        paged = np.full((LAYERS, PAGES, PAGE_SIZE, *cache.shape[3:]), np.nan, cache.dtype)
        whole = cache.reshape(LAYERS, REQUESTS, MAX_PAGES, PAGE_SIZE, *cache.shape[3:])
        paged[:, self.numbers] = whole
        return paged.reshape(LAYERS * PAGES, PAGE_SIZE, *cache.shape[3:])


def check(number, logits, expected, tokens):
    """Compare a step; return its largest error, and how many tokens the logits decide."""
    logits, expected = np.asarray(logits), np.asarray(expected)
    size = np.abs(expected).max()
    error = np.abs(logits - expected).max() / size
    assert error < BOUND, f"step {number}: the logits are wrong: {error:.1e} of {BOUND:.1e}"
    second, best = np.sort(expected, axis=1)[:, -2:].T
    decided = best - second > 2 * BOUND * size
    same = np.asarray(tokens) == expected.argmax(axis=1)
    assert same[decided].all(), f"step {number}: a token is wrong"
    return error, decided.sum()


def decode(jax, device, steps):
    rng, jnp = np.random.default_rng(), jax.numpy
    layers, rest = jax.tree.map(jnp.asarray, weights(rng))
    pages, lengths = Pages(rng), np.array(LENGTHS, np.int32)
    shape = LAYERS, REQUESTS, ROOM, KV_HEADS, HEAD_DIM
    keys, values = (rng.standard_normal(shape, np.float32).astype(np.float16) for _ in range(2))
    k_cache, v_cache = (jnp.asarray(pages.place(cache)) for cache in (keys, values))
    keys, values = (jnp.asarray(cache, jnp.float32) for cache in (keys, values))
    tokens = jnp.asarray(rng.integers(0, VOCABULARY, REQUESTS), jnp.int32)

    sizes = {"num_qo_heads": QO_HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    indptr, _, last = pages.of(lengths + 1)
    # Stream 0: a plan whose program may be replayed waits on the host in any case.
    plan = fi_ffi.BatchDecodePlan(
        indptr, None, last, **sizes, page_size=PAGE_SIZE, enable_cuda_graph=True,
        max_num_indices=PAGES, device=device, stream=0,
    )  # fmt: skip
    step, own = decode_step(jax, plan), own_step(jax)
    errors, decided, seen = [], 0, set()
    for number in range(steps):
        positions = jnp.asarray(lengths)
        indptr, indices, last = pages.of(lengths + 1)
        if number:
            plan.replan(indptr, None, last, stream=0)
        on_device = [jnp.asarray(each) for each in (indices, indptr, last)]
        keys, values, expected = own(layers, rest, keys, values, tokens, positions)
        k_cache, v_cache, logits, tokens = step(
            layers, rest, k_cache, v_cache, tokens, (*on_device, positions)
        )
        jax.block_until_ready(tokens)
        error, count = check(number, logits, expected, tokens)
        errors.append(error)
        decided += count
        seen.update(tokens.tolist())
        lengths += 1
    print(f"{steps} steps: largest error of a logit {max(errors):.1e} of {BOUND:.1e} allowed")
    print(f"{decided} of {steps * REQUESTS} tokens are decided by more, and the same; ", end="")
    print(f"{len(seen)} different ones")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="CPU arrays, reference kernels")
    parser.add_argument("--steps", type=int, default=40, help="1 to 60")
    given = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # before jax starts
    import jax

    if given.cpu:
        jax.config.update("jax_platforms", "cpu")
    with jax.default_matmul_precision("highest"):  # float32 and not TF32, for the check
        decode(jax, "cpu" if given.cpu else "cuda:0", given.steps)


if __name__ == "__main__":
    main()
