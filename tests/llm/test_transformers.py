"""The float64 model of the tests beside Hugging Face's, where it is installed with torch."""

from __future__ import annotations

import numpy as np
import pytest
from engine import Config
from tiny import make_tiny

from tests.llm.forward import Forward
from tests.llm.serving import LAYERS, MORE

KINDS = ("llama", "qwen3", "qwen3_moe", "gpt_oss", "gpt_oss_mxfp4", "qwen3_next", *MORE)
FEW = {"num_hidden_layers": 2}


@pytest.mark.parametrize("kind", KINDS)
def test_logits(kind, tmp_path, rng):
    """Of a prompt that is longer than windows, in float32."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = make_tiny(tmp_path, kind, rng, **LAYERS.get(kind, FEW))
    given = {"dtype": torch.float32, "attn_implementation": "eager"}
    if kind == "gpt_oss_mxfp4":
        given["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, **given)
    tokens = rng.integers(0, 256, 60)
    with torch.inference_mode():
        got = model(torch.from_numpy(tokens[None])).logits[0].double().numpy()
    expected = Forward(path)(tokens)
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_config_as_transformers_writes_it(kind, tmp_path, rng):
    """In the words of its release, config.json says the same."""
    transformers = pytest.importorskip("transformers")
    path = make_tiny(tmp_path, kind, rng, **LAYERS.get(kind, FEW))
    transformers.AutoConfig.from_pretrained(path).save_pretrained(tmp_path / "saved")
    ours, theirs = Config.read(path), Config.read(tmp_path / "saved")
    assert (theirs.layers, theirs.windows, theirs.eos) == (ours.layers, ours.windows, ours.eos)
    for attention in ours.windows:
        assert theirs.rope_of(attention) == ours.rope_of(attention)
    words = {"layer_types", "full_attention_interval", "pattern", "rope", "local_theta"}
    assert theirs.model_dump(exclude=words) == ours.model_dump(exclude=words)
    assert [theirs.table(i) for i in range(ours.count)] == [
        ours.table(i) for i in range(ours.count)
    ]
