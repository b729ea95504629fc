#!/usr/bin/env python3
"""Coverage-guided fuzzing of what reads bytes of others; needs `pip install atheris`.

    python3 tools/fuzz.py                       # every parser, a minute each
    python3 tools/fuzz.py --seconds 600 refusal # one of them, longer

A parser (tests/stress/parsers.py) may raise its own error and nothing else, and
takes no longer than --slow seconds.  What it finds is printed as a line for
tests/stress/corpus/NAME.txt, which every run and tests/stress/test_parsers.py begin with.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PACKAGES = [
    "fi_ffi.abi", "fi_ffi.cli.replay", "fi_ffi.loader", "fi_ffi.module_names", "fi_ffi.modules",
    "fi_ffi.watch.safetensors", "tools.release", "elftools", "html", "tomlkit", "zipfile",
]  # fmt: skip
_MOST = 1 << 20  # bytes kept of what a run prints


def _fuzz(name: str, seconds: int, slow: int, folder: str) -> None:
    """In a process of its own: libFuzzer never returns."""
    import atheris

    with atheris.instrument_imports(include=PACKAGES):
        from tests.stress.parsers import feed, seeds_of

    for number, seed in enumerate(seeds_of(name)):
        Path(folder, f"seed-{number}").write_bytes(seed)

    def one(data: bytes) -> None:
        try:
            feed(name, data)
        except BaseException:
            print(f"FOUND {name} {data!r:.100000}", flush=True)
            raise

    options = [f"-max_total_time={seconds}", f"-timeout={slow}", "-rss_limit_mb=2048"]
    options += [f"-artifact_prefix={folder}/found-", "-print_final_stats=1", "-max_len=65536"]
    atheris.Setup([sys.argv[0], *options, folder], one)
    atheris.Fuzz()


def _report(name: str, seconds: int, slow: int) -> bool:
    """Whether nothing was found; prints what was, and how much was tried."""
    with tempfile.TemporaryDirectory(prefix="fi-ffi-fuzz-") as folder:
        arguments = ["--in", folder, name, str(seconds), str(slow)]
        done = subprocess.run(
            [sys.executable, __file__, *arguments], capture_output=True, text=True, errors="replace"
        )
        lines = (done.stdout + done.stderr)[-_MOST:].splitlines()
        runs = [line.split()[-1] for line in lines if "number_of_executed_units" in line]
        covered = [line.split(" cov: ")[1].split()[0] for line in lines if " cov: " in line]
        found = list(Path(folder).glob("found-*"))
        told = f"{(runs or ['?'])[-1]} inputs, {(covered or ['?'])[-1]} edges"
        print(f"{name:14} {told}", flush=True)
        if done.returncode == 0 and not found:
            return True
        words = [line for line in lines if line.startswith("FOUND ")]
        print("\n".join(words or [f"  {path.read_bytes()!r:.2000}" for path in found]))
        print("\n".join(lines[-60:]))
        return False


def main() -> int:
    # Nothing is to be imported before it is instrumented.
    if sys.argv[1:2] == ["--in"]:
        folder, name, seconds, slow = sys.argv[2:]
        _fuzz(name, int(seconds), int(slow), folder)
        return 0
    from tests.stress.parsers import PARSERS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PARSERS)}; all of them")
    parser.add_argument("--seconds", type=int, default=60, help="for each")
    parser.add_argument("--slow", type=int, default=5, help="seconds that an input may take")
    given = parser.parse_args()
    unknown = {*given.names} - {*PARSERS}
    if unknown:
        parser.error(f"no parser {', '.join(sorted(unknown))}; there are {', '.join(PARSERS)}")
    sound = [_report(name, given.seconds, given.slow) for name in given.names or PARSERS]
    return 0 if all(sound) else 1


if __name__ == "__main__":
    sys.exit(main())
