"""Where kernels are looked for, in which order, and what is said of places without any."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fi_ffi
from fi_ffi.loader import lock, machine, runtime, search
from fi_ffi.loader.kernels import KernelWheel, open_source, release_of

VARIABLES = (*(getattr(search, n) for n in ("KERNELS", "SOURCES", "WHEELS", "RELEASE", "CUDA")),)


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """No variable is set, nothing is installed, compiled or lying about."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path / "nobody"))
    monkeypatch.setenv(search.WHEELS, str(tmp_path / "nothing"))
    yield
    monkeypatch.undo()
    runtime.use_source(None)


@pytest.fixture
def module_file(built_wheel) -> Path:
    return open_source(built_wheel).file("norm").path


def looked_at() -> dict[str, search.Candidate]:
    runtime.use_source(None)
    return {place.kind: place for place in search.places()}


def install(wheel: Path, target: Path) -> Path:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(wheel)], check=True, timeout=120)
    return target


def test_a_bare_machine_has_only_the_pinned_wheel():
    found = looked_at()
    assert list(found) == ["installed", "jit", "local", "remote"]
    assert [kind for kind, place in found.items() if place.source] == ["remote"]
    assert all(place.note for place in found.values() if not place.source)
    assert found["remote"].source.location.startswith("https://")
    assert search.release() == lock.the_lock().default_release


def test_explicit_is_the_only_one(built_wheel, monkeypatch):
    monkeypatch.setenv(search.KERNELS, str(built_wheel))
    found = looked_at()
    assert list(found) == ["explicit"]
    assert search.release() == "0.6.13"
    with pytest.raises(fi_ffi.KernelNotFoundError, match="gdn_prefill_sm90") as caught:
        search.find_module("gdn_prefill_sm90")
    assert "norm, page" in str(caught.value)
    assert "fi-ffi build --release 0.6.13 --arch 9.0a gdn_prefill_sm90" in str(caught.value)


def test_an_explicit_place_that_is_none_changes_nothing(built_wheel, tmp_path):
    fi_ffi.use_kernels(built_wheel)
    with pytest.raises(fi_ffi.KernelNotFoundError, match="no such file"):
        fi_ffi.use_kernels(tmp_path / "none.whl")
    text = tmp_path / "text"
    text.write_text("text")
    with pytest.raises(fi_ffi.ArtifactError, match="neither a directory nor"):
        fi_ffi.use_kernels(text)
    assert search.release() == "0.6.13"


def test_an_installed_distribution(built_wheel, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(install(built_wheel, tmp_path / "site")))
    place = looked_at()["installed"]
    assert place.source.version.startswith("0.6.13+cu130")
    source, file, _ = search.find_module("norm")
    assert source is place.source
    assert file.path.is_relative_to(tmp_path / "site")
    assert "flashinfer_jit_cache" not in sys.modules


def test_installed_providers_one_for_each_sm(module_file, tmp_path, monkeypatch):
    """The layout from 0.7.0.post1 on: a shim without kernels, and a distribution per SM."""
    for name, has_kernels in (
        ("flashinfer_jit_cache", False),
        ("flashinfer_jit_cache_sm90a", True),
    ):
        info = tmp_path / f"{name}-0.7.2.post1+cu134.dist-info"
        info.mkdir()
        title = name.replace("_", "-")
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {title}\nVersion: 0.7.2.post1+cu134\n"
        )
        files = [f"{name}/__init__.py,,"]
        if has_kernels:
            member = tmp_path / name / "jit_cache" / "norm" / "norm.so"
            member.parent.mkdir(parents=True)
            shutil.copy(module_file, member)
            files.append(f"{member.relative_to(tmp_path)},,")
        (info / "RECORD").write_text("\n".join(files) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    place = looked_at()["installed"]
    assert place.source.version == "0.7.2.post1+cu134"
    assert place.source.modules() == ["norm"]
    assert search.release() == "0.7.2.post1"


def test_flashinfers_own_compiled_modules(module_file, tmp_path, monkeypatch):
    folder = tmp_path / ".cache" / "flashinfer" / "0.6.13" / "90a" / "cached_ops" / "norm"
    folder.mkdir(parents=True)
    shutil.copy(module_file, folder / "norm.so")
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path))
    place = looked_at()["jit"]
    assert release_of(place.source) == "0.6.13"
    assert search.find_module("norm")[1].path == folder / "norm.so"


def test_local_wheels(built_wheel, tmp_path, monkeypatch):
    shutil.copy(built_wheel, tmp_path)
    monkeypatch.setenv(search.WHEELS, os.pathsep.join([str(tmp_path / "no"), str(tmp_path)]))
    place = looked_at()["local"]
    assert isinstance(place.source, KernelWheel)
    assert place.source.modules()[0] == "norm"


def test_a_broken_local_wheel_is_a_reason(built_wheel, tmp_path, monkeypatch):
    (tmp_path / "flashinfer_jit_cache-0.6.13.whl").write_bytes(built_wheel.read_bytes()[:5000])
    monkeypatch.setenv(search.WHEELS, str(tmp_path))
    place = looked_at()["local"]
    assert place.source is None
    assert "is not a readable wheel" in place.note


def test_places_of_another_release_are_passed_over(built_wheel, tmp_path, monkeypatch):
    shutil.copy(built_wheel, tmp_path)
    monkeypatch.setenv(search.WHEELS, str(tmp_path))
    monkeypatch.setenv(search.RELEASE, "0.6.18")
    found = looked_at()
    assert found["local"].source is None
    assert "is of 0.6.13, wanted is 0.6.18" in found["local"].note
    assert search.release() == "0.6.18"


