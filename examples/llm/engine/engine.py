"""Continuous batching: which tokens go into each step, and what comes of them.

A step is queued on the stream before the tokens of the step before it have arrived: a token
goes from one step to the next on the device, and the host reads it meanwhile.  So the GPU
does not wait for Python, and that a request has ended is seen one step later.  A grammar's mask
needs that token: it follows while the step's logits are computed.
"""

import functools
import itertools
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from .config import LINEAR
from .pages import Pages
from .sampling import MOST_BIASES, Sampling
from .steps import Steps

PASSED = 32  # later requests that may go before one for which there are not enough pages
LOOKED_AT = 64  # waiting requests, at each step


@dataclass(eq=False)
class Request:
    """A prompt and what comes of it: `tokens` grows until `finished` says why it does not."""

    prompt: list
    sampling: Sampling
    tokens: list = field(default_factory=list)  # those drawn, without what ended it
    finished: str | None = None  # "stop", "length" or "cancelled"
    number: int = field(default_factory=itertools.count().__next__)  # of this process
    reused: int = 0  # tokens of the prompt that were in the cache already
    slot: int | None = None
    pages: list = field(default_factory=list)
    passed: int = 0  # requests that went before it
    wanted: int = 0  # pages that were too few when it was last looked at
    rest: int | None = None  # tokens of the prompt that were not in the cache, once it has waited
    preempted: int = 0  # times that it lost its pages
    echoed: int = 0  # tokens of the prompt whose followers' log probabilities are asked for
    computed: int = 0  # tokens whose keys and values are in the cache, or will be
    filled: int = 0  # those that are in it
    remembered: int = 0  # those whose pages are known to prompts to come
    drawn: int = 0  # tokens drawn, with those that the host has not seen
    numbers: object = None
    known: object = None  # int32: the prompt; after it lost its pages with the tokens so far
    prompt_key: bytes = b""  # the same prompts have the same
    bias: object = None  # tokens and what is added to their logits, as arrays
    grammar: object = None  # `fill` a row of a mask, `accept` a token
    logprobs: list = field(default_factory=list)  # (value, tokens, their values) of each token
    prompt_logprobs: list = field(default_factory=list)  # from the second token of the prompt on

    @property
    def left(self):
        """Tokens that are yet to be computed before the next is drawn."""
        return len(self.prompt) + self.drawn - self.computed

    @property
    def is_new(self):
        """Whether the next of its tokens that is computed is known to the host."""
        return self.computed < len(self.known)

    def text(self, start, end):
        count = len(self.prompt)
        return self.prompt[start:end] + self.tokens[max(start - count, 0) : max(end - count, 0)]


def _asked(request, logprob):
    """As many of the most probable tokens as it wants: a step has as many as any of it does."""
    (value, ids, values), count = logprob, request.sampling.logprobs or 0
    return value, ids[:count], values[:count]


class Requests:
    """Makes requests of an engine that has a `config`, and `room` for so many tokens."""

    def __init__(self, config, room):
        self.config, self.room = config, room

    def request(self, prompt, sampling=None, grammar=None):
        """What `Engine.submit` queues, checked; any thread may make one."""
        request = Request([*map(int, prompt)], sampling or Sampling(), grammar=grammar)
        total, vocab = len(request.prompt) + request.sampling.max_tokens, self.config.vocab
        if not request.prompt or min(request.prompt) < 0 or max(request.prompt) >= vocab:
            raise ValueError(f"a prompt is one token or more, each from 0 to {vocab - 1}")
        if total > self.room:
            raise ValueError(f"{total} tokens, max_tokens included; there is room for {self.room}")
        bias = request.sampling.logit_bias
        if len(bias) > MOST_BIASES or not all(0 <= token < vocab for token in bias):
            raise ValueError(f"logit_bias: {MOST_BIASES} tokens at most, from 0 to {vocab - 1}")
        request.bias = np.array([*bias], np.int32), np.array([*bias.values()], np.float32)
        request.numbers = request.sampling.generator()
        request.known = np.array(request.prompt, np.int32)
        request.prompt_key = request.known.tobytes()
        return request


