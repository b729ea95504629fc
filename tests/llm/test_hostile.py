"""What hostile requests and checkpoints cannot do to examples/llm, in bounds of time and memory."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import serve
from engine import Config, Request, Sampling, load
from engine.config import Rope
from engine.words import Words
from server import Link
from server.chat import Template, calls_of
from server.metrics import Metrics
from server.schema import CompletionBody, Refused, parsed
from server.service import Service
from server.text import Text
from starlette.responses import JSONResponse
from tiny import make_tiny
from tokenizers import Tokenizer

from tests.helpers.stress_strength import scaled
from tests.llm.process import ServerProcess

MIB = 1 << 20
# Words of Python and its libraries, which are none of the interface.
PYTHON = re.compile(
    r"Traceback|<class|NoneType|TypeError|ValueError|codec|dict|__|pydantic|0x", re.I
)


@pytest.fixture
def target(servers: Any, where: str) -> ServerProcess:
    """One server for all attacks, each of which must leave it as it was."""

    def start() -> ServerProcess:
        server = ServerProcess(where, "--body-seconds", "2", "--max-queue", "2000")
        server.post()  # what is loaded by the first request
        return server

    return servers("attacked", where, start)


@pytest.fixture
def own(where: str) -> Iterator[Any]:
    """`own(flags)` starts a server that a test may end."""
    made = []

    def start(*flags: str, **more: Any) -> ServerProcess:
        made.append(ServerProcess(where, *flags, **more))
        return made[-1]

    yield start
    for server in made:
        server.child.kill()
        server.end()


def is_well(server: ServerProcess) -> None:
    """It answers as ever, and nothing is left of other requests."""
    answer = server.post(temperature=0, ignore_eos=True)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 4
    end = time.monotonic() + 30
    while server.metric("running_requests") + server.metric("waiting_requests"):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert server.metric("used_pages") == 0
    assert requests.get(f"{server.address}/health", timeout=20).status_code == 200


def bodies() -> Iterator[tuple[str, bytes]]:
    for value in ("2.5", '"many"', "[1]", "-1", "true", "1e99", "{}"):
        yield f"max_tokens {value}", b'{"prompt": "a", "max_tokens": %s}' % value.encode()
    for name in ("temperature", "top_p", "min_p", "presence_penalty", "logit_bias", "n", "seed"):
        for value in ("NaN", "Infinity", "-1e999", '"x"', "[]"):
            yield f"{name} {value}", b'{"prompt": "a", "%s": %s}' % (name.encode(), value.encode())
    yield "top_k 0.5", b'{"prompt": "a", "top_k": 0.5}'
    for text in ("", "null", "5", "[1]", '"many"', "{", '{"prompt": 5}', "\ufeff{}", "NaN"):
        yield f"body {text}", text.encode()
    yield "not UTF-8", b'{"prompt": "\xff"}'
    yield "a lone surrogate", rb'{"prompt": "\ud800"}'
    yield "a surrogate in a stop", rb'{"prompt": "a", "stop": ["\udfff"]}'
    yield "a long number", b'{"seed": %s}' % (b"9" * 100_000)
    for deep in ("[" * 50_000, "[" * 50_000 + "]" * 50_000, '{"a":' * 50_000 + "1" + "}" * 50_000):
        yield "deep", deep.encode()
        yield "a deep prompt", b'{"prompt": %s}' % deep.encode()
        yield (
            "a deep schema",
            (
                b'{"prompt": "a", "response_format": {"type": "json_schema", "json_schema": '
                b'{"name": "a", "schema": %s}}}' % deep.encode()
            ),
        )


def test_bodies_that_are_wrong(target):
    """Each is a 400 with words of the interface, quickly and in little memory."""
    before, start, count = target.peak(), time.monotonic(), 0
    with requests.Session() as session:
        for name, body in bodies():
            answer = session.post(f"{target.url}/completions", data=body, timeout=20)
            assert answer.status_code == 400, name
            error = answer.json()["error"]
            assert error["message"] and not PYTHON.search(error["message"]), (name, error)
            count += 1
            assert session.post(f"{target.url}/chat/completions", data=body).status_code == 400
    assert count > 50
    assert time.monotonic() - start < 60
    assert target.peak() - before < 64 * MIB
    is_well(target)


MANY = 4 * MIB - 200
# What is wrong a million times: to tell each took minutes, and gigabytes.
WRONG_OFTEN = {
    "messages": b'{"messages": [%s1]}' % (b"1," * (MANY // 2)),
    "calls": b'{"messages": [{"role": "user", "tool_calls": [%s1]}]}' % (b"{}," * (MANY // 3)),
    "fields": b'{"prompt": "a", %s}' % b",".join(b'"%x": 1' % n for n in range(MANY // 11)),
    "metadata": b'{"metadata": {%s"a": 1}}' % (b'"a":1,' * (MANY // 6)),
    "prompt": b'{"prompt": [%s-1]}' % (b"-1," * (MANY // 3)),
    "prompts": b'{"prompt": [%s[-1]]}' % (b"[-1]," * (MANY // 5)),
}


@pytest.mark.parametrize("name", WRONG_OFTEN)
def test_a_body_that_is_wrong_a_million_times(target, name):
    before, start = target.peak(), time.monotonic()
    for path in ("completions", "chat/completions"):
        answer = requests.post(f"{target.url}/{path}", data=WRONG_OFTEN[name], timeout=60)
        assert answer.status_code == 400
        assert len(answer.content) < 1000
    assert time.monotonic() - start < 30
    assert target.peak() - before < 256 * MIB
    is_well(target)


@pytest.mark.parametrize("name", ["self", "messages", "tools", "range", "raise_exception", "a b"])
def test_variables_of_the_template_have_any_name(target, name):
    answer = target.post(
        "chat/completions", messages=[{"role": "user", "content": "a"}], max_tokens=1,
        chat_template_kwargs={name: 1},
    )  # fmt: skip
    assert answer.status_code == 200


def test_numbers_that_make_others_of_probabilities(target):
    """A request gets its text, and those after it theirs."""
    expected = target.post(temperature=0, max_tokens=6).json()["choices"][0]["text"]
    for more in (
        {"temperature": 1e-39}, {"temperature": 1e-45}, {"temperature": 5e-324},
        {"temperature": 1e-5}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 100.0},
        {"repetition_penalty": 0.01}, {"repetition_penalty": 100.0, "top_k": 1},
        {"logit_bias": {str(n): -100 for n in range(257)}}, {"logit_bias": {"0": 100}},
    ):  # fmt: skip
        assert target.post(**more).status_code == 200, more
        assert target.post(temperature=0, max_tokens=6).json()["choices"][0]["text"] == expected
    is_well(target)


def test_a_body_of_75_mb(target):
    """Refused by its length, and where it tells none when there is too much of it."""
    before, start = target.peak(), time.monotonic()
    prompt = "a" * 75_000_000
    for data in (json.dumps({"prompt": prompt}), (b'{"prompt": "' + b"a" * MIB for _ in range(75))):
        try:
            answer = requests.post(f"{target.url}/completions", data=data, timeout=30)
            assert answer.status_code == 413
        except requests.ConnectionError:
            pass  # it has closed while the body was being sent
    assert time.monotonic() - start < 30
    assert target.peak() - before < 64 * MIB
    is_well(target)


def test_a_prompt_too_long_for_any_tokens(target):
    """Refused before it is tokenised, also as a chat."""
    start = time.monotonic()
    text = "ab c" * (1 << 19)
    answers = [target.post(prompt=text)]
    answers.append(target.post("chat/completions", messages=[{"role": "user", "content": text}]))
    for answer in answers:
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert time.monotonic() - start < 10


def test_tokenising_keeps_nobody_waiting(own, tmp_path, rng):
    """A megabyte of tokens, while others ask for the server's health."""
    path = make_tiny(tmp_path / "m", "llama", rng, num_hidden_layers=1)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens(["<" + "long" * 1000 + ">"])  # of which a megabyte might be
    tokenizer.save(str(path / "tokenizer.json"))
    target = own("--model", str(path))
    target.post()
    before = target.peak()
    body = json.dumps({"prompt": "ab c" * (1 << 18), "max_tokens": 1})
    answers: list[int] = []

    def send() -> None:
        answers.append(
            requests.post(f"{target.url}/completions", data=body, timeout=60).status_code
        )

    sending = threading.Thread(target=send)
    sending.start()
    longest = 0.0
    while sending.is_alive():
        start = time.monotonic()
        assert requests.get(f"{target.address}/health", timeout=20).status_code == 200
        longest = max(longest, time.monotonic() - start)
        time.sleep(0.01)
    sending.join()
    assert answers == [400]
    assert longest < 5
    assert target.peak() - before < 1024 * MIB
    is_well(target)


