"""The real openai client against examples/llm/serve.py in a process of its own."""

from __future__ import annotations

from typing import Any

import openai
import pytest
import requests

from tests.llm.process import ServerProcess

KEY = "sk-of-a-test"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def server(servers: Any, where: str) -> ServerProcess:
    return servers("of a key", where, lambda: ServerProcess(where, "--api-key", KEY))


@pytest.fixture
def client(server: ServerProcess) -> Any:
    return openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0, timeout=60)


def test_models(client, server):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "fi_ffi")
    assert client.models.retrieve("tiny").created == model.created > 1.7e9
    with pytest.raises(openai.NotFoundError) as other:
        client.models.retrieve("gpt")
    assert (other.value.param, other.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt", prompt="x")


def test_the_key(server):
    for key in ("other", "é", ""):
        client = openai.OpenAI(base_url=server.url, api_key=key or "-", max_retries=0)
        with pytest.raises((openai.AuthenticationError, UnicodeEncodeError)):
            client.models.list()
    assert requests.get(f"{server.url}/models", timeout=20).status_code == 401
    assert requests.get(f"{server.address}/health", timeout=20).json() == {"status": "ok"}


def test_a_chat_and_its_stream(client):
    ask = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "seed": 5}
    answer = client.chat.completions.create(**ask)
    assert answer.object == "chat.completion"
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.finish_reason in ("length", "stop")
    # "user: Hello" and "assistant: " by the checkpoint's template, a token for each byte.
    assert answer.usage.prompt_tokens == len("user: Hello\nassistant: ")
    text, reasons, usages = "", [], []
    for chunk in client.chat.completions.create(
        **ask, stream=True, stream_options={"include_usage": True}
    ):
        usages.append(chunk.usage)
        for part in chunk.choices:
            text += part.delta.content or ""
            reasons.append(part.finish_reason)
    assert text == choice.message.content
    assert reasons[-1] == choice.finish_reason and not any(reasons[:-1])
    assert usages[-1].completion_tokens == answer.usage.completion_tokens
    assert not any(usages[:-1])
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hel"},
                                          {"type": "text", "text": "lo"}]}]  # fmt: skip
    again = client.chat.completions.create(**ask | {"messages": parts})
    assert again.choices[0].message.content == choice.message.content


