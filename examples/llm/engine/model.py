"""The model: FlashInfer's kernels through fi_ffi, cuBLAS between them, one layer after another."""

import functools
import math
from dataclasses import dataclass

import numpy as np

import fi_ffi

from .config import LINEAR
from .device import columns, view
from .experts import Experts
from .glue import PLUS, SIGMOID, SILU, TIMES
from .products import Norm
from .weights import BLOCK, Blocks, of_layer

HEAD = 128  # of linear attention
# A few requests decode in pieces, so that all of the GPU attends to them: so many at most, each in
# so many pieces.
FEW, PIECES = 8, 16
# Threads for each token of more than so many that are placed; of fewer each head has its own.
THREADS, PLACED = 128, 256


@dataclass
class Batch:
    """The tokens of one step: tensors on the device, and the plan of its attention."""

    tokens: object  # [n] int32; below 0: the last one of slot -1 - token
    positions: object  # [n] int32
    requests: object  # [n] int32: which request each is of
    last: object  # [samples] int32: the tokens whose logits are wanted; None where all are
    slots: object  # [b] int32: where the requests' states are
    starts: object  # [b + 1] int64: where the requests' tokens are
    kv_indptr: object  # [b + 1] int32, and the pages of each request:
    kv_indices: object  # [pages or more] int32
    starts_of_pieces: object  # [b * PIECES + 1] int32: where their pages are; None without pieces
    attend: object  # by kind of layer: what attends to those pages