def test_calls_with_half_a_character():
    """What a model writes can be told, as it wrote it."""
    for said in ('{"b": "\\ud800é"}', r'"\ud800é"'):
        text = '{"name": "a\\udfff", "arguments": ' + said + "}"
        before, (call,) = calls_of(text, True)
        assert before == ""
        assert call["function"]["name"] == "a\\udfff"
        assert call["function"]["arguments"] == said.strip('"')
        JSONResponse(call)


def test_bytes_that_are_no_text(tmp_path):
    """Continuation bytes without end, or ends that are ignored, cost what text does."""
    tokenizer = Tokenizer.from_file(str(make_tiny(tmp_path / "m") / "tokenizer.json"))
    words = Words(tokenizer)
    by_bytes = {words.bytes(token): token for token in range(256)}
    for byte, said in ((by_bytes[b"\x80"], "\ufffd"), (256, "")):
        text, told, start = Text(words, ["a" * 128 + "b" * 128] * 16), "", time.monotonic()
        for _ in range(20_000):
            told += text.add([byte], None, None).text
        assert time.monotonic() - start < 20
        assert len(told) >= 19_900 * len(said)
        for each in "é€":
            for part in each.encode():
                told += text.add([by_bytes[bytes([part])]], None, None).text
        assert told == said * 20_000 + "é€"
        assert text.add([], None, "length").text == ""


