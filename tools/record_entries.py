"""Records what FlashInfer's modules export (tools/data/entries-*.json), and which it builds
(fi_ffi/loader/data/modules.json).

    python tools/record_entries.py [--check] [--build-dir DIR]

makes the build environment of every supported release (as `fi-ffi build` does: the package
index, nvcc of CUDA 13, a C++ compiler; no GPU), asks the generators of each for FlashInfer's
own list of modules, and reads the bindings of the default release's, and of modules that it
makes only when they are asked for.  `--check` compares
with the files, for the default release only.  Allow some minutes for the first time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fi_ffi.loader.building.names import DEFAULT_RELEASE  # noqa: E402
from fi_ffi.loader.listed import Box  # noqa: E402
from fi_ffi.loader.sources.modules import Reader, architectures  # noqa: E402
from fi_ffi.loader.uris import ROWS, Value, uri  # noqa: E402
from tools import boxes  # noqa: E402
from tools.entries import Entry  # noqa: E402
from tools.generators import described  # noqa: E402

RELEASES = ("0.6.3", "0.6.12", "0.6.13", "0.6.18", "0.7.2.post1")
EVERY_ARCH = "7.5 8.0 8.9 9.0a 10.0a 10.3a 11.0a 12.0f 12.1a"
DATA = ROOT / "fi_ffi" / "loader" / "data"
ENTRIES = ROOT / "tools" / "data" / f"entries-{DEFAULT_RELEASE}.json"
ABOUT_ENTRIES = (
    "Made by tools/record_entries.py: what every module that FlashInfer builds ahead of time "
    f"for {EVERY_ARCH} exports, read from its bindings. `modules`: families, and the values that "
    "their parameters take; `params`: names and types; `objects`: methods of module objects. "
    "Groups that are not `listed` are made only when they are asked for; of families, one or two."
)
ABOUT_MODULES = (
    "Made by tools/record_entries.py: what FlashInfer's generators list for "
    f"{EVERY_ARCH}, and the architectures in their flags. `count` includes modules that are "
    "named by hashes, which are left out; `unknown` has generators that could not be asked."
)


_HALF = {"dtype_q": "f16"}
_FP8 = {"dtype_q": "e4m3", "dtype_o": "f16"}
# One of each family that FlashInfer makes only when it is asked for.
_SAMPLES: tuple[tuple[str, dict[str, Value]], ...] = (
    ("pod", {**_HALF, "head_dim": 128}),
    ("batch_pod", {**_HALF, "head_dim": 128}),
    ("single_prefill", {**_HALF, "head_dim_qk": 128, "backend": "fa3"}),
    ("single_prefill", {**_FP8, "head_dim_qk": 128, "backend": "fa3"}),
    ("fmha_v2", {"input_layout": "packed_qkv", "input_dtype": "f16", "output_dtype": "f16"}),
)
# Families that are read from their sources alone: their generators need what the build environment
# lacks (NVSHMEM), or cannot be asked by a module's name.
_ALONE = {
    "batch_decode_mla": ("csrc/batch_decode_mla_binding.cu",),
    "checkpointing_ssu": ("csrc/checkpointing_ssu_jit_binding.cu",),
    "mixed_comm": ("csrc/mixed_comm.cu",),
}


def asked_for(release: str) -> list[str]:
    """Modules that a release makes when they are asked for, whether it lists them or not."""
    plain = [r.family for r in ROWS if not r.kinds and r.generator and r.holds_for(release)]
    samples = [uri(family, release=release, **params) for family, params in _SAMPLES]
    return sorted({*plain, *samples})


def entries(answer: dict[str, Any]) -> dict[str, Any]:
    """The record of a release's exports."""
    reader = Reader(Path(answer["data"]))
    groups: dict[str, tuple[list[str], dict[str, Any]]] = {}
    listed = {module["name"] for module in answer["modules"]}
    unlisted = [module for module in answer["unlisted"] if module["name"] not in listed]
    for module in answer["modules"] + unlisted:
        found = reader.bindings(module)
        if not found.exports:
            raise SystemExit(f"{module['name']} exports nothing: {module['sources']}")
        what: dict[str, Any] = {
            "sources": reader.files(module),
            "entries": _written(found.exports),
        }
        if found.objects:
            what["objects"] = {kind: _written(found.objects[kind]) for kind in found.objects}
        if module["name"] not in listed:
            what["listed"] = False
        groups.setdefault(json.dumps(what), ([], what))[0].append(module["name"])
    release = answer["release"]
    made = [
        (names, {"modules": _boxes(names, release), "count": len(names), **what})
        for names, what in groups.values()
    ]
    made += [([family], _alone(reader, family)) for family in _ALONE]
    return {
        "about": ABOUT_ENTRIES,
        "release": release,
        "groups": [group for _, group in sorted(made, key=lambda pair: pair[0])],
    }


