"""Penalties, biases, masks and log probabilities of examples/llm, against float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from engine import Sampling
from engine.sampling import MOST_BIASES, TOP

from tests.llm.serving import BOUND, KINDS, ROUNDING, check_empty, greedy

NONE = {"ignore_eos": True, "temperature": 0.0}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def adjusted(logits: np.ndarray, prompt: list[int], drawn: list[int], sampling: Sampling):
    """The logits of the next token as the parameters have it, one token after another."""
    x = logits.astype(np.float64)
    for token in {*prompt, *drawn}:
        times, factor = drawn.count(token), sampling.repetition_penalty
        x[token] = x[token] / factor if x[token] > 0 else x[token] * factor
        x[token] -= sampling.frequency_penalty * times
        x[token] -= sampling.presence_penalty * (times > 0)
    for token, value in sampling.logit_bias.items():
        x[token] += value
    return x


SOME = [
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.8},
    {"frequency_penalty": -0.7, "presence_penalty": -1.0},
    {"logit_bias": {3: 4.0, 250: -2.0, 11: 0.25}},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4,
     "logit_bias": {40: 3.0}},
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_greatest_is_taken_of_adjusted_logits(serve, kind):
    """Together in one batch, with others that ask for nothing; each follows its own tokens."""
    serving = serve(kind)
    engine = serving.engine(max_tokens=64)
    prompts = [serving.prompt(n) for n in (5, 40, 3, 17, 70, 9, 21)]
    for _ in range(2):  # the second time in slots whose counts are others'
        requests = [
            engine.submit(prompt, Sampling(**NONE, **some, max_tokens=14))
            for prompt, some in zip(prompts, SOME, strict=True)
        ]
        plain = engine.submit(prompts[0], Sampling(**NONE, max_tokens=14))
        engine.run()
        changed = 0
        for request in [*requests, plain]:
            rows = serving.logits[request]
            for i, token in enumerate(request.tokens):
                x = adjusted(rows[i], request.prompt, request.tokens[:i], request.sampling)
                # A tie within a rounding of float32 may go either way.
                assert x[token] >= x.max() - 1e-5 * np.abs(x).max()
                changed += token != rows[i].argmax()
        assert changed > 3
        check_empty(engine)


def test_draws_are_of_adjusted_logits(serve):
    """The share of each first token, with everything at once."""
    serving = serve("llama", num_hidden_layers=1)
    engine = serving.engine(max_batch=50)
    some = {"temperature": 0.8, "repetition_penalty": 1.4, "logit_bias": {5: 6.0, 9: 5.0}}
    prompt, count = serving.prompt(2), 1500
    requests = [
        engine.submit(prompt, Sampling(**some, seed=seed, max_tokens=1, ignore_eos=True))
        for seed in range(count)
    ]
    engine.run()
    x = adjusted(serving.logits[requests[0]][0], prompt, [], requests[0].sampling)
    p = np.exp(log_softmax(x / 0.8))
    got = np.bincount([request.tokens[0] for request in requests], minlength=len(p)) / count
    assert (np.abs(got - p) <= 5 * np.sqrt(p * (1 - p) / count) + 5 / count).all()


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=str)
def test_a_filter_alone_that_leaves_one_token(serve, filters):
    """The most probable; beside a request without filters, hot enough to draw others."""
    serving = serve("llama")
    engine, prompt = serving.engine(), serving.prompt(8)
    hot = {"temperature": 50.0, "seed": 4}
    asks = {"temperature": 0.0}, {"temperature": 1.5, "seed": 3, **filters}, hot
    greedy, one, other = (
        engine.submit(prompt, Sampling(**ask, max_tokens=12, ignore_eos=True)) for ask in asks
    )
    engine.run()
    assert one.tokens == greedy.tokens != other.tokens


@pytest.mark.parametrize("filters", [{"top_k": -1}, {"top_p": 0.9999999}, {"min_p": 1e-7}], ids=str)
def test_a_filter_alone_that_leaves_nearly_all(serve, filters):
    """The same draws as without.  What is left out moves the bounds of all other tokens, so it is
    very little."""
    serving = serve("llama")
    engine, prompt = serving.engine(), serving.prompt(8)
    if "top_k" in filters:
        filters = {"top_k": engine.config.vocab - 1}
    one, other = (
        engine.submit(prompt, Sampling(seed=6, **ask, max_tokens=12, ignore_eos=True))
        for ask in ({}, filters)
    )
    engine.run()
    assert one.tokens == other.tokens


ASKS = [
    {}, {"temperature": 0.0}, {"min_p": 0.1}, {"top_k": 5}, {"top_p": 0.6}, {"logprobs": 2},
    {"presence_penalty": 1.0}, {"logit_bias": {7: 3.0}}, {"min_tokens": 3},
]  # fmt: skip


@pytest.mark.parametrize("ask", ASKS, ids=str)
def test_steps_that_draw_at_once(serve, ask):
    """With the logits, as where nobody looks at these in between: the same, told the same."""
    serving, got = serve("qwen3"), []
    prompts = [serving.prompt(n) for n in (5, 30)]
    for is_looked_at in (True, False):
        engine = serving.engine()
        if not is_looked_at:
            engine.steps.on_logits = None
        requests = [
            engine.submit(prompt, Sampling(**{"seed": n, "max_tokens": 15, **ask}))
            for n, prompt in enumerate(prompts)
        ]
        engine.run()
        got.append([(request.tokens, request.logprobs) for request in requests])
    assert got[0] == got[1]
    assert all(bool(logprobs) == ("logprobs" in ask) for _, logprobs in got[0])


@pytest.mark.parametrize("top", [0, 1, 5, TOP])
def test_log_probabilities(serve, top):
    """Of the model's own logits, whatever is done to them before the draw; beside others."""
    serving = serve("qwen3")
    engine = serving.engine()
    asks = [{"temperature": 0.9}, {"temperature": 0.0}, {"presence_penalty": 2.0},
            {"logit_bias": {7: 50.0}}, {"top_k": 3, "top_p": 0.5}]  # fmt: skip
    requests = [
        engine.submit(serving.prompt(n + 4), Sampling(
            **ask, logprobs=min(top + n, TOP), seed=n, max_tokens=9, ignore_eos=True))
        for n, ask in enumerate(asks)
    ]  # fmt: skip
    silent = engine.submit(serving.prompt(3), Sampling(max_tokens=9, ignore_eos=True))
    engine.run()
    assert silent.logprobs == []
    for request in requests:
        count = request.sampling.logprobs
        assert len(request.logprobs) == len(request.tokens) == 9
        exact = log_softmax(np.array(serving.logits[request][:9]))
        for row, token, (value, ids, values) in zip(
            exact, request.tokens, request.logprobs, strict=True
        ):
            assert abs(value - row[token]) < 1e-4
            assert len(set(ids[:count])) == count
            assert np.abs(row[ids[:count]] - values[:count]).max(initial=0) < 1e-4
            best = np.sort(row)[::-1][:count]
            assert np.abs(best - values[:count]).max(initial=0) < 1e-4
    assert requests[3].tokens == [7] * 9


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_of_a_prompt(serve, kind):
    """In pieces, beside others, and where the cache knows its beginning."""
    serving = serve(kind)
    engine = serving.engine(max_tokens=24, max_batch=4)
    prompt = serving.prompt(70)
    plain = engine.submit(prompt, Sampling(**NONE, max_tokens=3))
    engine.run()
    more = [engine.submit(serving.prompt(n), Sampling(**NONE, max_tokens=20)) for n in (9, 30)]
    request = engine.submit(
        prompt, Sampling(**NONE, max_tokens=3, logprobs=2, prompt_logprobs=True)
    )
    engine.run()
    if serving.where == "cpu":  # a GPU's products round otherwise in other steps
        assert request.tokens == plain.tokens
    assert serving.error(request) <= 1
    assert [len(other.tokens) for other in more] == [20, 20]
    assert request.reused == 0
    told = request.prompt_logprobs
    assert len(told) == 69
    expected = log_softmax(serving.forward(prompt)[:-1])
    got = np.array([value for value, _, _ in told])
    exact = expected[np.arange(69), prompt[1:]]
    # In parts of what roundings of the dtype do by chance to all logits of a row.
    spread = BOUND * serving.forward.spread(prompt, ROUNDING[serving.dtype])[1][:-1]
    assert (np.abs(got - exact) <= 8 * spread).all()
    assert (np.abs(got - exact) / spread).mean() < 2
    for row, (_, ids, values), bound in zip(expected, told, spread, strict=True):
        assert np.abs(row[ids[:2]] - values[:2]).max() <= 8 * bound
        assert values[0] >= values[1]
    check_empty(engine)


