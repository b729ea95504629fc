"""The records of releases: exports of their sources, their modules, and the modules' names.

The records are in three places. `fi_ffi/catalogue/data/releases.json` lists the wheels that rows
are compared with. `fi_ffi/catalogue/data/modules.json`, with `tools/data/entries-RELEASE.json`, has
FlashInfer's own list of modules and their exports. `tests/loader/data/uris.json` has the names that
generators give modules, case by case. The first needs only a release's wheel; the others run its
generators, in the environment of `fi-ffi build`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fi_ffi.catalogue.ahead_of_time import ParameterGrid
from fi_ffi.errors import ArgumentError, BuildError
from fi_ffi.loader.uris import DTYPES, ROWS, Value, version_of
from fi_ffi.module_names import uri
from fi_ffi_build.build import available
from tools.release import grids
from tools.release.described import described, generated_names
from tools.release.entries import Entry
from tools.release.modules import Reader, architectures
from tools.release.wheels import open_release

EVERY_ARCH = "7.5 8.0 8.9 9.0a 10.0a 10.3a 11.0a 12.0f 12.1a"
ARCH = "9.0a"
RELEASES, MODULES = "fi_ffi/catalogue/data/releases.json", "fi_ffi/catalogue/data/modules.json"
NAMES = "tests/loader/data/uris.json"
_MADE_BY = "Made by `python3 -m tools.release record`: "
ABOUT_RELEASES = (
    f"{_MADE_BY}the wheels of flashinfer-python whose sources rows are compared with. `names` are "
    "those that TVM_FFI_DLL_EXPORT_TYPED_FUNC is written out with below csrc, in so many `files`; "
    "`entries` are all that is exported, methods and variants of generators included; `gpus` are "
    "those from SM90 on that its list of what is built ahead of time has cases for."
)
ABOUT_ENTRIES = (
    f"{_MADE_BY}what every module that FlashInfer builds ahead of time "
    f"for {EVERY_ARCH} exports, read from its bindings. `modules`: families, and the values that "
    "their parameters take; `params`: names and types; `objects`: methods of module objects. "
    "Groups that are not `listed` are made only when they are asked for; of families, one or two."
)
ABOUT_MODULES = (
    f"{_MADE_BY}what FlashInfer's generators list, and the architectures in their flags. They were "
    "asked for a release's `architectures`. `count` includes modules that are "
    "named by hashes, which are left out; `unknown` has generators that could not be asked."
)
ABOUT_NAMES = (
    f"{_MADE_BY}what the generators inside flashinfer-python of each release "
    "call a module. `cases`: family and parameters of fi_ffi.loader.uris, the generator and what "
    "it was called with where that is not the same, and the releases by the name they gave "
    "('' where they have no such generator); a case is added by hand, with no names. `listed`: "
    "FlashInfer's list of what it builds ahead of time for 9.0a, by the releases that have the "
    "names; `listed_for_every_arch`: what the default release lists beyond that for "
    "architectures from 7.5 to 12.1a."
)

_HALF = {"dtype_q": "f16"}
_FP8 = {"dtype_q": "e4m3", "dtype_o": "f16"}
# One of each family that FlashInfer makes only on request.
_SAMPLES: tuple[tuple[str, dict[str, Value]], ...] = (
    ("pod", {**_HALF, "head_dim": 128}),
    ("batch_pod", {**_HALF, "head_dim": 128}),
    ("single_prefill", {**_HALF, "head_dim_qk": 128, "backend": "fa3"}),
    ("single_prefill", {**_FP8, "head_dim_qk": 128, "backend": "fa3"}),
    ("fmha_v2", {"input_layout": "packed_qkv", "input_dtype": "f16", "output_dtype": "f16"}),
)
# Families that are read from their sources alone: their generators need something that the build
# environment lacks (NVSHMEM), or take no module name.
_ALONE = {
    "batch_decode_mla": ("csrc/batch_decode_mla_binding.cu",),
    "checkpointing_ssu": ("csrc/checkpointing_ssu_jit_binding.cu",),
    "mixed_comm": ("csrc/mixed_comm.cu",),
}

Document = dict[str, Any]
# Reports progress.
Say = Callable[[str], None]


def _in_order(releases: Iterable[str]) -> list[str]:
    return sorted({*releases}, key=version_of)


# The wheels


def with_sources(document: Document, releases: Iterable[str], say: Say) -> Document:
    """Return the record of wheels, with these releases read again."""
    known = dict(document.get("releases", {}))
    for release in releases:
        say(f"reading the sources of {release}")
        wheel = open_release(release)
        found = wheel.interface()
        known[wheel.release] = {
            "sha256": wheel.sha256, "names": len(found.names), "files": found.files,
            "entries": len(found.exports), "gpus": wheel.gpus(),
        }  # fmt: skip
    return {
        "about": ABOUT_RELEASES,
        "releases": {release: known[release] for release in _in_order(known)},
    }


# The modules and their exports


def asked_for(release: str) -> list[str]:
    """Return modules that a release makes on request, whether it lists them or not."""
    plain = [r.family for r in ROWS if not r.kinds and r.generator and r.holds_for(release)]
    samples = [uri(family, release=release, **params) for family, params in _SAMPLES]
    return sorted({*plain, *samples})


def entries(answer: Mapping[str, Any]) -> Document:
    """Return the record of a release's exports."""
    reader = Reader(Path(answer["data"]))
    groups: dict[str, tuple[list[str], Document]] = {}
    listed = {module["name"] for module in answer["modules"]}
    unlisted = [module for module in answer["unlisted"] if module["name"] not in listed]
    for module in answer["modules"] + unlisted:
        found = reader.bindings(module)
        if not found.exports:
            raise BuildError(f"{module['name']} exports nothing: {module['sources']}")
        what: Document = {
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


def _alone(reader: Reader, family: str) -> Document:
    """Return the record of a family whose generator is not run."""
    paths = [str(reader.data / source) for source in _ALONE[family]]
    module = {"sources": paths, "cflags": [], "cuda_cflags": []}
    return {
        "modules": [{"family": family}], "count": 1, "sources": reader.files(module),
        "entries": _written(reader.bindings(module).exports), "listed": False,
    }  # fmt: skip


def _written(functions: Mapping[str, Any]) -> Document:
    return {name: Entry(f.signature, f.names).write() for name, f in sorted(functions.items())}


def _boxes(names: Iterable[str], release: str) -> list[dict[str, object]]:
    return [grids.write(grid) for grid in grids.grids_of(names, release)]


def with_modules(document: Document, answers: Mapping[str, Mapping[str, Any]]) -> Document:
    """Return the record of modules, updated by these releases' answers from their generators."""
    found: dict[tuple[ParameterGrid, str], list[str]] = {}
    for group in document.get("groups", ()):
        kept = [release for release in group["releases"] if release not in answers]
        if kept:
            found[ParameterGrid.read(group), group["compiled_for"]] = kept
    about = dict(document.get("releases", {}))
    for release, answer in answers.items():
        by_codes: dict[str, list[str]] = {}
        targets = answer["architectures"]
        for module in answer["modules"]:
            codes = [name.replace("_", "") for name in architectures(module, targets)]
            codes.sort(key=lambda name: (len(name.strip("smaf")), name))
            by_codes.setdefault(" ".join(codes), []).append(module["name"])
        for codes_text, names in by_codes.items():
            for grid in grids.grids_of(names, release):
                found.setdefault((grid, codes_text), []).append(release)
        about[release] = {
            "architectures": EVERY_ARCH,
            "count": len(answer["modules"]),
            "unknown": sorted(answer["unavailable"]),
        }
    groups = [((grid, codes), _in_order(of)) for (grid, codes), of in found.items()]
    groups.sort(key=lambda item: (item[0][0].family, str(item[0]), item[1]))
    return {
        "about": ABOUT_MODULES,
        "releases": {release: about[release] for release in _in_order(about)},
        "groups": [
            {**grids.write(grid), "compiled_for": codes, "releases": releases}
            for (grid, codes), releases in groups
        ],
    }


# The names that generators give modules


def with_names(document: Document, release: str, default: str, folder: Path | None) -> Document:
    """Return the record of names, with all cases of a release queried again."""
    cases = [dict(case) for case in document["cases"]]
    known = _in_order([*document["releases"], release])
    before = known[max(0, known.index(release) - 1)]
    for case in cases:
        case["names"] = {name: [*releases] for name, releases in case["names"].items()}
    asked = {
        str(number): case
        for number, case in enumerate(cases)
        if not case["names"] or _is_of(case, release)
        or (release not in document["releases"] and _is_of(case, before))
    }  # fmt: skip
    requests = [_as_request(number, case) for number, case in asked.items()]
    names, failed = generated_names(requests, release=release, arch=EVERY_ARCH, build_dir=folder)
    for number, reason in failed.items():
        if not any(text in reason for text in ("has no attribute", "No module named")):
            raise BuildError(f"{release}: {cases[int(number)]}: {reason}")
        names[number] = ""
    for number, case in asked.items():
        for releases in case["names"].values():
            if release in releases:
                releases.remove(release)
        given = case["names"].setdefault(names[number], [])
        given[:] = _in_order([*given, release])
        case["names"] = {name: of for name, of in case["names"].items() if of}
    lists = {
        each: [n for key, of in document["listed"].items() if each in key.split() for n in of]
        for each in document["releases"]
    }
    lists[release] = _listed(release, ARCH, folder)
    beyond = document["listed_for_every_arch"]
    if release == default:
        every = _listed(release, EVERY_ARCH, folder and folder / "every")
        beyond = sorted({*every} - {*lists[release]})
    return {
        "about": ABOUT_NAMES, "releases": known, "default": default, "arch": ARCH,
        "listed": _by_releases({each: lists[each] for each in known}),
        "listed_for_every_arch": beyond, "cases": cases,
    }  # fmt: skip


def _is_of(case: Document, release: str) -> bool:
    return any(release in releases for releases in case["names"].values())


def _as_request(number: str, case: Document) -> dict[str, Any]:
    """Return a case as a request for the driver in the build environment."""

    def argument(name: str, value: Any) -> Any:
        is_text = case["family"] == "rmsnorm_silu" or not isinstance(value, str)
        return value if is_text or "dtype" not in name else f"torch.{DTYPES[value]}"

    called = {name: argument(name, value) for name, value in case["params"].items()}
    arguments = called | case["arguments"]
    return {"text": number, "generator": case["generator"], "arguments": arguments}


def _listed(release: str, arch: str, folder: Path | None) -> list[str]:
    found = available(release=release, arch=arch, build_dir=folder)
    return sorted(entry.name for entry in found if entry.kind == "module")


def _by_releases(lists: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Group names by the releases that have them; most are in all."""
    found: dict[str, list[str]] = {}
    for name in sorted({*itertools.chain.from_iterable(lists.values())}):
        key = " ".join(release for release, names in lists.items() if name in names)
        found.setdefault(key, []).append(name)
    return found


# The files


def text_of_groups(document: Document) -> str:
    """Return JSON with a line for each group."""
    head = {name: value for name, value in document.items() if name != "groups"}
    groups = ",\n".join(json.dumps(group) for group in document["groups"])
    return json.dumps(head, indent=1)[:-2] + f',\n "groups": [\n{groups}\n]}}\n'


def text_of_releases(document: Document) -> str:
    """Return JSON with a line for each release."""
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in document["releases"].items()]
    about = json.dumps(document["about"])
    return f'{{\n "about": {about},\n "releases": {{\n' + ",\n".join(lines) + "\n }\n}\n"


def text_of_names(document: Document) -> str:
    """Return JSON with a line for each case."""
    head = {name: value for name, value in document.items() if name != "cases"}
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in document["cases"])
    return f'{json.dumps(head, indent=0)[:-2]},\n"cases": [\n{lines}\n]\n}}\n'


def recorded(
    root: Path,
    releases: Iterable[str],
    default: str,
    say: Say,
    *,
    with_generators: bool = False,
    build_dir: Path | None = None,
) -> dict[Path, str]:
    """Return the files of a checkout's records and their texts, with these releases recorded again.

    Raises ArgumentError if `root` is no checkout, and BuildError for a source that cannot be read.
    """
    if not (root / MODULES).is_file() or not (root / NAMES).is_file():
        raise ArgumentError(
            "release record", "--to", got=root, expected="a checkout of the repository"
        )
    found: dict[Path, str] = {}
    path = root / RELEASES
    before = json.loads(path.read_text()) if path.exists() else {}
    found[path] = text_of_releases(with_sources(before, releases, say))
    if not with_generators:
        return found
    modules = json.loads((root / MODULES).read_text())
    names = json.loads((root / NAMES).read_text())
    for release in releases:
        folder = build_dir and build_dir / release
        say(f"asking the generators of {release} for modules")
        extra = asked_for(release) if release == default else []
        answer = described(extra, release=release, arch=EVERY_ARCH, build_dir=folder)
        modules = with_modules(modules, {release: answer})
        if release == default:
            path = root / "tools" / "data" / f"entries-{release}.json"
            found[path] = text_of_groups(entries(answer))
        say(f"asking the generators of {release} for names")
        names = with_names(names, release, default, folder)
    found[root / MODULES] = text_of_groups(modules)
    found[root / NAMES] = text_of_names(names)
    return found
