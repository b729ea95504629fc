"""What a second visible GPU costs the host: benchmarks/host.py with one and with all GPUs visible.

    python3 benchmarks/visible.py [--rounds 3] [--output .out] [arguments of host.py]

CUDA fixes what is visible when it starts, so each run is a process of its own; the two settings
take turns, and each is timed beside its peer.  A process may land on slow cores or be interrupted,
which only adds time: each figure is of the quickest process.  A row is met where it takes with all
GPUs at most 1.06 of what it takes with one, or 0.35 us more, or where its ratio to its peer, which
has the same process and the same GPUs, grows no more than that.  The exit status is 1 where a row
is not met or has no figure in one of the settings.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_HOST = Path(__file__).with_name("host.py")
_MOST_RATIO, _MOST_NS = 1.06, 350.0
_VARIABLE = "CUDA_VISIBLE_DEVICES"
# A row's figures by its text and peer: our nanoseconds and the peer's, of each run.
Figures = dict[tuple[str, str], list[tuple[float, float | None]]]


def run(folder: Path, first_only: bool, arguments: list[str]) -> dict[str, Any]:
    """Run host.py once and return what it wrote."""
    environment = {name: value for name, value in os.environ.items() if name != _VARIABLE}
    if first_only:
        environment[_VARIABLE] = "0"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(_HOST), "--output", str(folder), *arguments]
    with (folder / "printed.txt").open("w") as printed:
        subprocess.run(command, env=environment, stdout=printed, stderr=subprocess.STDOUT)
    found: dict[str, Any] = json.loads((folder / "host.json").read_text())
    return found


def add(figures: Figures, found: dict[str, Any]) -> None:
    for entry in found["entries"]:
        if entry["fi_ffi_ns"] is not None:
            key = entry["what"], entry["peer"]
            figures.setdefault(key, []).append((entry["fi_ffi_ns"], entry["peer_ns"]))


def least(figures: Figures, key: tuple[str, str]) -> float | None:
    return min((mine for mine, _ in figures.get(key, ())), default=None)


def ratio(figures: Figures, key: tuple[str, str]) -> float | None:
    """Return the least ratio to the peer in one process."""
    ratios = [mine / theirs for mine, theirs in figures.get(key, ()) if theirs is not None]
    return min(ratios, default=None)


def shown(key: tuple[str, str], one: Figures, every: Figures) -> tuple[str, bool]:
    """Return a row of the table, and whether it is met."""
    few, many = least(one, key), least(every, key)
    if few is None or many is None:
        return f"| {key[0]} | no figure | | | | NO |", False
    is_met = many <= max(few * _MOST_RATIO, few + _MOST_NS)
    beside = ""
    before, after = ratio(one, key), ratio(every, key)
    if before is not None and after is not None:
        is_met = is_met or after <= before * _MOST_RATIO
        beside = f"{before:.2f}; {after:.2f}"
    met = "yes" if is_met else "NO"
    cells = f"{few:,.0f} | {many:,.0f} | {many / few:.3f} | {beside} | {met}"
    return f"| {key[0]} | {cells} |", is_met


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=os.environ.get("OUT", ".out"))
    options, arguments = parser.parse_known_args()
    one: Figures = {}
    every: Figures = {}
    about = ""
    for number in range(options.rounds):
        # The order changes, so that neither setting always has the warmer machine.
        for is_one in (number % 2 == 0, number % 2 == 1):
            folder = options.output / f"{'one' if is_one else 'all'}-{number}"
            found = run(folder, is_one, arguments)
            add(one if is_one else every, found)
            if not is_one:
                about = f"{found['about']['visible']} GPUs: {found['about']['gpu']}"
    rows = [shown(key, one, every) for key in dict.fromkeys([*one, *every])]
    lines = [
        f"One GPU visible, and all of {about}; the quickest of {options.rounds} processes each.",
        "",
        "| what | one, ns | all, ns | all / one | beside its peer: one; all | met |",
        "|---|---:|---:|---:|---|---|",
        *(row for row, _ in rows),
    ]
    print("\n".join(lines))
    (options.output / "visible.md").write_text("\n".join(lines) + "\n")
    return int(not rows or not all(is_met for _, is_met in rows))


if __name__ == "__main__":
    sys.exit(main())
