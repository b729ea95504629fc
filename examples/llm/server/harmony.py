"""OpenAI's harmony format, which gpt-oss writes: content, thoughts, and calls of functions.

A message has a head of special tokens: its channel, and to whom it is.  What is on the channel
`analysis`, or to a tool of the model's own, is a thought.
"""

import re

from engine.words import Decoder

MARKS = START, CHANNEL, MESSAGE, END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
RECIPIENT = re.compile(r"to=(functions\.)?([\w.-]+)")
ANALYSIS = re.compile(r"^\s*analysis", re.MULTILINE)


class Harmony(Decoder):
    def __init__(self, words, prompt=()):
        super().__init__(words, prompt)
        self.marks = {words.tokenizer.token_to_id(name): name for name in MARKS}
        self.head, self.kind = "", None  # `head`: None in a message

    def step(self, token):
        mark, text = self.marks.get(token), super().step(token)
        if mark == MESSAGE:  # of the kind that its head says
            head, self.head = self.head or "", None
            to, is_analysis = RECIPIENT.search(head), ANALYSIS.search(head)
            self.kind = "call" if to and to[1] else "thought" if to or is_analysis else None
            if self.kind == "call":
                self.calls.append({"name": to[2], "arguments": ""})
        elif mark in (START, END) or (mark and self.head is None):
            self.head = "" if mark == END else "\n"
        elif self.head is not None:
            self.head += "\n" if token in self.words.special else text
        else:
            return self._told(text)
        return ""

    def _told(self, text):
        """What of it is content."""
        if self.kind == "call":
            self.calls[-1]["arguments"] += text
        elif self.kind == "thought":
            self.thought += text
        return "" if self.kind else text

    def rest(self):
        """At the end also what has no head."""
        return self._told(super().rest()) + ("" if "\n" in (self.head or "") else self.head or "")
