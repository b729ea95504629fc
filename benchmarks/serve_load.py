"""Tokens a second and latencies of examples/llm/serve.py under load, over HTTP.

    python3 benchmarks/serve_load.py [--model llama-3-8b] [--rate 8] [--requests 256]
    python3 benchmarks/serve_load.py --url http://127.0.0.1:8000    # of a server that runs

The load that nano-vllm publishes: 256 requests of 100 to 1,024 tokens that get 100 to 1,024 each,
at temperature 0.6, all at once.  With --rate they come by Poisson arrivals, so many a second.
Without --url a server is started with random weights in the shape of a published model; what
follows `--` are its flags.  Each request is a stream of its own connection; a first-token latency
is from when the request is sent, a per-token one the time between two events of a stream.
Latencies are of all rounds (--repeats), after one to warm up; tokens a second are the median.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples/llm"))

from marks.about import about
from marks.llm_load import Load, Round, add_arguments, drawn, summed, table
from marks.llm_models import MODELS, RandomWeights
from safetensors.numpy import save_file
from tiny import byte_tokenizer
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
STARTS_S = 600  # a large model takes long to be written and loaded
SERVER = ("--max-batch", "256", "--num-pages", "34000", "--max-step", "8192", "--max-queue", "4096")


async def ask(at: Any, body: bytes, length: int, to: Round) -> None:
    """One request; its latencies go into `to`."""
    reader, writer = await asyncio.open_connection(at.hostname, at.port, limit=1 << 22)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {at.hostname}\r\nContent-Length: {len(body)}\r\n"
    )
    last = time.perf_counter()
    told, usage = 0, None
    try:
        writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        if b" 200 " not in await reader.readline():
            to.failed += 1
            return
        async for line in reader:
            if not line.startswith(b"data: {"):
                continue
            now, event = time.perf_counter(), json.loads(line[6:])
            if "error" in event or (usage := event.get("usage")):
                break
            if event["choices"][0]["text"]:
                (to.each if told else to.first).append(now - last)
                told, last = told + 1, now
    finally:
        writer.close()
    if usage is None or usage["completion_tokens"] != length:
        to.failed += 1
        return
    to.tokens += length
    to.prompt_tokens += usage["prompt_tokens"]


async def offered(url: str, load: Load, temperature: float) -> Round:
    """All requests of a load, each at its time."""
    to, at = Round(), urlsplit(url)
    start = time.perf_counter()

    async def one(prompt: list[int], length: int, arrival: float) -> None:
        body = {
            "prompt": prompt, "max_tokens": length, "temperature": temperature, "stream": True,
            "ignore_eos": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        raw = json.dumps(body).encode()
        await asyncio.sleep(max(arrival - (time.perf_counter() - start), 0))
        await ask(at, raw, length, to)

    await asyncio.gather(*map(one, load.prompts, load.lengths, load.arrivals))
    to.seconds = time.perf_counter() - start
    return to


def written(folder: Path, name: str, seed: int) -> Path:
    """A checkpoint of random weights, with a name for each token."""
    raw = MODELS[name]
    weights = RandomWeights(raw, np.random.default_rng(seed))
    (folder / "config.json").write_text(json.dumps(raw))
    save_file({key: weights(key) for key in weights.shapes}, folder / "model.safetensors")
    told = json.loads(byte_tokenizer().to_str())
    words = told["model"]["vocab"]
    told["added_tokens"] = []
    words |= {f"t{n}": n for n in range(len(words), raw["vocab_size"])}
    tokenizer = Tokenizer.from_str(json.dumps(told))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


class Server:
    """serve.py as a process of its own."""

    def __init__(self, model: Path, flags: list[str]) -> None:
        words = [sys.executable, str(ROOT / "examples/llm/serve.py"), "--model", str(model)]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.child = subprocess.Popen(
            [*words, "--port", "0", *flags], stdout=self.log, stderr=subprocess.STDOUT
        )
        end = time.monotonic() + STARTS_S
        while "running on http" not in (told := self.output()):
            if time.monotonic() > end or self.child.poll() is not None:
                self.close()
                raise RuntimeError(f"the server has not started:\n{told}")
            time.sleep(0.1)
        self.url = told.partition("running on ")[2].split()[0]

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def close(self) -> None:
        self.child.terminate()
        try:
            self.child.wait(30)
        except subprocess.TimeoutExpired:
            self.child.kill()


def run(given: argparse.Namespace) -> int:
    vocab, server = given.vocab or MODELS[given.model]["vocab_size"], None
    with tempfile.TemporaryDirectory() as folder:
        try:
            if given.url is None:
                model = written(Path(folder), given.model, given.seed)
                server = Server(model, [*SERVER, *given.flags])
            url = given.url or server.url  # type: ignore[union-attr]
            rounds = []
            for n in range(given.repeats + 1):  # the first warms up: graphs are recorded
                load = drawn(given, given.rate, vocab, given.seed + n)
                rounds.append(asyncio.run(offered(url, load, given.temperature)))
        finally:
            if server is not None:
                server.close()
    found = summed(rounds[1:])
    print(table([("serve.py", given.requests, given.rate, found)]))
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        kind = f"{given.rate:g}" if given.rate else "at-once"
        told = {key: value for key, value in vars(given).items() if key != "output"}
        whole = {"about": about() | {"load": told}, "found": found}
        (given.output / f"serve-{given.model}-{kind}.json").write_text(json.dumps(whole, indent=1))
    return 1 if found["failed"] else 0


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", help="of a server that runs; else one is started")
    parser.add_argument("--model", default="qwen3-0.6b", choices=tuple(MODELS))
    parser.add_argument("--vocab", type=int, help="tokens of prompts are below it")
    of_load = add_arguments(parser)
    of_load.add_argument(
        "--rate", type=float, default=0.0, help="requests a second; 0: all at once"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a folder for JSON")
    parser.add_argument("flags", nargs="*", help="of serve.py, after --")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(run(parsed()))