class Engine(Requests):
    """A model that serves requests; `runner` runs its steps, on one rank or more."""

    def __init__(self, runner):
        self.runner, job = runner, runner.job
        self.page_size, self.max_tokens = job.page_size, job.max_tokens
        self.model = runner.model  # rank 0's, where it is in this process
        # The states of linear attention are not in pages: there a prompt is not reused.
        self.pages = Pages(job.num_pages, job.page_size, reuse=LINEAR not in job.config.layers)
        room = self.pages.total * job.page_size
        super().__init__(job.config, min(job.config.max_positions, room))
        self.steps = Steps(runner)
        self.waiting, self.running, self.queued = deque(), [], None
        self.full = []  # requests that have filled a page since the last step
        self.preempted = 0  # times that any request lost its pages
        self.slots = [*range(job.max_batch)][::-1]

    def submit(self, prompt, sampling=None):
        """Queue a prompt (token ids); ValueError where it could never be run."""
        request = self.request(prompt, sampling)
        self.waiting.append(request)
        return request

    def cancel(self, request):
        """End a request; its pages are free for the next step."""
        if request.finished is None:
            self._finish(request, "cancelled")

    def step(self):
        """Queue a step and take in the one before: requests with news; None when none are left."""
        for request in self.full:  # while the GPU goes on with the step that is queued
            if request.finished is None and request.slot is not None:
                self._remember(request)
        self._admit()
        work, before = self._schedule(), self.queued
        arrived = functools.cache(lambda: self._arrived(before) if before else [])
        self.queued = self.steps.queue(work, arrived) if work else None
        return arrived() if work or before else None

    def run(self):
        while self.step() is not None:
            pass

    def generate(self, prompt, sampling=None):
        """Tokens of one request, each when it is there."""
        request, told = self.submit(prompt, sampling), 0
        try:
            while request.finished is None or told < len(request.tokens):
                if told == len(request.tokens):
                    self.step()
                yield from request.tokens[told:]
                told = len(request.tokens)
        finally:
            self.cancel(request)

    def _admit(self):
        """Requests by and large in order, while there are slots, and pages for what is known.

        Later ones go before one that does not fit, so many times at most.  The same prompts wait
        for the first of them, and find its pages.  Long ones wait until they can soon be computed.
        """
        if not self.waiting or not self.slots:
            return
        coming, blocked = {r.prompt_key for r in self.running if self._leads(r)}, []
        long = [r.left for r in self.running if r.is_new and r.left > self.max_tokens]
        early = (request for request in [*self.waiting] if not self._is_late(request, long))
        for request in itertools.islice(early, LOOKED_AT):
            if request.prompt_key in coming and not request.sampling.prompt_logprobs:
                continue
            if self._place(request):
                self.waiting.remove(request)
                for other in blocked:
                    other.passed += 1
                if not self.slots or any(other.passed >= PASSED for other in blocked):
                    return
                if self._leads(request):
                    coming.add(request.prompt_key)
                long += [request.left] * (request.left > self.max_tokens)
            elif request.passed >= PASSED:
                return
            else:
                blocked.append(request)

    def _is_late(self, request, long):
        """Whether two go before it, of no more than twice its rest: `long` has those of prompts."""
        if len(long) < 2 or len(request.prompt) <= self.max_tokens or request.preempted:
            return False
        if request.rest is None:
            self.pages.give_back(found := self.pages.find(request.prompt))
            request.rest = len(request.prompt) - len(found) * self.page_size
        return request.rest > self.max_tokens and sum(n <= 2 * request.rest for n in long) >= 2

    def _leads(self, request):
        """Whether pages of its prompt will be known that are not yet."""
        full = (len(request.prompt) - 1) // self.page_size * self.page_size
        return self.pages.reuse and request.remembered < full

    def _place(self, request):
        """Give it a slot and pages for what is known of it; whether there are enough."""
        pages, spare = self.pages, len(self.running)  # each that runs may soon need one more
        before = pages.available
        # To look for pages takes its time, of a long prompt milliseconds.
        if self.running and request.wanted + spare > before:
            return False
        known = request.text(0, len(request.prompt) + len(request.tokens))
        # All logits of a prompt are computed where they are asked for.
        found = [] if request.sampling.prompt_logprobs else pages.find(known)
        need = -(-len(known) // self.page_size) - len(found)
        if need + spare > pages.available:
            request.wanted = need + before - pages.available
            pages.give_back(found)
            return False
        request.pages, request.slot = found + pages.take(need), self.slots.pop()
        request.known = np.array(known, np.int32)
        request.computed = request.filled = request.remembered = len(found) * self.page_size
        if not request.preempted:
            request.reused = request.computed
        self.running.append(request)
        self.steps.admit(request)
        return True

    def _schedule(self):
        """(request, tokens) of the next step: one token where it decodes, the rest for prompts."""
        room, work = self.max_tokens, {}
        echoed = len(self.slots)  # rows of logits that no draw needs
        prompts = [request for request in self.running if request.is_new]
        # Half of the room for prompts is kept for the oldest.
        half = (room + len(prompts) - len(self.running)) // 2
        kept = min(half, prompts[0].left) if prompts else 0
        # A long prompt delays neither who decodes nor a short one by more than a step of its own.
        for request in sorted(self.running, key=lambda r: (r.is_new, r.left)):
            if request.slot is None:  # it has made way
                continue
            kept = 0 if request in prompts[:1] else kept
            count = min(request.left, room - kept)
            if request.sampling.prompt_logprobs and not request.drawn:
                count = min(count, echoed + 1)
                echoed -= max(count - 1, 0)
            is_due = count and request.drawn < request.sampling.max_tokens
            if is_due and self._grow(request, request.computed + count, work):
                work[request] = count
                room -= count
        return [*work.items()]

    def _grow(self, request, tokens, work):
        """Give it pages for so many tokens; False where it has made way itself."""
        have = len(request.pages)
        more = -(-tokens // self.page_size) - have
        while more > self.pages.available:  # the youngest loses its own: the oldest always goes on
            youngest = max(self.running, key=lambda r: r.number)
            work.pop(youngest, None)
            # It waits as the next; what was computed of it is computed again, and nothing drawn.
            self._release(youngest)
            youngest.pages, youngest.slot, youngest.wanted = [], None, 0
            youngest.preempted += 1
            self.preempted += 1
            self.waiting.appendleft(youngest)
            if youngest is request:
                return False
        if more > 0:
            request.pages += self.pages.take(more)
            self.steps.place(request, have)
        return True

    def _arrived(self, step):
        (tokens, logprobs), changed = self.steps.tokens(step), []
        for request, end in step.filled:
            request.filled = end
        size = self.page_size
        self.full = [r for r, end in step.filled if end // size > r.remembered // size]
        for request, token in zip(step.sampled, tokens, strict=True):
            logprob = next(logprobs)
            if request.finished is not None:  # it ended while this was under way
                continue
            changed.append(request)
            if token in self.config.eos and not request.sampling.ignore_eos:
                self._finish(request, "stop")
            elif request.grammar and not request.grammar.accept(token):
                self._finish(request, "error")  # no token fits
            else:
                request.tokens.append(token)
                if request.sampling.logprobs is not None:
                    request.logprobs.append(_asked(request, logprob))
                if len(request.tokens) == request.sampling.max_tokens:
                    self._finish(request, "length")
        for request, echoed in step.echoed:
            some = itertools.islice(logprobs, len(echoed))
            request.prompt_logprobs += [_asked(request, logprob) for logprob in some]
        return changed

    def _remember(self, request):
        """Its full pages, for prompts to come that begin alike."""
        first = request.remembered // self.page_size
        tokens = request.text(first * self.page_size, request.filled)
        self.pages.remember(request.pages, first, tokens)
        self.steps.place(request, first)
        request.remembered = request.filled

    def _finish(self, request, why):
        request.finished = why
        if request.slot is None:
            self.waiting.remove(request)
        else:
            self._release(request)

    def _release(self, request):
        self._remember(request)
        self.running.remove(request)
        self.slots.append(request.slot)
        self.pages.give_back(request.pages)

    def close(self):
        self.runner.close()
