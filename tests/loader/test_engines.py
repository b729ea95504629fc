"""fi_ffi installs beside inference engines: pip resolves what they and fi_ffi publish.

The packages are wheels of metadata alone, made here of what tools/record_engines.py recorded.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fi_ffi.loader import tvm_ffi

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_name("data") / "engines.json"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Extras that no engine can have beside it, and the package of which two versions are wanted.
CLASHING = {"cu12": "cuda-bindings"}
FITTING = ",".join(extra for extra in EXTRAS if extra not in CLASHING)


@functools.cache
def recorded() -> Any:
    found = json.loads(RECORD.read_text())
    here = ".".join(platform.python_version_tuple()[:2]), platform.machine()
    if here != (found["python"], "x86_64"):
        pytest.skip(f"recorded with Python {found['python']} on x86_64: markers differ here")
    return found


ENGINES = json.loads(RECORD.read_text())["engines"]


def wheel(folder: Path, name: str, version: str, requires: Iterable[str], extras=()) -> None:
    """A wheel that has nothing but its name and its requirements."""
    stem = f"{name.replace('-', '_')}-{version}"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Provides-Extra: {extra}" for extra in extras]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{stem}.dist-info/METADATA", "\n".join(lines) + "\n")
        archive.writestr(f"{stem}.dist-info/WHEEL", tags)
        archive.writestr(f"{stem}.dist-info/RECORD", "")


def own_requirements(accepted: str) -> list[str]:
    """Those of pyproject.toml that engines have too, with this range of apache-tvm-ffi."""
    found = [
        f"{tvm_ffi.PROJECT}{accepted}" if Requirement(one).name == tvm_ffi.PROJECT else one
        for one in PROJECT["dependencies"]
    ]
    for extra, requirements in EXTRAS.items():
        if extra in ("torch", "jax"):  # an engine brings the torch that it pins, and no jax
            continue
        for requirement in map(Requirement, requirements):
            marker = f"({requirement.marker}) and " if requirement.marker else ""
            requirement.marker = None
            found.append(f"{requirement}; {marker}extra == '{extra}'")
    return found


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Path:
    """A folder of what the engines and fi_ffi need, without fi_ffi."""
    folder = tmp_path_factory.mktemp("index")
    packages = recorded()["packages"]
    every = [one for versions in packages.values() for of in versions.values() for one in of]
    extras = {extra for requirement in map(Requirement, every) for extra in requirement.extras}
    for name, versions in packages.items():
        for version, requires in versions.items():
            wheel(folder, name, version, requires, sorted(extras))
    return folder


def resolve(index: Path, own: Path, *wanted: str) -> tuple[dict[str, str], str]:
    """What pip would install, by name, and what it says."""
    report = own / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
    command += ["--no-index", "--find-links", str(index), "--find-links", str(own)]
    done = subprocess.run(
        [*command, "--report", str(report), *wanted],
        env={**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_CONSTRAINT": ""},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    if done.returncode:
        return {}, done.stdout
    told = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return {of["name"]: of["version"] for of in told}, done.stdout


@pytest.fixture
def own(tmp_path):
    """Makes fi_ffi's wheel with a range of apache-tvm-ffi, in a folder of its own."""

    def make(accepted: str) -> Path:
        wheel(tmp_path, "fi-ffi", PROJECT["version"], own_requirements(accepted), EXTRAS)
        return tmp_path

    return make


@pytest.mark.parametrize("engine", ENGINES)
def test_beside_an_engine(engine, index, own):
    """With every extra that does not clash; what the engine pins is what is installed."""
    found, told = resolve(index, own(tvm_ffi.ACCEPTED), engine, f"fi-ffi[{FITTING}]")
    assert "fi-ffi" in found, told
    name, _, version = engine.partition("==")
    assert found[name] == version
    pinned = recorded()["packages"][name][version]
    for requirement in map(Requirement, pinned):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            got = found[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(got, prereleases=True)
    assert found[tvm_ffi.PROJECT] == "0.1.11"


def test_the_newest_alone(index, own):
    found, told = resolve(index, own(tvm_ffi.ACCEPTED), f"fi-ffi[{FITTING}]")
    assert found, told
    assert found[tvm_ffi.PROJECT] == [*recorded()["packages"][tvm_ffi.PROJECT]][-1] != "0.1.11"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_range_that_leaves_the_engines_release_out(engine, index, own):
    found, told = resolve(index, own(">=0.1.12,<0.2"), engine, "fi-ffi")
    assert not found and "apache-tvm-ffi" in told and "ResolutionImpossible" in told


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("extra", CLASHING)
def test_an_extra_that_clashes(extra, engine, index, own):
    found, told = resolve(index, own(tvm_ffi.ACCEPTED), engine, f"fi-ffi[{extra}]")
    assert not found and CLASHING[extra] in told and "ResolutionImpossible" in told
    assert resolve(index, own(tvm_ffi.ACCEPTED), f"fi-ffi[{extra}]")[0]


def test_the_page_names_engines_and_clashes():
    page = (ROOT / "docs" / "install.md").read_text().partition("## Beside vLLM and SGLang")[2]
    for engine in ENGINES:
        name, version = engine.split("==")
        assert re.search(rf"{name} {re.escape(version)}", page, re.IGNORECASE), engine
    for extra, package in CLASHING.items():
        assert f"`{extra}`" in page and package in page
