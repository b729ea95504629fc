"""The examples that run without a GPU, as a reader would run them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PAGED = EXAMPLES / "paged_attention_cuda_python.py"
GDN = EXAMPLES / "qwen3_next_gdn_cuda_python.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_paged_attention_on_the_cpu() -> None:
    done = run(str(PAGED), "--cpu")
    assert done.returncode == 0, done.stderr
    assert "decode: 64 steps" in done.stdout
    pages = re.search(r"cache: (\d+) tokens in (\d+) of", done.stdout)
    # 64 tokens a request besides the prompts, in pages of 4.
    assert pages is not None and int(pages[1]) == 47 + 3 * 64 and int(pages[2]) == 17 + 18 + 26


@pytest.mark.parametrize(
    "fault",
    [
        # A token is not written, a page is taken twice, keys are swapped for values.
        "example.fi_ffi.append_paged_kv_cache = lambda *args, **more: None",
        "example.Pages.grow = lambda self, n, grow=example.Pages.grow: "
        "(grow(self, n), self.of.__setitem__(0, self.of[1][:len(self.of[0])]))",
        "example.fi_ffi.append_paged_kv_cache = lambda k, v, *rest, append="
        "example.fi_ffi.append_paged_kv_cache, **more: append(v, k, *rest, **more)",
    ],
)
def test_its_check_can_fail(fault: str) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import paged_attention_cuda_python as example
{fault}
sys.argv[1:] = ["--cpu", "--steps", "8"]
example.main()
"""
    done = run("-c", program)
    assert done.returncode == 1
    assert "AssertionError: request" in done.stderr


def test_a_linear_attention_layer_on_the_cpu() -> None:
    done = run(str(GDN), "--cpu")
    assert done.returncode == 0, done.stderr
    assert "request 1: 64 and 11 tokens" in done.stdout


@pytest.mark.parametrize(
    "fault",
    [
        # A state that is not carried on, and tokens taken the other way round.
        "alone = example.fi_ffi.gdn_prefill\n"
        "example.fi_ffi.gdn_prefill = lambda **a: alone(**a | {'input_state': None})",
        "plain = example.token_by_token\n"
        "example.prefill.__globals__['token_by_token'] = lambda layer, x: plain(layer, x[::-1])",
    ],
)
def test_the_layers_check_can_fail(fault: str) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import qwen3_next_gdn_cuda_python as example
{fault}
sys.argv[1:] = ["--cpu"]
example.main()
"""
    done = run("-c", program)
    assert done.returncode == 1
    assert "is wrong" in done.stderr