def test_a_text_is_not_shorter_than_asked(serve):
    """What would end it cannot be drawn before."""
    serving = serve("llama")
    engine = serving.engine()
    end = serving.forward.raw["eos_token_id"]
    for count in (0, 1, 6):
        request = engine.submit([1, 2], Sampling(
            temperature=0, logit_bias={end: 100.0}, min_tokens=count, max_tokens=10))  # fmt: skip
        engine.run()
        assert len(request.tokens) == count
        assert request.finished == "stop"
        assert end not in request.tokens


class EvenThenOdd:
    """A grammar: tokens alternate, and no token is followed by one below it."""

    def __init__(self, vocab):
        self.vocab, self.last = vocab, -1

    def fill(self, bits, row):
        tokens = np.arange(bits.shape[1] * 32)
        fits = (tokens > self.last) & (tokens % 2 != self.last % 2)
        bits[row] = np.packbits(fits, bitorder="little").view(np.int32)

    def accept(self, token):
        fits = token > self.last and token % 2 != self.last % 2
        self.last = token
        return fits


def test_masks_follow_each_token(serve):
    """Each request draws in every step, and its mask knows the token of the step before."""
    serving = serve("llama", vocab_size=1000)
    engine = serving.engine()
    grammars = [EvenThenOdd(1000) for _ in range(3)]
    requests = [
        engine.request(serving.prompt(5), Sampling(seed=n, max_tokens=4, ignore_eos=True), grammar)
        for n, grammar in enumerate(grammars)
    ]
    engine.waiting.extend(requests)
    other = engine.submit(serving.prompt(5), Sampling(max_tokens=12, ignore_eos=True))
    engine.run()
    assert len(other.tokens) == 12
    for request in requests:
        tokens = request.tokens
        assert tokens and all(a < b and a % 2 != b % 2 for a, b in itertools.pairwise(tokens))
        assert request.finished == ("length" if len(tokens) == 4 else "error")
    check_empty(engine)


