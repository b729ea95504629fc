"""generate() of Hugging Face transformers, with attention by fi_ffi's plans.

The attention function and the mask function are registered by name, which is transformers' way; a
model is made with that name, and the rest is as ever: `generate()`, its caches, batches that are
padded on the left.

The plans read keys and values where transformers' cache has them, without a copy.  A token is a
page of its own: one stride of the cache leads from page to page, and the page numbers of a request
begin after its padding.  A plan is made once for a step, and runs for each layer.

The mask function gives all layers of a step the same tensor, [requests, tokens], so a tensor that
was not seen before is a step that was not planned.  Its padding is read back from the GPU once in a
step.  Transformers compiles a step with a static cache, unless it is told not to:
`disable_compile=True`.

With --cpu: torch's CPU tensors, and reference kernels.  With --times: tokens a second, beside
transformers' own `sdpa`.
"""

import argparse
import copy
import math
import time

import numpy as np
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.masking_utils import causal_mask_function

import fi_ffi

# What other models ask of attention.  It is refused rather than left out.
OTHER = ("sliding_window", "softcap", "s_aux", "position_bias", "cu_seq_lens_q", "head_mask")


class Attention:
    """What is registered: the attention function, and its mask function."""

    def __init__(self):
        self.plans = {}  # by what is fixed: the plan, and what it was planned for
        self.runs = {"prefill": 0, "decode": 0}

    def register(self, name):
        AttentionInterface.register(name, self.attend)
        AttentionMaskInterface.register(name, self.mask)

    def mask(self, batch_size, q_length, q_offset=0, kv_offset=0, attention_mask=None,
             mask_function=causal_mask_function, device=None, **others):  # fmt: skip
        """Which tokens are there, [requests, tokens until now]: what `attend` has as its mask."""
        if mask_function is not causal_mask_function or int(kv_offset):
            raise ValueError("fi_ffi: expected a causal mask over all tokens of the cache")
        tokens = int(q_offset) + q_length
        if attention_mask is None:
            return torch.ones(batch_size, tokens, dtype=torch.bool, device=device)
        if attention_mask.shape[1] < tokens:
            raise ValueError(
                f"fi_ffi: attention_mask: got shape {[*attention_mask.shape]}, expected {tokens} "
                "tokens for each request"
            )
        return attention_mask[:, :tokens]

    def attend(self, module, query, key, value, attention_mask, dropout=0.0, scaling=None,
               is_causal=None, **others):  # fmt: skip
        """Attention of [requests, heads, tokens, head_dim]; returns [requests, tokens, ...]."""
        refused = [name for name in OTHER if others.get(name) is not None]
        refused += ["dropout"] if dropout else []
        refused += ["gradients"] if query.requires_grad and torch.is_grad_enabled() else []
        if is_causal is False or not getattr(module, "is_causal", True):
            refused.append("attention to later tokens")
        if refused:
            what = f"{', '.join(refused)} of {type(module).__name__}"
            raise NotImplementedError(f"fi_ffi: {what}: not served here")
        if attention_mask is None or attention_mask.ndim != 2:
            raise ValueError("fi_ffi: attention_mask: expected what its mask function returns")
        if value.stride() != key.stride():
            key, value = key.contiguous(), value.contiguous()

        batch, heads, length, head_dim = query.shape
        stream = torch.cuda.current_stream(query.device) if query.is_cuda else None
        plan = self.plan(query, key, attention_mask, stream)
        # The projections have a token's heads side by side, so this is a view.
        q = query.transpose(1, 2).reshape(batch * length, heads, head_dim)
        out = torch.empty(batch * length, heads, value.shape[-1], dtype=q.dtype, device=q.device)
        run = plan.run if isinstance(plan, fi_ffi.BatchDecodePlan) else plan.paged_run
        run(q, pages(key), pages(value), out, kv_layout="HND", sm_scale=scaling, stream=stream)
        self.runs["decode" if length == 1 else "prefill"] += 1
        return out.view(batch, length, heads, -1), None

    def plan(self, query, key, attention_mask, stream):
        """The plan of this step: as it is, or planned again if this is the step's first layer."""
        heads, length, kv_heads = *query.shape[1:3], key.shape[1]
        # The decode plan's kernels use no tensor cores, which many heads for a key need.
        by_cores = length > 1 or heads // kv_heads > 2
        fixed = by_cores, length > 1, heads, kv_heads, key.shape[-1], query.dtype, query.device
        step = length, key.stride()
        plan, planned_mask, planned_step = self.plans.get(fixed, (None, None, None))
        if planned_mask is attention_mask and planned_step == step:
            return plan

        starts, rows, firsts, counts = requests(attention_mask.cpu().numpy(), length)
        _, of_request, of_token = page_strides(key)
        indices = np.concatenate(
            [of_request * request + of_token * np.arange(first, first + count)
             for request, first, count in zip(rows, firsts, counts, strict=True)]
        ).astype(np.int32)  # fmt: skip
        indptr = np.cumsum([0, *counts]).astype(np.int32)
        last_page_len = np.ones(len(counts), np.int32)
        sizes = {"num_qo_heads": heads, "num_kv_heads": kv_heads, "page_size": 1,
                 "q_data_type": str(query.dtype).partition(".")[2]}  # fmt: skip
        if by_cores:
            batch = {"qo_indptr": starts, "paged_kv_indptr": indptr, "paged_kv_indices": indices,
                     "paged_kv_last_page_len": last_page_len}  # fmt: skip
        else:
            batch = {"indptr": indptr, "indices": indices, "last_page_len": last_page_len}
        if plan is not None:
            plan.replan(**batch, stream=stream)
        elif by_cores:
            # fa3 does not divide the keys of a request, which one query of few requests needs.
            plan = fi_ffi.BatchPrefillPlan(
                **batch, **sizes, head_dim_qk=key.shape[-1], causal=True, device=str(query.device),
                backend="auto" if length > 1 else "fa2", stream=stream,
            )  # fmt: skip
        else:
            plan = fi_ffi.BatchDecodePlan(
                **batch, **sizes, head_dim=key.shape[-1], device=str(query.device), stream=stream
            )
        self.plans[fixed] = plan, attention_mask, step
        return plan


