"""What proxies send and the openai package does not, by curl, to examples/llm/serve.py."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.llm.process import ServerProcess

pytestmark = pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl on the PATH")

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "ignore_eos": True}
TYPE = ("-H", "Content-Type: application/json")


class Told(NamedTuple):
    """The answer to the last of curl's requests."""

    status: int
    head: str  # with those of answers before, such as 100
    body: str

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@pytest.fixture
def curl(servers: Any, where: str, tmp_path: Path) -> Any:
    """`curl(path, *arguments, body=…)` asks one server, which all tests share; several bodies on
    one connection, as curl has it.
    """
    server = servers("plain", where, lambda: ServerProcess(where))

    def ask(path: str, *words: str, body: bytes | list[bytes] | None = None) -> Told:
        bodies = body if isinstance(body, list) else [] if body is None else [body]
        head, url, line = tmp_path / "head", server.address + path, ["curl"]
        for n, each in enumerate(bodies or [None]):
            line += ["--next"] * (n > 0)
            line += ["--silent", "--show-error", "--max-time", "60", "--dump-header", str(head)]
            if each is not None:
                (tmp_path / f"body{n}").write_bytes(each)
                line += ["--data-binary", f"@{tmp_path}/body{n}"]
            line += [*words, url]
        done = subprocess.run(line, capture_output=True, check=True)
        lines = head.read_text().lower()
        status = re.findall(r"^http/\S+ (\d+)", lines, re.MULTILINE)
        return Told(int(status[-1]), lines, done.stdout.decode())

    return ask


@pytest.mark.parametrize(
    ("more", "ignored"),
    [({"max_completion_tokens": 3, "max_tokens": 900}, ""), ({"tool_choice": "none"}, ""),
     ({"tool_choice": "auto"}, ""), ({"tools": [], "parallel_tool_calls": True}, ""),
     ({"parallel_tool_calls": False}, ""), ({"response_format": {"type": "text"}}, ""),
     ({"stop": []}, ""), ({"stop": None, "n": None, "seed": None, "tools": None}, ""),
     ({"logit_bias": {}, "logprobs": False, "top_logprobs": None, "stream": False}, ""),
     ({"functions": None, "function_call": None, "prediction": None, "audio": None}, ""),
     ({"user": "one", "store": False}, "store, user"),
     ({"metadata": {"user_api_key": None, "tags": ["a"], "spend": 0.5}}, "metadata"),
     ({"prompt_cache_retention": "24h", "prompt_cache_options": {"mode": "implicit"}},
      "prompt_cache_options, prompt_cache_retention")],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_fields(curl, more, ignored, stream):
    """Each changes nothing: three tokens come, and their count."""
    body = CHAT | more | ({"stream": True, "stream_options": {"include_usage": True}} if stream
                          else {})  # fmt: skip
    told = curl("/v1/chat/completions", *TYPE, body=json.dumps(body).encode())
    assert told.status == 200, told.body
    found = re.search(r"^x-ignored: (.*)$", told.head, re.MULTILINE)
    assert (found[1] if found else "") == ignored
    if not stream:
        assert told.json["usage"]["completion_tokens"] == 3
        return
    *chunks, end, rest = told.body.split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    usages = [json.loads(chunk.removeprefix("data: "))["usage"] for chunk in chunks]
    assert usages.pop()["completion_tokens"] == 3
    assert usages and not any(usages)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("words", "head"),
    [(["-H", "OpenAI-Organization: org-1", "-H", "OpenAI-Project: a", "-H", "Accept: */*"], ""),
     (["-H", "Authorization: Bearer sk-of-nobody"], ""), (["-H", "Content-Type:"], ""),
     (["-H", "Content-Type: application/x-www-form-urlencoded"], ""),
     (["-H", "Expect: 100-continue"], "100 continue"), (["--http1.0"], "connection: close"),
     (["--http1.0", "-H", "Connection: keep-alive"], "connection: close"),
     (["-H", "Transfer-Encoding: chunked"], ""), (["--compressed"], ""), (["--http2"], ""),
     (["-H", "X-Forwarded-For: 1.2.3.4, 5.6.7.8", "-H", "Forwarded: for=1.2.3.4"], "")],
    ids=" ".join,
)  # fmt: skip
def test_ways_to_send(curl, words, head, stream):
    body = json.dumps(CHAT | {"temperature": 0, "stream": stream}).encode()
    told = curl("/v1/chat/completions", *words, body=body)
    assert told.status == 200, told.body
    assert head in told.head
    assert told.body.endswith("data: [DONE]\n\n") if stream else len(told.json["choices"]) == 1


def test_a_body_of_megabytes(curl):
    """For which curl asks first; it sends no more than the server will read."""
    body = json.dumps(CHAT | {"metadata": {"a": "x" * 1_500_000}}).encode()
    told = curl("/v1/chat/completions", *TYPE, body=body)
    assert told.status == 200 and "100 continue" in told.head
    told = curl("/v1/chat/completions", *TYPE, body=b" " * (5 << 20))
    assert told.status == 413 and "100 continue" not in told.head
    assert "bytes at most" in told.json["error"]["message"]


def test_a_body_that_is_compressed(curl):
    """It is refused by the name of what is wrong."""
    body = gzip.compress(json.dumps(CHAT).encode())
    told = curl("/v1/chat/completions", *TYPE, "-H", "Content-Encoding: gzip", body=body)
    assert told.status == 415
    assert "Content-Encoding" in told.json["error"]["message"]


def test_one_connection_for_all(curl):
    """After answers, streams and errors alike."""
    asks = [CHAT, CHAT | {"stream": True}, CHAT | {"n": 0}, CHAT]
    words = ["--output", "/dev/null", "--write-out", "%{http_code} %{num_connects}\\n"]
    told = curl("/v1/chat/completions", *words, body=[json.dumps(ask).encode() for ask in asks])
    assert told.body.splitlines() == ["200 1", "200 0", "400 0", "200 0"]


@pytest.mark.parametrize(
    ("words", "path", "status", "head"),
    [([], "/v1/models/tiny", 200, "application/json"), ([], "/v1/models/other", 404, "json"),
     (["--head"], "/health", 200, "content-length: 15"), (["--head"], "/v1/models", 200, "json"),
     (["--head"], "/", 200, "text/html"), (["--head"], "/v1/chat/completions", 405, "allow: post"),
     (["-X", "OPTIONS"], "/v1/chat/completions", 405, "allow: post"),
     ([], "/v1/completions", 405, "allow: post"), (["-X", "DELETE"], "/v1/models/tiny", 405, "get"),
     (["-X", "OPTIONS", "--request-target", "*"], "", 404, "json"),
     (["-X", "POST"], "/v1/chat/completions", 400, "json"), ([], "/v1/chat", 404, "json")],
    ids=str,
)  # fmt: skip
def test_paths(curl, words, path, status, head):
    told = curl(path, *words)
    assert told.status == status
    assert head in told.head
    if status >= 400 and "--head" not in words:
        assert told.json["error"]["message"]
