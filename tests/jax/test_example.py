"""The example that decodes in jax.jit, as a reader would run it, and that its checks can fail."""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path

import jax
import pytest

import fi_ffi.jax

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "interop"))
import jax_in_jit as example


@pytest.fixture(autouse=True)
def as_jax_is():
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", True)


own = functools.cache(example.own_step)


def run(monkeypatch, steps):
    monkeypatch.setattr(example, "own_step", own)  # compiled once
    monkeypatch.setattr(sys, "argv", ["jax_in_jit.py", "--cpu", "--steps", str(steps)])
    example.main()


def test_it_decodes(monkeypatch, capsys):
    """Over the end of a page of each request, by one compiled program."""
    run(monkeypatch, 20)
    out = capsys.readouterr().out
    decided, different = map(int, re.findall(r"(\d+) (?:of 60 tokens|different ones)", out))
    assert decided > 40 and different > 20, out


def other_sampling(probs, top_k_val):
    return fi_ffi.jax.call("top_k_sampling_from_probs", probs, top_k_val=200, seed_val=3)


FAULTS = {
    # Keys are swapped for values; the norm adds 1 to its weights.
    "swap": ("append_paged_kv_cache", lambda k, v, *rest: fi_ffi.jax.call(
        "append_paged_kv_cache", v, k, *rest), "logits are"),
    "norm": ("fused_add_rmsnorm", functools.partial(
        fi_ffi.jax.call, "gemma_fused_add_rmsnorm"), "logits are"),
    "sampling": ("top_k_sampling_from_probs", other_sampling, "a token is"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_its_check_can_fail(fault, monkeypatch):
    name, wrong, what = FAULTS[fault]
    monkeypatch.setattr(fi_ffi.jax, name, wrong)
    with pytest.raises(AssertionError, match=rf"step \d: (the )?{what} wrong"):
        run(monkeypatch, 5)


def test_its_plans_are_needed(monkeypatch):
    monkeypatch.setattr(fi_ffi.BatchDecodePlan, "replan", lambda *_, **__: None)
    with pytest.raises(AssertionError, match=r"step [1-9]: the logits are wrong"):
        run(monkeypatch, 5)