def requests(is_there, length):
    """The plan's requests, of a mask [requests, tokens]: where the queries of each start, then of
    each its row, its first key, and the number of its keys.

    Padding that has queries is a request of its own, which attends to padding: its output is a
    number, as transformers expects, and nobody's.
    """
    tokens = is_there.shape[1]
    padding = tokens - is_there.sum(1)
    if not (is_there == (np.arange(tokens) >= padding[:, None])).all():
        raise ValueError("fi_ffi: attention_mask: got a gap, expected padding on the left alone")
    found = []  # queries, row, first key, keys
    for row, first in enumerate(padding):
        rest = max(0, first - (tokens - length))  # queries that are padding
        if rest:
            found.append((rest, row, first - rest, rest))
        if rest < length:
            found.append((length - rest, row, first, tokens - first))
    queries, rows, firsts, counts = zip(*found, strict=True)
    return np.cumsum([0, *queries]).astype(np.int32), rows, firsts, counts


def page_strides(cache):
    """Elements from a page to the next, and pages from request to request and token to token."""
    of_request, _, of_token, _ = cache.stride()
    if len(cache) == 1:  # its stride is any number
        of_request = of_token
    unit = math.gcd(of_request, of_token)
    return unit, of_request // unit, of_token // unit


def pages(cache):
    """[requests, heads, tokens, head_dim] as pages of one token: a view of the same memory."""
    batch, heads, tokens, head_dim = cache.shape
    unit, of_request, of_token = page_strides(cache)
    count = (batch - 1) * of_request + (tokens - 1) * of_token + 1
    return cache.as_strided((count, heads, 1, head_dim), (unit, *cache.stride()[1:]))


def models(device, layers, dtype, sizes):
    """A Qwen3 and a Llama of random weights, with which attention is far from uniform."""
    common = {"num_hidden_layers": layers, "num_key_value_heads": 2, "eos_token_id": None,
              "bos_token_id": None, "pad_token_id": 0, "max_position_embeddings": 4096}  # fmt: skip
    of = {
        "Qwen3": (Qwen3ForCausalLM, Qwen3Config),
        "Llama": (LlamaForCausalLM, LlamaConfig),
    }
    for name, (model, config) in of.items():
        chosen = config(**common | sizes[name])
        chosen.initializer_range = chosen.hidden_size**-0.5
        with torch.device(device):
            yield name, model(chosen).to(dtype).eval()


def prompts(lengths, vocabulary, device):
    """Prompts of these lengths, padded on the left."""
    longest = max(lengths)
    is_there = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
    tokens = torch.randint(1, vocabulary, is_there.shape) * is_there
    return {"input_ids": tokens.to(device), "attention_mask": is_there.to(device)}


