"""A request of a client: its choices as they come, and the objects that tell them."""

import asyncio
import json
import time
import uuid
from functools import partial

from engine.words import Decoder

from .chat import OPEN, call_of, calls_of
from .harmony import CHANNEL, Harmony
from .schema import Refused
from .service import Listener
from .text import THINK, THOUGHT, Logprob, Piece, Text


class Answer:
    """What both kinds of completion have; `requests` are the engine's, one for each choice."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, service, words, name, body, requests):
        self.service, self.words, self.name = service, words, name
        self.body, self.requests = body, requests
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self.texts = [self._text(index) for index in range(len(requests))]

    @property
    def _is_free(self):
        """Whether no schema says what is written."""
        form = self.body.response_format
        return not getattr(self.body, "forced", None) and (form is None or form.type == "text")

    def _text(self, index, **more):
        # JSON begins anew, also after half a character.
        prompt = self.requests[index].prompt if self._is_free else ()
        return Text(self.words, self.body.stops, prompt=prompt, tops=self.body.tops, **more)

    async def pieces(self):
        """(choice, Piece) as they come; the last of each choice has its `finished`."""
        queue, open_ = asyncio.Queue(), {}
        try:
            for index, request in enumerate(self.requests):
                open_[index] = Listener(request, index, queue)
                self.service.submit(open_[index])
            while open_:
                listener = await queue.get()
                index, (tokens, logprobs, finished) = listener.index, listener.take()
                if index not in open_:  # its text had ended
                    continue
                if finished == "cancelled":  # by nobody here
                    raise Refused("the server is ending", 503)
                if finished == "error":
                    raise Refused("the engine could not go on", 500, code="engine_error")
                piece = self.texts[index].add(tokens, logprobs, finished)
                if piece.finished:
                    self.service.cancel(open_.pop(index), piece.finished)
                if piece.text or piece.thought or piece.logprobs or piece.finished:
                    yield index, piece
        finally:
            for listener in open_.values():
                self.service.cancel(listener)

    def told(self, index, name, value, logprobs, finished=None):
        """A choice, or a change of one."""
        return {"index": index, name: value, "logprobs": logprobs, "finish_reason": finished}

    def object(self, kind, choices, **more):
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name,
                "choices": choices} | more  # fmt: skip

    @property
    def usage(self):
        prompts = self.requests[:: self.body.n or 1]
        prompt = sum(len(request.prompt) for request in prompts)
        drawn = sum(len(text.tokens) for text in self.texts)
        cached = sum(request.reused for request in prompts)
        told = {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}
        return told | {"prompt_tokens_details": {"cached_tokens": cached}}

    async def whole(self):
        told = [Piece("") for _ in self.requests]
        async for index, piece in self.pieces():
            told[index].text += piece.text
            told[index].thought += piece.thought
            told[index].logprobs += piece.logprobs
            told[index].finished = piece.finished
        choices = [self.choice(index, piece) for index, piece in enumerate(told)]
        return self.object(self.kind, choices, usage=self.usage)

    async def events(self):
        """The answer in server-sent events; an error once it has begun is one too."""
        options, pieces = self.body.stream_options, self.pieces()
        with_usage = bool(options and options.include_usage)
        chunk = partial(self.object, self.chunk_kind, **{"usage": None} if with_usage else {})
        try:
            for choice in self.beginnings():
                yield event(chunk([choice]))
            async for index, piece in pieces:
                for choice in self.changes(index, piece):
                    yield event(chunk([choice]))
            if with_usage:
                yield event(chunk([], usage=self.usage))
        except Refused as refused:
            yield event(refused.body)
        finally:
            await pieces.aclose()
        yield "data: [DONE]\n\n"

    def beginnings(self):
        return ()


encoded = json.JSONEncoder(separators=(",", ":")).encode


def event(told):
    return f"data: {encoded(told)}\n\n"


class Completion(Answer):
    """Of /v1/completions."""

    def _text(self, index):
        return super()._text(index, offset=len(self.echo(index)))

    def prompt(self, index):
        return self.body.prompts[index // (self.body.n or 1)]

    def echo(self, index):
        """The prompt as text, where it is asked for."""
        if not self.body.echo:
            return ""
        if isinstance(prompt := self.prompt(index), str):
            return prompt
        decoder = Decoder(self.words, skips=False)
        return "".join(map(decoder.step, self.requests[index].prompt))

    def echoed_logprobs(self, index):
        """Of the prompt's tokens, the first of which follows nothing."""
        request, tops, offset = self.requests[index], self.body.logprobs, 0
        decoder, following = Decoder(self.words, skips=False), [None, *request.prompt_logprobs]
        is_text = isinstance(self.prompt(index), str)  # without what the tokenizer puts before it
        added = is_text and self.words.tokenizer.num_special_tokens_to_add(False)
        for n, (token, logprob) in enumerate(zip(request.prompt, following, strict=False)):
            value, ids, values = logprob or (None, [], [])
            yield Logprob(token, value, ids[:tops], values[:tops], offset)
            offset += len(decoder.step(token)) if n >= added else 0

    async def pieces(self):
        body, begun = self.body, set()
        async for index, piece in super().pieces():
            if body.max_tokens == 0:  # the prompt alone
                piece.text, piece.logprobs = "", []
                piece.finished = piece.finished and "length"
                self.texts[index].tokens.clear()
                if not piece.finished:
                    continue
            if body.echo and index not in begun:
                piece.text = self.echo(index) + piece.text
                if body.logprobs is not None:
                    piece.logprobs = [*self.echoed_logprobs(index), *piece.logprobs]
            begun.add(index)
            yield index, piece

    def choice(self, index, piece):
        logprobs = None
        if self.body.logprobs is not None:
            told = piece.logprobs
            logprobs = {
                "tokens": [self.words.name(x.token) for x in told],
                "token_logprobs": [x.value for x in told],
                "top_logprobs": [self._tops(x) for x in told],
                "text_offset": [x.offset for x in told],
            }
        return self.told(index, "text", piece.text, logprobs, piece.finished)

    def _tops(self, told):
        """By name, the chosen token among them; nothing of the first of a prompt."""
        if told.value is None:
            return None
        names = {told.token: self.words.name(told.token)}
        for token in told.tokens:
            name = self.words.name(token)
            if token not in names:  # another may have the same
                names[token] = f"token_id:{token}" if name in names.values() else name
        values = dict(zip(told.tokens, told.values, strict=True)) | {told.token: told.value}
        return {name: values[token] for token, name in names.items()}

    def changes(self, index, piece):
        yield self.choice(index, piece)


