"""Masks of the tokens that a JSON schema allows next, by xgrammar's library through fi_ffi.

The library of the package xgrammar registers functions and types with libtvm_ffi, so that its
Python package, and torch with it, are not imported.
"""

import contextlib
import importlib.metadata
import json
import resource
import time
from collections import namedtuple
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from engine import spawned
from engine.words import Words

import fi_ffi

from .schema import MOST_SCHEMA, Refused

LIBRARY = "xgrammar/libxgrammar_bindings.so"
QUICK = 0.5  # seconds in which a schema has to compile while others wait
KEPT, KEPT_SECONDS = 256, 600  # schemas of which is known what they are; refusals for so long
MEMORY = 8 << 30  # bytes of addresses that a process which tries schemas may have


def library(folder=None):
    """The library in a folder, or of the installed package; None without it, or for "none"."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        folder = folder or importlib.metadata.distribution("xgrammar").locate_file("")
    if folder in (None, "none"):
        return None
    path = Path(str(folder)) / LIBRARY
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    return path


def _type(name):
    return fi_ffi.object_type(f"xgrammar.tvm_ffi_binding.{name}")


def compiler(path, kind, words, vocab, eos):
    fi_ffi.module(path)
    info = _type("TokenizerInfo")(words, kind, vocab, eos, False)
    return _type("GrammarCompiler")(info, 1, False, -1)  # its cache grows past its limit


def compiled(compiler, text, is_strict):
    return compiler.compile_json_schema(text, False, None, None, is_strict, None, False)


def _try_schemas(pipe, *parts):
    """What the other process of a `Trial` runs."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    made = compiler(*parts)
    with contextlib.suppress(OSError, EOFError):  # the server has ended
        while True:
            pipe.send(True)  # it is ready
            schema = pipe.recv()
            try:
                compiled(made, *schema)
                pipe.send(True)
            except (fi_ffi.FiFfiError, MemoryError):
                pipe.send(False)


class Trial:
    """Compiles schemas in another process first, which ends with one that takes too long.

    A pattern of 20,000 optional letters compiles for minutes, and nothing stops xgrammar.
    """

    def __init__(self, parts):
        self.parts = parts
        (self.pipe, self.child), self.spare = self._begun(), None

    def __call__(self, seconds, *schema):
        """Whether a schema compiles; TimeoutError where it is not known in time."""
        try:
            self.pipe.recv()
            self.pipe.send(schema)
            if self.pipe.poll(seconds):
                return self.pipe.recv()
        except (OSError, EOFError):  # the schema has ended the process
            self._again()
            return False
        self._again()
        raise TimeoutError

    def _begun(self):
        return spawned(_try_schemas, *self.parts, daemon=True)

    def _again(self):
        """Go on with another process, and begin one that is there when this one is lost."""
        self.child.kill()
        self.child.join()
        self.pipe.close()
        self.pipe, self.child = self.spare or self._begun()
        self.spare = self._begun()


# The state of one request's grammar, as the engine asks for it.
Grammar = namedtuple("Grammar", ("fill", "accept"))


class Grammars:
    """Compiles schemas, each within `seconds`, on one thread; without a library it refuses them."""

    def __init__(self, path, tokenizer, vocab, eos, seconds=5.0):
        self.compiled, self.seconds, self.has_end = None, seconds, bool(eos)
        self.bits = 1, -(-vocab // 32)  # the shape of a mask
        if path is None:
            return
        parts = (str(path), *vocabulary(tokenizer, vocab), vocab, [*eos])
        self.compiled = lru_cache(KEPT)(partial(compiled, compiler(*parts)))
        self.matcher, self.trial, self.known = _type("GrammarMatcher"), Trial(parts), {}

    def _try_out(self, text, is_strict, is_patient):
        """Why a schema is refused, or None, as `known` for a time; TimeoutError for impatience."""
        wrong, until = self.known.get(text, (None, 0))
        if time.monotonic() < until:
            return wrong
        try:
            compiles = self.trial(self.seconds if is_patient else QUICK, text, is_strict)
            wrong = None if compiles else "not a JSON schema that can be served"
        except TimeoutError:
            if not is_patient:
                raise
            wrong = f"a schema has to compile within {self.seconds:g} s"
        if len(self.known) >= KEPT:
            del self.known[next(iter(self.known))]
        # Another time the machine may be less busy.
        self.known[text] = wrong, time.monotonic() + (KEPT_SECONDS if wrong else float("inf"))
        return wrong

    def __call__(self, schema, param, is_patient=True):
        """A grammar's state; None is any JSON object.  TimeoutError where it needs patience."""
        if self.compiled is None:
            raise Refused(f"{param}: this server has no xgrammar, which that needs", param=param)
        if not self.has_end:
            raise Refused(f"{param}: the model has no token that ends a text", param=param)
        is_strict = schema is not None
        text = json.dumps(schema if is_strict else {"type": "object"})
        if len(text) > MOST_SCHEMA:
            raise Refused(f"{param}: a schema has {MOST_SCHEMA} bytes at most", param=param)
        if wrong := self._try_out(text, is_strict, is_patient):
            raise Refused(f"{param}: {wrong}", param=param)
        made = self.compiled(text, is_strict)
        state, bits = self.matcher(made, None, False, -1, None), np.zeros(self.bits, "i4")
        grammar = Grammar(
            fill=lambda bits, row: state.fill_next_token_bitmask(bits, row, False),
            accept=lambda token: bool(state.accept_token(token, False)),
        )
        grammar.fill(bits, 0)
        if not bits.any():  # such as one that refers to itself alone
            raise Refused(f"{param}: no text fits the schema", param=param)
        return grammar


def vocabulary(tokenizer, vocab):
    """Which kind xgrammar calls it, and the tokens in order; special ones have no text."""
    of, names = Words(tokenizer), [""] * vocab
    kind = 2 if "ByteLevel" in of.decoders else 1 if "ByteFallback" in of.decoders else 0
    for name, token in tokenizer.get_vocab(with_added_tokens=True).items():
        if token < vocab and token not in of.special:
            names[token] = name
    return kind, names
