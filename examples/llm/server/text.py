"""The text of a request as its tokens come: characters that are whole, up to a stop string."""

import re
from collections import namedtuple
from dataclasses import dataclass, field

from engine.words import Decoder

THINK, THOUGHT = "<think>", "</think>"  # around what a model thinks before its answer
AFTER = re.compile(rf"{THOUGHT}\s*")
OBJECT = r"\s*(?:({)|\Z)"  # an object of JSON, or what may be one

# `offset` is in the text.
Logprob = namedtuple("Logprob", ("token", "value", "tokens", "values", "offset"))


@dataclass
class Piece:
    text: str
    logprobs: list = field(default_factory=list)
    finished: str | None = None
    thought: str = ""  # before the text


def begun(text, stop):
    """How many characters at the end of `text` may be the beginning of `stop`."""
    at = max(len(text) - len(stop) + 1, 0)
    while (at := text.find(stop[0], at)) >= 0:
        if stop.startswith(text[at:]):
            return len(text) - at
        at += 1
    return 0


class Text:
    """Of one request.

    Args:
        stops: strings before the first of which the text ends.
        held: a string from which on nothing is told if an object of JSON follows, or "" for all;
            it is in `text` in the end.
        tops: None for no logprobs.
        offset: where the text begins, of what was told before it.
        thinks: whether it begins within a thought, or may begin with one; None for neither.
    """

    def __init__(self, words, stops=(), held=None, tops=None, offset=0, prompt=(), thinks=None,
                 decoder=Decoder):  # fmt: skip
        self.stops, self.held, self.tops = stops, held, tops
        self.decoder = decoder(words, prompt)
        self.text, self.told, self.offset, self.tokens, self.waiting = "", 0, offset, [], []
        self.longest = max(map(len, (*stops, held or "")), default=0)
        self.held_from, self.is_held = (0, True) if held == "" else (None, False)
        self.finished, self.thinks, self.begin = None, thinks, 0  # `begin`: after a thought

    def add(self, tokens, logprobs, finished):
        """The next piece, of tokens that have come, and of why no more will."""
        begin, ends = max(len(self.text) - self.longest, 0), False
        for token, logprob in zip(tokens, logprobs or [None] * len(tokens), strict=True):
            if self.tops is not None:
                self.waiting.append(Logprob(token, *logprob, self.offset + len(self.text)))
            self.tokens.append(token)
            if ends := self._ends(self.decoder.step(token)):
                break
        ends = ends or (finished and self._ends(self.decoder.rest()))
        self.finished = finished = "stop" if ends else finished
        apart, self.decoder.thought = self.decoder.thought, ""
        thought = apart if self.thinks is None else apart + self._think()
        end = self._end(max(begin, self.begin)) if self.thinks is None else self.told
        piece = Piece(self.text[self.told : end], [], finished, thought)
        self.told = max(end, self.told)
        if self.tops is not None:  # of a token whose text has begun
            ready = [x for x in self.waiting if x.offset - self.offset < self.told]
            if apart or (finished and not ends):
                ready = self.waiting
            self.waiting = self.waiting[len(ready) :]
            piece.logprobs = ready
        return piece

    def _ends(self, more):
        """Whether a stop string ends the text with these characters."""
        begin, self.text = max(len(self.text) - self.longest, 0), self.text + more
        ends = [at for stop in self.stops if (at := self.text.find(stop, begin)) >= 0]
        self.text = self.text[: min(ends, default=None)]
        return bool(ends)

    def _think(self):
        """What has come of a thought; the text that is told is what follows."""
        if not self.told:  # a model may begin one once more
            start = self.text.lstrip()
            if start.startswith(THINK):
                self.thinks, self.told = True, len(self.text) - len(start) + len(THINK)
            elif not self.finished and THINK.startswith(start):
                return ""
            self.thinks = self.thinks or None
        if not self.thinks:
            return ""
        text, told, found = self.text, self.told, AFTER.search(self.text, self.told)
        if not found:
            strings = (*self.stops, THOUGHT)
            left = 0 if self.finished else max(begun(text, string) for string in strings)
            self.told = max(len(text) - left, told)
            return text[told : self.told]
        self.begin = self.told = found.end()
        if found.end() < len(text) or self.finished:
            self.thinks = None
        else:  # spaces before the answer may go on
            self.told = found.start()
        return text[told : found.start()]

    def _end(self, begin):
        """How much may be told: not what may be the beginning of a stop string."""
        text = self.text
        if self.held is not None and not self.is_held:  # so far no object follows
            begin = begin if self.held_from is None else self.held_from
            found = re.compile(re.escape(self.held) + OBJECT).search(text, begin)
            self.held_from, self.is_held = found and found.start(), bool(found and found[1])
        if self.held_from is not None:
            return max(self.held_from, self.told)
        if self.finished:
            return len(text)
        strings = self.stops if self.held is None else (*self.stops, self.held)
        return len(text) - max((begun(text, stop) for stop in strings), default=0)
