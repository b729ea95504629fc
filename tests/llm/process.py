"""examples/llm/serve.py as a process of its own, on a port of the loopback that is free."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import requests
from tiny import make_tiny

from tests.helpers.children import ROOT, environment

SERVE = ROOT / "examples" / "llm" / "serve.py"


def children(process: int, of: bytes = b"spawn_main") -> list[int]:
    """Those that a process has started, by what their command lines contain; by default those that
    multiprocessing runs a function in.
    """
    told = " ".join(each.read_text() for each in Path(f"/proc/{process}/task").glob("*/children"))
    return [int(n) for n in told.split() if of in Path(f"/proc/{n}/cmdline").read_bytes()]


class ServerProcess:
    """A server of a tiny checkpoint; `flags` are serve.py's."""

    def __init__(self, where: str, *flags: str, program: str | None = None) -> None:
        cpu = ["--cpu"] if where == "cpu" else []
        if "--num-pages" not in flags:  # by default one server takes a GPU's memory
            flags = (*flags, "--num-pages", "1024")
        if "--xgrammar" not in flags:  # an installed one would add processes
            flags = (*flags, "--xgrammar", "none")
        self.folder = tempfile.TemporaryDirectory()
        file = SERVE
        if program is not None:
            file = Path(self.folder.name) / "program.py"
            file.write_text(program)
        if "--model" not in flags:  # of one layer: many tests wait for it
            model = make_tiny(self.folder.name, "llama", num_hidden_layers=1)
            flags = (*flags, "--model", str(model))
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        paths = [str(ROOT), str(SERVE.parent), os.environ.get("PYTHONPATH")]
        self.child = subprocess.Popen(
            [sys.executable, str(file), *cpu, "--port", "0", "--served-model-name", "tiny", *flags],
            env=environment(PYTHONPATH=os.pathsep.join(filter(None, paths))),
            stdout=self.log, stderr=subprocess.STDOUT, cwd=SERVE.parent,
        )  # fmt: skip
        end, found = time.monotonic() + 120, None
        while found is None:
            assert time.monotonic() < end and self.child.poll() is None, self.output()
            time.sleep(0.05)
            found = re.search(r"running on (http://127\.0\.0\.1:\d+)", self.output())
        self.address = found[1]
        self.url = self.address + "/v1"

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def post(self, path: str = "completions", **body: Any) -> requests.Response:
        body = {"prompt": "Once", "max_tokens": 4} | body if path == "completions" else body
        return requests.post(f"{self.url}/{path}", json=body, timeout=60)

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        text = requests.get(f"{self.address}/metrics", timeout=20).text
        lines = re.findall(rf"^fi_ffi_{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, lines))

    def memory(self) -> int:
        """Resident bytes of all its processes."""
        return self._bytes("VmRSS")

    def peak(self) -> int:
        return self._bytes("VmHWM")

    def _bytes(self, name: str) -> int:
        told = [Path(f"/proc/{n}/status").read_text() for n in (self.child.pid, *self.ranks())]
        return sum(int(re.search(rf"{name}:\s+(\d+)", text)[1]) << 10 for text in told)  # type: ignore[index]

    def ranks(self) -> list[int]:
        """The process that runs steps, and those of other ranks, which it has started."""
        (first,) = children(self.child.pid)
        return [first, *children(first)]

    def end(self, sig: int | None = None, seconds: float = 20) -> int:
        """The status with which it ends in that time; killed, and an error, where it does not."""
        if sig is not None:
            self.child.send_signal(sig)
        try:
            return self.child.wait(seconds)
        finally:
            self.child.kill()
            self.child.wait()
            self.folder.cleanup()