def connected(server: ServerProcess) -> socket.socket:
    host, port = server.address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), 20)


def half_a_body(server: ServerProcess) -> socket.socket:
    held = connected(server)
    held.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
        b'Content-Type: application/json\r\n\r\n{"prompt": "'
    )
    return held


def test_half_a_body(target):
    """It does not come in time: 408."""
    with half_a_body(target) as held:
        held.settimeout(20)
        assert held.recv(1000).split(b"\r\n")[0].split()[1] == b"408"
    is_well(target)


def test_connections_on_which_nothing_happens(target):
    """Idle ones, heads that never end, and answers that nobody reads are cut."""
    before = len(os.listdir(f"/proc/{target.child.pid}/fd"))
    held = [connected(target) for _ in range(300)]
    slow, deaf = [connected(target) for _ in range(3)], connected(target)
    deaf.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2000)
    end = time.monotonic() + 60
    for connection in slow:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\n")
    while slow:
        assert time.monotonic() < end
        time.sleep(0.2)
        for connection in [*slow]:
            try:
                connection.sendall(b"X: a\r\n")
            except OSError:
                slow.remove(connection)
    for connection in held:
        connection.settimeout(20)
        assert connection.recv(1) == b""
        connection.close()
    # Of its answers, more than the system's buffers hold, some megabytes come and then the end.
    while len(os.listdir(f"/proc/{target.child.pid}/fd")) > before:
        assert time.monotonic() < end
        time.sleep(0.2)
    deaf.close()
    is_well(target)


def test_clients_that_go_while_they_send(target):
    """The log has no word of it."""
    for _ in range(20):
        half_a_body(target).close()
    is_well(target)
    assert "Traceback" not in target.output()


