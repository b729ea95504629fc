"""Continuous batching in examples/llm: pages, slots, reuse, cancellation, and drawing tokens."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from engine import Config, Request, Sampling, load
from engine.device import Cpu
from engine.pages import Pages
from engine.sampling import columns_of, keep, uniform
from engine.weights import Weights, of_layer
from tiny import make_tiny

from tests.llm.serving import KINDS, check_empty, greedy, texts


def test_more_requests_than_slots_and_pages(serve):
    serving = serve("llama")
    engine = serving.engine(num_pages=20, max_batch=3, max_tokens=40)
    requests = []
    for n in serving.rng.integers(1, 120, 25):
        length = int(serving.rng.integers(1, 30))
        sampling = Sampling(max_tokens=length, ignore_eos=True)
        requests.append(engine.submit(serving.prompt(int(n)), sampling))
    most = 0
    while engine.step() is not None:
        most = max(most, len(engine.running))
    assert most == 3
    assert all(len(request.tokens) == request.sampling.max_tokens for request in requests)
    for request in serving.rng.choice(requests, 6, replace=False):
        assert serving.error(request) <= 1
    check_empty(engine)


def test_a_request_too_large_for_what_is_left_waits(serve):
    engine = serve("llama").engine(num_pages=11, page_size=16)
    large = engine.submit([1] * 100, greedy(20))  # 8 of 10 pages
    second = engine.submit([2] * 40, greedy(20))  # 4
    engine.step()
    assert large.slot is not None
    assert second.slot is None
    engine.run()
    assert len(second.tokens) == 20
    check_empty(engine)


def test_a_request_that_waits_holds_none_of_the_pages_with_its_beginning(serve):
    engine = serve("llama").engine(num_pages=11, page_size=16)
    large = engine.submit([1] * 118, greedy(9))  # 8 of 10 pages
    for _ in range(3):
        engine.step()
    second = engine.submit([1] * 40 + [2] * 40, greedy(27))  # 5, two of which are there
    for _ in range(4):
        engine.step()
        assert second.slot is None and large.slot is not None
    engine.run()
    assert second.reused == 32
    check_empty(engine)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_prompts_beginning_is_found_again(serve, kind, where):
    serving = serve(kind)
    start = serving.prompt(50)
    fresh, engine = serving.engine(), serving.engine()
    ends = [serving.prompt(n) for n in (1, 9, 40)]
    first = engine.submit(start + ends[0], greedy())
    engine.run()
    for end in ends:
        request = engine.submit(start + end, greedy())
        engine.run()
        assert request.reused == 48  # three full pages
        assert serving.error(request) <= 1
        if where == "cpu":
            assert request.tokens == texts(fresh, [start + end], greedy())[0]
    assert first.reused == 0
    # The whole of it: one token at least is computed, to draw from.
    exact = engine.submit(start[:48], greedy())
    engine.run()
    assert exact.reused == 32
    # Text that was generated is in pages too.
    more = engine.submit(first.prompt + first.tokens + serving.prompt(3), greedy())
    engine.run()
    assert more.reused == 48
    longer = engine.submit(start + ends[2], greedy(30))
    engine.run()
    after = engine.submit(longer.prompt + longer.tokens, greedy())
    engine.run()
    assert after.reused == (90 + 29) // 16 * 16
    assert serving.error(after) <= 1
    check_empty(engine)


def test_the_same_prompt_twice_at_once_has_one_set_of_pages(serve):
    serving = serve("llama")
    engine = serving.engine(max_batch=2)
    prompt = serving.prompt(40)
    requests = [engine.submit(prompt, greedy(n)) for n in (30, 34)]
    for _ in range(16):
        engine.step()
    one, two = (request.pages for request in requests)
    assert [request.reused for request in requests] == [0, 32]
    assert one[:3] == two[:3]
    assert one[3] != two[3]
    engine.run()
    assert all(serving.error(request) <= 1 for request in requests)
    check_empty(engine)


def test_more_pages_are_named_than_there_are(serve):
    """Eight requests that share most of a prompt."""
    serving = serve("llama")
    engine = serving.engine(num_pages=24)
    start = serving.prompt(160)
    texts(engine, [start], greedy(2))
    requests = [engine.submit(start + serving.prompt(4), greedy(8)) for _ in range(8)]
    engine.run()
    for request in requests:
        assert request.reused == 160
        assert serving.error(request) <= 1
    check_empty(engine)


def test_another_beginning_is_not_taken_for_it(serve):
    serving = serve("qwen3")
    engine = serving.engine()
    prompt = serving.prompt(64)
    texts(engine, [prompt], greedy())
    for place in (0, 17, 47):
        other = [*prompt]
        other[place] = (other[place] + 1) % 256
        request = engine.submit(other, greedy())
        engine.run()
        assert request.reused == place // 16 * 16
        assert serving.error(request) <= 1


def test_linear_attention_reuses_nothing(serve):
    serving = serve("qwen3_next")
    engine = serving.engine()
    prompt = serving.prompt(60)
    texts(engine, [prompt], greedy())
    again = engine.submit(prompt, greedy())
    engine.run()
    assert again.reused == 0
    assert serving.error(again) <= 1


def test_pages_that_nobody_uses_make_room(serve):
    """The longest idle first, from the end of a prompt on."""
    serving = serve("llama")
    engine = serving.engine(num_pages=11)
    prompts = [serving.prompt(64) for _ in range(6)]
    for prompt in prompts:
        texts(engine, [prompt], greedy(4))
    for prompt in (prompts[5], prompts[0]):
        request = engine.submit(prompt, greedy(4))
        engine.run()
        assert serving.error(request) <= 1
        assert (request.reused > 0) == (prompt is prompts[5])
    check_empty(engine)


@pytest.mark.parametrize("kind", KINDS)
def test_cancelled(serve, kind):
    """While waiting, in its prompt, with a token under way, and after the end."""
    serving = serve(kind)
    engine = serving.engine(max_batch=2, max_tokens=16)
    running = [engine.submit(serving.prompt(n), greedy(20)) for n in (5, 60)]
    waiting = engine.submit(serving.prompt(5), greedy())
    engine.cancel(waiting)
    assert waiting.finished == "cancelled"
    for _ in range(3):
        engine.step()
    for request in running:
        assert request.slot is not None
        engine.cancel(request)
        engine.cancel(request)
    check_empty(engine)
    # Their slots and pages serve others, while what was queued still runs.
    after = [engine.submit(serving.prompt(n), greedy(9)) for n in (30, 3)]
    engine.run()
    assert all(serving.error(request) <= 1 for request in after)
    assert all(len(request.tokens) < 20 for request in running)
    check_empty(engine)


def test_generate(serve):
    serving = serve("llama")
    engine = serving.engine()
    prompt = serving.prompt(10)
    tokens = [*engine.generate(prompt, greedy(10))]
    assert tokens == texts(engine, [prompt], greedy(10))[0]
    stream = engine.generate(prompt, greedy(10))
    assert [next(stream) for _ in range(3)] == tokens[:3]
    stream.close()
    check_empty(engine)


def test_the_end_of_text(serve):
    """The token that ends a text is not part of it; ignore_eos makes it one."""
    serving = serve("llama")
    prompt = serving.prompt(10)
    plain = texts(serving.engine(), [prompt], greedy(12))[0]
    end = plain[-1]
    at = plain.index(end)
    for file in ("config.json", "generation_config.json"):
        path = serving.path / file
        had = path.read_text() if path.exists() else "{}"
        path.write_text(json.dumps(json.loads(had) | {"eos_token_id": [999, end]}))
        engine = serving.engine()
        request = engine.submit(prompt, Sampling(temperature=0, max_tokens=12))
        engine.run()
        assert request.tokens == plain[:at]
        assert request.finished == "stop"
        assert texts(engine, [prompt], greedy(12))[0] == plain
        check_empty(engine)
        path.write_text(had)


def shares(serving, sampling, count=4000):
    """How often each token is drawn from the same logits, and the logits."""
    engine = serving.engine(max_batch=50)
    prompt = serving.prompt(1)
    drawn = Counter()
    for seed in range(count):
        request = engine.submit(prompt, Sampling(**sampling, seed=seed, max_tokens=1))
    requests = [request]
    while engine.step() is not None:
        pass
    for request, rows in serving.logits.items():
        drawn[request.tokens[0] if request.tokens else engine.config.eos[0]] += 1
        logits = rows[0].astype(np.float64)
    assert requests
    return drawn, logits


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2},
     {"top_k": 20, "top_p": 0.8, "min_p": 0.05, "temperature": 1.3}],
    ids=str,
)  # fmt: skip
def test_tokens_are_drawn_by_their_probabilities(serve, sampling):
    serving = serve("llama", num_hidden_layers=1)
    count = 1500
    drawn, logits = shares(serving, sampling, count)
    p = np.exp((logits - logits.max()) / sampling.get("temperature", 1))
    p /= p.sum()
    order = np.argsort(-p)
    left = np.ones(len(p), bool)
    left[order[sampling.get("top_k", len(p)) :]] = False
    q = np.where(left, p, 0) / p[left].sum()
    before = np.cumsum(q[order]) - q[order]
    left[order[before >= sampling.get("top_p", 2)]] = False
    left &= p >= sampling.get("min_p", 0) * p.max()
    q = np.where(left, p, 0) / p[left].sum()
    assert all(left[token] for token in drawn)
    got = np.array([drawn[token] for token in range(len(p))]) / count
    # Five standard deviations, and five draws where hardly any are expected.
    assert (np.abs(got - q) <= 5 * np.sqrt(q * (1 - q) / count) + 5 / count).all()


def test_temperature_0_takes_the_greatest(serve):
    serving = serve("qwen3")
    engine = serving.engine()
    request = engine.submit(serving.prompt(7), greedy(10))
    drawn = Sampling(seed=1, temperature=100, max_tokens=10, ignore_eos=True)  # all alike
    other = engine.submit(serving.prompt(7), drawn)
    engine.run()
    assert request.tokens == [int(row.argmax()) for row in serving.logits[request][:10]]
    assert other.tokens != [int(row.argmax()) for row in serving.logits[other][:10]]


def test_a_seed_is_repeated_and_none_is_not(serve):
    engine = serve("llama").engine()

    def text(seed):
        return texts(engine, [[1, 2, 3]], Sampling(seed=seed, max_tokens=16, ignore_eos=True))[0]

    assert text(1) == text(1)
    assert text(1) != text(2)
    assert text(None) != text(None)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p"), ({"top_p": 1.5}, "top_p"),
     ({"min_p": 2}, "min_p"), ({"top_k": -1}, "top_k"), ({"max_tokens": 0}, "max_tokens")],
)  # fmt: skip
def test_wrong_parameters(wrong, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**wrong)


def test_requests_that_can_never_be_run(serve):
    engine = serve("llama").engine(num_pages=5)
    for prompt, words in (([], "one token"), ([257], "from 0 to 256"), ([-1], "from 0 to 256"),
                          ([1] * 60, "room for 64")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            engine.submit(prompt, greedy(5))
    check_empty(engine)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"model_type": "gpt2"}, "gpt2"), ({"rope_scaling": {"rope_type": "linear"}}, "linear"),
     ({"attention_bias": True}, "attention_bias"),
     ({"use_sliding_window": True, "sliding_window": 9}, "use_sliding_window is True"),
     ({"use_qk_norm": False}, "use_qk_norm is False"),
     ({"model_type": "llama", "use_qk_norm": True}, "which nothing here computes"),
     ({"quantization_config": {"bits": 4}}, "quantization_config"),
     ({"quantization_config": {"quant_method": "fp8"}}, "with bfloat16"),
     ({"shared_expert_intermediate_size": 128}, "shared_expert_intermediate_size differs"),
     ({"head_dim": 512}, "256 at most"),
     ({"partial_rotary_factor": 0.3}, "RoPE is of 76 numbers"),
     ({"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 9,
       "shared_expert_intermediate_size": None}, "num_experts_per_tok is 9, of 8 experts"),
     ({"linear_key_head_dim": 64}, "linear_key_head_dim is 64: Input should be 128")],
)  # fmt: skip
def test_models_that_are_not_here(serve, change, words):
    path = serve("qwen3_next").path
    raw = json.loads((path / "config.json").read_text()) | change
    (path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=words):
        Config.read(path)


def test_one_file_and_shards(serve, tmp_path):
    """The same weights in one file without an index; a missing one is named."""
    from safetensors.numpy import load_file, save_file

    serving = serve("qwen3")
    prompt = serving.prompt(9)
    sharded = texts(serving.engine(), [prompt], greedy())[0]
    tensors = {}
    for shard in serving.path.glob("*.safetensors"):
        tensors |= load_file(shard)
    one = tmp_path / "one"
    one.mkdir()
    save_file(tensors, one / "model.safetensors")
    (one / "config.json").write_text((serving.path / "config.json").read_text())
    engine = load(one, serving.where, num_pages=8, max_batch=2, max_tokens=32)
    serving.engines.append(engine)
    assert texts(engine, [prompt], greedy())[0] == sharded
    with pytest.raises(KeyError, match="no tensor model.nothing"):
        Weights(one)("model.nothing")


def test_a_file_beside_an_index_of_others(serve, where):
    """Of both, model.safetensors is read, as transformers does: the index may be left behind."""
    from safetensors.numpy import load_file, save_file

    serving = serve("qwen3")
    prompt, tensors = serving.prompt(9), {}
    sharded = texts(serving.engine(), [prompt], greedy())[0]
    for shard in serving.path.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    save_file(tensors, serving.path / "model.safetensors")
    assert (serving.path / "model.safetensors.index.json").exists()
    assert texts(serving.engine(), [prompt], greedy())[0] == sharded


# What files of the hub have, by kind: of an older or newer transformers, or of one model alone.
AS_PUBLISHED = [
    ("llama", {"num_key_value_heads": None, "torch_dtype": "float16"}, ("kv_heads", 4)),
    ("llama", {"rope_theta": None}, ("rope.rope_theta", 10000.0)),
    ("gemma3_text", {"rope_theta": None}, ("rope.rope_theta", 1e6)),
    ("gemma3_text", {"rope_theta": None}, ("local_theta", 1000.0)),
    ("mixtral", {"rope_theta": None}, ("rope.rope_theta", 1e6)),
    ("gpt_oss", {"rope_theta": None}, ("rope.rope_theta", 150000.0)),
    ("qwen3_next", {"partial_rotary_factor": None}, ("rope.partial_rotary_factor", 0.25)),
    ("qwen3_moe", {"num_experts": None, "num_local_experts": 8}, ("experts", 8)),
    ("qwen3_next", {"num_experts": None, "num_local_experts": 8}, ("experts", 8)),
    ("qwen3_moe", {"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0},
     ("qk_norm", True)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "expected"), AS_PUBLISHED, ids=str)
def test_fields_as_published(tmp_path, kind, change, expected):
    """Each default is that of the kind's class in transformers."""
    path = make_tiny(tmp_path, kind)
    raw = json.loads((path / "config.json").read_text()) | change
    raw = {name: value for name, value in raw.items() if value is not None}
    (path / "config.json").write_text(json.dumps(raw))
    found = Config.read(path)
    for name in expected[0].split("."):
        found = getattr(found, name)
    assert found == expected[1]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("no scales", "there is not one of"),
        ("other blocks", "has scales"),
        ("mixed", "all or none"),
    ],
)
def test_weights_in_fp8_that_do_not_fit(tmp_path, rng, wrong, words):
    name = "model.layers.1.self_attn.k_proj.weight"

    class Wrong(Weights):
        def __contains__(self, other):
            return super().__contains__(other) and (
                wrong != "no scales" or other != f"{name}_scale_inv"
            )

        def __call__(self, other):
            if wrong == "other blocks" and other == f"{name}_scale_inv":
                return super().__call__(other)[:, :1]
            found = super().__call__(other)
            return found.astype(np.float32) if wrong == "mixed" and other == name else found

    path = make_tiny(tmp_path / "one", "qwen3_fp8", rng)
    with pytest.raises((ValueError, KeyError), match=words):
        of_layer(Wrong(path), Config.read(path), 1)


