"""An environment with FlashInfer's own distributions of kernels works without a setting."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import children, installed
from tests.helpers.installed import RELEASE

Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def norm(built_wheel: Path) -> bytes:
    return installed.library_of(built_wheel, "norm")


@pytest.fixture(scope="module")
def page_of_orin(built_wheel_sm87: Path) -> bytes:
    return installed.library_of(built_wheel_sm87, "page")


@pytest.fixture(scope="module")
def site(norm: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install` leaves: the shim, and the kernels of two GPUs."""
    wheels = tmp_path_factory.mktemp("wheels")
    made = [installed.provider(wheels, sm, {"norm": norm}) for sm in ("sm80", "sm90a")]
    target = tmp_path_factory.mktemp("site")
    return installed.install(target, installed.shim(wheels, ("sm80", "sm90a")), *made)


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """Run a program that sees these folders of packages, and no FI_FFI_* but those given."""

    def run(program: str, *sites: Path, **variables: str) -> Any:
        kept = {name: "" for name in os.environ if name.startswith("FI_FFI_")}
        given = {"FI_FFI_CACHE_DIR": str(tmp_path / "cache")} | variables
        path = os.pathsep.join(map(str, [*sites, children.ROOT]))
        code, out, err = children.done(
            _CLEAN.format(kept=sorted(kept), given=given) + program,
            PYTHONPATH=path, FLASHINFER_WORKSPACE_BASE=str(tmp_path),
        )  # fmt: skip
        assert code in (0, 1), out + err
        return json.loads(out)

    return run


_CLEAN = """\
import json, os
for name in {kept!r}:
    os.environ.pop(name, None)
os.environ.update({given!r})
"""
DOCTOR = "from fi_ffi.cli import main; main(['doctor', *{names!r}, '--json'])"
FIRST_CALL = """\
import fi_ffi
from fi_ffi.loader import machine, runtime, search
from fi_ffi.ops.call.releases import release_in_force
answer = fi_ffi.rmsnorm.supports(sm=90)
machine.capability = lambda device: (9, 0)
row = fi_ffi.rmsnorm.row
source, file, facts = search.find_module("norm", 0)
runtime.kernel_entry("norm", row.signature, row.releases)
print(json.dumps([bool(answer), answer.place, answer.is_here, answer.release, answer.reason,
                  release_in_force(), row.releases, str(file.path), source.trust]))
"""


def test_a_call_takes_the_installed_kernels(ask, site):
    works, place, is_here, release, reason, in_use, _, path, trust = ask(FIRST_CALL, site)
    assert (works, place, is_here) == (True, "installed", True), reason
    assert release == in_use == RELEASE
    assert "sm90a" in path and path.startswith(str(site)) and trust == "record-unpinned"
    assert f"norm in {Path(path).parents[1]} is compiled for sm_90a" in reason


def test_the_rows_are_those_of_the_release(ask, site):
    """Of an op that another release calls with other arguments."""
    program = """\
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.call.releases import fits
several = [op for op in OPS.values() if len(op.rows) > 1]
print(json.dumps([[op.row is op.rows[0], fits(op.row, "0.7.2.post1")] for op in several]))
"""
    rows = ask(program, site)
    assert any(not same for same, _ in rows)
    assert all(fits for same, fits in rows if not same)


PROVIDER = "{site}/flashinfer_jit_cache/providers/sm90a"
DECIDED = [
    ({}, RELEASE, "an installed flashinfer-jit-cache: "),
    ({"FI_FFI_RELEASE": "0.6.18"}, "0.6.18", "FI_FFI_RELEASE"),
    # A folder that does not tell its release.
    ({"FI_FFI_KERNELS": PROVIDER}, "", "FI_FFI_KERNELS: "),
    ({"FI_FFI_KERNELS": PROVIDER, "FI_FFI_RELEASE": "0.7.1"}, "0.7.1", "FI_FFI_RELEASE"),
    ({"FI_FFI_SOURCES": "remote"}, "0.6.13", "the default of "),
    ({"FI_FFI_SOURCES": "local"}, "0.6.13", "the default of "),
]