def test_an_engine_that_stands_still(target):
    """Its pipe fills up, and the server answers nevertheless; then it goes on."""
    (process,) = target.ranks()
    body: dict[str, Any] = {"prompt": [[65] * 900] * 16, "max_tokens": 1}
    os.kill(process, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(12) as pool:
            asked = [pool.submit(target.post, **body) for _ in range(12)]
            for _ in range(20):
                health = requests.get(f"{target.address}/health", timeout=5)
                assert health.status_code == 200
                time.sleep(0.05)
            assert not any(one.done() for one in asked)
            os.kill(process, signal.SIGCONT)
            assert [one.result().status_code for one in asked] == [200] * 12
    finally:
        os.kill(process, signal.SIGCONT)
    is_well(target)


def test_a_name_of_another_site(target):
    """A page of a site whose name leads to the loopback may not ask, as its own or any other."""
    body = {"prompt": "a", "max_tokens": 1}
    port = target.address.rpartition(":")[2]
    for host, status in (
        ("evil.example", 403), (f"evil.example:{port}", 403), ("127.0.0.1.evil.example", 403),
        ("", 403), (f"localhost:{port}", 200), ("LOCALHOST", 200), (f"[::1]:{port}", 200),
        ("[", 403), ("1234:5678::1:8080", 403), ("a@localhost", 403), ("127.0.0.1", 200),
    ):  # fmt: skip
        headers = {"Host": host}
        if status == 403:
            headers["Origin"] = f"http://{host}"
        answer = requests.post(f"{target.url}/completions", json=body, headers=headers, timeout=20)
        assert answer.status_code == status, host


@pytest.mark.parametrize(
    ("flags", "names"),
    [([], ["localhost", "127.0.0.1", "::1"]), (["--host", "localhost"], ["localhost"]),
     (["--host", "::1", "--allowed-host", "a.example", "b"], ["::1", "a.example", "b"]),
     (["--host", "127.3.2.1"], ["127.3.2.1"]), (["--host", "0.0.0.0"], None)],
    ids=str,
)  # fmt: skip
def test_what_a_server_is_called(flags, names):
    """On the loopback; elsewhere it may have any name."""
    found = serve.names_of(serve.arguments(flags))
    assert found is None if names is None else {*names} <= found


def test_a_port_that_is_taken(tmp_path, monkeypatch, capsys):
    """It is noticed before a model is loaded."""
    monkeypatch.setattr(serve, "built", lambda given: pytest.fail("a model is loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr("sys.argv", ["serve.py", "--port", str(port)])
        with pytest.raises(SystemExit, match="serve.py: .*in use"):
            serve.main()
    given = serve.arguments(["--port", str(port)])
    with serve.kept(given), socket.socket() as other:  # and nobody else gets it
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with serve.kept(given):  # but for this server, which listens then
            pass


LATER = "connections wait: [Errno 24]"


def test_more_connections_than_descriptors(target):
    """The log has a line of it, and the server goes on when there are some again."""
    process = target.child.pid
    taken = set(map(int, os.listdir(f"/proc/{process}/fd")))
    # The limit is one of numbers, and those of a process have gaps: five below it are free.
    limit = next(itertools.islice((n for n in itertools.count() if n not in taken), 5, None))
    before, limits = len(target.output()), resource.prlimit(process, resource.RLIMIT_NOFILE)
    resource.prlimit(process, resource.RLIMIT_NOFILE, (limit, limits[1]))
    # More than there are numbers: it may close what earlier clients left.
    held = [connected(target) for _ in range(limit)]
    end = time.monotonic() + 20
    while LATER not in target.output()[before:] and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(1.5)  # in which it could say so again
    most = max(map(int, os.listdir(f"/proc/{process}/fd")))
    for connection in held:
        connection.close()
    resource.prlimit(process, resource.RLIMIT_NOFILE, limits)
    if most >= limit:
        pytest.skip("this kernel does not hold a process to a limit that another set")
    is_well(target)
    told = target.output()[before:]
    assert told.count(LATER) == 1
    assert "Traceback" not in told and "out of system resource" not in told


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_within_the_grace(own, where, sig):
    """With half a body held open, three long streams, and a client that reads nothing."""
    server = own("--grace", "5")
    body = {"prompt": "x", "max_tokens": 1900, "stream": True, "ignore_eos": True}
    streams = [
        requests.post(f"{server.url}/completions", json=body, stream=True, timeout=60)
        for _ in range(3)
    ]
    with half_a_body(server):
        start = time.monotonic()
        server.end(sig, seconds=5 + 2 + 10)
        assert time.monotonic() - start < 17
    for stream in streams:  # each is told of it, but for those that a GPU has ended before
        text = stream.content
        is_whole = where != "cpu" and text.endswith(b"data: [DONE]\n\n")
        assert is_whole or b"the server is ending" in text
    assert "Traceback" not in server.output()


def test_more_than_may_wait_is_refused(own):
    """429, with the time after which to try again; the others are served."""
    server = own("--max-batch", "2", "--max-queue", "3")
    server.post()
    statuses, headers = [], []

    def ask() -> None:
        answer = server.post(max_tokens=200, ignore_eos=True)
        statuses.append(answer.status_code)
        headers.append(answer.headers.get("retry-after"))

    asking = [threading.Thread(target=ask) for _ in range(20)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    refused = statuses.count(429)
    assert {*statuses} == {200, 429}
    assert statuses.count(200) >= 5
    assert headers.count("1") == refused == server.metric("rejected_requests_total")
    assert server.post(n=6).status_code == 429
    is_well(server)


def test_those_with_room_keep_others_out_before_they_wait(serve, where):
    """A burst of requests is counted before the first of them is submitted."""
    serving = serve("llama")
    engine = load(serving.path, where, **serving.options | {"max_batch": 2})
    service = Service(Link.here(engine), Metrics(), max_queue=1)
    try:
        first = [Request([1], Sampling()) for _ in range(3)]
        service.check_room(first)
        for count in (1, 3):
            with pytest.raises(Refused, match="1 requests are waiting") as caught:
                service.check_room([Request([1], Sampling()) for _ in range(count)])
            assert caught.value.status == 429
        del first[1]  # its client has gone
        service.check_room([Request([1], Sampling())])
    finally:
        service.close()


def test_first_come_first_served(own):
    """Requests start in the order in which they came, also behind large ones."""
    server = own("--max-batch", "2", "--num-pages", "40")
    server.post()
    order: list[int] = []

    def ask(n: int) -> None:
        body = {"prompt": "x" * (300 if n % 3 == 0 else 3), "max_tokens": 8, "stream": True}
        body["ignore_eos"] = True
        with requests.post(
            f"{server.url}/completions", json=body, stream=True, timeout=60
        ) as answer:
            next(answer.iter_lines())
            order.append(n)
            for _ in answer.iter_lines():
                pass

    asking = []
    for n in range(12):
        asking.append(threading.Thread(target=ask, args=(n,)))
        asking[-1].start()
        time.sleep(0.1)  # so that they come in this order
    for thread in asking:
        thread.join()
    # Two run at once: neighbours may be told of in either order.
    assert sorted(order) == [*range(12)]
    assert all(abs(place - n) <= 2 for place, n in enumerate(order)), order
    is_well(server)


async def client(server: ServerProcess, n: int, rng: np.random.Generator) -> bool:
    """One of many: a stream, or an answer in one; a third goes away at some time."""
    host, port = server.address.removeprefix("http://").split(":")
    leaves = n % 3 == 0
    body = json.dumps({
        "prompt": f"{n} " * int(rng.integers(1, 9)), "max_tokens": 40 if leaves else 2,
        "stream": bool(n % 2), "seed": n, "ignore_eos": True, "n": 1 + n % 2,
    }).encode()  # fmt: skip
    for _ in range(5):
        try:
            reader, writer = await asyncio.open_connection(host, int(port))
            break
        except OSError:  # too many at once for the backlog
            await asyncio.sleep(0.2)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
    try:
        if leaves:
            await asyncio.wait([asyncio.ensure_future(reader.read(1))], timeout=rng.uniform(0, 1))
            return False
        told = await reader.read()
        assert told.startswith(b"HTTP/1.1 200"), told[:300]
        assert told.count(b"[DONE]") == n % 2
        return True
    finally:
        writer.transport.abort()


def crowd(server: ServerProcess, numbers: range, at_once: int, rng: np.random.Generator) -> int:
    """How many clients got their answer."""

    async def go() -> int:
        room = asyncio.Semaphore(at_once)

        async def one(n: int) -> bool:
            async with room:
                return await client(server, n, rng)

        return sum(await asyncio.gather(*(one(n) for n in numbers)))

    return asyncio.run(go())


def test_a_crowd_of_which_a_third_leaves(target, rng):
    """1,000 clients at once: who stays is answered, and all pages come back."""
    count = scaled(1000, 240)
    answered = crowd(target, range(count), count, rng)
    assert answered == count - len(range(0, count, 3))
    is_well(target)


def test_memory_is_flat(target, rng):
    """Over 10,000 requests, a third of which leave."""
    crowd(target, range(120), 60, rng)
    is_well(target)
    before, count = target.memory(), scaled(10_000, 240)
    crowd(target, range(count), 60, rng)
    is_well(target)
    assert target.memory() - before < 24 * MIB


FAILING = """
import serve
from engine import Engine
step = Engine.step  # here and where the engine is, which imports this file
def failing(self):
    if any(request.prompt[0] == 66 for request in self.running):
        raise RuntimeError("the device is gone")
    return step(self)
Engine.step = failing
if __name__ == "__main__":
    serve.main()
"""


def test_an_engine_that_ends_takes_the_process_with_it(own):
    """Its clients are told, /health says so, and then the process ends with an error."""
    server = own(program=FAILING)
    assert server.post().status_code == 200
    answer = server.post(prompt=[66])
    assert answer.status_code == 500
    assert not PYTHON.search(answer.json()["error"]["message"])
    health = requests.get(f"{server.address}/health", timeout=5)
    assert health.status_code == 503
    assert server.post().status_code == 503
    assert server.end(seconds=30) == 1
    assert "the device is gone" in server.output()


@pytest.mark.parametrize("is_asked", [False, True])
def test_an_engine_whose_process_is_killed(own, is_asked):
    """A client that waits for it is told, and the server ends with an error; so it does idle."""
    server = own()
    (process,) = server.ranks()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.post, max_tokens=2000 if is_asked else 1, ignore_eos=True)
        while is_asked and not server.metric("generated_tokens_total"):
            time.sleep(0.02)
        if not is_asked:
            asked.result()
        os.kill(process, signal.SIGKILL)
        if is_asked:
            answer = asked.result()
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_error")
    assert server.end(seconds=20) == 1


def lie(path: Path, **changes: Any) -> None:
    config = path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))


def name_shard(path: Path, name: str) -> None:
    index = path / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    told["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"vocab_size": 5000}, r"embed_tokens.*\(257, 128\).*\(5000, 128\)"),
     ({"hidden_size": 256}, "shape"), ({"intermediate_size": 128}, "mlp"),
     ({"num_key_value_heads": 4}, "k_proj"), ({"num_hidden_layers": 2}, "no tensor"),
     ({"vocab_size": -1}, "vocab_size"), ({"hidden_size": "many"}, "hidden_size"),
     ({"num_attention_heads": 10**12}, "num_attention_heads"), ({"head_dim": 2.5}, "head_dim"),
     ({"head_dim": None, "hidden_size": 2}, "head_dim is 0"),
     ({"max_position_embeddings": 10**9}, "max_position_embeddings"),
     ({"vocab_size": None}, "vocab_size"), ("../x.safetensors", "no name of a file"),
     ("/etc/passwd", "no name of a file"), ("a/b.safetensors", "no name of a file"),
     (5, "no name of a file"), ("..", "no name of a file"),
     ({"eos_token_id": -5}, "eos_token_id"), ({"eos_token_id": [[1]]}, "eos_token_id"),
     ({"model_type": []}, "model_type"), ({"torch_dtype": "x"}, "torch_dtype"),
     ({"rms_norm_eps": "x"}, "rms_norm_eps"), ({"rope_theta": float("inf")}, "rope_theta"),
     ({"rope_scaling": 5}, "rope_scaling"), ({"rope_scaling": {"type": "llama3"}}, "with factor"),
     ({"rope_scaling": {"rope_type": "yarn", "factor": 0.0}}, "factor"),
     ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "kind of layer"),
     ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30"),
     ({"qk_layernorm": True}, "qk_layernorm is True"), ({"alibi": [1]}, "alibi"),
     ({"rope_scaling": {"factor": 2.0}}, "rope_type"), ({"hidden_act": "gelu"}, "hidden_act"),
     ({"partial_rotary_factor": 1e9}, "partial_rotary_factor"),
     ({"layer_types": "full_attention"}, "layer_types"), ({"layer_types": [1]}, "layer_types"),
     ({"layer_types": ["full_attention"] * 2}, "layer_types has 2 of 1 layers"),
     ({"layer_types": ["linear_attention"]}, "layer_types"),
     ({"num_hidden_layers": 10**7}, "num_hidden_layers"), ({"tie_word_embeddings": 1}, "tie_word"),
     ({"quantization_config": "x"}, "quantization_config"),
     ({"use_sliding_window": True, "sliding_window": "x"}, "sliding_window")],
    ids=str,
)  # fmt: skip
def test_checkpoints_that_lie(tmp_path, rng, change, words):
    """Refused when they are loaded, soon, by the name of what does not fit."""
    start = time.monotonic()
    path = make_tiny(tmp_path / "m", "llama", rng, num_hidden_layers=1)
    if isinstance(change, dict):
        lie(path, **change)
    else:
        name_shard(path, change)
    with pytest.raises((ValueError, KeyError), match=words):
        load(path, "cpu", num_pages=8, max_batch=2, max_tokens=32)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [("config.json", b"[" * 100_000, "config.json"),
     ("generation_config.json", b"[]", "generation_config.json is no object"),
     ("generation_config.json", b'{"eos_token_id": "x"}', "generation_config.json: eos_token_id"),
     ("generation_config.json", b'{"top_p": 0.0}', "generation_config.json: top_p"),
     ("generation_config.json", b'{"temperature": NaN}', "generation_config.json: temperature"),
     ("tokenizer.json", b"{}", "tokenizer.json"),
     *((name, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", f"{name} .*Git LFS")
       for name in ("tokenizer.json", "config.json", "model-00001-of-00002.safetensors")),
     ("tokenizer.json", b"", "tokenizer.json"), ("tokenizer_config.json", b"[]", "no object"),
     ("tokenizer_config.json", b'{"chat_template": [1]}', "template"),
     ("tokenizer_config.json", b'{"chat_template": [{}]}', "template"),
     ("chat_template.jinja", b"{{" + b"(" * 3000 + b"1" + b")" * 3000 + b"}}", "template"),
     ("model.safetensors.index.json", b"[]", "no object"),
     ("model.safetensors.index.json", b'{"weight_map": []}', "no weight_map"),
     ("model-00001-of-00002.safetensors", b"", "header"),
     ("model-00001-of-00002.safetensors", b"\xff" * 8, "header"),
     ("model-00001-of-00002.safetensors", (4 << 30).to_bytes(8, "little") + b"{", "header"),
     ("model-00001-of-00002.safetensors", (9).to_bytes(8, "little") + b"[" * 9, "header")],
    ids=lambda x: str(x)[:36],
)  # fmt: skip
def test_files_that_are_none_of_a_checkpoint(tmp_path, name, content, words):
    """A sentence that names the file, and no more."""
    path, start = make_tiny(tmp_path / "m", "llama", num_hidden_layers=1), time.monotonic()
    (path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        serve.built(serve.arguments(["--cpu", "--model", str(path)]))
    assert time.monotonic() - start < 20


def test_positions_that_no_page_has(tmp_path, where):
    """A table of 16 million positions took gigabytes."""
    path = make_tiny(tmp_path / "m", "llama", num_hidden_layers=1)
    lie(path, max_position_embeddings=2**24)
    engine = load(path, where, num_pages=8, max_batch=2, max_tokens=32)
    assert [table.shape[0] for table in engine.model.cos_sin.values()] == [8 * engine.page_size]
    engine.close()


@pytest.mark.parametrize("source", ["{{ 1 / 0 }}", "{{ '{a}'.format() }}", "{{ messages.a.b }}"])
def test_templates_that_fail(tmp_path, source):
    """The client is told of it, in words of the interface."""
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(Refused, match="chat template: it cannot be rendered"):
        Template(tmp_path)([{"role": "user", "content": "a"}], None, {})


@pytest.mark.parametrize(
    "source",
    ["{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
     "{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
     "{% macro twice(n) %}{% if n %}{{ twice(n - 1) }}{{ twice(n - 1) }}{% endif %}{% endmacro %}"
     "{{ twice(99) }}", "{{ 10 ** (10 ** 8) }}"],
    ids=["loops", "sums", "macros", "power"],
)  # fmt: skip
def test_templates_without_an_end(tmp_path, monkeypatch, source):
    """They end, with an error that says so."""
    monkeypatch.setattr("server.chat.SECONDS", 0.2)
    (tmp_path / "chat_template.jinja").write_text(source)
    start, profile = time.monotonic(), sys.getprofile()
    with pytest.raises(Refused, match=r"rendered within 0.2 s|a power is 64"):
        Template(tmp_path)([], None, {})
    assert time.monotonic() - start < 3
    assert sys.getprofile() is profile
    (tmp_path / "chat_template.jinja").write_text("{{ 2 ** 10 }}")
    assert Template(tmp_path)([], None, {}) == "1024"


def test_a_long_name_of_a_field_is_cut():
    """In place and message."""
    with pytest.raises(Refused) as refused:
        parsed(CompletionBody, b'{"%s": 1}' % (b"a" * (3 << 20)))
    assert "no such field" in refused.value.message
    assert len(json.dumps(refused.value.body)) < 1000


def test_templates_as_checkpoints_have_them(tmp_path):
    """One by name for tools, words of special_tokens_map.json, and marks for training."""
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}}')
    named = [
        {"name": "default", "template": "{{ bos_token }}{% generation %}"
                                        "{% set a = 1 %}one{% endgeneration %}{{ a }}"},
        {"name": "tool_use", "template": "{{ tools | length }} tools"},
    ]  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = Template(tmp_path)
    assert template([], None, {}) == "<s>one"
    assert template([], [{}, {}], {}) == "2 tools"
    # As newer ones have them, which come before those.
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("{{ tools | length }}")
    (tmp_path / "additional_chat_templates/rag.jinja").write_text("none")
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}two")
    template = Template(tmp_path)
    assert template([], None, {}) == "<s>two"
    assert template([], [{}, {}], {}) == "2"


