"""Draw docs/pages.svg, plan.svg and search.svg; `--check` only compares.

The pages are those of docs/concepts.md's batch, the times those of docs/runs.toml, and the places
those of the code's search for kernels.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from generated import write_or_check  # noqa: E402

import fi_ffi  # noqa: E402
from fi_ffi.loader import search  # noqa: E402
from tools.drawing import arrow, picture, rect, words  # noqa: E402

DOCS = ROOT / "docs"
PAGE, COUNT = 4, 10  # tokens of a page, pages of the cache
CELL, LEFT = 34, 150  # pixels
# What changes each place of the search, or takes it out.
SETTINGS = {
    "explicit": "FI_FFI_KERNELS, use_kernels(), --kernels: then no other place",
    "installed": "the environment's flashinfer-jit-cache",
    "jit": "FLASHINFER_WORKSPACE_BASE moves it",
    "local": "FI_FFI_WHEELS, FI_FFI_CACHE_DIR",
    "remote": "wheels.lock, FI_FFI_LOCK; FI_FFI_OFFLINE=1: cache only",
}


def pages() -> str:
    """A cache with a batch: each page's tokens, and the three arrays."""
    source = (DOCS / "concepts.md").read_text()
    names = "indptr", "indices", "last_page_len"
    found = {name: re.search(rf"^{name} = np\.array\((\[.*?\])", source, re.M) for name in names}
    arrays = [np.array(eval(found[name][1]), np.int32) for name in names]  # type: ignore[index]
    indptr, indices, last = arrays
    lengths = fi_ffi.seq_lens(indptr, last, page_size=PAGE)
    lines = [words(16, 52, "pages of the cache", "left note")]
    owner = {int(p): r for r in range(len(last)) for p in indices[indptr[r] : indptr[r + 1]]}
    step = PAGE * CELL / 2 + 12
    for page in range(COUNT):
        x, request = LEFT + page * step, owner.get(page)
        order = [*map(int, indices)].index(page) if request is not None else 0
        before = 0 if request is None else (order - int(indptr[request])) * PAGE
        have = 0 if request is None else min(int(lengths[request]) - before, PAGE)
        for token in range(PAGE):
            kind = "box" if token >= have else "full" if request == 0 else "other"
            cell = CELL / 2
            lines.append(rect(x + token * cell, 30, cell, CELL, kind, 1))
            if token < have:
                lines.append(words(x + (token + 0.5) * cell, 52, before + token, "note"))
        lines.append(words(x + PAGE * CELL / 4, 82, f"page {page}", "note"))
    for row, (name, array) in enumerate(zip(names, arrays, strict=True)):
        y = 108 + 44 * row
        lines.append(words(16, y + 22, name, "left code"))
        for at, value in enumerate(array.tolist()):
            request = at if name == "last_page_len" else owner.get(value)
            kind = "box" if name == "indptr" else "full" if request == 0 else "other"
            lines += [rect(LEFT + at * 44, y, CELL, CELL - 2, kind, 2)]
            lines += [words(LEFT + at * 44 + CELL / 2, y + 22, value)]
    told = [f"request {r}: {n} tokens" for r, n in enumerate(lengths.tolist())]
    notes = (
        "request r owns indices[indptr[r]:indptr[r + 1]]",
        "a token's number is its position in the request",
        "tokens of each last page; " + ", ".join(told),
    )
    lines += [
        words(LEFT + 190, 130 + 44 * row, note, "left note") for row, note in enumerate(notes)
    ]
    title = "Pages of a cache, and the arrays indptr, indices and last_page_len of two requests"
    return picture(title, LEFT + COUNT * step + 4, 246, lines)


def _time(table: dict[str, object], what: str) -> float:
    rows: list[list[str]] = table["rows"]  # type: ignore[assignment]
    return float(next(row[1] for row in rows if row[0] == what))


def plan() -> str:
    """A step: the host's replan, a run for each layer, and the GPU behind it."""
    tables = tomllib.loads((DOCS / "runs.toml").read_text())["tables"]
    table = next(t for t in tables if t["title"].startswith("Host time beside flashinfer-python"))
    first = _time(table, "the first run after a replan")
    row = next(r for r in table["rows"] if r[0] == "the first run after a replan")
    replan, later = _time(table, "decode replan"), float(row[3])
    scale, lines, x = 2.4, [], 110.0
    lines += [words(16, 62, "host", "left"), words(16, 132, "GPU, stream s", "left")]
    gpu = x
    for name, took, kind in (
        ("replan(...)", replan, "other"),
        ("run, layer 0", first, "full"),
        *((f"layer {n}", later, "full") for n in range(1, 4)),
        ("...", later, "box"),
        ("replan(...)", replan, "other"),
    ):
        width = took * scale
        lines += [rect(x, 40, width - 3, 36, kind), words(x + width / 2 - 2, 62, name, "note")]
        start = max(gpu, x + width)
        if name != "...":
            work = 34.0 if kind == "other" else 62.0
            label = "copy" if kind == "other" else "kernel"
            lines += [
                rect(start, 110, work - 3, 36, kind),
                words(start + work / 2, 132, label, "note"),
            ]
            lines.append(arrow(f"M{x + width - 6:g},77 L{start + 8:g},106"))
            gpu = start + work
        x += width
    notes = (
        f"host, µs on an H100: replan {replan:g}, first run {first:g}, a later run {later:g}",
        "the GPU is not to scale; the host waits for nothing on it",
    )
    lines += [words(16, 180 + 18 * row, note, "left note") for row, note in enumerate(notes)]
    title = "A step: replan once, run for every layer, and the GPU behind on the same stream"
    return picture(title, max(x, gpu) + 14, 214, lines)


def places() -> str:
    """The search for kernels, with what changes it."""
    kinds = ["explicit", *search._KINDS]
    assert kinds == [*SETTINGS], kinds
    lines = [words(16, 30, "the first call of an op on a GPU", "left")]
    for at, kind in enumerate(kinds):
        y = 48 + 62 * at
        lines += [rect(16, y, 120, 36, "box core"), words(76, y + 23, kind)]
        lines += [words(320, y + 16, SETTINGS[kind], "left note")]
        lines += [arrow(f"M136,{y + 18} L196,{y + 18}"), words(166, y + 12, "has it", "note")]
        lines += [rect(202, y, 98, 36, "full"), words(251, y + 23, "check, load")]
        if at + 1 < len(kinds):
            said = "none named" if kind == "explicit" else "no"
            lines += [arrow(f"M76,{y + 36} L76,{y + 58}"), words(84, y + 54, said, "left note")]
    y = 48 + 62 * len(kinds)
    lines += [arrow(f"M76,{y - 26} L76,{y - 4}"), words(84, y - 8, "no", "left note")]
    lines += [
        rect(16, y, 284, 36, "other"),
        words(158, y + 23, "KernelNotFoundError, with a command"),
    ]
    notes = (
        "FI_FFI_SOURCES chooses places and their order, FI_FFI_RELEASE and FI_FFI_CUDA what fits",
        "FI_FFI_VERIFY says how a fetched wheel is checked",
    )
    lines += [words(16, y + 62 + 20 * row, note, "left note") for row, note in enumerate(notes)]
    return picture("The search for a kernel module, and what changes it", 720, y + 96, lines)


PICTURES = {"pages": pages, "plan": plan, "search": places}

if __name__ == "__main__":
    codes = [write_or_check(DOCS / f"{n}.svg", draw(), __file__) for n, draw in PICTURES.items()]
    raise SystemExit(max(codes))
