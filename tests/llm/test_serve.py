"""examples/llm/serve.py over real HTTP: completions, streams, stops, clients that go away."""

from __future__ import annotations

import json
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
from engine.checkpoint import make_tiny
from serve import application, begun
from tokenizers import Tokenizer

from tests.llm.serving import check_empty

PROMPT = "Once upon a time"


class Served:
    """A server on a thread, and what a client asks of it."""

    def __init__(self, path: Path, where: str) -> None:
        self.tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        self.engine = load(path, where, num_pages=64, max_batch=4, max_tokens=64)
        app = application(self.engine, self.tokenizer, "tiny")
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"

    def post(self, stream: bool = False, **body: Any) -> requests.Response:
        body = {"prompt": PROMPT, "seed": 3, "temperature": 1.0} | body
        more = {"stream": True} if stream else {}
        return requests.post(f"{self.url}/completions", json=body | more, stream=stream, timeout=60)

    def text(self, **body: Any) -> str:
        answer = self.post(**body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    def wait_until_empty(self) -> None:
        end = time.monotonic() + 20
        while self.engine.running or self.engine.waiting or self.engine.queued:
            assert time.monotonic() < end, "requests are still there"
            time.sleep(0.02)
        check_empty(self.engine)


@pytest.fixture
def served(tmp_path: Path, where: str, rng: Any) -> Iterator[Served]:
    served = Served(make_tiny(tmp_path / "model", "llama", rng), where)
    yield served
    served.wait_until_empty()
    served.server.should_exit = True
    served.thread.join(20)
    assert not served.thread.is_alive()


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
    ask = {"max_tokens": 900, "prompt": "x"}
    if stream:
        answer = served.post(stream=True, **ask)
        next(answer.iter_lines())
        assert served.engine.running
        answer.close()
    else:
        body = {"prompt": "x", "max_tokens": 900, "seed": 1}
        with pytest.raises(requests.exceptions.ReadTimeout):
            requests.post(f"{served.url}/completions", json=body, timeout=(5, 0.3))
    start = time.monotonic()
    served.wait_until_empty()
    assert time.monotonic() - start < 10
    # Nobody's text is different for it.
    assert served.text(max_tokens=8) == served.text(max_tokens=8)


@pytest.mark.parametrize(
    ("body", "words"),
    [({"temperature": -1}, "temperature"), ({"max_tokens": 5000}, "there is room for"),
     ({"prompt": []}, "one token or more"), ({"prompt": [999]}, "from 0 to 256"),
     ({"prompt": 5}, "int"), ({"n": 2}, "n other than 1"), ({"logprobs": 1}, "logprobs"),
     ({"prompt": ["a", "b"]}, "a string or a list of token ids"), ({"temperature": "hot"}, "")],
)  # fmt: skip
def test_what_cannot_be_served(served, body, words):
    answer = served.post(**body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_what_is_no_request(served):
    for data in (b"{", b"[]", b"null", b"\xff"):
        assert requests.post(f"{served.url}/completions", data=data, timeout=20).status_code == 400
    assert requests.get(f"{served.url}/completions", timeout=20).status_code == 405
    assert requests.get(f"{served.url}/models", timeout=20).json()["data"][0]["id"] == "tiny"


def test_an_engine_that_fails_tells_everyone(served, monkeypatch):
    """No client waits for ever: those that are served end with "error", new ones are refused."""

    def fail(work):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    monkeypatch.setattr(served.engine.steps, "queue", fail)
    answer = served.post(max_tokens=8)
    assert answer.json()["choices"][0]["finish_reason"] == "error"
    assert served.post(max_tokens=8).status_code == 500
    for request in [*served.engine.running]:
        served.engine._finish(request, "error")


def test_sampling_of_the_body(served):
    ids = served.tokenizer.encode(PROMPT).ids
    served.wait_until_empty()
    expected = served.tokenizer.decode([*served.engine.generate(ids, Sampling(
        temperature=0.7, top_k=30, top_p=0.9, min_p=0.01, seed=9, max_tokens=12))])  # fmt: skip
    body = {"temperature": 0.7, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "seed": 9}
    assert served.text(**body, max_tokens=12) == expected
