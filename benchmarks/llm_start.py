"""How long examples/llm takes from exec to its first token, for a checkpoint in the page cache.

    python3 benchmarks/llm_start.py --model qwen3-0.6b [--runs 10] [--prompt 4] [--profile]

The checkpoint is of random weights in the shapes of a published one.  Each run is a fresh process
of generate.py's steps; milliseconds, medians and spreads.  `--profile` prints where one of them
spent its time.  A prompt of few tokens (examples/llm/engine/products.py) needs no cuBLAS.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import serve_load

# benchmarks/marks and examples/llm are found as serve_load.py finds them.
from marks.llm_models import MODELS

CHILD = """
import sys, time
began = time.time() - float(sys.argv[3])
start = time.perf_counter()
sys.path.insert(0, sys.argv[1])
import early
if sys.argv[4] != "cpu":
    early.begin()
import generate
from engine import Sampling, load
imported = time.perf_counter()
engine = load(sys.argv[2], sys.argv[4] or None)
loaded = time.perf_counter()
prompt = [5, 6, 7, 8] * (int(sys.argv[5]) // 4)
request = engine.submit(prompt, Sampling(temperature=0, max_tokens=2, ignore_eos=True))
while not request.tokens:
    engine.step()
first = time.perf_counter()
while engine.step() is not None:
    pass
second = time.perf_counter()
print("parts", began, imported - start, loaded - imported, first - loaded, second - first)
engine.close()
"""
PARTS = ("interpreter", "imports", "load", "first token", "second token")


def run(folder: Path, device: str, prompt: int, profile: str = "") -> list[float]:
    """Seconds of each part of one process."""
    command = [sys.executable, *([profile] if profile else []), "-c", CHILD]
    if profile:
        program = folder / "child.py"
        program.write_text(CHILD)
        command = [sys.executable, "-m", "cProfile", "-s", profile, str(program)]
    examples = str(Path(__file__).resolve().parents[1] / "examples" / "llm")
    arguments = [examples, str(folder), repr(time.time()), device, str(prompt)]
    # Bytecode is kept, as it is by default.
    kept = {name: os.environ[name] for name in os.environ if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [*command, *arguments], env=kept, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    if profile:
        print("\n".join(line[:140] for line in done.stdout.splitlines()[:60]))
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("parts ")]
    return [float(word) for word in line.split()[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="qwen3-0.6b")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--device", default="")
    parser.add_argument("--prompt", type=int, default=4, help="tokens, a multiple of 4")
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = serve_load.written(Path(name), given.model, 1)
        run(
            folder, given.device, given.prompt
        )  # what a first process leaves: bytecode, CUDA's own cache
        rows = [run(folder, given.device, given.prompt) for _ in range(given.runs)]
        for part, column in zip(PARTS, zip(*rows, strict=True), strict=True):
            print(line(part, column))
        print(line("exec to the first token", [sum(row[:4]) for row in rows]))
        if given.profile:
            for order in ("tottime", "cumtime"):
                run(folder, given.device, given.prompt, order)


def line(name: str, seconds: list[float] | tuple[float, ...]) -> str:
    least, middle, most = min(seconds), statistics.median(seconds), max(seconds)
    return f"{name:24} {1e3 * middle:8.0f} ms  {1e3 * least:.0f} to {1e3 * most:.0f}"


if __name__ == "__main__":
    main()