def generate(model, implementation, given, new, **options):
    model.set_attn_implementation(implementation)
    return model.generate(
        **given, max_new_tokens=new, do_sample=False, disable_compile=True, use_cache=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip


def logits_of(model, given, sequences, new):
    """What `eager` gives for each new token, in one pass over prompts and tokens."""
    model.set_attn_implementation("eager")
    is_there = torch.nn.functional.pad(given["attention_mask"], (0, new), value=1)
    positions = (is_there.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(sequences, attention_mask=is_there, position_ids=positions, use_cache=False)
    return whole.logits[:, -new - 1 : -1].float()


def check(name, model, attention, given, new, **cache):
    """Compare generate() with `eager`: the logits of each token, and tokens where these decide."""
    before = dict(attention.runs)
    got = generate(model, "fi_ffi", given, new, output_logits=True, **cache)
    layers = model.config.num_hidden_layers
    runs = {kind: attention.runs[kind] - before[kind] for kind in before}
    assert runs == {"prefill": layers, "decode": layers * (new - 1)}, f"{name}: {runs}"

    logits = torch.stack(got.logits, 1).float()
    exact = logits_of(copy.deepcopy(model).float(), given, got.sequences, new)
    size = exact.abs().max()
    eager = (logits_of(model, given, got.sequences, new) - exact).abs().max() / size
    error = (logits - exact).abs().max() / size
    assert error < 2 * eager, f"{name}: the logits are wrong: {error:.1e}, by eager {eager:.1e}"

    # Where both chose the same tokens until then, a token is the same, or two logits were too near.
    same = generate(model, "eager", given, new, **cache).sequences == got.sequences
    second, best = exact.topk(2).values.flip(-1).unbind(-1)
    for row, equal in enumerate(same[:, -new:].tolist()):
        if False in equal:
            at = equal.index(False)
            apart = (best - second)[row, at] / size
            assert apart < 4 * eager, f"{name}: token {at} of request {row} is wrong"
    chosen = logits.gather(-1, got.sequences[:, -new:, None])[..., 0]
    assert (chosen == logits.amax(-1)).all(), (
        f"{name}: generate() chose a token that is not the best"
    )
    equal = same[:, -new:]
    print(
        f"{name}: {runs['prefill']} + {runs['decode']} runs of plans; largest error of a logit "
        f"{error:.1e}, by eager {eager:.1e}; {equal.sum()} of {equal.numel()} tokens as by eager"
    )


def tokens_a_second(model, implementation, given, new, **cache):
    best = math.inf
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        made = generate(model, implementation, given, new, min_new_tokens=new, **cache).sequences
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    assert made.shape[1] == given["input_ids"].shape[1] + new
    return len(made) * new / best


def times(device, new=64):
    """Tokens a second of generate(), the prefill included, as a table."""
    sizes = {
        "Qwen3": {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16,
                  "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000},
        "Llama": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
                  "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 32000},
    }  # fmt: skip
    rng = np.random.default_rng()
    batches = {
        "1 of 512": [512],
        "16 of 512": [512] * 16,
        "16 of 128 to 512": [512, *rng.integers(128, 513, 15)],
    }
    print("| model, cache | requests | sdpa | fi_ffi | ratio |\n|---|---|---:|---:|---:|")
    for name, model in models(device, 16, torch.bfloat16, sizes):
        for cache in ("dynamic", "static"):
            for batch, lengths in batches.items():
                given = prompts(lengths, model.config.vocab_size, device)
                sdpa, ours = (
                    tokens_a_second(model, kind, given, new, cache_implementation=cache)
                    for kind in ("sdpa", "fi_ffi")
                )
                row = f"{name}, {cache}", batch, f"{sdpa:,.0f}", f"{ours:,.0f}"
                print(f"| {' | '.join(row)} | {ours / sdpa:.2f} |")
        del model
        torch.cuda.empty_cache()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="reference kernels on CPU tensors")
    parser.add_argument("--times", action="store_true", help="tokens a second, on a GPU")
    args = parser.parse_args()
    attention = Attention()
    attention.register("fi_ffi")
    if args.cpu:
        device, layers, new, lengths = "cpu", 2, 6, (9, 14, 3)
        size = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 64, "vocab_size": 500}
        heads = {"Qwen3": 4, "Llama": 8}
    else:
        device, layers, new, lengths = "cuda:0", 6, 32, (100, 512, 37, 300, 1)
        size = {"hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128, "vocab_size": 5000}
        heads = {"Qwen3": 4, "Llama": 8}
    sizes = {name: size | {"num_attention_heads": count} for name, count in heads.items()}
    for name, model in models(device, layers, torch.float16, sizes):
        given = prompts(lengths, model.config.vocab_size, device)
        check(f"{name}, dynamic cache", model, attention, given, new)
        check(f"{name}, static cache", model, attention, given, new, cache_implementation="static")
    if args.times:
        times(device)


if __name__ == "__main__":
    main()
