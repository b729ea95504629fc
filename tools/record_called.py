"""Merges what GPU tests called into fi_ffi/catalogue/data/called.json.

    python tools/record_called.py entries-called-RELEASE.json...

tools/gpu_run.sh leaves such a file in its output.  What was called once stays, until the
file is edited; run tools/generate_coverage.py and tools/generate_matrix.py afterwards.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent.parent / "fi_ffi" / "catalogue" / "data" / "called.json"


def merged(record: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """The record with one more run in it."""
    key = ("device", "capability", "release")
    runs = [dict(old) for old in record["runs"]]
    # Of kernels of CUDA 13 that is left unsaid.
    cuda = {"cuda": run["cuda"]} if run.get("cuda", 13) != 13 else {}
    wanted = {name: run[name] for name in key} | cuda
    same = next(
        (old for old in runs if {k: v for k, v in old.items() if k != "entries"} == wanted), None
    )
    if same is None:
        same = wanted | {"entries": {}}
        runs.append(same)
    entries = {family: {*names} for family, names in same["entries"].items()}
    for family, names in run["entries"].items():
        entries.setdefault(family, set()).update(names)
    same["entries"] = {family: sorted(names) for family, names in sorted(entries.items())}
    return {**record, "runs": sorted(runs, key=lambda old: (old["device"], old["release"]))}


def text(record: dict[str, Any]) -> str:
    """JSON with a line for each family."""
    runs = []
    for run in record["runs"]:
        head = {name: value for name, value in run.items() if name != "entries"}
        lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in run["entries"].items()]
        body = ",\n".join(lines)
        runs.append(json.dumps(head)[:-1] + ', "entries": {\n' + body + "\n }}")
    return '{"runs": [\n ' + ",\n ".join(runs) + "\n]}\n"


def main(paths: list[str]) -> int:
    record = json.loads(DATA.read_text()) if DATA.exists() else {"runs": []}
    for path in paths:
        record = merged(record, json.loads(Path(path).read_text()))
    DATA.write_text(text(record))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
