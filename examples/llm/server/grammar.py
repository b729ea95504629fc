"""Masks of the tokens that a JSON schema allows next, by xgrammar's library through fi_ffi.

The library of the package xgrammar registers functions and types with libtvm_ffi, so that its
Python package, and torch with it, are not imported.
"""

import contextlib
import functools
import importlib.metadata
import json
import multiprocessing
import resource
from pathlib import Path

from engine.words import Words

import fi_ffi

from .schema import MOST_SCHEMA, Refused

LIBRARY = "xgrammar/libxgrammar_bindings.so"
CACHE = 64 << 20  # bytes of compiled grammars that are kept
MEMORY = 8 << 30  # bytes of addresses that a process which tries schemas may have


def library(folder=None):
    """The library in a folder with the package xgrammar, or that of the installed one, or None."""
    if folder is None:
        try:
            folder = importlib.metadata.distribution("xgrammar").locate_file("")
        except importlib.metadata.PackageNotFoundError:
            return None
    path = Path(str(folder)) / LIBRARY
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    return path


def _type(name):
    return fi_ffi.object_type(f"xgrammar.tvm_ffi_binding.{name}")


def compiler(path, kind, words, vocab, eos):
    """xgrammar's GrammarCompiler for a vocabulary."""
    fi_ffi.module(path)
    info = _type("TokenizerInfo")(words, kind, vocab, eos, False)
    return _type("GrammarCompiler")(info, 1, True, CACHE)


def compiled(compiler, text, is_strict):
    return compiler.compile_json_schema(text, False, None, None, is_strict, None, False)


def _try_schemas(pipe, *parts):
    """What the other process of a `Trial` runs."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    made = compiler(*parts)
    with contextlib.suppress(OSError, EOFError):  # the server has ended
        pipe.send(True)
        while True:
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

    def __init__(self, parts, seconds):
        self.parts, self.seconds = parts, seconds
        self._start()

    def __call__(self, *schema):
        """Whether a schema compiles; TimeoutError where it is not known in time."""
        try:
            if not self.is_ready:
                self.is_ready = self.pipe.recv()
            self.pipe.send(schema)
            if self.pipe.poll(self.seconds):
                return self.pipe.recv()
        except (OSError, EOFError):  # the schema has ended the process
            self._again()
            return False
        self._again()
        raise TimeoutError

    def _start(self):
        spawn = multiprocessing.get_context("spawn")  # a fork would have this process's CUDA
        self.is_ready, (self.pipe, other) = False, spawn.Pipe()
        self.child = spawn.Process(target=_try_schemas, args=(other, *self.parts), daemon=True)
        self.child.start()
        other.close()

    def _again(self):
        self.child.kill()
        self.child.join()
        self.pipe.close()
        self._start()


class Grammars:
    """Compiles schemas over a tokenizer's vocabulary; None for a library refuses them.

    One thread calls it.  A schema has to compile within `seconds`.
    """

    def __init__(self, path, tokenizer, vocab, eos, seconds=5.0):
        self.compiler, self.seconds, self.has_end = None, seconds, bool(eos)
        if path is None:
            return
        parts = (str(path), *vocabulary(tokenizer, vocab), vocab, [*eos])
        self.compiler, self.matcher = compiler(*parts), _type("GrammarMatcher")
        # Refusals are not kept: another time the machine may be less busy.
        self.try_out = functools.lru_cache(256)(self._try_out)
        self.trial = Trial(parts, seconds)

    def _try_out(self, text, is_strict, param):
        try:
            if self.trial(text, is_strict):
                return
        except TimeoutError:
            words = f"a schema has to compile within {self.seconds:g} s"
            raise Refused(f"{param}: {words}", param=param) from None
        raise Refused(f"{param}: not a JSON schema that can be served", param=param)

    def __call__(self, schema, param):
        """A grammar's state for one request; `schema` is None for any JSON object."""
        if self.compiler is None:
            raise Refused(
                f"{param}: this server has no xgrammar, which it takes for that", param=param
            )
        if not self.has_end:
            raise Refused(f"{param}: the model has no token that ends a text", param=param)
        text, is_strict = (
            json.dumps({"type": "object"} if schema is None else schema),
            schema is not None,
        )
        if len(text) > MOST_SCHEMA:
            raise Refused(f"{param}: a schema has {MOST_SCHEMA} bytes at most", param=param)
        self.try_out(text, is_strict, param)
        return Grammar(
            self.matcher(compiled(self.compiler, text, is_strict), None, False, -1, None)
        )


class Grammar:
    """The state of one request's grammar, as the engine asks for it."""

    def __init__(self, matcher):
        self.matcher = matcher

    def fill(self, bits, row):
        self.matcher.fill_next_token_bitmask(bits, row, False)

    def accept(self, token):
        return bool(self.matcher.accept_token(token, False))


def vocabulary(tokenizer, vocab):
    """Which kind xgrammar calls it, and the tokens in order; special ones have no text."""
    of, names = Words(tokenizer), [""] * vocab
    kind = 2 if "ByteLevel" in of.decoders else 1 if "ByteFallback" in of.decoders else 0
    for name, token in tokenizer.get_vocab(with_added_tokens=True).items():
        if token < vocab and token not in of.special:
            names[token] = name
    return kind, names
