"""The engine behind a pipe: orders, news, schemas, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import server.host
import server.service
from engine import Sampling, load
from server import Link
from server.host import Host, News
from server.metrics import Metrics
from server.schema import Refused
from server.service import Listener, Service

from tests.llm.serving import check_empty, greedy, texts

RESULT = 20  # seconds for what takes a moment


def until(is_so: Callable[[], Any]) -> None:
    end = time.monotonic() + RESULT
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


class AnyToken:
    """A grammar of all tokens."""

    def fill(self, bits: Any, row: int) -> None:
        bits[row] = -1

    def accept(self, token: int) -> bool:
        return True


@pytest.fixture
def hosted(serve: Any, where: str) -> Any:
    """An engine, and a service of it whose grammars are `grammars`."""

    def start(grammars: Any = None, **options: Any) -> Any:
        serving = serve("llama")
        engine = load(serving.path, where, **serving.options | options)
        made.append(Service(Link.here(engine, grammars), Metrics(), max_queue=100))
        return SimpleNamespace(serving=serving, engine=engine, service=made[-1])

    made: list[Service] = []
    yield start
    for service in made:
        service.close()


async def asked(service: Service, request: Any) -> Any:
    """The request when it has ended; all that was told of it."""
    queue: asyncio.Queue[Listener] = asyncio.Queue()
    listener, told = Listener(request, 0, queue), []
    service.submit(listener)
    while request.finished is None or queue.qsize():
        await asyncio.wait_for(queue.get(), RESULT)
        told += listener.take()[0]
    return told


def test_news_have_every_token_once(hosted):
    """The tokens of the engine alone, their log probabilities, and those of the prompt."""
    here = hosted(max_tokens=33)
    prompt = here.serving.prompt(40)
    some = Sampling(temperature=0, logprobs=2, prompt_logprobs=True, max_tokens=9, ignore_eos=True)
    alone = here.serving.engine(max_tokens=33)
    (expected,) = [alone.submit(prompt, some)]
    alone.run()
    request = here.engine.request(prompt, some)
    told = asyncio.run(asked(here.service, request))
    assert told == request.tokens == expected.tokens
    assert request.finished == "length"
    for got, known in ((request.logprobs, expected.logprobs),
                       (request.prompt_logprobs, expected.prompt_logprobs)):  # fmt: skip
        assert [value for value, *_ in got] == [value for value, *_ in known]
    assert here.service.submitted == here.service.news.submitted == 1


def test_how_the_engine_is(hosted):
    """Slots and pages that are taken, and requests that wait for them."""
    here = hosted(max_batch=2, num_pages=40)
    assert isinstance(here.service.news, News)
    assert (here.service.news.slots, here.service.news.waiting) == (2, 0)

    async def three() -> None:
        requests = [here.engine.request([1, 2], greedy(200)) for _ in range(3)]
        working = [asyncio.ensure_future(asked(here.service, request)) for request in requests]
        while here.service.news.waiting != 1:
            await asyncio.sleep(0.01)
        news = here.service.news
        assert (news.running, news.slots, news.submitted, news.pages) == (2, 0, 3, 39)
        assert news.used_pages >= 2
        here.service.order("cancel_all")
        await asyncio.gather(*working)
        assert {request.finished for request in requests} == {"cancelled"}

    asyncio.run(three())
    until(lambda: here.service.news.slots == 2)
    assert here.service.news.used_pages == 0
    check_empty(here.engine)


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> list[Host]:
    """Those that are made."""
    made: list[Host] = []
    begin = Host.__init__
    monkeypatch.setattr(
        Host, "__init__", lambda self, *given: (made.append(self), begin(self, *given))[0]
    )
    return made


def test_a_grammar_that_is_not_used_is_forgotten(hosted, hosts):
    """Of a request whose client has gone before it was submitted."""
    here = hosted(lambda schema, param, is_patient: AnyToken())
    requests = [here.engine.request([1, 2], greedy(3)) for _ in range(2)]
    asyncio.run(here.service.constrain(requests, {}, "schema"))
    assert {*hosts[0].compiled} == {request.number for request in requests}
    del requests[0]
    assert len(asyncio.run(asked(here.service, requests[0]))) == 3
    until(lambda: not hosts[0].compiled)


def test_schemas_that_fail(hosted):
    """What is refused, what fails, and what is under way when the engine ends."""
    go = threading.Event()

    def grammars(schema: Any, param: str, is_patient: bool) -> Any:
        if schema == "refused":
            raise Refused(f"{param}: no", param=param)
        if schema == "slow":
            go.wait(RESULT)
        raise RuntimeError("a failure")

    here = hosted(grammars)
    one = [here.engine.request([1], greedy(3))]
    for schema, status in (("refused", 400), ("fails", 500)):
        with pytest.raises(Refused) as caught:
            asyncio.run(here.service.constrain(one, schema, "schema"))
        assert caught.value.status == status

    async def ended() -> None:
        waits = asyncio.ensure_future(here.service.constrain(one, "slow", "schema"))
        await asyncio.sleep(0.05)
        closed = asyncio.get_running_loop().run_in_executor(None, here.service.close)
        with pytest.raises(Refused, match="the engine has ended"):
            await asyncio.wait_for(waits, RESULT)
        go.set()
        assert await closed

    asyncio.run(ended())


def test_slow_schemas_let_others_go_first(hosted, hosts):
    """Each is tried for a moment, and for longer when nobody else waits; clients that have gone
    hold nobody up, and nothing is kept for them.
    """
    asked: list[Any] = []

    def grammars(schema: Any, param: str, is_patient: bool) -> Any:
        asked.append((schema, is_patient))
        if schema == "first":
            until(lambda: len(hosts[0].schemas.queue) == len(hosts[0].awaited) == 5)
        if schema.startswith("slow") and not is_patient:
            raise TimeoutError
        if schema == "slow2":
            raise Refused("too slow")
        return AnyToken()

    here = hosted(grammars)

    async def all_of_them() -> Any:
        async def one(schema: str) -> None:
            requests = [here.engine.request([1], greedy(3))]
            try:
                await here.service.constrain(requests, schema, "schema")
            except asyncio.CancelledError:
                return
            told.append(schema)

        told: list[str] = []
        names = ("first", "slow0", "slow1", "slow2", "gone", "polite")
        waits = [asyncio.ensure_future(one(name)) for name in names]
        await asyncio.sleep(0)
        waits[4].cancel()
        done = await asyncio.gather(*waits, return_exceptions=True)
        assert isinstance(done[3], Refused)
        return told

    assert asyncio.run(all_of_them()) == ["first", "polite", "slow0", "slow1"]
    slow = [f"slow{n}" for n in range(3)]
    expected = [(name, False) for name in ("first", *slow, "polite")]
    assert asked == expected + [(name, True) for name in slow]


def test_a_schema_that_has_no_turn(hosted, monkeypatch):
    """Its client is told, and not kept waiting."""
    go = threading.Event()
    monkeypatch.setattr(server.service, "SCHEMA_SECONDS", 0.2)
    here = hosted(lambda *given: go.wait(RESULT) and AnyToken())
    one = [here.engine.request([1], greedy(3))]
    with pytest.raises(Refused, match="take too long") as refused:
        asyncio.run(here.service.constrain(one, {}, "schema"))
    assert refused.value.status == 429
    go.set()


def test_a_schema_whose_client_has_gone(hosted):
    """What comes of it is told to nobody, before and after the waiting has ended; others go on."""
    go = threading.Event()
    here = hosted(lambda *given: go.wait(RESULT) and AnyToken())
    service = here.service

    async def gone() -> None:
        one = [here.engine.request([1], greedy(3))]
        waits = asyncio.ensure_future(service.constrain(one, {}, "schema"))
        await asyncio.sleep(0.05)
        ((number, done),) = service.compiling.items()
        done.cancel()
        service._compiled(number, None)
        with pytest.raises(asyncio.CancelledError):
            await waits
        service._compiled(number, None)
        go.set()
        assert len(await asked(service, here.engine.request([1], greedy(3)))) == 3

    asyncio.run(gone())
    assert service.is_serving


def test_an_engine_that_fails(hosted, monkeypatch):
    """Whoever waits is told, with why, once."""
    here, told = hosted(), []

    def fail() -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(here.engine, "step", fail)
    here.service.on_failure = lambda: told.append(str(here.service.failure))
    request = here.engine.request([1, 2], greedy(3))
    assert asyncio.run(asked(here.service, request)) == []
    assert request.finished == "error"
    until(lambda: told == ["the device is gone"])
    assert not here.service.is_serving
    with pytest.raises(Refused, match="the engine has ended"):
        here.service.check_room([request])


def test_tokens_of_a_request_that_was_cancelled(hosted, monkeypatch):
    """Its pages come back, others go on as if it had not been there, and nothing is told of it."""
    here, cancelled = hosted(max_batch=2), []
    cancel = here.engine.cancel
    monkeypatch.setattr(here.engine, "cancel", lambda x: (cancelled.append(x.number), cancel(x)))
    prompt = here.serving.prompt(9)
    expected = texts(here.serving.engine(), [prompt], greedy(30))[0]

    async def both() -> None:
        request, other = (here.engine.request(prompt, greedy(n)) for n in (30, 200))
        listener = Listener(other, 0, asyncio.Queue())
        here.service.submit(listener)
        going = asyncio.ensure_future(asked(here.service, request))
        await asyncio.wait_for(listener.queue.get(), RESULT)
        here.service.cancel(listener)
        count = len(other.tokens)
        assert await going == expected
        assert len(other.tokens) == count < 200
        assert cancelled == [other.number]

    asyncio.run(both())
    until(lambda: here.service.news.slots == 2)
    check_empty(here.engine)


def fails_at_once() -> None:
    raise ValueError("no such model")


def made_to_fail() -> Any:
    """An engine whose first step fails."""
    made = SimpleNamespace(
        config=1, room=2, runner=SimpleNamespace(is_whole=True), waiting=[], running=[], slots=[],
        pages=SimpleNamespace(total=1, free=[0], idle=[]), preempted=0,
    )  # fmt: skip

    def step() -> None:
        raise RuntimeError("the device is gone")

    made.step = step
    return made, None


def test_a_process_whose_engine_fails_ends_with_an_error(monkeypatch):
    """At once, with what its device holds; where nothing is made, with what was raised."""
    told: list[Any] = []

    def ended() -> None:
        told.append("ended")

    monkeypatch.setattr(server.host, "end_process", ended)
    monkeypatch.setattr(server.host, "alone", contextlib.nullcontext)
    here, there = multiprocessing.Pipe()
    worker = threading.Thread(target=server.host._host, args=(there, made_to_fail))
    worker.start()
    assert here.recv() == (1, 2)
    assert isinstance(here.recv()[1], News)
    here.send(("cancel", 1))
    assert here.recv() == ("failed", "the device is gone")
    worker.join(RESULT)
    assert told == ["ended"]
    with pytest.raises(ValueError, match="no such model"):
        Link.apart(fails_at_once)
