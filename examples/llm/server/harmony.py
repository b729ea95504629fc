"""OpenAI's harmony format, which gpt-oss writes, in the words that `Text` and `calls_of` read.

A message has a head of special tokens: its channel, and to whom it is.  What is on the channel
`analysis` is a thought; what is to a function are the arguments of a call.
"""

import json
import re

from engine.words import Decoder

from .chat import OPEN, SHUT
from .text import THINK, THOUGHT

MARKS = START, CHANNEL, MESSAGE, END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
RECIPIENT = re.compile(r"to=functions\.([\w.-]+)")


class Harmony(Decoder):
    def __init__(self, words, prompt=()):
        super().__init__(words, prompt)
        self.marks = {words.tokenizer.token_to_id(name): name for name in MARKS}
        self.head, self.is_thought, self.shut = "", False, ""  # `head`: None in a message

    def step(self, token):
        mark, text = self.marks.get(token), super().step(token)
        if mark is None and self.head is None:
            return text
        if mark in (END, START):
            text, self.head, self.shut = self.shut, "", ""
            return text
        if mark == MESSAGE:
            return self._begun()
        self.head = (self.head or "") + ("\n" if mark else text)
        return ""

    def _begun(self):
        """What stands for the head of a message that begins."""
        head, self.head = self.head or "", None
        called = RECIPIENT.search(head)
        if head.rpartition("\n")[2].split()[:1] == ["analysis"] and not called:
            before, self.is_thought = "" if self.is_thought else THINK, True
            return before
        before, self.is_thought = THOUGHT if self.is_thought else "", False
        if called:
            self.shut = "}" + SHUT
            return f'{before}{OPEN}{{"name": {json.dumps(called[1])}, "arguments": '
        return before

    def rest(self):
        return super().rest() + self.shut