def test_the_first_source_settles_the_release(built_wheel, tmp_path, monkeypatch):
    later = tmp_path / "flashinfer_jit_cache-0.6.18+cu130-cp39-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(built_wheel) as old, zipfile.ZipFile(later, "w") as new:
        for info in old.infolist():
            name = info.filename.replace("-0.6.13+cu130.sm90a.dist-info", "-0.6.18+cu130.dist-info")
            new.writestr(name, old.read(info))
    monkeypatch.setenv(search.WHEELS, str(tmp_path))
    found = looked_at()
    assert release_of(found["local"].source) == "0.6.18"
    assert "0.6.18" in found["remote"].source.version


def test_sources_may_be_chosen_and_ordered(built_wheel, tmp_path, monkeypatch):
    shutil.copy(built_wheel, tmp_path)
    monkeypatch.setenv(search.WHEELS, str(tmp_path))
    monkeypatch.setenv(search.SOURCES, "remote, local")
    assert list(looked_at()) == ["remote", "local"]
    monkeypatch.setenv(search.SOURCES, "")
    assert looked_at() == {}
    monkeypatch.setenv(search.SOURCES, "local,cloud")
    with pytest.raises(fi_ffi.ArgumentError, match="cloud"):
        looked_at()


@pytest.mark.parametrize(
    ("driver", "forced", "cuda"),
    [
        (None, None, "cu134"),
        ((13, 0), None, "cu134"),
        ((13, 5), None, "cu134"),
        ((13, 0), "cu130", "cu130"),
        ((12, 8), None, None),
        ((12, 8), "cu130", "cu130"),
        ((13, 0), "cu126", None),
    ],
)
def test_the_pin_is_chosen_by_the_machine(driver, forced, cuda, tmp_path, monkeypatch):
    """Drivers of other CUDA versions cannot be had here; everything else is real."""
    text = lock.lock_path().read_text()
    name = "flashinfer_jit_cache-0.6.13+cu134.whl"
    text += '\n[[kernels.files]]\nrelease = "0.6.13"\ncuda = "cu134"\nlayout = "monolithic"\n'
    text += f'platform = "{lock.this_platform()}"\nfile = "{name}"\nsha256 = "{"0" * 64}"\n'
    text += 'provenance = "none"\n'
    mine = tmp_path / "wheels.lock"
    mine.write_text(text)
    monkeypatch.setenv(lock.ENVIRONMENT, str(mine))
    lock.the_lock.cache_clear()
    monkeypatch.setattr(machine, "driver_version", lambda: driver)
    if forced:
        monkeypatch.setenv(search.CUDA, forced)
    try:
        if cuda is None:
            with pytest.raises(fi_ffi.LoaderError, match="pins no kernels of FlashInfer 0.6.13"):
                search.pinned("0.6.13")
        else:
            assert search.pinned("0.6.13").cuda == cuda
    finally:
        lock.the_lock.cache_clear()


def test_a_release_that_is_not_pinned_names_those_that_are():
    with pytest.raises(
        fi_ffi.LoaderError, match=r"pins no kernels of FlashInfer 9\.9\.9"
    ) as caught:
        search.pinned("9.9.9")
    assert "0.6.13 cu130 linux-x86_64" in str(caught.value)


@pytest.mark.parametrize("capability", [(8, 7), (9, 0), (10, 0)])
def test_device_code_is_looked_at_before_anything_is_loaded(
    capability, built_wheel, built_wheel_sm87, tmp_path, monkeypatch
):
    """On each device the wheel that has code for it, whichever comes first."""
    for wheel in (built_wheel, built_wheel_sm87):
        shutil.copy(wheel, tmp_path)
    monkeypatch.setenv(search.WHEELS, str(tmp_path))
    monkeypatch.setenv(search.SOURCES, "local")
    monkeypatch.setattr(machine, "capability", lambda device: capability)
    runtime.use_source(None)
    if capability == (10, 0):
        with pytest.raises(fi_ffi.ArchitectureError) as caught:
            search.find_module("page", 0)
        text = str(caught.value)
        assert "has sm_90a only; the device is sm_100" in text
        assert "has sm_87 only; the device is sm_100" in text
        assert "fi-ffi build --release 0.6.13 --arch 10.0a page" in text
    else:
        source, _, facts = search.find_module("page", 0)
        assert [code.sm for code in facts.codes] == [capability[0] * 10 + capability[1]]
        assert ("sm87" in source.version) == (capability == (8, 7))


def test_a_module_that_only_another_cuda_can_load(module_file, tmp_path):
    from fi_ffi.loader.held import Facts, check_needed
    from fi_ffi.loader.kernels import ModuleFile

    file = ModuleFile("norm", module_file, "0" * 64)
    check_needed(file, Facts(["libcudart.so.13"], [], []), machine.CUDART)
    with pytest.raises(fi_ffi.AbiError, match="needs libcudart.so.12, and fi_ffi runs on"):
        check_needed(file, Facts(["libcudart.so.12", "libc.so.6"], [], []), machine.CUDART)


def test_other_kernels_are_chosen_while_places_are_asked(tmp_path: Path) -> None:
    """What was begun goes on as it was, and finds no hole."""
    search.use_source(None)
    try:
        asked = search.places()
        first = next(asked)
        search.use_source(None)
        assert [first, *asked] and next(search.places()).kind == first.kind
    finally:
        search.use_source(None)