def test_yarn_takes_mscale_only_with_mscale_all_dim():
    """By arithmetic: without both, the gain is 0.1 ln(factor) + 1."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "mscale": 2.0}
    alone = Rope(**yarn).cos_sin(1, 8, 64)[0, 0]
    both = Rope(**yarn, mscale_all_dim=0.5).cos_sin(1, 8, 64)[0, 0]
    assert alone == pytest.approx(1.1386294, rel=1e-6)
    assert both == pytest.approx(1.2772589 / 1.0693147, rel=1e-6)


def test_qwen3_next_turns_a_quarter_of_a_head_by_default(tmp_path):
    """As its published class of configuration has it."""
    path = make_tiny(tmp_path / "m", "qwen3_next", head_dim=64)
    raw = json.loads((path / "config.json").read_text())
    raw.pop("partial_rotary_factor", None)
    (path / "config.json").write_text(json.dumps(raw))
    assert Config.read(path).rotary_dim == 16


def test_layers_that_see_all_where_the_file_does_not_say(tmp_path):
    """Of Qwen's 28, as transformers has it; none with a window where it is not used."""
    path = make_tiny(tmp_path / "m", "qwen3")
    for used, count in ((True, 28), (False, 32)):
        lie(path, num_hidden_layers=32, use_sliding_window=used, sliding_window=9)
        layers = Config.read(path).layers
        assert layers == ["full_attention"] * count + ["sliding_attention"] * (32 - count)


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1, -(2**63) - 1, 2**63])
def test_seeds_have_64_bits(seed):
    body = b'{"prompt": "a", "seed": %d}' % seed
    if abs(2 * seed + 1) < 2**64:
        sampling = parsed(CompletionBody, body).sampling({}, 1, 0)
        assert sampling.seed == seed
    else:
        with pytest.raises(Refused, match="seed"):
            parsed(CompletionBody, body)


@pytest.mark.parametrize("token", ["\uff11", "\u0663", "-1", "1.0", " 1", ""])
def test_tokens_of_biases_are_digits(token):
    """Of ASCII: other scripts have digits too."""
    body = json.dumps({"prompt": "a", "logit_bias": {token: 1}})
    with pytest.raises(Refused, match="logit_bias"):
        parsed(CompletionBody, body.encode())


def test_numbers_of_seeds_that_differ_in_sign():
    """Seeds 7 and -7 draw by other numbers, as the page says."""
    drawn = [Sampling(seed=seed).generator().random() for seed in (7, -7, 7)]
    assert drawn[0] == drawn[2] != drawn[1]
