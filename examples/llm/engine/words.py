"""Tokens as the bytes that they add to a text, and the characters that these make up."""

import codecs
import functools
import json
import re

BYTE = re.compile("<0x([0-9A-F]{2})>")
LONGEST = 4  # bytes of a character, and so tokens that one may be of

# The bytes that the letters of byte-level tokenizers stand for: most are their own.
BYTES = {chr(byte): byte for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}
OTHERS = [byte for byte in range(256) if byte not in BYTES.values()]
BYTES |= {chr(256 + n): byte for n, byte in enumerate(OTHERS)}


class Words:
    """What a tokenizer's decoder makes of each token."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        tokenizer.no_truncation()  # a file keeps what its maker trained with
        tokenizer.no_padding()
        decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
        self.decoders = {part["type"] for part in decoder.get("decoders", [decoder]) if part}
        added = tokenizer.get_added_tokens_decoder()
        self.special = {number for number, token in added.items() if token.special}
        self.bytes, self.first = functools.cache(self._bytes), functools.cache(self._first)

    @functools.cached_property
    def before(self):
        """A token and its text, after which others have the space that begins them."""
        for token in range(self.tokenizer.get_vocab_size()):
            text = self._decoded(token)
            if token not in self.special and text.isascii() and text.isalnum():
                return [token], text
        return [], ""

    def _decoded(self, *tokens):
        return self.tokenizer.decode([*tokens], skip_special_tokens=False)

    def _bytes(self, token):
        """What it adds to a text; a token may be a part of a character."""
        name = self.tokenizer.id_to_token(token)
        if name is None:  # rows of the embedding that the tokenizer does not use
            return b""
        if "ByteLevel" in self.decoders and all(letter in BYTES for letter in name):
            return bytes(BYTES[letter] for letter in name)
        if "ByteFallback" in self.decoders and (byte := BYTE.fullmatch(name)):
            return bytes([int(byte[1], 16)])
        tokens, text = self.before
        return self._decoded(*tokens, token)[len(text) :].encode()

    def _first(self, token):
        """The same where a text begins with it: some decoders strip a space there."""
        whole, text = self.bytes(token), self._decoded(token).encode()
        return text if whole.endswith(text) else whole

    def name(self, token):
        """Its text, or as OpenAI has it where it is no whole character."""
        told = self.bytes(token)
        try:
            return told.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in told)


class Decoder:
    """Characters as the tokens after a prompt come; `skips` special ones."""

    def __init__(self, words, prompt=(), skips=True):
        self.words, self.skips = words, skips
        self.thought, self.calls = "", []  # what a format tells apart
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        plain = [token for token in prompt[-LONGEST:] if token not in words.special]
        self.is_first = not plain and words.special.issuperset(prompt)
        for token in plain:  # the last may be half a character
            self.utf8.decode(words.bytes(token))

    def step(self, token):
        """The characters that have become whole with a token."""
        if self.skips and token in self.words.special:
            return ""
        told = self.words.first(token) if self.is_first else self.words.bytes(token)
        self.is_first = False
        return self.utf8.decode(told)

    def rest(self):
        """At the end: what stands for bytes that are no whole character."""
        return self.utf8.decode(b"", True)