class Model:
    """Weights and caches on a device, and `forward`; with a `group`, one rank's part of these."""

    def __init__(self, device, config, weights, job, group=None):
        self.device, self.config = device, config
        self.slots, self.max_tokens = job.max_batch, job.max_tokens
        self.group, self.rank, self.ranks = group, *((group.rank, group.size) if group else (0, 1))
        self.scratch = functools.lru_cache(4096)(self._scratch)  # described once
        self.embed = device.put(weights("model.embed_tokens.weight"))
        self.head = self.embed if config.tied else device.put(weights("lm_head.weight"))
        self.norm, self.scale = device.put(weights("model.norm.weight")), None
        if scale := config.embedding_scale:
            self.scale = device.put(np.full(config.hidden, scale).astype(self.embed.dtype.numpy))
        self.experts = Experts(device, config, self.max_tokens)
        self.layers = []
        for i in range(len(config.layers)):
            layer = self.experts.placed(of_layer(weights, config, i))
            self.layers.append({name: device.put(array) for name, array in layer.items()})
        if LINEAR in config.layers:
            self._make_states()
        page = (2, job.page_size, config.kv_heads, config.head_dim)
        self.num_pages = job.num_pages or self._fitting(page)
        positions = min(config.max_positions, self.num_pages * job.page_size)
        sizes = positions, config.rotary_dim, config.max_positions
        ropes = {kind: config.rope_of(kind) for kind in config.windows if kind != LINEAR}
        tables = {rope: device.put(rope.cos_sin(*sizes)) for rope in set(ropes.values())}
        self.cos_sin = {kind: tables[rope] for kind, rope in ropes.items()}
        self.caches = [
            None if kind == LINEAR
            else fi_ffi.split_paged_kv_cache(device.zeros((self.num_pages, *page), config.dtype))
            for kind in config.layers
        ]  # fmt: skip
        # The last token drawn for each slot; one slot more is what pads batches.
        self.latest = device.zeros((self.slots + 1, 1), "int32")
        self.pdl = {"enable_pdl": device.has_pdl}
        norms = fi_ffi.fused_add_rmsnorm, fi_ffi.rmsnorm
        of_gemma = fi_ffi.gemma_fused_add_rmsnorm, fi_ffi.gemma_rmsnorm
        self.add_norm, self.rms = of_gemma if config.adds_one else norms
        # Whether products are not added to the residual at once.
        self.is_apart = group is not None or "attended_norm" in self.layers[0]

    def _fitting(self, page):
        """Pages that each rank's memory has room for, and no more than all slots could use."""
        config, device = self.config, self.device
        size = 2 * math.prod(page) * (len(config.layers) - config.layers.count(LINEAR))
        pages = min(device.fitting(size), self.slots * -(-config.max_positions // page[1]) + 1)
        if self.group:
            mine = device.put(np.array([[pages]], np.float32))
            pages = int(device.get(self.gathered("every rank's pages", mine)).min())
        if pages < 2:
            raise ValueError("no memory is left for pages of the cache")
        return pages

    def _make_states(self):
        """Of each slot: all layers' states side by side, so that a slot is cleared at once."""
        config, device = self.config, self.device
        rooms = self.slots + 1, config.layers.count(LINEAR)
        self.states = device.zeros((*rooms, config.value_heads, HEAD, HEAD), "float32")
        self.convs = device.zeros((*rooms, sum(config.linear_sizes), 3), config.dtype)
        # l2norm is RMSNorm with a weight of 1 / sqrt(HEAD).
        unit = np.full(HEAD, HEAD**-0.5, np.float32)
        like = self.layers[config.layers.index(LINEAR)]["norm"]
        self.unit = device.put(unit.astype(like.dtype.numpy))
        size = fi_ffi.gdn_prefill_workspace_size(device.name) if device.is_gpu else 0
        self.gdn_scratch = device.empty((size,), "uint8") if size else None
        self.has_decode = config.dtype == "bfloat16"
        if self.has_decode and device.is_gpu:
            heads = {"h": config.key_heads, "hv": config.value_heads}
            self.has_decode = bool(fi_ffi.gdn_decode.supports(**heads, state_dtype="float32"))

    def clear(self, slot):
        for kept in (self.states, self.convs) if LINEAR in self.config.layers else ():
            self.device.zero(kept.rows(slot, slot + 1))

    def _scratch(self, name, count, *shape, dtype=None, most=None):
        """The first `count` of all rows there may be: what a graph has recorded never moves."""
        shape = (most or self.max_tokens, *shape)
        return self.device.scratch(name, shape, dtype or self.config.dtype).rows(0, count)

    def linear(self, name, x, weight, is_last=False, **more):
        """A product in scratch memory; `is_last`: other kernels come before the next product."""
        out = self.scratch(name, x.shape[0], weight.shape[0], **more)
        if isinstance(weight, Blocks) and not self.device.is_few(x, weight):
            fi_ffi.fp8_blockscale_gemm_sm90(*self.quantised(x, weight), out)
        else:
            self.device.linear(out, x, weight, is_last)
        return out

    def quantised(self, x, weight):
        """x in fp8 and the weight, then what each 128 of x's rows and the weight's blocks have."""
        n, width = x.shape
        depth, room = width // BLOCK, -(-n // 4) * 4
        values = self.scratch(f"fp8 of {width}", n, width, dtype="float8_e4m3fn")
        most = -(-self.max_tokens // 4) * 4
        scales = self.scratch(f"scales of {width}", most, depth, dtype="float32", most=most)
        scales = view(scales, depth, room)
        fi_ffi.fp8_quantize_1x128(x, values, scales)
        return values, weight.values, scales, weight.scales

    def forward(self, batch):
        """Logits, float32 [samples, vocabulary], of the tokens that `batch.last` names, or all."""
        config, device, n = self.config, self.device, batch.tokens.shape[0]
        residual = self.scratch("residual", n, config.hidden)
        self.look_up(residual, batch.tokens)
        norms = [(layer["input_norm"], layer.get("qkv")) for layer in self.layers]
        x, linears = self.join(None, residual, *norms[0]), 0
        for kind, layer, cache, after in zip(
            config.layers, self.layers, self.caches, [*norms[1:], (self.norm, None)], strict=True
        ):
            if kind == LINEAR:
                x = self.linear_attention(layer, x, residual, batch, linears)
                linears += 1
            else:
                x = self.attention(layer, x, residual, batch, cache, kind)
            own = layer.get("attended_norm")
            x = self.join(x, residual, layer["post_norm"], layer.get("gate_up"), own)
            x = self.mlp(layer, x, residual)
            x = self.join(x, residual, *after, layer.get("mlp_norm"))
        if batch.last is None:
            return self.logits(x)
        if not batch.last.shape[0]:  # pieces of prompts only
            return None
        last = self.scratch("last", batch.last.shape[0], config.hidden, most=self.slots)
        device.take(last, x, batch.last)
        return self.logits(last)

    def look_up(self, out, tokens):
        """Each token's embedding, which one rank has."""
        start, latest = self.rank * self.embed.shape[0], view(self.latest, self.slots + 1)
        self.device.take(out, self.embed, tokens, start, latest)
        if self.group:
            self.group.all_reduce(out, stream=self.device.stream)
        if self.scale:
            self.combine(out, self.scale, TIMES)

    def onto(self, residual, x, weight):
        """residual += x @ weight.T; or the product, where `join` has to add it."""
        if self.is_apart or (isinstance(weight, Blocks) and not self.device.is_few(x, weight)):
            return self.linear("x", x, weight, is_last=self.is_apart)
        self.device.linear(residual, x, weight, adds=True)
        return None

    def join(self, x, residual, weight, following=None, own=None):
        """The norm of residual + x, which is left in `residual`; without x that of `residual`.

        With a norm of its `own`, x is normed before it is added.  Ranks add x up: with one kernel
        for decoding, where they reach each other's memory; its norm has no 1 + weight.  A product
        that is `following` norms on the way where that is quicker.
        """
        config, stream = self.config, self.device.stream
        if x is None:
            # Norms by 1 + weight are not the products'.
            is_one = following is not None and not config.adds_one
            if is_one and self.device.can_norm(residual, following):
                return Norm(residual, weight, config.eps)
            x = self.scratch("x", *residual.shape)
            self.rms(x, residual, weight, config.eps, **self.pdl)
            return x
        if self.group:
            fusion = self.group.fusion
            if fusion and x.shape[0] <= fusion.max_tokens and not config.adds_one:
                self.group.allreduce_fusion(
                    x, pattern="kARResidualRMSNorm", residual_in=residual, residual_out=residual,
                    norm_out=x, rms_gamma=weight, rms_eps=config.eps, stream=stream,
                    trigger_completion_at_end=not self.device.has_pdl,
                )  # fmt: skip
                return x
            self.group.all_reduce(x, stream=stream)
        if own is not None:
            self.rms(x, x, own, config.eps, **self.pdl)
        self.add_norm(x, residual, weight, config.eps, **self.pdl)
        return x

    def logits(self, x):
        """Of the whole vocabulary, on each rank."""
        n, width, vocab = x.shape[0], self.head.shape[0], self.config.vocab
        name = "part" if self.group else "logits"
        part = self.linear(name, x, self.head, is_last=True, dtype="float32", most=self.slots)
        if not self.group:
            return part
        every = self.gathered("every part", part)
        out = self.scratch("logits", n, vocab, dtype="float32", most=self.slots)
        self.device.launch("joined", (vocab, n), out, every, width, vocab)
        return out

    def gathered(self, name, x):
        """float32 [ranks, n, ...]: each rank's x, of as many rows as there are requests."""
        most = self.ranks * self.slots
        out = self.scratch(name, self.ranks * x.shape[0], *x.shape[1:], dtype="float32", most=most)
        self.group.all_gather(x, out, stream=self.device.stream)
        return view(out, self.ranks, *x.shape)

    def of_first(self, tokens):
        """Those that rank 0 has drawn, for all ranks go on with the same."""
        if not self.group:
            return tokens
        bits = fi_ffi.TensorDesc(tokens.ptr, tokens.shape, "float32", device=tokens.device)
        every = self.gathered("every token", bits)
        return fi_ffi.TensorDesc(every.ptr, tokens.shape, "int32", device=tokens.device)

    def close(self):
        is_lost = self.group and not self.group.is_open
        if self.group:
            self.group.close()
        self.device.close(is_lost)

    def mlp(self, layer, x, residual):
        if "router" in layer:
            return self.mixture(layer, x)
        product = self.scratch("product", x.shape[0], self.config.intermediate)
        if self.config.is_silu and self.device.is_few(x, layer["gate_up"]):
            self.device.linear_silu(product, x, layer["gate_up"])
        else:
            gate_up = self.linear("gate_up", x, layer["gate_up"])
            of = fi_ffi.silu_and_mul if self.config.is_silu else fi_ffi.gelu_tanh_and_mul
            of(product, gate_up, **self.pdl)
        return self.onto(residual, product, layer["down"])

    def mixture(self, layer, x):
        config, n = self.config, x.shape[0]
        logits = self.linear("router", x, layer["router"], dtype="float32")
        count = config.top_k + config.has_shared
        chosen = self.scratch("chosen", n, count, dtype="int32")
        shares = self.scratch("shares", n, count, dtype="float32")
        self.device.launch(
            "route", (32, n), chosen, shares, logits, layer["router_bias"],
            config.experts, config.top_k, int(config.norm_topk), int(config.has_shared),
            block=32,
        )  # fmt: skip
        out = self.scratch("mixed", n, config.hidden)
        self.experts(out, x, chosen, shares, layer)
        return out

    def biased(self, x, layer, name):
        if name in layer:
            self.combine(x, layer[name], PLUS)
        return x

    def combine(self, x, others, how):
        """Rows of x with others, or each with the same one."""
        n, width = x.shape
        step = np.int64(others.strides[0] if len(others.shape) > 1 else 0)
        self.device.launch("combined", (width, n), x, others, step, width, how)

    def attention(self, layer, x, residual, batch, cache, kind):
        """Of each token over its request's pages, its own key and value among them; see `onto`."""
        config, n = self.config, x.shape[0]
        heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
        qkv = self.biased(self.linear("qkv", x, layer["qkv"], is_last=True), layer, "qkv_bias")
        starts, out = batch.starts_of_pieces, self.scratch("attended", n, heads, dim)
        q, attend = self.place(layer, qkv, batch, cache, kind), batch.attend[kind]
        more = self.pdl | ({"sm_scale": config.sm_scale} if config.sm_scale else {})
        if config.has_sinks:
            more["sink"] = layer["sinks"]
        if starts:
            part, lse = self.of_pieces("part", n, dim), self.of_pieces("lse", n, dtype="float32")
            attend(q, *cache, part, lse, **more)
            self.device.launch("merged", (128 * heads, n), out, part, lse, starts, PIECES, dim,
                               block=128)  # fmt: skip
        else:
            attend(q, *cache, out, **more)
        out = view(out, n, heads * dim)
        if config.has_gate:
            gates = columns(qkv, (heads + 2 * kv_heads) * dim, heads * dim)
            self.combine(out, gates, SIGMOID)
        x = self.onto(residual, out, layer["out"])
        self.biased(residual if x is None else x, layer, "out_bias")
        return x

    def of_pieces(self, name, n, *shape, **more):
        """Memory of that shape for each head of each piece of n requests."""
        name, most = f"{name} of pieces", FEW * PIECES
        return self.scratch(name, n * PIECES, self.config.heads, *shape, most=most, **more)

    def place(self, layer, qkv, batch, cache, kind):
        """The norms of q and k, RoPE, and k and v to their pages, in one kernel; q."""
        config, n, starts = self.config, qkv.shape[0], batch.starts_of_pieces
        heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
        if starts:
            q, pieces = self.of_pieces("queries", n, dim), PIECES
        else:
            q, pieces, starts = self.scratch("queries", n, heads, dim), 0, np.uint64(0)
        norms = (layer["q_norm"], layer["k_norm"]) if config.qk_norm else (np.uint64(0),) * 2
        threads = THREADS if n > PLACED else dim // 8 * (heads + 2 * kv_heads)
        self.device.launch(
            "place", (threads, n), q, *cache, qkv, *norms, self.cos_sin[kind],
            batch.positions, batch.requests, batch.kv_indptr, batch.kv_indices, starts,
            np.int64(qkv.strides[0]), np.int64(cache[0].strides[0]), pieces, heads, kv_heads,
            dim, config.rotary_dim, cache[0].shape[1], np.float32(config.eps),
            int(config.qk_norm), block=THREADS,
        )  # fmt: skip
        return q

    def linear_attention(self, layer, x, residual, batch, i):
        """A gated DeltaNet layer: its requests' states go from their slots and back."""
        config, n, b = self.config, x.shape[0], batch.slots.shape[0]
        qkvz = self.linear("qkvz", x, layer["qkvz"])
        ba = self.linear("ba", x, layer["ba"])
        q, k, v = self.convolved(layer, qkvz, batch, i)
        heads, state = config.value_heads, self.states.shape[2:]
        out = self.scratch("delta", n, heads, HEAD)
        pool = columns(self.states, i * math.prod(state), *state)  # of this layer
        if self.has_decode and n == b:  # a token of each request
            self.decoded(out, layer, pool, q, k, v, ba, batch)
        else:
            self.prefilled(out, layer, pool, q, k, v, ba, batch)
        flat = view(out, n * heads, HEAD)
        fi_ffi.rmsnorm(flat, flat, layer["norm"], config.eps, **self.pdl)
        size = config.linear_sizes[2]
        out = view(out, n, size)
        self.combine(out, columns(qkvz, sum(config.linear_sizes), size), SILU)
        return self.onto(residual, out, layer["out"])

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
        device.launch("decays", (n * heads, 1),
                      alpha, beta, ba, layer["a_log"], layer["dt_bias"], n, heads)  # fmt: skip
        state = self.scratch("state", b, heads, HEAD, HEAD, dtype="float32", most=self.slots)
        device.take(state, pool, batch.slots)
        fi_ffi.gdn_prefill(out, state, q, k, v, batch.starts, state, alpha, beta,
                           workspace_buffer=self.gdn_scratch)  # fmt: skip
        device.give(pool, state, batch.slots)

    def convolved(self, layer, qkvz, batch, i):
        """q, k and v after the short convolution, each in memory of its own."""
        sizes, device, n, start, made = self.config.linear_sizes, self.device, qkvz.shape[0], 0, []
        for name, size in zip("qkv", sizes, strict=True):
            out = self.scratch(name, n, size)
            kept = columns(self.convs, (i * sum(sizes) + start) * 3, size, 3)
            device.launch(
                "convolve", (size, batch.slots.shape[0]), out, columns(qkvz, start, size),
                layer["conv"].rows(start, start + size), kept, batch.slots, batch.starts,
                np.int64(qkvz.strides[0]), np.int64(kept.strides[0]), size,
            )  # fmt: skip
            made.append(view(out, n, size // HEAD, HEAD))
            start += size
        return made
