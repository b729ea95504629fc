"""The model: FlashInfer's kernels through fi_ffi, cuBLAS between them, one layer after another."""

import functools
from dataclasses import dataclass

import numpy as np

import fi_ffi

from .config import LINEAR
from .device import columns, rows, view
from .weights import of_layer

HEAD = 128  # of linear attention


@dataclass
class Batch:
    """The tokens of one step: tensors on the device, and the plan of its attention."""

    tokens: object  # [n] int32; below 0: the last one of slot -1 - token
    positions: object  # [n] int32
    requests: object  # [n] int32: which request each is of
    last: object  # [samples] int32: the tokens whose logits are wanted
    slots: object  # [b] int32: where the requests' states are
    starts: object  # [b + 1] int64: where the requests' tokens are
    kv_indptr: object  # [b + 1] int32, and the pages of each request:
    kv_last_page_len: object  # [b] int32
    kv_indices: object  # [pages or more] int32
    attend: object = None  # the plan's run

    INPUTS = (
        "tokens", "positions", "requests", "last", "slots", "starts", "kv_indptr",
        "kv_last_page_len", "kv_indices",
    )  # fmt: skip


class Model:
    """Weights and caches on a device, and `forward`."""

    def __init__(self, device, config, weights, num_pages, page_size, slots, max_tokens):
        self.device, self.config, self.slots, self.max_tokens = device, config, slots, max_tokens
        self.scratch = functools.lru_cache(4096)(self._scratch)  # described once
        self.embed = device.put(weights("model.embed_tokens.weight"))
        self.head = self.embed if config.tied else device.put(weights("lm_head.weight"))
        self.norm = device.put(weights("model.norm.weight"))
        self.layers = []
        for i in range(len(config.layers)):
            layer = of_layer(weights, config, i)
            self.layers.append({name: device.put(array) for name, array in layer.items()})
        self.cos_sin = device.put(config.cos_sin_cache(config.max_positions))
        page = (2, page_size, config.kv_heads, config.head_dim)
        self.caches = [
            None if kind == LINEAR
            else fi_ffi.split_paged_kv_cache(self._zeros((num_pages, *page), config.dtype))
            for kind in config.layers
        ]  # fmt: skip
        # The last token drawn for each slot; one slot more is what pads batches.
        self.latest = self._zeros((slots + 1, 1), "int32")
        self.pdl = {"enable_pdl": device.has_pdl}
        self.add_norm = fi_ffi.fused_add_rmsnorm
        self.rms = fi_ffi.rmsnorm
        if config.is_next:
            self.add_norm, self.rms = fi_ffi.gemma_fused_add_rmsnorm, fi_ffi.gemma_rmsnorm
        if config.is_hybrid:
            self._make_states()

    def _zeros(self, shape, dtype):
        x = self.device.empty(shape, dtype)
        self.device.zero(x)
        return x

    def _make_states(self):
        """Of each slot: all layers' states side by side, so that a slot is cleared at once."""
        config = self.config
        count = config.layers.count(LINEAR)
        state = (config.value_heads, HEAD, HEAD)
        self.states = self._zeros((self.slots + 1, count, *state), "float32")
        self.convs = self._zeros((self.slots + 1, count, config.conv_size, 3), config.dtype)
        # l2norm is RMSNorm with a weight of 1 / sqrt(HEAD).
        unit = np.full(HEAD, HEAD**-0.5, np.float32)
        like = self.layers[config.layers.index(LINEAR)]["norm"]
        self.unit = self.device.put(unit.astype(self.device.get(like).dtype))
        size = fi_ffi.gdn_prefill_workspace_size(self.device.name) if self.device.is_gpu else 0
        self.gdn_scratch = self.device.empty((size,), "uint8") if size else None
        self.has_decode = config.dtype == "bfloat16" and (
            not self.device.is_gpu
            or bool(fi_ffi.gdn_decode.supports(
                h=config.key_heads, hv=config.value_heads, state_dtype="float32"
            ))
        )  # fmt: skip

    def clear(self, slot):
        """Forget what a slot's request before has left."""
        if self.config.is_hybrid:
            self.device.zero(rows(self.states, slot, slot + 1))
            self.device.zero(rows(self.convs, slot, slot + 1))

    def _scratch(self, name, count, *shape, dtype=None, most=None):
        """The first `count` of all rows there may be: what a graph has recorded never moves."""
        shape = (most or self.max_tokens, *shape)
        return rows(self.device.scratch(name, shape, dtype or self.config.dtype), 0, count)

    def linear(self, name, x, weight, **more):
        out = self.scratch(name, x.shape[0], weight.shape[0], **more)
        self.device.linear(out, x, weight)
        return out

    def forward(self, batch):
        """Logits, float32 [samples, vocabulary], of the tokens that `batch.last` names."""
        config, device, n = self.config, self.device, batch.tokens.shape[0]
        latest = view(self.latest, self.slots + 1)
        device.launch("resolve", (-(-n // 256), 1), 256, batch.tokens, latest, n)
        residual = self.scratch("residual", n, config.hidden)
        x = self.scratch("x", n, config.hidden)
        device.take(residual, self.embed, batch.tokens)
        self.rms(x, residual, self.layers[0]["input_norm"], config.eps, **self.pdl)
        following = [layer["input_norm"] for layer in self.layers[1:]] + [self.norm]
        linears = 0
        for kind, layer, cache, next_norm in zip(
            config.layers, self.layers, self.caches, following, strict=True
        ):
            if kind == LINEAR:
                x = self.linear_attention(layer, x, batch, linears)
                linears += 1
            else:
                x = self.attention(layer, x, batch, cache)
            self.add_norm(x, residual, layer["post_norm"], config.eps, **self.pdl)
            x = self.mlp(layer, x)
            self.add_norm(x, residual, next_norm, config.eps, **self.pdl)
        if not batch.last.shape[0]:  # pieces of prompts only
            return None
        last = self.scratch("last", batch.last.shape[0], config.hidden, most=self.slots)
        device.take(last, x, batch.last)
        return self.linear("logits", last, self.head, dtype="float32", most=self.slots)

    def mlp(self, layer, x):
        product = self.scratch("product", x.shape[0], self.config.intermediate)
        if self.device.is_few(x, layer["gate_up"]):
            self.device.linear_silu(product, x, layer["gate_up"])
        else:
            gate_up = self.linear("gate_up", x, layer["gate_up"])
            fi_ffi.silu_and_mul(product, gate_up, **self.pdl)
        return self.linear("x", product, layer["down"])

    def attention(self, layer, x, batch, cache):
        """Of each token over its request's pages, its own key and value among them."""
        config, n = self.config, x.shape[0]
        heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
        qkv = self.linear("qkv", x, layer["qkv"])
        q = columns(qkv, 0, heads, dim)
        k = columns(qkv, heads * dim, kv_heads, dim)
        v = columns(qkv, (heads + kv_heads) * dim, kv_heads, dim)
        if config.qk_norm:
            fi_ffi.qk_rmsnorm(q, q, layer["q_norm"], config.eps, **self.pdl)
            fi_ffi.qk_rmsnorm(k, k, layer["k_norm"], config.eps, **self.pdl)
        fi_ffi.apply_rope_pos_ids_cos_sin_cache(q, k, q, k, self.cos_sin, batch.positions)
        fi_ffi.append_paged_kv_cache(
            k, v, batch.requests, batch.positions, *cache,
            batch.kv_indices, batch.kv_indptr, batch.kv_last_page_len,
        )  # fmt: skip
        out = self.scratch("attended", n, heads, dim)
        batch.attend(q, *cache, out, **self.pdl)
        out = view(out, n, heads * dim)
        if config.is_next:
            self.gate(out, columns(qkv, (heads + 2 * kv_heads) * dim, heads * dim), False)
        return self.linear("x", out, layer["out"])

    def gate(self, x, gate, is_silu):
        n, width = x.shape
        step = np.int64(gate.strides[0])
        grid = (-(-width // 256), n)
        self.device.launch("gated", grid, 256, x, gate, step, width, int(is_silu))

    def linear_attention(self, layer, x, batch, i):
        """A gated DeltaNet layer: its requests' states go from their slots and back."""
        config, n, b = self.config, x.shape[0], batch.slots.shape[0]
        qkvz = self.linear("qkvz", x, layer["qkvz"])
        ba = self.linear("ba", x, layer["ba"])
        q, k, v = self.convolved(layer, qkvz, batch, i)
        heads = config.value_heads
        out, pool = self.scratch("delta", n, heads, HEAD), columns_of_slot(self.states, i)
        if self.has_decode and n == b:  # a token of each request
            self.decoded(out, layer, pool, q, k, v, ba, batch)
        else:
            self.prefilled(out, layer, pool, q, k, v, ba, batch)
        flat = view(out, n * heads, HEAD)
        fi_ffi.rmsnorm(flat, flat, layer["norm"], config.eps, **self.pdl)
        out = view(out, n, config.value_size)
        self.gate(out, columns(qkvz, config.conv_size, config.value_size), True)
        return self.linear("x", out, layer["out"])

    def decoded(self, out, layer, pool, q, k, v, ba, batch):
        """States where they are, and gates from what they are made of."""
        n, heads = out.shape[:2]
        b, a = (columns(ba, at, 1, heads) for at in (0, heads))
        q, k, v, out = (view(x, n, 1, x.shape[1], HEAD) for x in (q, k, v, out))
        fi_ffi.gdn_decode(q, k, v, pool, layer["a_log"], a, layer["dt_bias"], b, output=out,
                          initial_state_indices=batch.slots)  # fmt: skip

    def prefilled(self, out, layer, pool, q, k, v, ba, batch):
        """Any tokens of each request, its state in memory beside the others'."""
        device, n, b, heads = self.device, q.shape[0], batch.slots.shape[0], v.shape[1]
        for part in (q, k):
            fi_ffi.qk_rmsnorm(part, part, self.unit, 1e-6 / HEAD, **self.pdl)
        alpha, beta = (self.scratch(name, n, heads, dtype="float32") for name in ("alpha", "beta"))
        device.launch("decays", (-(-n * heads // 256), 1), 256,
                      alpha, beta, ba, layer["a_log"], layer["dt_bias"], n, heads)  # fmt: skip
        state = self.scratch("state", b, heads, HEAD, HEAD, dtype="float32", most=self.slots)
        device.take(state, pool, batch.slots)
        fi_ffi.gdn_prefill(out, state, q, k, v, batch.starts, state, alpha, beta,
                           workspace_buffer=self.gdn_scratch)  # fmt: skip
        device.give(pool, state, batch.slots)

    def convolved(self, layer, qkvz, batch, i):
        """q, k and v after the short convolution, each in memory of its own."""
        config, device, n, start, made = self.config, self.device, qkvz.shape[0], 0, []
        kept = columns_of_slot(self.convs, i)
        for name, size in (
            ("q", config.key_size),
            ("k", config.key_size),
            ("v", config.value_size),
        ):
            out = self.scratch(name, n, size)
            device.launch(
                "convolve", (-(-size // 256), batch.slots.shape[0]), 256, out,
                columns(qkvz, start, size), rows(layer["conv"], start, start + size),
                inner_rows(kept, start, size), batch.slots, batch.starts,
                np.int64(qkvz.strides[0]), np.int64(kept.strides[0]), size,
            )  # fmt: skip
            made.append(view(out, n, size // HEAD, HEAD))
            start += size
        return made


def columns_of_slot(pool, i):
    """Layer i's part of every slot: [slots, ...]."""
    ptr = pool.ptr + i * pool.strides[1] * pool.dtype.itemsize
    shape, strides = (pool.shape[0], *pool.shape[2:]), (pool.strides[0], *pool.strides[2:])
    return fi_ffi.TensorDesc(ptr, shape, pool.dtype, strides=strides, device=pool.device)


def inner_rows(x, start, count):
    """x[:, start : start + count]"""
    ptr = x.ptr + start * x.strides[1] * x.dtype.itemsize
    shape = (x.shape[0], count, *x.shape[2:])
    return fi_ffi.TensorDesc(ptr, shape, x.dtype, strides=x.strides, device=x.device)
