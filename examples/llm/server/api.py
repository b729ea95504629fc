"""The routes: bodies in, answers and errors of OpenAI's interface out."""

import asyncio
import contextlib
import errno
import functools
import hmac
import itertools
import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from engine.words import Words
from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .answers import Chat, Completion
from .chat import schema_of
from .metrics import Metrics
from .schema import MOST_CHOICES, ChatBody, CompletionBody, Refused, parsed
from .service import Service

PAGE = Path(__file__).with_name("page.html")
OWNER = "fi_ffi"
MOST_LOGPROBS = 1 << 19  # of an answer, which is held until its last token
# Tokens of an answer where the client does not say: OpenAI's for completions; of a chat, a
# number that a small cache has room for.
MAX_TOKENS = {CompletionBody: 16, ChatBody: 1024}
PORT = re.compile(r":\d*$")
ERRORS = {404: "there is no such path", 405: "the path has other methods"}


@dataclass
class Limits:
    max_body: int = 4 << 20  # bytes
    max_held: int = 64 << 20  # bytes of all bodies that are being read
    body_seconds: float = 30  # in which a body has to be there
    max_queue: int = 256  # requests of the engine that wait for a slot
    api_key: str | None = None
    hosts: set | None = None  # names of this server that a request may have; None: any


class Api:
    """The handlers of one engine, which is behind a `host.Link`."""

    def __init__(self, link, tokenizer, names, template, limits, on_failure):
        self.requests, self.tokenizer, self.names = link.requests, tokenizer, names
        self.template, self.limits, self.room = template, limits, link.requests.room
        self.metrics, self.created = Metrics(), int(time.time())
        self.service = Service(link, self.metrics, limits.max_queue, on_failure)
        self.held, self.reading, self.is_ending = 0, set(), False
        self.words, self.pool = Words(tokenizer), ThreadPoolExecutor(2, "tokenize")
        self.longest = max(map(len, tokenizer.get_vocab(with_added_tokens=True)))

    async def body(self, http):
        """The bytes of a request's body, which are bounded, and so is the time they take."""
        limits, parts = self.limits, bytearray()
        if "content-encoding" in http.headers:
            raise Refused("a body comes as it is, without Content-Encoding", 415)
        too_large = Refused(f"a body has {limits.max_body} bytes at most", 413)
        told = http.headers.get("content-length", "")
        if told.isdecimal() and int(told) > limits.max_body:
            raise too_large

        async def read():
            async for part in http.stream():
                parts.extend(part)
                self.held += len(part)
                if len(parts) > limits.max_body:
                    raise too_large
                if self.held > limits.max_held:
                    raise Refused("too much is being read: try again later", 429)

        reading = asyncio.ensure_future(read())
        self.reading.add(reading)
        try:
            await asyncio.wait_for(reading, limits.body_seconds)
        except BaseException as wrong:
            self.held -= len(parts)
            if isinstance(wrong, asyncio.TimeoutError):
                raise Refused("the body did not come in time", 408) from None
            if isinstance(wrong, asyncio.CancelledError) and self.is_ending:
                raise Refused("the server is ending", 503) from None
            raise
        finally:
            self.reading.discard(reading)
        return bytes(parts)

    def hurry(self):
        """End what is still going on, with an error for each client; from any thread."""
        self.is_ending = True
        self.service.order("cancel_all")
        for reading in [*self.reading]:
            with contextlib.suppress(RuntimeError):
                reading.get_loop().call_soon_threadsafe(reading.cancel)

    def prepare(self, kind, raw):
        """On a thread: the body, the engine's requests, and what `constrain` takes or None."""
        body = parsed(kind, raw)
        self.check_model(body.model)
        prompts = self.chat(body) if kind is ChatBody else self.prompts(body)
        param, requests = "messages" if kind is ChatBody else "prompt", []
        for ids, choice in itertools.product(prompts, range(body.n or 1)):
            sampled, known = self.max_tokens(body, len(ids), param), self.requests.config.sampling
            if (body.min_tokens or 0) > sampled:
                raise Refused("min_tokens: it is more than max_tokens", param="min_tokens")
            try:
                drawn = body.sampling(known, sampled, choice)
                requests.append(self.requests.request(ids, drawn))
            except ValueError as wrong:
                text = str(wrong)
                named = "logit_bias" if text.startswith("logit_bias") else param
                raise Refused(text if named in text else f"{named}: {text}", param=named) from None
        self.check_logprobs(requests)
        return body, requests, self.schema(body)

    def check_logprobs(self, requests):
        count = 0
        for request in requests:
            of = request.sampling
            if of.logprobs is not None:
                tokens = of.max_tokens + len(request.prompt) * of.prompt_logprobs
                count += tokens * (of.logprobs + 1)
        if count > MOST_LOGPROBS:
            raise Refused(f"logprobs: an answer of these lengths may have {count}; "
                          f"{MOST_LOGPROBS} at most", param="logprobs")  # fmt: skip

    def max_tokens(self, body, prompt, param):
        given = body.limit
        if given is None:
            return max(min(MAX_TOKENS[type(body)], self.room - prompt), 1)
        if given == 0:
            if not getattr(body, "echo", None):
                raise Refused("max_tokens: it is 0 for `echo` alone", param="max_tokens")
            return 1  # of which nothing is told
        if prompt + given > self.room:
            raise Refused(f"max_tokens: {prompt} tokens of {param} and {given} more; there is "
                          f"room for {self.room}", param="max_tokens",
                          code="context_length_exceeded")  # fmt: skip
        return given

    def prompts(self, body):
        if len(body.prompts) * (body.n or 1) > MOST_CHOICES:
            raise Refused(f"prompt: {MOST_CHOICES} choices at most, prompts times n", 400, "prompt")
        return [self.tokens(p, "prompt") if isinstance(p, str) else p for p in body.prompts]

    def tokens(self, text, param, **more):
        """Those of a text; by a call that leaves other threads running, unlike `encode`."""
        if len(text) > self.room * self.longest:
            raise Refused(f"{param}: there is room for {self.room} tokens", param=param,
                          code="context_length_exceeded")  # fmt: skip
        return self.tokenizer.encode_batch([text], **more)[0].ids

    def chat(self, body):
        given = () if body.tool_choice == "none" else body.tools or ()
        tools = [tool.model_dump(exclude_none=True) for tool in given]
        if body.tool_choice not in (None, "none", "auto") and not body.forced:
            raise Refused("tool_choice: there is no such tool in tools", param="tool_choice")
        if body.top_logprobs and not body.logprobs:
            raise Refused("top_logprobs: it needs logprobs to be true", param="top_logprobs")
        messages = [message.for_template() for message in body.messages]
        text = self.template(messages, tools or None, body.chat_template_kwargs or {})
        return [self.tokens(text, "messages", add_special_tokens=False)]

    def schema(self, body):
        """The schema that the answer must fit, and the field that has it; None for any text."""
        form, forced = body.response_format, getattr(body, "forced", [])
        if not forced and (form is None or form.type == "text"):
            return None
        param = "tools" if forced else "response_format"
        for name in ("ignore_eos", "min_tokens"):
            if getattr(body, name):
                raise Refused(f"{name}: not with {param}, by which a text ends", param=name)
        if forced:
            return schema_of(forced), param
        if form.type == "json_object":
            return None, param
        if form.json_schema is None:
            param = "response_format.json_schema"
            raise Refused(f"{param}: Field required", param=param)
        return form.json_schema.schema_, param

    def check_model(self, name):
        if name is not None and name not in self.names:
            raise Refused(f"there is no model {name:.80}; there is {self.names[0]}", 404, "model",
                          "model_not_found")  # fmt: skip

    async def complete(self, kind, answer, http):
        raw, loop = await self.body(http), asyncio.get_running_loop()
        try:
            body, requests, wanted = await loop.run_in_executor(self.pool, self.prepare, kind, raw)
        finally:
            self.held -= len(raw)
        del raw
        self.service.check_room(requests)
        if wanted is not None:
            await self.service.constrain(requests, *wanted)
        if self.is_ending:
            raise Refused("the server is ending", 503)
        name = body.model or self.names[0]
        answer = answer(self.service, self.words, name, body, requests)
        told = {"X-Ignored": ", ".join(body.ignored)} if body.ignored else {}
        if body.stream:
            told |= {"Cache-Control": "no-cache"}
            return StreamingResponse(answer.events(), 200, told, "text/event-stream")
        return await unless_gone(http, answer.whole(), told)

    async def models(self, http):
        """All, or that of the path's name."""
        name, about = http.path_params.get("name"), {"object": "model", "created": self.created}
        self.check_model(name)
        about |= {"owned_by": OWNER, "max_model_len": self.room}
        data = [{"id": each, **about} for each in ([name] if name else self.names)]
        return JSONResponse(data[0] if name else {"object": "list", "data": data})

    async def health(self, http):
        """200 while the engine serves, and 503 from its end to that of the process."""
        code, status = (200, "ok") if self.service.is_serving else (503, "the engine has ended")
        return JSONResponse({"status": status}, code)

    async def metrics_text(self, http):
        text = generate_latest(self.metrics.registry)
        return Response(text, media_type="text/plain; version=0.0.4")

    def guarded(self, handler):
        """A handler for this server's own page and for programs; it asks for the key, if any."""

        async def checked(http):
            # A page whose name leads to this machine would be its own server's.
            hosts, host = self.limits.hosts, http.headers.get("host", "")
            if hosts is not None and PORT.sub("", host).strip("[]").lower() not in hosts:
                raise Refused("this server has other names: see --allowed-host", 403)
            # A browser sends a page's origin along; a page of another site may not use the GPU.
            origin = http.headers.get("origin")
            if origin is not None and origin.partition("://")[2] != host:
                raise Refused("a page of another site asks", 403)
            if self.limits.api_key is not None:
                kind, _, key = http.headers.get("authorization", "").partition(" ")
                same = hmac.compare_digest(key.encode(), self.limits.api_key.encode())
                if kind.lower() != "bearer" or not same:
                    raise Refused("the API key is missing, or another", 401, code="invalid_api_key")
            return await handler(http)

        return checked


