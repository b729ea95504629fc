"""What examples/llm computes, against the same architecture in float64, written independently."""

from __future__ import annotations

import engine.config
import engine.model
import engine.steps
import engine.weights
import ml_dtypes
import numpy as np
import pytest
from engine import Sampling

import fi_ffi

from tests.llm.forward import e2m1
from tests.llm.serving import KINDS, MORE, check_empty, greedy, texts

LENGTHS = (1, 5, 40, 17, 100)
by_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("kind", [*KINDS, *MORE])
@pytest.mark.parametrize("max_tokens", [512, 33], ids=["whole", "cut"])
def test_prompts_and_decoding(serve, kind, max_tokens):
    """Each request's prompt, whole or in pieces, and six tokens after it."""
    serving = serve(kind)
    engine = serving.engine(max_tokens=max_tokens)
    drawn = Sampling(max_tokens=6, ignore_eos=True)
    requests = [engine.submit(serving.prompt(n), drawn) for n in LENGTHS]
    engine.run()
    for request in requests:
        assert len(request.tokens) == 6
        assert request.finished == "length"
        assert serving.error(request) <= 1
    check_empty(engine)


@by_kind
def test_long_decoding(serve, kind):
    """Over pages' ends, and far from the prompt."""
    serving = serve(kind)
    engine = serving.engine(page_size=16)
    request = engine.submit(serving.prompt(13), Sampling(max_tokens=40, ignore_eos=True))
    engine.run()
    assert serving.error(request) <= 1


@pytest.mark.parametrize("kind", ["qwen3", "llama", "qwen3_next"])
@pytest.mark.parametrize("page_size", [8, 32])
def test_pieces_and_longer_requests(serve, kind, page_size, where, monkeypatch):
    """Few and short ones decode in pieces; then one is longer, and then there are more."""
    monkeypatch.setattr(engine.steps, "PIECE", 8)
    serving = serve(kind)
    made = serving.engine(max_batch=12, page_size=page_size, num_pages=64 if page_size > 8 else 200)
    runner = made.runner
    if where == "cpu":
        runner.has_pieces = True
    elif not runner.has_pieces:
        pytest.skip("the kernels in use have no decode for these heads")

    def served(*lengths, tokens=4):
        drawn = Sampling(max_tokens=tokens, ignore_eos=True)
        requests = [made.submit(serving.prompt(n), drawn) for n in lengths]
        made.run()
        assert all(serving.error(request) <= 1 for request in requests)

    served(1, page_size, page_size + 1, 5 * page_size - 2, tokens=9)
    assert 4 in runner.plans_of_pieces
    assert {size for size, _ in runner.plans} == {0}
    served(16 * page_size - 2)  # to the end of what 16 pieces hold, and past it
    assert 1 in runner.plans_of_pieces
    assert {size for size, _ in runner.plans} == {0, 1}
    served(*range(3, 12))
    assert {size for size, _ in runner.plans} == {0, 1, 12}


@by_kind
def test_together_as_alone(serve, kind, where):
    serving = serve(kind)
    prompts = [serving.prompt(n) for n in LENGTHS]
    together = serving.engine(max_tokens=512)  # where prompts are not cut
    got = [together.submit(prompt, greedy()) for prompt in prompts]
    together.run()
    alone = serving.engine(max_tokens=512)
    for prompt, request in zip(prompts, got, strict=True):
        one = alone.submit(prompt, greedy())
        alone.run()
        if where == "cpu":  # a row of a product does not depend on the others
            assert one.tokens == request.tokens
            assert (np.array(serving.logits[one]) == np.array(serving.logits[request])).all()
        else:  # a GPU's round otherwise in other sizes: each is right, within bounds
            assert serving.error(one) <= 1
    assert all(serving.error(request) <= 1 for request in got)