@pytest.mark.parametrize(("variables", "release", "by"), DECIDED)
def test_doctor_says_who_decided_the_release(variables, release, by, ask, site):
    given = {name: value.format(site=site) for name, value in variables.items()}
    found = {one["check"]: one for one in ask(DOCTOR.format(names=()), site, **given)}
    told = found["release"]
    assert told["values"]["release"] == release and told["values"]["decided_by"].startswith(by)
    by = told["values"]["decided_by"]
    says = f"FlashInfer {release}, by {by}" if release else f"unknown: {by} does not say it"
    assert (told["status"], told["found"]) == ("ok" if release else "warn", says)
    assert "\n" not in says


def test_doctor_for_an_op(ask, site):
    norm, rope = ask(DOCTOR.format(names=("rmsnorm", "apply_rope", "--sm", "90")), site)
    assert norm["works"] and norm["place"] == "installed" and norm["is_here"]
    assert "entry attested" in norm["reason"] and norm["release"] == RELEASE
    # Nothing is pinned of this release.
    assert not rope["works"] and f"pins no kernels of FlashInfer {RELEASE}" in rope["reason"]


def test_the_nearest_sm_is_taken(ask, norm, page_of_orin, tmp_path):
    """Not the first by name: code for SM80 runs on SM89, and lacks what SM89 has."""
    (tmp_path / "wheels").mkdir()
    sms = {"sm80": {"page": page_of_orin}, "sm89": {"page": page_of_orin}, "sm90a": {"norm": norm}}
    made = [installed.provider(tmp_path / "wheels", sm, modules) for sm, modules in sms.items()]
    site = installed.install(tmp_path / "site", *made)
    program = """\
from fi_ffi.loader import search
found = [place for place in search.places() if place.kind == "installed"]
def places(sm):
    asked = [search.ask(place, "page", sm) for place in found]
    return [[said.place.sm, said.status, said.file is not None] for said in asked]
print(json.dumps([places((8, 9)), places((9, 0))]))
"""
    ada, hopper = ask(program, site)
    # The libraries are for SM87; what counts is in which order they were opened, and which not.
    assert [sm for sm, _, _ in ada] == ["sm90a", "sm89", "sm80"]
    assert [is_open for _, _, is_open in ada] == [False, True, True]
    assert [is_open for _, _, is_open in hopper] == [False, False, False]
    assert [status for _, status, _ in hopper] == ["lacks", "other", "other"]


def test_what_an_upgrade_left_is_not_used(ask, norm, tmp_path):
    """As FlashInfer does: a GPU's kernels are of the version that the shim names."""
    (tmp_path / "wheels").mkdir()
    old = installed.provider(tmp_path / "wheels", "sm90a", {"norm": norm}, "0.7.1+cu130")
    shim = installed.shim(tmp_path / "wheels", ("sm90a",))
    site = installed.install(tmp_path / "site", shim, old)
    found = ask(DOCTOR.format(names=()), site)
    (told,) = [one for one in found if one["check"] == "kernels: installed"]
    assert told["status"] == "none"
    assert "is of 0.7.1+cu130, and flashinfer-jit-cache of 0.7.2.post1+cu130" in told["found"]
    # Alone, they are as good as any.
    alone = installed.install(tmp_path / "alone", old)
    found = {one["check"]: one for one in ask(DOCTOR.format(names=()), alone)}
    assert found["release"]["values"]["release"] == "0.7.1"
    # And a shim without any says so.
    bare = installed.install(tmp_path / "bare", shim)
    found = {one["check"]: one for one in ask(DOCTOR.format(names=()), bare)}
    assert "has no kernels of its own" in found["kernels: installed"]["found"]
    assert found["release"]["values"]["decided_by"].startswith("the default of ")


def test_a_changed_file_is_refused(ask, norm, tmp_path):
    (tmp_path / "wheels").mkdir()
    wheel = installed.provider(tmp_path / "wheels", "sm90a", {"norm": norm})
    site = installed.install(tmp_path / "site", wheel)
    (library,) = site.rglob("norm.so")
    library.write_bytes(norm + b"!")
    (answer,) = ask(DOCTOR.format(names=("rmsnorm", "--sm", "90")), site)
    assert not answer["works"] and "the RECORD of the distribution has" in answer["reason"]
