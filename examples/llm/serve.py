"""An OpenAI-compatible /v1/completions server, with streaming, in front of the engine.

    python3 examples/llm/serve.py [--model FOLDER] [--cpu] [--port 8000]
    curl -N localhost:8000/v1/completions -H 'content-type: application/json' \\
        -d '{"prompt": "Once upon a time", "max_tokens": 32, "stream": true}'

The engine has a thread of its own; handlers are told of its tokens through their event loop.
A client that goes away cancels its request, whose pages are free for the next step.
"""

import argparse
import asyncio
import contextlib
import json
import tempfile
import threading
import time
import uuid
from collections import deque
from pathlib import Path

import uvicorn
from engine import Sampling, load
from engine.checkpoint import make_tiny
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed", "max_tokens")
OTHERS = ("model", "prompt", "stream", "stop", "user", "n")


class Service:
    """The engine on its thread: `submit` and `cancel` may be called from any other."""

    def __init__(self, engine, name):
        self.name = name
        self.engine, self.orders, self.wake = engine, deque(), threading.Event()
        self.listeners, self.is_closed = {}, False
        self.thread = threading.Thread(target=self._serve, name="engine")
        self.thread.start()

    def submit(self, request, tell):
        """`tell(request)` is called on the engine's thread when there is news of the request."""
        if self.is_closed:
            raise RuntimeError("the engine has ended")
        self.listeners[request] = tell
        self._order(lambda: self.engine.waiting.append(request))

    def cancel(self, request):
        self._order(lambda: (self.listeners.pop(request, None), self.engine.cancel(request)))

    def _order(self, order):
        self.orders.append(order)
        self.wake.set()

    def _serve(self):
        try:
            while not self.is_closed:
                while self.orders:
                    self.orders.popleft()()
                changed = self.engine.step()
                for request in changed or ():
                    self._tell(request)
                if changed is None:
                    self.wake.wait()
                    self.wake.clear()
        finally:  # at the end, or with an error of the device, for which there is no help
            self.is_closed = True
            for request in [*self.listeners]:
                request.finished = request.finished or "error"
                self._tell(request)

    def _tell(self, request):
        tell = self.listeners.get(request)
        if tell:
            tell(request)
        if request.finished:
            self.listeners.pop(request, None)

    def close(self):
        self.is_closed = True
        self.wake.set()
        self.thread.join()
        self.engine.close()


class Completion:
    """One request of a client: its text as it comes, up to a stop string."""

    def __init__(self, service, tokenizer, body):
        unknown = [name for name in body if name not in SAMPLING + OTHERS]
        if unknown or body.get("n", 1) != 1:
            raise ValueError(f"{', '.join(unknown) or 'n other than 1'}: not supported")
        prompt, stop = body.get("prompt", ""), body.get("stop") or []
        if not isinstance(prompt, str) and not all(type(token) is int for token in prompt):
            raise ValueError("prompt: a string or a list of token ids")
        self.stops = [stop] if isinstance(stop, str) else stop
        given = {name: body[name] for name in SAMPLING if body.get(name) is not None}
        ids = tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt
        self.request = service.engine.request(ids, Sampling(**{"max_tokens": 16} | given))
        self.service, self.tokenizer, self.used = service, tokenizer, 0
        self.finish_reason = None
        self.id, self.created = f"cmpl-{uuid.uuid4().hex}", int(time.time())

    async def pieces(self):
        """The text as it comes; at its end `finish_reason` is set."""
        loop, news, stream = asyncio.get_running_loop(), asyncio.Queue(), DecodeStream()
        text, told = "", 0

        def tell(request):
            with contextlib.suppress(RuntimeError):  # the loop has ended: so has the server
                state = [*request.tokens], request.finished
                loop.call_soon_threadsafe(news.put_nowait, state)

        self.service.submit(self.request, tell)
        try:
            while self.finish_reason is None:
                tokens, finished = await news.get()
                for token in tokens[self.used :]:
                    text += stream.step(self.tokenizer, token) or ""
                self.used = len(tokens)
                text += self.rest(text, tokens) if finished else ""
                ends = [text.find(stop) for stop in self.stops if stop in text]
                if ends:
                    text, finished = text[: min(ends)], "stop"
                # What may be the beginning of a stop string is not told before that is known.
                hidden = 0 if finished else max((begun(text, s) for s in self.stops), default=0)
                if len(text) - hidden > told:
                    yield text[told : len(text) - hidden]
                    told = len(text) - hidden
                self.finish_reason = finished
        finally:
            self.service.cancel(self.request)

    def rest(self, text, tokens):
        """What was held back at the end: bytes that are no whole character."""
        whole = self.tokenizer.decode(tokens)
        return whole[len(text) :] if whole.startswith(text) else ""

    def chunk(self, text, finish_reason=None):
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
        return {"id": self.id, "object": "text_completion", "created": self.created,
                "model": self.service.name, "choices": [choice]}  # fmt: skip

    @property
    def usage(self):
        prompt = len(self.request.prompt)
        return {"prompt_tokens": prompt, "completion_tokens": self.used,
                "total_tokens": prompt + self.used}  # fmt: skip


def begun(text, stop):
    """How many characters at the end of `text` may be the beginning of `stop`."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)


def error(message, status=400):
    kind = "invalid_request_error"
    body = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": body}, status)


def application(engine, tokenizer, name):
    """The ASGI application; the engine is its own from then on."""
    service = Service(engine, name)

    async def completions(http):
        try:
            body = await http.json()
            completion = Completion(service, tokenizer, body)
        except (ValueError, TypeError, AttributeError) as wrong:
            return error(str(wrong))
        if body.get("stream"):
            return StreamingResponse(events(completion), media_type="text/event-stream")
        text = await whole(http, completion)
        return JSONResponse(
            completion.chunk(text, completion.finish_reason) | {"usage": completion.usage}
        )

    async def models(http):
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"}]})

    @contextlib.asynccontextmanager
    async def lifespan(app):
        yield
        service.close()

    routes = [Route("/v1/completions", completions, methods=["POST"]), Route("/v1/models", models)]
    app = Starlette(routes=routes, lifespan=lifespan)
    app.state.service = service
    return app


async def events(completion):
    """Server-sent events; a client that goes away ends this, and so its request."""
    async with contextlib.aclosing(completion.pieces()) as pieces:
        async for text in pieces:
            yield f"data: {json.dumps(completion.chunk(text))}\n\n"
    yield f"data: {json.dumps(completion.chunk('', completion.finish_reason))}\n\n"
    yield "data: [DONE]\n\n"


async def whole(http, completion):
    """All of the text; a client that goes away ends it as well."""

    async def text():
        return "".join([piece async for piece in completion.pieces()])

    work = asyncio.ensure_future(text())
    while not (await asyncio.wait([work], timeout=0.1))[0]:
        if await http.is_disconnected():
            work.cancel()
    return await work


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a folder in the hub's layout; else a tiny one is made")
    parser.add_argument("--cpu", action="store_true", help="the reference kernels, in numpy")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(given.model or make_tiny(folder))
        engine = load(model, "cpu" if given.cpu else None)
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    uvicorn.run(application(engine, tokenizer, model.name), host=given.host, port=given.port)


if __name__ == "__main__":
    main()
