"""Minutes of clients of every kind at one examples/llm/serve.py: what each waits, what comes back.

    python3 benchmarks/serve_mixed.py [--seconds 540] [--clients 48] [--xgrammar FOLDER]

Each client asks again as soon as it has its answer: a text, a text that it leaves in the middle,
JSON by a schema that nobody had before (with --xgrammar), a prompt of thousands of tokens, or four
choices.  Beside them a polite one asks for 8 tokens four times a second; the columns say how long
each kind waited for its first token, and for its whole answer, and how often it was refused with
429, after which it waits for as long as the answer must say.  At the end every page must be back;
memory and descriptors are of all processes of the server, after a tenth of the time and at the end.
What follows `--` are flags of serve.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import serve_load
from marks.about import about
from marks.llm_load import milliseconds
from marks.llm_models import MODELS

RETRY_AFTER = re.compile(rb"^retry-after: (\d+)\r$", re.IGNORECASE | re.MULTILINE)
WHOLE = 0  # a token of a whole character, as `serve_load.written` names it
POLITE_S = 0.25  # between the requests of the polite client
# Kinds of clients, and how many of 16 are of each.
SHARES = {"text": 6, "leaves": 4, "schema": 2, "long": 2, "choices": 2}


class Clients:
    """What clients of each kind waited for."""

    def __init__(self, url: str, given: argparse.Namespace, vocab: int, room: int) -> None:
        self.at, self.given, self.vocab, self.room = urlsplit(url), given, vocab, room
        self.end = time.monotonic() + given.seconds
        self.first: dict[str, list[float]] = defaultdict(list)
        self.whole: dict[str, list[float]] = defaultdict(list)
        self.refused: dict[str, int] = defaultdict(int)
        self.left = 0
        self.wrong: list[str] = []

    async def all(self) -> None:
        kinds = [kind for kind, share in SHARES.items() for _ in range(share)]
        if self.given.xgrammar is None:
            kinds = [kind for kind in kinds if kind != "schema"]
        seeds = np.random.SeedSequence(self.given.seed).spawn(self.given.clients + 1)
        rngs = [np.random.default_rng(seed) for seed in seeds]
        clients = (self.client(kinds[n % len(kinds)], rngs[n]) for n in range(self.given.clients))
        await asyncio.gather(self.polite(rngs[-1]), *clients)

    async def client(self, kind: str, rng: np.random.Generator) -> None:
        while time.monotonic() < self.end:
            wait = await self.ask(kind, self.body(kind, rng), float(rng.uniform(0, 2)))
            await asyncio.sleep(wait)

    async def polite(self, rng: np.random.Generator) -> None:
        asked = set()
        while time.monotonic() < self.end:
            body = {"prompt": self.prompt(rng, 8, 32), "max_tokens": 8, "ignore_eos": True}
            asked.add(asyncio.create_task(self.ask("polite", body)))
            await asyncio.sleep(POLITE_S)
        await asyncio.gather(*asked)

    def prompt(self, rng: np.random.Generator, low: int, high: int) -> list[int]:
        return rng.integers(0, self.vocab, rng.integers(low, high + 1)).tolist()

    def body(self, kind: str, rng: np.random.Generator) -> dict[str, Any]:
        body = {"prompt": self.prompt(rng, 20, 400), "temperature": 0.8, "ignore_eos": True,
                "max_tokens": int(rng.integers(20, 200))}  # fmt: skip
        if kind == "long":
            body |= {"prompt": self.prompt(rng, self.room // 4, self.room - 8), "max_tokens": 8}
        elif kind == "choices":
            body |= {"n": 4}
        elif kind == "schema":
            names = [f"k{n}" for n in rng.integers(0, 1 << 30, 3)]
            made = {"enum": [int(n) for n in rng.integers(0, 1 << 30, 16)]}
            parts = dict(zip(names, (made, {"type": "boolean"}, {"type": "null"}), strict=True))
            schema = {"type": "object", "properties": parts, "required": names,
                      "additionalProperties": False}  # fmt: skip
            # Half a character at a prompt's end would be told with the answer, before the JSON.
            body["prompt"][-1] = WHOLE
            body |= {"ignore_eos": False, "max_tokens": 200, "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "made", "strict": True, "schema": schema},
            }}  # fmt: skip
        return body

    async def ask(self, kind: str, body: dict[str, Any], patience: float = 0.0) -> int:
        """Seconds after which to ask again."""
        raw = json.dumps(body | {"stream": True}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self.at.hostname}\r\n"
            f"Content-Length: {len(raw)}\r\nConnection: close\r\n\r\n"
        )
        start = time.perf_counter()
        answer = asyncio.ensure_future(self.answer(kind, body, head.encode() + raw, start))
        if kind != "leaves":
            return await answer
        await asyncio.wait([answer], timeout=patience)
        self.left += answer.cancel()
        (wait,) = await asyncio.gather(answer, return_exceptions=True)
        return wait if isinstance(wait, int) else 0

    async def answer(self, kind: str, body: dict[str, Any], raw: bytes, start: float) -> int:
        reader, writer = await asyncio.open_connection(
            self.at.hostname, self.at.port, limit=1 << 22
        )
        choices, first, line, done = defaultdict(str), None, b"", False
        ends: dict[int, str] = {}
        try:
            writer.write(raw)
            if b" 429 " in await reader.readline():
                return self.refusal(kind, await reader.read())
            async for line in reader:
                if not line.startswith(b"data: "):
                    continue
                first = first or time.perf_counter()
                if done := line.startswith(b"data: [DONE]"):
                    break
                for choice in json.loads(line[6:]).get("choices", ()):
                    choices[choice["index"]] += choice["text"]
                    if choice["finish_reason"]:
                        ends[choice["index"]] = choice["finish_reason"]
        except OSError as lost:
            line = str(lost).encode()
        finally:
            writer.transport.abort()
        if found := self.fault(kind, body, choices, ends) if done else f"no end: {line!r}":
            self.wrong.append(f"{kind}: {found}")
        elif first is not None:
            self.first[kind].append(first - start)
            self.whole[kind].append(time.perf_counter() - start)
        return 0

    def refusal(self, kind: str, told: bytes) -> int:
        found = RETRY_AFTER.search(told)
        if not found:
            self.wrong.append(f"{kind}: 429 without Retry-After: {told!r}")
            return 1
        self.refused[kind] += 1
        return int(found[1])

    @staticmethod
    def fault(
        kind: str, body: dict[str, Any], choices: dict[int, str], ends: dict[int, str]
    ) -> str | None:
        if len(ends) != body.get("n", 1):
            return f"{len(ends)} choices"
        if kind != "schema":
            return None if {*ends.values()} == {"length"} else f"ended by {ends}"
        schema = body["response_format"]["json_schema"]["schema"]
        try:
            made = json.loads(choices[0])
        except ValueError:
            return f"{choices[0]!r} is no JSON"
        enum, is_bool, null = (made.get(name) for name in schema["required"])
        allowed = schema["properties"][schema["required"][0]]["enum"]
        is_right = [*made] == schema["required"] and enum in allowed and null is None
        return None if is_right and isinstance(is_bool, bool) else f"{choices[0]!r}"


def metrics(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    pairs = [line.split() for line in lines if line.startswith("fi_ffi_") and "{" not in line]
    return {name.removeprefix("fi_ffi_"): float(value) for name, value in pairs}


def held(process: int) -> tuple[int, int]:
    """Resident MiB and descriptors of a process and its children."""
    folder = Path(f"/proc/{process}")
    status = (folder / "status").read_text()
    if "VmRSS:" not in status:  # it has ended
        return 0, 0
    mib = int(status.partition("VmRSS:")[2].split()[0]) >> 10
    descriptors = len([*(folder / "fd").iterdir()])
    told = " ".join(each.read_text() for each in folder.glob("task/*/children"))
    for child in map(int, told.split()):
        more = held(child)
        mib, descriptors = mib + more[0], descriptors + more[1]
    return mib, descriptors


def is_idle(url: str, seconds: float = 30) -> bool:
    """No request has a page any more, within so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        told = metrics(url)
        if not (told["running_requests"] or told["waiting_requests"] or told["used_pages"]):
            return True
        time.sleep(0.1)
    return False


