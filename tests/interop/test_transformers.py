"""The example with transformers on the CPU, that its checks can fail, and what it refuses."""

from __future__ import annotations

import inspect
import itertools
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import fi_ffi

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "interop"))
torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
import transformers_attention as example  # noqa: E402

SIZES = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 64, "vocab_size": 500,
         "num_attention_heads": 4}  # fmt: skip


@pytest.fixture
def attention():
    made = example.Attention()
    made.register("fi_ffi")
    return made


def model():
    found = dict(example.models("cpu", 2, torch.float16, dict.fromkeys(("Qwen3", "Llama"), SIZES)))
    return found["Qwen3"]


def run(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["transformers_attention.py", "--cpu"])
    example.main()


def test_it_generates(monkeypatch, capsys):
    run(monkeypatch)
    out = capsys.readouterr().out
    assert re.findall(r"^(\w+, \w+) cache: 2 \+ 10 runs of plans", out, re.M) == [
        "Qwen3, dynamic", "Qwen3, static", "Llama, dynamic", "Llama, static",
    ]  # fmt: skip


def with_padding(is_there, length, requests=example.requests):
    return requests(np.ones_like(is_there), length)


def other_pages(cache, pages=example.pages):
    return pages(cache.roll(1, 2))


def no_plan(self, module, query, *_, **__):
    return torch.zeros_like(query.transpose(1, 2)), None


FAULTS = {
    # Padding is attended to; each key is another token's; what was planned first is run each time;
    # nothing is written; another scale.
    "padding": (example, "requests", with_padding),
    "pages": (example, "pages", other_pages),
    "replan": (fi_ffi.BatchDecodePlan, "replan", lambda *_, **__: None),
    "run": (fi_ffi.BatchPrefillPlan, "paged_run", lambda self, q, k, v, o, **_: o.fill_(0)),
    "scale": (fi_ffi.BatchDecodePlan, "run", lambda *args, run=fi_ffi.BatchDecodePlan.run, **more:
              run(*args, **more | {"sm_scale": 0.1})),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_its_check_can_fail(fault, monkeypatch):
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError, match="the logits are wrong"):
        run(monkeypatch)


def test_that_no_plan_ran_is_noticed(monkeypatch):
    monkeypatch.setattr(example.Attention, "attend", no_plan)
    with pytest.raises(
        AssertionError, match=r"Qwen3, dynamic cache: \{'prefill': 0, 'decode': 0\}"
    ):
        run(monkeypatch)


@pytest.mark.parametrize("cache", [transformers.DynamicCache, transformers.StaticCache])
@pytest.mark.parametrize("lengths", [[11], [9, 2, 14]], ids=str)
def test_a_prompt_in_parts(cache, lengths, attention):
    """Parts of one token and of several, of which some are padding alone."""
    found = model()
    given = example.prompts(lengths, 500, "cpu")
    tokens, is_there = given.values()
    positions = (is_there.cumsum(1) - 1).clamp(min=0)
    kept = cache(config=found.config, **({"max_cache_len": 20} if "Static" in str(cache) else {}))
    # Renamed between transformers 5.17 and 5.24.
    names = inspect.signature(found.model.layers[0].self_attn.forward).parameters
    name = "cache" if "cache" in names else "past_key_values"
    parts = []
    found.set_attn_implementation("fi_ffi")
    for start, end in itertools.pairwise([0, 3, 4, 8, max(lengths)]):
        with torch.no_grad():
            parts.append(found(
                tokens[:, start:end], attention_mask=is_there[:, :end],
                position_ids=positions[:, start:end], **{name: kept},
            ).logits)  # fmt: skip
    got = torch.cat(parts, 1)
    found = found.float()
    found.set_attn_implementation("eager")
    with torch.no_grad():
        exact = found(tokens, attention_mask=is_there, position_ids=positions).logits
    error = (got - exact).abs().amax(-1)[is_there.bool()]
    assert error.max() < 2**-7 * exact.abs().max()
    assert np.isfinite(got.numpy()).all()
    assert attention.runs == {"prefill": 6, "decode": 2}


def test_without_a_mask_and_without_a_cache(attention):
    """Keys and values have the layout of the projections then."""
    found = model()
    tokens = torch.randint(1, 500, (2, 11))
    logits = {}
    for name in ("fi_ffi", "eager"):
        found.set_attn_implementation(name)
        with torch.no_grad():
            logits[name] = found(tokens, use_cache=False).logits.float()
    error = (logits["fi_ffi"] - logits["eager"]).abs().max()
    assert error < 2**-6 * logits["eager"].abs().max()
    assert attention.runs == {"prefill": 2, "decode": 0}


def ask(found, **more):
    found.set_attn_implementation("fi_ffi")
    with torch.no_grad():
        return found(torch.ones(2, 5, dtype=torch.long), **more)


def test_gradients_are_refused(attention):
    found = model()
    found.set_attn_implementation("fi_ffi")
    with pytest.raises(NotImplementedError, match="gradients of Qwen3Attention: not served"):
        found(torch.ones(2, 5, dtype=torch.long))
    assert attention.runs == {"prefill": 0, "decode": 0}


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ([[1, 1, 1, 1, 0]] * 2, "expected padding on the left alone"),
        ([[1, 0, 1, 1, 1]] * 2, "expected padding on the left alone"),
        ([[1, 1, 1]] * 2, r"attention_mask: got shape \[2, 3\], expected 5 tokens"),
        (torch.zeros(2, 1, 5, 5), "expected what its mask function returns"),
    ],
    ids=["right", "gap", "short", "4D"],
)
def test_masks_that_are_refused(mask, words, attention):
    with pytest.raises(ValueError, match=words):
        ask(model(), attention_mask=torch.as_tensor(mask))
    assert attention.runs == {"prefill": 0, "decode": 0}


def test_a_window_is_refused(attention):
    found = model()
    found.model.layers[1].self_attn.sliding_window = 4
    with pytest.raises(NotImplementedError, match="sliding_window of Qwen3Attention: not served"):
        ask(found)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"is_causal": False}, "attention to later tokens"), ({"dropout": 0.1}, "dropout"),
     ({"softcap": 30.0, "s_aux": 1}, "softcap, s_aux of Linear: not served")],
    ids=["causal", "dropout", "others"],
)  # fmt: skip
def test_arguments_that_are_refused(change, words, attention):
    module, x = torch.nn.Linear(1, 1), torch.ones(1, 2, 3, 64)
    with pytest.raises(NotImplementedError, match=words):
        attention.attend(module, x, x, x, torch.ones(1, 3, dtype=torch.bool), **change)


def test_other_masks_than_causal_ones_are_refused(attention):
    for more in ({"mask_function": lambda *_: True}, {"kv_offset": 3}):
        with pytest.raises(ValueError, match="expected a causal mask over all tokens"):
            attention.mask(2, 3, **more)