def test_several_choices(client):
    """The first is what it is alone; others have seeds of their own, and all are repeated."""
    # Warm and long, for the tiny model repeats itself.
    ask = {"model": "tiny", "messages": HELLO, "max_tokens": 20, "seed": 5, "temperature": 2}
    one = client.chat.completions.create(**ask).choices[0].message.content
    texts = [
        [c.message.content for c in client.chat.completions.create(**ask, n=4).choices]
        for _ in range(2)
    ]
    assert texts[0] == texts[1]
    assert texts[0][0] == one
    assert len(set(texts[0])) == 4
    # Nor are they those of another seed, near or of the other sign.
    for seed in (4, 6, -5):
        answer = client.chat.completions.create(**ask | {"seed": seed}, n=4)
        texts[0] += [choice.message.content for choice in answer.choices]
    assert len(set(texts.pop(0))) == 16
    streamed = [""] * 4
    for chunk in client.chat.completions.create(**ask, n=4, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts[0]


def test_prompts(client):
    """A list of them, and tokens, give what each gives alone."""
    ask = {"model": "tiny", "max_tokens": 8, "temperature": 0}

    def texts(prompt):
        return [c.text for c in client.completions.create(**ask, prompt=prompt).choices]

    alone = [texts(prompt)[0] for prompt in ("one", "two!")]
    assert texts(["one", "two!"]) == alone
    echoed = client.completions.create(
        **ask | {"max_tokens": 1}, prompt=["one", "two!"], echo=True, logprobs=0
    )
    names = [choice.logprobs.tokens[:-1] for choice in echoed.choices]
    assert names == [[*"one"], [*"two!"]]
    answer = client.completions.create(**ask, prompt=["one", "two!"], n=2)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert [c.text for c in answer.choices] == [alone[0]] * 2 + [alone[1]] * 2
    assert answer.usage.prompt_tokens == 7
    twice = client.completions.create(
        **ask | {"max_tokens": 1}, prompt=["one", "two!"], n=2, echo=True
    )
    assert [choice.text[:3] for choice in twice.choices] == ["one", "one", "two", "two"]


def test_logprobs(client, where):
    ask = {"model": "tiny", "max_tokens": 6, "temperature": 0}
    answer = client.chat.completions.create(**ask, messages=HELLO, logprobs=True, top_logprobs=3)
    (choice,) = answer.choices
    told = choice.logprobs.content
    assert len(told) == answer.usage.completion_tokens
    assert (
        b"".join(bytes(x.bytes) for x in told)
        .decode(errors="replace")
        .startswith(choice.message.content[:1])
    )
    for x in told:
        assert x.top_logprobs[0].token == x.token
        values = [top.logprob for top in x.top_logprobs]
        assert values == sorted(values, reverse=True) and len(values) == 3
        assert x.logprob == values[0] <= 0
    old = client.completions.create(**ask, prompt="Hi", logprobs=2, echo=True)
    logprobs = old.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert logprobs.text_offset[:3] == [0, 1, 2]
    assert old.choices[0].text.startswith("Hi")
    # The prompt alone, as those ask who score texts.
    scored = client.completions.create(
        model="tiny", prompt=old.choices[0].text, max_tokens=0, logprobs=2, echo=True
    )
    if "\ufffd" not in old.choices[0].text:
        assert scored.choices[0].text == old.choices[0].text
        # A GPU's matrix products round otherwise in other sizes of batch.
        exact = {"abs": 0.0 if where == "cpu" else 0.02}
        again = scored.choices[0].logprobs.token_logprobs
        assert again[1:] == pytest.approx(logprobs.token_logprobs[1:], **exact)
        assert scored.usage.completion_tokens == 0


def test_stops_and_tokens_of_the_text(client):
    ask = {"model": "tiny", "prompt": "Once", "temperature": 0, "max_tokens": 12,
           "extra_body": {"ignore_eos": True}}  # fmt: skip
    answer = client.completions.create(**ask)
    assert answer.usage.completion_tokens == 12
    text = answer.choices[0].text
    stopped = client.completions.create(**ask, stop=[text[5:7], "never"]).choices[0]
    assert stopped.text == text[: text.index(text[5:7])]
    assert stopped.finish_reason == "stop"
    token = client.completions.create(
        **ask | {"max_tokens": 1}, logit_bias={str(n): 100 for n in (7,)}
    )
    forced = token.choices[0].text
    assert len(forced) == 1
    banned = client.completions.create(**ask, logit_bias={"7": 100}, frequency_penalty=0)
    assert banned.choices[0].text == forced * 12


def test_errors_are_those_of_the_interface(client):
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"temperature": 1e9}, "temperature"), ({"max_tokens": 2.5}, "max_tokens"),
        ({"messages": []}, "messages"), ({"messages": [{"role": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"top_logprobs": 2}, "top_logprobs"), ({"extra_body": {"top_k": 0.5}}, "top_k"),
        ({"extra_body": {"what": 1}}, "what"), ({"tool_choice": "required"}, "tool_choice"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a"), ({"stop": ["a", 1]}, "stop[1]"),
        ({"logit_bias": {"1": 1, "01": 2}}, "logit_bias"),
        ({"modalities": ["audio"]}, "modalities[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "messages[0].content[0]"),
    ]  # fmt: skip
    for more, param in wrong:
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**{"model": "tiny", "messages": HELLO} | more)
        assert refused.value.param == param
        assert param in refused.value.body["message"]


def test_what_clients_send_and_nothing_here_reads(client):
    """It is told in a header; an answer goes back as the package has it, nulls among it."""
    ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 4, "temperature": 0}
    said = client.chat.completions.create(**ask).choices[0].message
    ask["messages"] = [
        *HELLO, said.model_dump(),
        {"role": "user", "content": [
            {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
    ]  # fmt: skip
    ignored = {
        "service_tier": "auto", "reasoning_effort": "low", "prompt_cache_key": "a",
        "safety_identifier": "b", "verbosity": "low", "modalities": ["text"],
    }  # fmt: skip
    plain = client.chat.completions.with_raw_response.create(**ask, top_logprobs=0)
    assert "x-ignored" not in plain.headers
    for stream in (False, True):
        more = ignored | {"stream": stream}
        answer = client.chat.completions.with_raw_response.create(**ask, **more)
        assert answer.headers["x-ignored"].split(", ") == sorted(ignored)
    assert plain.parse().choices[0].message.content is not None


def test_metrics(client, server):
    before = [server.metric(name) for name in ("generated_tokens_total", "requests_total")]
    answer = client.completions.create(
        model="tiny", prompt="Once", max_tokens=9, extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 9
    assert server.metric("generated_tokens_total") == before[0] + 9
    assert server.metric("requests_total") == before[1] + 1
    for name in ("first_token_seconds_count", "token_seconds_count", "step_seconds_count", "pages"):
        assert server.metric(name) > 0
    assert server.metric("rejected_requests_total") == 0


def test_the_page(server):
    page = requests.get(server.address, timeout=20)
    assert page.headers["content-type"].startswith("text/html")
    assert "v1/chat/completions" in page.text
