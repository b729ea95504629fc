"""An OpenAI-compatible server in front of the engine: chats and completions, with streaming.

    python3 examples/llm/serve.py [--model FOLDER] [--cpu] [--port 8000]
    curl -N localhost:8000/v1/completions -H 'content-type: application/json' \\
        -d '{"prompt": "Once upon a time", "max_tokens": 32, "stream": true}'

SIGTERM and SIGINT end it: requests may finish within --grace seconds.  Where the engine ends with
an error, /health says so for LINGER seconds, and then the process ends with status 1.
"""

import argparse
import contextlib
import ipaddress
import multiprocessing
import socket
import sys
import tempfile
import threading
from pathlib import Path

import early

if multiprocessing.current_process().name == "engine" and "--cpu" not in sys.argv:
    early.begin()  # beside the imports; other processes import this file too

import uvicorn
from engine import Config, Weights, end_process, load, verify
from engine.config import check_pointer
from server import Limits, Link, application
from server.chat import Template
from server.connection import Connection
from server.grammar import Grammars, library
from tiny import make_tiny
from tokenizers import Tokenizer

LINGER = 3  # seconds in which /health tells of an engine that has ended
LAST = 2  # seconds before the end of the grace in which what still goes on is ended


def arguments(words=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a folder in the hub's layout; else a tiny one is made")
    parser.add_argument("--served-model-name", nargs="+", help="its names for clients")
    parser.add_argument("--cpu", action="store_true", help="the reference kernels, in numpy")
    parser.add_argument("--tp", type=int, default=1, help="GPUs that the model is split over")
    parser.add_argument("--ray", action="store_true", help="Ray places ranks, on any machine")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--allowed-host", nargs="+", default=[],
                        help="names besides the loopback's, where it listens there")  # fmt: skip
    parser.add_argument("--api-key", help="what clients have to send as a bearer's token")
    parser.add_argument("--num-pages", type=int, help="of 16 tokens in the cache; else what fits")
    parser.add_argument("--max-batch", type=int, default=64, help="requests that are run at once")
    parser.add_argument("--max-step", type=int, default=512, help="tokens of a step at most")
    parser.add_argument("--max-queue", type=int, default=Limits.max_queue, help="429 if more wait")
    parser.add_argument("--max-body", type=int, default=Limits.max_body, help="bytes of a request")
    parser.add_argument("--body-seconds", type=float, default=Limits.body_seconds,
                        help="for a body; headers and slow reads get twice that")  # fmt: skip
    parser.add_argument("--grace", type=float, default=10, help="seconds to end after a signal")
    parser.add_argument("--xgrammar", metavar="FOLDER", help="that has xgrammar, or none")
    return parser.parse_args(words)


class Process(uvicorn.Server):
    """uvicorn's server, which ends with the engine, and within the grace in any case."""

    has_failed = is_ending = False
    grace = 10  # seconds from a signal to the end
    hurry = None  # ends what is still going on

    def engine_failed(self):
        """Called on another thread."""
        self.has_failed = True
        _later(LINGER, self.end)

    def handle_exit(self, sig, frame):
        super().handle_exit(sig, frame)
        self.end()

    def end(self):
        if not self.is_ending:
            _later(max(self.grace - LAST, self.grace / 2), self.hurry)
            _later(self.grace, end_process)
        self.is_ending = self.should_exit = True


def _later(seconds, function):
    timer = threading.Timer(seconds, function)
    timer.daemon = True
    timer.start()


def hosted(given, model):
    """The engine and its grammars as the flags say, for the process that they have of their own."""
    engine = load(model, "cpu" if given.cpu else None, given.num_pages, max_batch=given.max_batch,
                  max_tokens=given.max_step, tp=given.tp,
                  way="ray" if given.ray else "processes")  # fmt: skip
    config, tokenizer = engine.config, tokenizer_of(model)
    return engine, Grammars(library(given.xgrammar), tokenizer, config.vocab, config.eos)


def tokenizer_of(model):
    check_pointer(model / "tokenizer.json")
    try:
        return Tokenizer.from_file(str(model / "tokenizer.json"))
    except Exception as wrong:  # which has no class of its own
        raise ValueError(f"{model / 'tokenizer.json'}: {wrong}") from None


def built(given):
    with tempfile.TemporaryDirectory() as folder:
        model = Path(given.model or make_tiny(Path(folder) / "tiny"))
        verify(Config.read(model), Weights(model))  # before a process is started for nothing
        tokenizer, template = tokenizer_of(model), Template(model)
        link = Link.apart(hosted, given, model)
    return link, tokenizer, given.served_model_name or [model.resolve().name], template


def names_of(given):
    """What a request may call the server; None, anything, where it does not listen on the loopback:
    there a page of another site could take a name that leads to it.
    """
    is_loopback = given.host == "localhost"
    with contextlib.suppress(ValueError):
        is_loopback = is_loopback or ipaddress.ip_address(given.host).is_loopback
    names = {"localhost", "127.0.0.1", "::1", given.host, *given.allowed_host}
    return names if is_loopback else None


@contextlib.contextmanager
def kept(given):
    """The port, from before a model is loaded until the server listens; OSError if it is taken."""
    family, kind, *_, address = socket.getaddrinfo(given.host, given.port, 0, socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(address)
        yield


def main():
    given = arguments()
    try:
        with kept(given):
            parts = built(given)
    except (OSError, ValueError, KeyError) as wrong:
        sys.exit(f"serve.py: {wrong.args[0] if isinstance(wrong, KeyError) else wrong}")
    names = "max_body", "body_seconds", "max_queue", "api_key"
    limits = Limits(**{name: getattr(given, name) for name in names}, hosts=names_of(given))
    Connection.seconds = given.body_seconds
    fixed = {"http": Connection, "loop": "asyncio", "ws": "none"}  # whatever else is installed
    server = Process(uvicorn.Config(None, given.host, given.port, **fixed))
    server.grace = given.grace
    app = server.config.app = application(*parts, limits=limits, on_failure=server.engine_failed)
    server.hurry = app.state.hurry
    with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again when it has ended
        server.run()
    if server.has_failed or not server.started:
        end_process()  # the device may hang: nothing is left to be said


if __name__ == "__main__":
    main()