def test_a_token_that_does_not_fit_is_not_told(serve):
    """Where none does, after the greatest: the text ends before it."""
    serving = serve("llama", vocab_size=1000)
    engine, grammar = serving.engine(), EvenThenOdd(1000)
    grammar.last = 996
    request = engine.request(serving.prompt(5), greedy(9), grammar)
    engine.waiting.append(request)
    engine.run()
    assert request.finished == "error" and request.tokens in ([999], [997, 998, 999])
    engine = serving.engine()
    grammar.last = 999
    request = engine.request(serving.prompt(5), greedy(9), grammar)
    engine.waiting.append(request)
    engine.run()
    assert (request.finished, request.tokens) == ("error", [])
    check_empty(engine)


def steps_of(engine):
    """How many steps are queued until nothing is left to do."""
    count, queue = 0, engine.runner.queue

    def counted(*given):
        nonlocal count
        count += 1
        return queue(*given)

    engine.runner.queue = counted
    engine.run()
    engine.runner.queue = queue
    return count


@pytest.mark.parametrize("neighbours", [0, 2])
def test_a_grammar_draws_in_every_step(serve, neighbours):
    """One step for the prompt and its first token, one for each other, and none for `length`."""
    serving = serve("llama", vocab_size=1000)
    engine = serving.engine()
    sampling = Sampling(temperature=0, max_tokens=9, ignore_eos=True)
    request = engine.request(serving.prompt(5), sampling, Ascending())
    engine.waiting.append(request)
    others = [engine.submit(serving.prompt(5), sampling) for _ in range(neighbours)]
    assert steps_of(engine) == 9
    assert len(request.tokens) == 9
    assert all(b == a + 1 for a, b in itertools.pairwise(request.tokens))
    assert all(len(other.tokens) == 9 for other in others)
    check_empty(engine)


