"""Records what inference engines require: tests/loader/data/engines.json.

    python tools/record_engines.py [vllm==VERSION sglang==VERSION]

asks pip what it would install of each engine beside fi_ffi with its extras, and of fi_ffi alone; it
installs nothing, and downloads wheels of some gigabytes where the index offers no metadata.  Kept
are the packages from which a requirement of fi_ffi's own can be reached, each with its
requirements on the others.  tests/loader/test_engines.py resolves them again without the index.
Without arguments the engines are those recorded before.  pip takes its options from PIP_*.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.loader.test_engines import CLASHING, EXTRAS, RECORD  # noqa: E402

OWN = "fi-ffi"
# Of a package: its version, and what it requires.
Packages = dict[tuple[str, str], list[Requirement]]


def resolved(*wanted: str) -> Packages:
    """What pip would install."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
        command += ["--ignore-installed", "--report", str(report), *wanted]
        # A file of constraints is of this machine alone.
        subprocess.run(command, check=True, env={**os.environ, "PIP_CONSTRAINT": ""})
        told: Any = json.loads(report.read_text())
    found = {}
    for item in told["install"]:
        of = item["metadata"]
        requires = [Requirement(text) for text in of.get("requires_dist", [])]
        found[canonicalize_name(of["name"]), of["version"]] = requires
    return found


def named(requirements: Iterable[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


def reaching(packages: Packages, targets: set[str]) -> set[str]:
    """The packages that require one of the targets, directly or by others, and the targets."""
    found: set[str] = set()
    more = {name for name, _ in packages} & targets
    while more:
        found |= more
        more = {name for (name, _), of in packages.items() if named(of) & found} - found
    return found


def requested(packages: Packages) -> Mapping[str, set[str]]:
    """The extras that some package requires of another."""
    extras: dict[str, set[str]] = defaultdict(set)
    for requirements in packages.values():
        for requirement in requirements:
            extras[canonicalize_name(requirement.name)] |= requirement.extras
    return extras


def is_used(requirement: Requirement, kept: set[str], extras: set[str]) -> bool:
    """Whether a requirement counts: it is on a kept package, of no extra or of a requested one."""
    if canonicalize_name(requirement.name) not in kept:
        return False
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def record(engines: list[str]) -> dict[str, Any]:
    fits = [extra for extra in EXTRAS if extra not in CLASHING]
    packages = resolved(f"{ROOT}[{','.join(fits)}]")
    for extra in CLASHING:
        packages |= resolved(f"{ROOT}[{extra}]")
    for engine in engines:
        packages |= resolved(engine, f"{ROOT}[{','.join(fits)}]")
    own = next(of for (name, _), of in packages.items() if name == OWN)
    kept, extras = reaching(packages, named(own) - {OWN}), requested(packages)
    made: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for (name, version), requirements in sorted(packages.items()):
        if name in kept and name != OWN:
            used = (one for one in requirements if is_used(one, kept, extras[name]))
            made[name][version] = sorted({str(one) for one in used})
    python = ".".join(platform.python_version_tuple()[:2])
    return {"engines": engines, "python": python, "packages": made}


def main() -> None:
    engines = sys.argv[1:] or json.loads(RECORD.read_text())["engines"]
    made = record(engines)
    RECORD.write_text(json.dumps(made, indent=1) + "\n")
    print(f"{len(made['packages'])} packages")


if __name__ == "__main__":
    main()