async def unless_gone(http, work, headers):
    """The answer as JSON; a client that goes away ends the work."""

    async def gone():
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(each) for each in (work, gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            return await nobody_reads()
        return JSONResponse(tasks[0].result(), headers=headers)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def refused(http, error):
    """Any error in the interface's own shape."""
    headers = getattr(error, "headers", None)
    if isinstance(error, HTTPException):
        error = Refused(ERRORS.get(error.status_code, error.detail), error.status_code)
    elif not isinstance(error, Refused):
        error = Refused("the server has failed", 500)
    headers = {"Retry-After": "1"} if error.status == 429 else headers
    return JSONResponse(error.body, error.status, headers)


async def nobody_reads(http=None, error=None):
    return Response(status_code=499)


class Seldom:
    """Tells once a minute that no descriptors are left, where asyncio has a line for each try."""

    told = -60.0

    def __call__(self, loop, context):
        if getattr(context.get("exception"), "errno", None) not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif time.monotonic() >= self.told + 60:
            self.told = time.monotonic()
            logging.getLogger("uvicorn.error").error("connections wait: %s", context["exception"])


def application(link, tokenizer, names, template=None, limits=None, on_failure=None):
    """The ASGI application, to which the engine of a `host.Link` belongs from then on.

    `on_failure` is called on another thread when the engine has ended with an error.
    """
    api = Api(link, tokenizer, names, template, limits or Limits(), on_failure)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        asyncio.get_running_loop().set_exception_handler(Seldom())
        yield
        api.pool.shutdown(wait=False, cancel_futures=True)
        api.service.close()

    guarded = api.guarded
    completions = functools.partial(api.complete, CompletionBody, Completion)
    chats = functools.partial(api.complete, ChatBody, Chat)
    routes = [
        Route("/v1/completions", guarded(completions), methods=["POST"]),
        Route("/v1/chat/completions", guarded(chats), methods=["POST"]),
        Route("/v1/models", guarded(api.models)),
        Route("/v1/models/{name:path}", guarded(api.models)),
        Route("/health", api.health),
        Route("/metrics", api.metrics_text),
        Route("/", lambda http: FileResponse(PAGE)),
    ]
    handlers = dict.fromkeys((Refused, HTTPException, Exception), refused)
    handlers[ClientDisconnect] = nobody_reads
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.state.service, app.state.hurry = api.service, api.hurry
    return app