class Ascending:
    """A grammar: of each token the next one follows."""

    last = 99

    def fill(self, bits, row):
        allowed = np.arange(bits.shape[1] * 32) == self.last + 1
        bits[row] = np.packbits(allowed, bitorder="little").view(np.int32)

    def accept(self, token):
        fits, self.last = token == self.last + 1, token
        return fits


def test_what_others_ask_for_changes_nothing(serve, where):
    """The text of a request is the same whoever its neighbours are."""
    if where != "cpu":
        pytest.skip("a GPU's products round otherwise in other sizes of batch")
    serving = serve("qwen3")
    prompt = serving.prompt(20)
    some = Sampling(seed=4, presence_penalty=1.0, repetition_penalty=1.2, logprobs=3,
                    logit_bias={2: 1.0}, max_tokens=16, ignore_eos=True)  # fmt: skip
    engine = serving.engine()
    alone = engine.submit(prompt, some)
    engine.run()
    engine = serving.engine()
    others = [engine.submit(serving.prompt(9), Sampling(**ask, max_tokens=16)) for ask in SOME[:5]]
    together = engine.submit(prompt, some)
    engine.run()
    assert others
    assert together.tokens == alone.tokens
    assert together.logprobs == alone.logprobs


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"temperature": float("nan")}, "temperature"), ({"top_k": 0.5}, "whole number"),
     ({"max_tokens": 2.5}, "whole number"), ({"max_tokens": "many"}, "max_tokens"),
     ({"max_tokens": None}, "max_tokens"), ({"repetition_penalty": 0}, "repetition_penalty"),
     ({"presence_penalty": 3}, "presence_penalty"), ({"logprobs": 21}, "logprobs")],
    ids=str,
)  # fmt: skip
def test_wrong_numbers(wrong, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**wrong)


def test_a_temperature_that_divides_to_infinity_is_0(serve):
    engine = serve("llama").engine()
    assert Sampling(temperature=1e-39).temperature == 0
    requests = [engine.submit([1, 2], Sampling(temperature=t, max_tokens=9, ignore_eos=True))
                for t in (0, 1e-45, 1e-39, 1e-6)]  # fmt: skip
    coldest = engine.submit([1, 2], Sampling(temperature=1e-5, max_tokens=9, ignore_eos=True))
    engine.run()
    assert len({tuple(request.tokens) for request in [*requests, coldest]}) == 1


def test_as_many_biases_as_there_may_be(serve):
    """Of all slots at once, with the end of the text besides."""
    serving = serve("llama", vocab_size=1100, num_hidden_layers=1)
    engine = serving.engine(max_batch=2)
    bias = dict.fromkeys(range(MOST_BIASES), -1.0)
    some = Sampling(logit_bias=bias, min_tokens=3, max_tokens=3, temperature=0)
    requests = [engine.submit(serving.prompt(4), some) for _ in range(2)]
    engine.run()
    for request in requests:
        assert len(request.tokens) == 3
        for i, token in enumerate(request.tokens):
            x = adjusted(serving.logits[request][i], [], [], some)
            x[engine.config.eos] = -np.inf
            assert x[token] >= x.max() - 1e-5 * np.abs(x).max()
    check_empty(engine)


def test_biases_of_tokens_that_are_none(serve):
    engine = serve("llama").engine()
    for bias in ({257: 1.0}, {-1: 1.0}, dict.fromkeys(range(-2000, 0), 1.0)):
        with pytest.raises(ValueError, match="logit_bias"):
            engine.submit([1], Sampling(logit_bias=bias))
    check_empty(engine)
