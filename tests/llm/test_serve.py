"""examples/llm/serve.py over real HTTP: completions, streams, stops, clients that go away."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import uvicorn
from engine import Sampling, load
from server import Link, application
from server.chat import Template
from server.text import begun
from tiny import make_tiny
from tokenizers import Tokenizer

from tests.llm.serving import check_empty

PROMPT = "Once upon a time"


class Served:
    """A server on a thread, and what a client asks of it; `more` is `application`'s."""

    def __init__(self, path: Path, where: str, grammars: Any = None, **more: Any) -> None:
        self.tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        self.engine = load(path, where, num_pages=64, max_batch=4, max_tokens=64)
        link = Link.here(self.engine, grammars)
        app = application(link, self.tokenizer, ["tiny"], Template(path), **more)
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self.url = f"{self.address}/v1"

    def post(self, stream: bool = False, **body: Any) -> requests.Response:
        body = {"prompt": PROMPT, "seed": 3, "temperature": 1.0} | body
        more = {"stream": True} if stream else {}
        return requests.post(f"{self.url}/completions", json=body | more, stream=stream, timeout=60)

    def text(self, **body: Any) -> str:
        answer = self.post(**body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    def metric(self, name: str) -> float:
        text = requests.get(f"{self.address}/metrics", timeout=20).text
        return float(re.search(rf"^fi_ffi_{name} (\S+)$", text, re.MULTILINE)[1])

    def wait_until_empty(self) -> None:
        end = time.monotonic() + 20
        while self.engine.running or self.engine.waiting or self.engine.queued:
            assert time.monotonic() < end, "requests are still there"
            time.sleep(0.02)
        check_empty(self.engine)

    def end(self) -> None:
        self.wait_until_empty()
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture
def served(tmp_path: Path, where: str, rng: Any) -> Iterator[Served]:
    served = Served(make_tiny(tmp_path / "model", "llama", rng, num_hidden_layers=2), where)
    yield served
    served.end()


def events(answer: requests.Response) -> list[Any]:
    lines = [line for line in answer.iter_lines(decode_unicode=True) if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_completion_and_a_stream(served):
    answer = served.post(max_tokens=24).json()
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    assert answer["usage"]["prompt_tokens"] == len(PROMPT)
    used = answer["usage"]["completion_tokens"]
    assert answer["usage"]["total_tokens"] == len(PROMPT) + used
    choice = answer["choices"][0]
    assert choice["finish_reason"] == ("length" if used == 24 else "stop")
    streamed = events(served.post(max_tokens=24, stream=True))
    assert "".join(event["choices"][0]["text"] for event in streamed) == choice["text"]
    reasons = [event["choices"][0]["finish_reason"] for event in streamed]
    assert reasons[-1] == choice["finish_reason"]
    assert set(reasons[:-1]) <= {None}
    assert len({event["id"] for event in streamed}) == 1
    ids = served.tokenizer.encode(PROMPT).ids
    assert served.text(prompt=ids, max_tokens=24) == choice["text"]


def test_clients_at_once_get_what_they_get_alone(served, where):
    bodies = [{"seed": n, "max_tokens": 20, "top_k": 50, "prompt": PROMPT[n:]} for n in range(9)]
    alone = [served.text(**body) for body in bodies]
    with ThreadPoolExecutor(9) as pool:
        together = [*pool.map(lambda body: served.text(**body), bodies)]
    assert all(together)
    if where == "cpu":  # a GPU's matrix products round otherwise in other sizes of batch
        assert together == alone


def test_stop_strings(served):
    """What is told ends before the first of them, also where it comes in pieces."""
    text = served.text(max_tokens=60)
    for length in (1, 3):
        stop = text[len(text) // 2 :][:length]
        cut = text[: text.index(stop)]
        answer = served.post(max_tokens=60, stop=["\0never\0", stop]).json()["choices"][0]
        assert (answer["text"], answer["finish_reason"]) == (cut, "stop")
        streamed = events(served.post(max_tokens=60, stop=stop, stream=True))
        assert "".join(event["choices"][0]["text"] for event in streamed) == cut
    assert served.text(max_tokens=60, stop=[text + "more"]) == text


def test_a_text_that_a_stop_string_ends_is_computed_no_further(served):
    ask = {"max_tokens": 900, "ignore_eos": True, "logit_bias": {"7": 100}}
    text = served.text(**ask | {"max_tokens": 4})
    assert served.text(**ask, stop=text) == ""
    served.wait_until_empty()
    assert served.metric("generated_tokens_total") < 450


def test_prompts_that_are_found_again_are_told(served):
    ask = {"prompt": "x" * 40, "max_tokens": 1}
    told = [served.post(**ask).json()["usage"]["prompt_tokens_details"] for _ in range(3)]
    assert told == [{"cached_tokens": n} for n in (0, 32, 32)]
    served.wait_until_empty()
    assert served.metric("cached_tokens_total") == 64
    assert served.metric("prompt_tokens_total") == 120


def test_how_many_tokens_there_is_room_for(served):
    """As many as /v1/models tells; 16 where the client does not say."""
    answer = requests.get(f"{served.url}/models", timeout=20).json()
    room = answer["data"][0]["max_model_len"]
    assert room == served.engine.pages.total * served.engine.page_size
    for length, status in ((room - 1, 200), (room, 400)):
        answer = served.post(prompt="x" * length, max_tokens=1)
        assert answer.status_code == status
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("max_tokens", "context_length_exceeded")
    assert served.post(ignore_eos=True).json()["usage"]["completion_tokens"] == 16


def test_begun():
    assert [begun("abcab", stop) for stop in ("abx", "x", "bab", "cabs", "abcab")] == [
        2,
        0,
        1,
        3,
        2,
    ]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_gives_its_pages_back(served, stream):
    ask = {"max_tokens": 900, "prompt": "x", "ignore_eos": True}  # else it may end by chance
    if stream:
        answer = served.post(stream=True, **ask)
        next(answer.iter_lines())
        assert served.engine.running
        answer.close()
    else:
        with pytest.raises(requests.exceptions.ReadTimeout):
            requests.post(f"{served.url}/completions", json=ask, timeout=(5, 0.3))
    start = time.monotonic()
    served.wait_until_empty()
    assert time.monotonic() - start < 10
    # Nobody's text is different for it.
    assert served.text(max_tokens=8) == served.text(max_tokens=8)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [({"temperature": -1}, "temperature", "greater than or equal to 0"),
     ({"max_tokens": 5000}, "max_tokens", "there is room for"),
     ({"prompt": []}, "prompt", "a string, a list"), ({"prompt": ""}, "prompt", "one token"),
     ({"prompt": [999]}, "prompt", "from 0 to 256"), ({"prompt": 5}, "prompt", "a list of tokens"),
     ({"n": 0}, "n", "greater"), ({"best_of": 2}, "best_of", "to equal n"),
     ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
     ({"prompt": ["a", 1]}, "prompt", "a list of strings"),
     ({"temperature": "hot"}, "temperature", "number"), ({"more": 1}, "more", "no such field"),
     ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "more than max_tokens"),
     ({"logit_bias": {"257": 1}}, "logit_bias", "from 0 to 256"), ({"stop": ""}, "stop", "1 char"),
     ({"stop": "a" * 257}, "stop", "256"), ({"stop": ["a", "b" * 257]}, "stop[1]", "256"),
     ({"n": 33, "prompt": ["a", "b"]}, "prompt", "64 choices at most"),
     ({"response_format": {"type": "json"}}, "response_format.type", "json_object"),
     ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
     ({"stream_options": {"usage": True}}, "stream_options.usage", "no such field"),
     ({"stream_options": {"include_usage": True}}, "stream_options", "stream to be true"),
     ({"max_tokens": 0}, "max_tokens", "echo"),
     ({"n": 64, "max_tokens": 400, "logprobs": 20}, "logprobs", "537600; 524288 at most"),
     ({"prompt": ["a" * 400] * 64, "max_tokens": 0, "echo": True, "logprobs": 20}, "logprobs",
      "538944")],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_served(served, body, param, words):
    """Each is an error of the interface that names the field."""
    answer = served.post(**body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert param in error["message"] and words in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_page_of_another_site(served):
    """A browser sends a page's origin along; that of this server's own page may ask."""
    body = {"prompt": "Once", "max_tokens": 1}
    for origin, status in (
        (served.address, 200), ("http://example.org", 403), ("null", 403), ("http://[", 403),
    ):  # fmt: skip
        answer = requests.post(
            f"{served.url}/completions", json=body, headers={"Origin": origin}, timeout=20
        )
        assert answer.status_code == status, origin


def test_what_the_checkpoint_gives_for_those_who_do_not_say(tmp_path, where, rng):
    path = make_tiny(tmp_path / "model", "llama", rng, num_hidden_layers=2)
    (path / "generation_config.json").write_text('{"top_k": 1, "top_p": null, "do_sample": true}')
    served = Served(path, where)
    try:
        url, body = f"{served.url}/completions", {"prompt": PROMPT, "max_tokens": 16}

        def told(**more):
            answers = [requests.post(url, json=body | more, timeout=60).json() for _ in range(4)]
            return {answer["choices"][0]["text"] for answer in answers}

        assert told() == told(top_k=None) == told(temperature=0)
        assert len(told(top_k=0)) > 1
    finally:
        served.end()


def test_a_long_name_is_not_told_whole(served):
    answer = served.post(model="x" * 100_000)
    assert answer.status_code == 404 and len(answer.content) < 300


def test_what_is_no_request(served):
    for data in (b"{", b"[]", b"null", b"\xff"):
        assert requests.post(f"{served.url}/completions", data=data, timeout=20).status_code == 400
    assert requests.get(f"{served.url}/completions", timeout=20).status_code == 405
    assert requests.get(f"{served.url}/nothing", timeout=20).json()["error"]["param"] is None
    assert requests.get(f"{served.url}/models", timeout=20).json()["data"][0]["id"] == "tiny"


def test_an_engine_that_fails_tells_everyone(served, monkeypatch):
    """No client waits for ever: those that are served get an error, new ones are refused."""

    def fail(work):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(served.engine.steps, "queue", fail)
    answer = served.post(max_tokens=8)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "engine_error"
    assert served.post(max_tokens=8).status_code == 503
    for request in [*served.engine.running]:
        served.engine._finish(request, "error")


def test_sampling_of_the_body(served):
    ids = served.tokenizer.encode(PROMPT).ids
    served.wait_until_empty()
    expected = served.tokenizer.decode([*served.engine.generate(ids, Sampling(
        temperature=0.7, top_k=30, top_p=0.9, min_p=0.01, seed=9, max_tokens=12))])  # fmt: skip
    body = {"temperature": 0.7, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "seed": 9}
    assert served.text(**body, max_tokens=12) == expected
    assert served.text(top_k=-1) == served.text(top_k=0)  # either leaves out no token