@by_kind
def test_neighbours_do_not_matter(serve, kind, where):
    """The same request beside others, in another slot, and with them arriving later."""
    serving = serve(kind)
    prompt = serving.prompt(20)
    mine = Sampling(temperature=1.5, top_k=100, top_p=0.95, min_p=0.001, seed=11, max_tokens=12,
                    ignore_eos=True)  # fmt: skip
    other = Sampling(temperature=0.7, seed=5, max_tokens=14, ignore_eos=True)
    first = texts(serving.engine(), [prompt, serving.prompt(20)], mine, other)[0]
    engine = serving.engine()
    moved = texts(engine, [serving.prompt(20), prompt], other, mine)[1]
    assert first == moved
    if where == "cpu":  # with the beginning found in the cache, a GPU's products round otherwise
        again = texts(engine, [serving.prompt(20), prompt], other, mine)[1]
        assert first == again


@pytest.mark.parametrize("way", ["decoded", "prefilled"])
def test_states_a_token_further(serve, way, where, monkeypatch):
    """A hybrid's decoding steps by `gdn_decode`, and as prompts of one token."""
    if way == "prefilled":
        monkeypatch.setattr(engine.model.Model, "decoded", engine.model.Model.prefilled)
    serving = serve("qwen3_next", torch_dtype="bfloat16")
    made = serving.engine()
    if not made.model.has_decode:
        pytest.skip("the kernels in use have no gdn_decode for these heads")
    drawn = Sampling(max_tokens=12, ignore_eos=True)
    requests = [made.submit(serving.prompt(n), drawn) for n in (1, 5, 40)]
    made.run()
    assert all(serving.error(request) <= 1 for request in requests)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3_next"])
def test_in_bfloat16(serve, kind):
    """As they are published: the tests' own are in float16."""
    serving = serve(kind, torch_dtype="bfloat16")
    engine = serving.engine()
    requests = [engine.submit(serving.prompt(n), greedy()) for n in (1, 40, 300)]
    engine.run()
    assert all(serving.error(request) <= 1 for request in requests)


def test_other_numbers_of_heads(serve):
    """Five query heads a key head: prefill's kernels decode, on tensor cores."""
    serving = serve("qwen3", num_attention_heads=5, num_key_value_heads=1)
    engine = serving.engine()
    requests = [engine.submit(serving.prompt(n), greedy()) for n in (9, 520)]
    engine.run()
    assert all(serving.error(request) <= 1 for request in requests)
    assert isinstance(engine.runner.plans[2, "full_attention"], fi_ffi.BatchPrefillPlan)


def turning(real):
    """Weights in fp8, with scales that are not their own."""

    def one(*args):
        weight = real(*args)
        if not isinstance(weight, engine.weights.Blocks):
            return weight
        scales = weight.scales[::-1, ::-1]
        return weight._replace(scales=scales if (scales != weight.scales).any() else 1.5 * scales)

    return one


def but(**others):
    """A layer's tensors, some of which are full of another number."""

    def changed(real):
        def layer(*args):
            found = real(*args)
            return found | {
                name: np.full_like(found[name], value) for name, value in others.items()
            }

        return layer

    return changed


@pytest.mark.parametrize("heads", [4, 8])
def test_windows_without_sinks(serve, heads):
    """Layers from the second on see 30 keys; decoding on CUDA cores and on tensor cores."""
    serving = serve(
        "qwen3", num_attention_heads=heads, use_sliding_window=True, sliding_window=30,
        max_window_layers=1, layer_types=["full_attention", "sliding_attention"],
        attention_bias=True,
    )  # fmt: skip
    engine = serving.engine()
    requests = [engine.submit(serving.prompt(n), greedy(40)) for n in (9, 100)]
    engine.run()
    assert all(serving.error(request) <= 1 for request in requests)
    assert {kind for _, kind in engine.runner.plans} == {"full_attention", "sliding_attention"}


def changed(model, **fields):
    """A pydantic model with other fields."""
    return model.model_copy(update=fields)


def without_last(real):
    """The last of the experts gives zeros."""

    def arranged(self, layer, i):
        found = np.array(layer["fc2"])
        found[-1] = 0
        return real(self, layer, i) | {"fc2": found}

    return arranged