async def measured(clients: Clients, process: int) -> tuple[int, int]:
    """What the server held after a tenth of the time."""
    asked = asyncio.ensure_future(clients.all())
    await asyncio.sleep(clients.given.seconds / 10)
    early = held(process)
    await asked
    return early


def table(found: dict[str, Any]) -> str:
    lines = [
        "| clients | answers | 429 | first token, 50 % | 99 % | longest | answer, 50 % | 99 % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, of in found["kinds"].items():
        waits = " | ".join(f"{of[name]:,.0f} ms" for name in list(of)[2:])
        lines.append(f"| {kind} | {of['answers']:,} | {of['refused']:,} | {waits} |")
    return "\n".join(lines)


def run(given: argparse.Namespace) -> int:
    vocab = MODELS[given.model]["vocab_size"]
    flags = [*given.flags, *(["--xgrammar", given.xgrammar] if given.xgrammar else [])]
    with tempfile.TemporaryDirectory() as folder:
        model = serve_load.written(Path(folder), given.model, 0)
        ended = MODELS[given.model] | {"eos_token_id": vocab - 1}  # by which JSON ends
        (model / "config.json").write_text(json.dumps(ended))
        server = serve_load.Server(model, flags)
        try:
            with urllib.request.urlopen(f"{server.url}/v1/models", timeout=30) as answer:
                room = json.load(answer)["data"][0]["max_model_len"]
            clients = Clients(server.url, given, vocab, min(room, given.long))
            early = asyncio.run(measured(clients, server.child.pid))
            idle = is_idle(server.url)
            late, told = held(server.child.pid), metrics(server.url)
        finally:
            server.close()
    kinds = {
        kind: {
            "answers": len(first), "refused": clients.refused[kind],
            "first_ms_50": milliseconds(first, 50),
            "first_ms_99": milliseconds(first, 99), "first_ms_most": milliseconds(first, 100),
            "whole_ms_50": milliseconds(clients.whole[kind], 50),
            "whole_ms_99": milliseconds(clients.whole[kind], 99),
        }
        for kind in sorted({*clients.first, *clients.refused})
        for first in [clients.first[kind]]
    }  # fmt: skip
    found = {
        "kinds": kinds, "left": clients.left, "wrong": len(clients.wrong),
        "tokens": told["generated_tokens_total"], "rejected": told["rejected_requests_total"],
        "pages_are_back": idle, "mib": [early[0], late[0]], "descriptors": [early[1], late[1]],
    }  # fmt: skip
    print(table(found))
    print(f"{found['tokens']:,.0f} tokens in {given.seconds:g} s; {clients.left:,} left; "
          f"{'all pages are back' if idle else 'PAGES ARE MISSING'}; {early[0]:,} then {late[0]:,} "
          f"MiB, {early[1]} then {late[1]} descriptors; {len(clients.wrong)} wrong")  # fmt: skip
    for text in clients.wrong[:5]:
        print(text)
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        whole = {"about": about() | {"seconds": given.seconds, "seed": given.seed}, "found": found}
        file = given.output / f"mixed-{given.model}-{given.seed}.json"
        file.write_text(json.dumps(whole, indent=1))
    return 0 if idle and not clients.wrong else 1


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="qwen3-0.6b", choices=tuple(MODELS))
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--clients", type=int, default=48)
    parser.add_argument("--long", type=int, default=12_000, help="tokens of a long prompt at most")
    parser.add_argument("--xgrammar", metavar="FOLDER", help="that has the package xgrammar")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a folder for JSON")
    parser.add_argument("flags", nargs="*", help="of serve.py, after --")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(run(parsed()))