def _alone(reader: Reader, family: str) -> dict[str, Any]:
    """The record of a family whose generator is not asked."""
    paths = [str(reader.data / source) for source in _ALONE[family]]
    module = {"sources": paths, "cflags": [], "cuda_cflags": []}
    return {
        "modules": [{"family": family}], "count": 1, "sources": reader.files(module),
        "entries": _written(reader.bindings(module).exports), "listed": False,
    }  # fmt: skip


def _written(functions: dict[str, Any]) -> dict[str, Any]:
    return {name: Entry(f.signature, f.names).write() for name, f in sorted(functions.items())}


def _boxes(names: Iterable[str], release: str) -> list[dict[str, object]]:
    return [boxes.write(box) for box in boxes.boxes_of(names, release)]


def modules(answers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The record of which modules there are, for all releases together."""
    found: dict[tuple[Box, str], list[str]] = {}
    about = {}
    for release, answer in answers.items():
        by_codes: dict[str, list[str]] = {}
        targets = answer["architectures"]
        for module in answer["modules"]:
            codes = [name.replace("_", "") for name in architectures(module, targets)]
            codes.sort(key=lambda name: (len(name.strip("smaf")), name))
            by_codes.setdefault(" ".join(codes), []).append(module["name"])
        for codes_text, names in by_codes.items():
            for box in boxes.boxes_of(names, release):
                found.setdefault((box, codes_text), []).append(release)
        about[release] = {
            "count": len(answer["modules"]),
            "unknown": sorted(answer["unavailable"]),
        }
    groups = sorted(found.items(), key=lambda item: (item[0][0].family, str(item[0]), item[1]))
    return {
        "about": ABOUT_MODULES,
        "releases": about,
        "groups": [
            {**boxes.write(box), "compiled_for": codes, "releases": releases}
            for (box, codes), releases in groups
        ],
    }


def text(document: dict[str, Any]) -> str:
    """JSON with a line for each group."""
    head = {name: value for name, value in document.items() if name != "groups"}
    groups = ",\n".join(json.dumps(group) for group in document["groups"])
    return json.dumps(head, indent=1)[:-2] + f',\n "groups": [\n{groups}\n]}}\n'


def _of_release(document: dict[str, Any], release: str) -> list[str]:
    """What a record of modules says of one release, a line for each group."""
    lines = []
    for group in document["groups"]:
        if release in group["releases"]:
            lines.append(json.dumps({key: group[key] for key in group if key != "releases"}))
    return [json.dumps(document["releases"][release]), *lines]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--build-dir", type=Path)
    asked = parser.parse_args()
    answers = {}
    for release in (DEFAULT_RELEASE,) if asked.check else RELEASES:
        folder = asked.build_dir and asked.build_dir / release
        extra = asked_for(release) if release == DEFAULT_RELEASE else []
        answers[release] = described(extra, release=release, arch=EVERY_ARCH, build_dir=folder)
    exported, made = entries(answers[DEFAULT_RELEASE]), modules(answers)
    if not asked.check:
        ENTRIES.write_text(text(exported))
        (DATA / "modules.json").write_text(text(made))
        return 0
    recorded = json.loads((DATA / "modules.json").read_text())
    fresh = ENTRIES.read_text() == text(exported)
    fresh &= _of_release(recorded, DEFAULT_RELEASE) == _of_release(made, DEFAULT_RELEASE)
    if not fresh:
        print("the records are stale: run python3 tools/record_entries.py")
    return int(not fresh)


if __name__ == "__main__":
    sys.exit(main())