GEMMA = engine.KINDS["gemma3_text"]
FAULTS = {
    # Keys and values change places; queries have the norm of keys; another theta; Llama 3's slower
    # frequencies are left as they were; a state is not cleared; a gate is left out.
    "pages": (
        "llama", engine.model.Model, "place",
        lambda real: lambda self, *given: real(self, *given[:-2], given[-2][::-1], given[-1]),
    ),
    "norm": (
        "qwen3", engine.model.Model, "place",
        lambda real: lambda self, layer, *rest: real(
            self, layer | {"q_norm": layer["k_norm"]}, *rest
        ),
    ),
    "theta": (
        "qwen3", engine.config.Rope, "cos_sin",
        lambda real: lambda self, *given: real(changed(self, rope_theta=5000.0), *given),
    ),
    "llama3": ("llama", engine.config.Rope, "_llama3", lambda real: lambda self, given: given),
    "state": ("qwen3_next", engine.model.Model, "clear", lambda real: lambda self, slot: None),
    # Blocks have each other's scales; one of three matrices has another's.
    "fp8 blocks": ("qwen3_fp8", engine.weights, "one", turning),
    "fp8 scale": ("llama_fp8", engine.weights, "one", turning),
    # The gate's rows come first; experts' weights do not add up to 1.
    "moe halves": (
        "qwen3_moe", engine.kinds.mixtral.Sparse, "sparse",
        lambda real: lambda self: real(self) | {"fc1": dict([*real(self)["fc1"].items()][::-1])},
    ),
    "moe shares": (
        "qwen3_moe", engine.config.Config, "read",
        lambda real: lambda path: changed(real(path), norm_topk=False),
    ),
    # Of gpt-oss: all keys are seen, heads have no sinks, positions are not stretched, biases are
    # left out, experts are not limited, 4 bits are counted from the upper half.
    "gpt_oss window": (
        "gpt_oss", engine.config.Config, "windows",
        lambda real: property(lambda self: dict.fromkeys(self.layers, -1)),
    ),
    "gpt_oss sinks": ("gpt_oss", engine.KINDS["gpt_oss"], "arranged", but(sinks=-30)),
    "gpt_oss yarn": (
        "gpt_oss", engine.config.Rope, "_yarn",
        lambda real: lambda self, given, *rest: (given, 1.0),
    ),
    "gpt_oss biases": (
        "gpt_oss", engine.model.Model, "biased", lambda real: lambda self, x, layer, name: x
    ),
    "gpt_oss limit": ("gpt_oss", engine.KINDS["gpt_oss"], "arranged", but(swiglu_limit=7)),
    "gpt_oss halves": (
        "gpt_oss_mxfp4", engine.weights, "fours",
        lambda real: lambda blocks, scales: real(blocks << 4 | blocks >> 4, scales),
    ),
    "gate": ("qwen3_next", engine.model.Model, "combine", lambda real: lambda *args: None),
    # The expert of all tokens has no say.  Of Gemma embeddings are small, scores have the usual
    # factor, layers in a window turn as others do, halves of a layer have no norm, GELU is SiLU.
    "shared": ("qwen3_next", engine.KINDS["qwen3_next"], "arranged", without_last),
    "gemma embeddings": ("gemma3_text", GEMMA, "embedding_scale", lambda real: None),
    "gemma scores": ("gemma3_text", GEMMA, "sm_scale", lambda real: None),
    "gemma rope": ("gemma3_text", GEMMA, "rope_of", lambda real: lambda self, kind: self.rope),
    "gemma norms": (
        "gemma3_text", engine.model.Model, "join",
        lambda real: lambda self, *given: real(self, *given[:4]),
    ),
    "gemma gelu": ("gemma3_text", GEMMA, "is_silu", lambda real: True),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(serve, fault, monkeypatch):
    kind, owner, name, wrong = FAULTS[fault]
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    serving = serve(kind, is_deep=True)  # so that it is far from the bound
    engine = serving.engine(max_batch=1)
    requests = [engine.submit(serving.prompt(40), greedy()) for _ in range(2)]
    engine.run()
    error = max(serving.error(request) for request in requests)
    print(f"{fault}: {error:.1f} of the bound")
    assert error > 1


# With sizes that kernels take as they are, and with smaller ones, which are filled up.
@pytest.mark.parametrize(("hidden", "inner", "bits"), [(256, 384, 4.25), (128, 96, None)])
@pytest.mark.parametrize("release", ["0.6.13", "0.6.18"])  # scales in rows, and folded
def test_experts_stay_in_4_bits(serve, where, hidden, inner, bits, release, put_release):
    if where == "cpu":  # kernels are those of one release
        put_release(release)
    elif not (found := fi_ffi.cutlass_fused_moe.supports(mode="mxfp4")):
        pytest.skip(found.reason)
    serving = serve("gpt_oss_mxfp4", hidden_size=hidden, intermediate_size=inner)
    made = serving.engine()
    layers = made.model.layers
    parts = [part for layer in layers for name in ("fc1", "fc2") for part in layer[name]]
    assert all(part.dtype.name == "uint8" for part in parts)
    if where == "cpu":
        axes = {len(layer[name].scales.shape) for layer in layers for name in ("fc1", "fc2")}
        assert axes == {5 if release == "0.6.18" else 3}
    if bits:
        elements = len(layers) * 8 * 3 * hidden * inner
        assert 8 * sum(part.span_bytes for part in parts) == bits * elements
    request = made.submit(serving.prompt(9), greedy(3))
    made.run()
    assert serving.error(request) <= 1


def test_widened(rng):
    """4 bits in bfloat16, where no kernels take them; each number and power, exactly."""
    blocks = rng.integers(0, 256, (3, 5, 4, 16)).astype(np.uint8)
    scales = rng.integers(64, 190, (3, 5, 4)).astype(np.uint8)
    values = np.stack([e2m1(blocks.astype(float) % 16), e2m1(blocks // 16 + 0.0)], -1)
    expected = values.reshape(3, 5, 4, 32) * 2.0 ** (scales[..., None].astype(float) - 127)
    got = engine.weights.fours(blocks, scales).widened()
    assert got.dtype == ml_dtypes.bfloat16
    assert (got.astype(np.float64) == expected.reshape(3, 5, 128)).all()


class Found(dict):
    """Tensors by name, as a checkpoint has them."""

    def __call__(self, name):
        return self[name]


FP8 = ml_dtypes.float8_e4m3fn


@pytest.mark.parametrize("k", [128, 256])
@pytest.mark.parametrize("n", [64, 128, 192, 256, 320])
def test_scales_of_blocks(n, k, rng):
    """One of each 128 x 128, of which the last rows may be half a block; or one of all."""
    values = rng.standard_normal((n, k)).astype(FP8)
    wanted = len(range(0, n, 128)), len(range(0, k, 128))
    scales = rng.uniform(0.5, 2, wanted).astype(np.float32)
    made = engine.weights.one(Found(w=values, w_scale_inv=scales), "w")
    assert made.values is values and (made.scales == scales).all()
    whole = engine.weights.one(Found(w=values, w_scale=np.float32([3])), "w")
    assert whole.scales.shape == wanted and (whole.scales == 3).all()
    for rows, columns in ((1, 0), (-1, 0), (0, 1)):
        wrong = np.ones((wanted[0] + rows, wanted[1] + columns), np.float32)
        if wrong.size > 1:
            with pytest.raises(ValueError, match="has scales"):
                engine.weights.one(Found(w=values, w_scale_inv=wrong), "w")
    for cut in (values[:-1], values[:, :-1]):
        with pytest.raises(ValueError, match="has scales"):
            engine.weights.one(Found(w=cut, w_scale_inv=scales), "w")