class Chat(Answer):
    """Of /v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def _text(self, index):
        body = self.body
        held = "" if body.forced else OPEN if body.tools and body.tool_choice != "none" else None
        if self._is_free and self.words.tokenizer.token_to_id(CHANNEL) is not None:
            return super()._text(index, decoder=Harmony)
        return super()._text(index, held=held, thinks=self._thinks(index))

    def _thinks(self, index):
        """As `Text` has it; what follows a schema does not think."""
        if not self._is_free or self.words.tokenizer.token_to_id(THOUGHT) is None:
            return None
        last = Decoder(self.words, skips=False)
        end = "".join(map(last.step, self.requests[index].prompt[-len(THINK) :]))
        return end.rstrip().endswith(THINK)

    def _logprobs(self, piece):
        if not self.body.logprobs:
            return None

        def of(token, value, **more):
            said = self.words.bytes(token)
            told = {"token": said.decode(errors="replace"), "logprob": value, "bytes": [*said]}
            return told | more

        content = [of(x.token, x.value, top_logprobs=[*map(of, x.tokens, x.values)])
                   for x in piece.logprobs]  # fmt: skip
        return {"content": content, "refusal": None}

    def _ending(self, index, finished):
        """At the end: text that was held back, tool calls in it, and why there is no more."""
        text = self.texts[index]
        before, calls = "", [call_of(call) for call in text.decoder.calls]
        if text.held_from is not None:
            before, calls = calls_of(text.text[text.begin :], bool(self.body.forced))
        calls = calls[:1] if self.body.parallel_tool_calls is False else calls
        finished = "tool_calls" if calls and finished == "stop" else finished
        return before[text.told - text.begin :], calls, finished

    def choice(self, index, piece):
        rest, calls, reason = self._ending(index, piece.finished)
        content = piece.text + rest
        message = {"role": "assistant", "content": content, "refusal": None}
        if piece.thought:
            message["reasoning_content"] = piece.thought
        if calls:
            message |= {"content": content.strip() or None, "tool_calls": calls}
        return self.told(index, "message", message, self._logprobs(piece), reason)

    def beginnings(self):
        for index in range(len(self.requests)):
            yield self.told(index, "delta", {"role": "assistant", "content": ""}, None)

    def changes(self, index, piece):
        parts = {"reasoning_content": piece.thought} if piece.thought else {}
        if piece.text or not parts:
            parts["content"] = piece.text
        if piece.text or piece.thought or piece.logprobs:
            yield self.told(index, "delta", parts, self._logprobs(piece))
        if not piece.finished:
            return
        rest, calls, reason = self._ending(index, piece.finished)
        if rest:
            yield self.told(index, "delta", {"content": rest}, None)
        if calls:
            numbered = [{"index": n} | call for n, call in enumerate(calls)]
            yield self.told(index, "delta", {"tool_calls": numbered}, None)
        yield self.told(index, "delta", {}, None, reason)