def test_pages_by_themselves(rng):
    """Takes and returns at random: no page is ever used by two that do not share its tokens."""
    pages, held = Pages(40, 4), []
    for _ in range(3000):
        if held and rng.random() < 0.5:
            tokens, mine = held.pop(rng.integers(len(held)))
            for page, start in zip(mine, range(0, len(tokens), 4), strict=False):
                sharing = [other for other, theirs in held if page in theirs]
                assert all(other[: start + 4] == tokens[: start + 4] for other in sharing)
            pages.give_back(mine)
            continue
        tokens = rng.integers(0, 2, rng.integers(1, 30)).tolist()
        found = pages.find(tokens)
        assert len(found) * 4 < len(tokens)
        need = -(-len(tokens) // 4) - len(found)
        if need > pages.available:
            pages.give_back(found)
            continue
        mine = found + pages.take(int(rng.integers(0, need + 1)))
        pages.remember(mine, len(found), tokens[len(found) * 4 : len(mine) * 4])
        held.append((tokens, mine))
    for _, mine in held:
        pages.give_back(mine)
    assert sorted([*pages.free, *pages.idle]) == [*range(1, 40)]
    assert not any(pages.users)


def test_a_number_that_decides_is_below_1_in_float32():
    """Or no token's share of the probabilities would have it."""
    request = Request([1], Sampling(seed=1))
    request.numbers = SimpleNamespace(random=lambda: 1 - 2**-53)
    assert np.float32(1 - 2**-24) == np.float32(uniform(request)) < 1


def test_parameters_of_a_slot():
    columns = columns_of(2, 257)
    keep(columns, 0, Sampling(temperature=0, top_k=9999), 257)
    assert [column[0] for column in columns.values()] == [1, 257, 4, 0, 0, 0, 1]


@pytest.mark.parametrize("kind", ["llama", "qwen3_next"])
def test_as_many_pages_as_there_is_memory_for(serve, kind, monkeypatch):
    """By the bytes that they take, on each rank; no more than requests can have; 1,024 on a CPU."""
    serving, asked, rooms = serve(kind), [], [90, 70]
    small = {"num_pages": None, "max_batch": 2}
    assert serving.engine(**small).pages.total == 2 * 2048 // 16
    assert serving.engine(**small | {"max_batch": 64}).pages.total == 1023

    def fitting(self, size):
        asked.append(size)
        return rooms.pop()

    monkeypatch.setattr(Cpu, "fitting", fitting)
    engine = serving.engine(**small, tp=2, way="threads")
    assert engine.pages.total == 69
    whole = engine.model
    caches = [cache for pair in whole.caches if pair for cache in pair]
    size = sum(2 * int(np.prod(cache.shape)) for cache in caches)
    assert asked == [size // 70] * 2
    assert len(texts(engine, [serving.prompt(30)], greedy(5))[0]) == 5
    rooms += [1]
    with pytest.raises(ValueError, match="no memory is left"):
        serving.engine(**small)
