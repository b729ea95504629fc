"""Where kernels are looked for: the lock, the layouts there are, the order, and what is said."""

from __future__ import annotations

import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

import fi_ffi
from fi_ffi.capability.judgement import Query
from fi_ffi.errors import ArtifactError, KernelNotFoundError, LoaderError
from fi_ffi.loader import lock, machine, runtime, search
from fi_ffi.loader.fetch import pinned_wheels, wheels_lock
from fi_ffi.loader.kernels import LAYOUT, KernelDirectory, KernelWheel, open_source, release_of

from tests.helpers.remains import allowed
from tests.loader.server import make_wheel, sha256

VARIABLES = (search.KERNELS, search.SOURCES, search.WHEELS, search.RELEASE, search.CUDA)


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
    wheels_lock.the_lock.cache_clear()


@pytest.fixture(scope="session")
def unpacked(built_wheel, tmp_path_factory):
    """The built wheel as an installer leaves it."""
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(built_wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def modules(unpacked, tmp_path):
    """A directory of modules and nothing else."""
    return Path(shutil.copytree(unpacked / LAYOUT, tmp_path / "somewhere" / "kernels"))


def looked_at():
    runtime.use_source(None)
    return {place.kind: place for place in search.places()}


def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return sorted(n.split("/")[2] for n in archive.namelist() if n.endswith(".so"))


# The lock.

TEXT = lock.lock_path().read_text()


def test_every_kernel_file():
    kernels = wheels_lock.the_lock().kernels
    assert len({(k.release, k.cuda, k.platform, k.sm) for k in kernels}) == len(kernels) > 0
    for kernel in kernels:
        Version(kernel.release)
        assert f"-{kernel.release}+{kernel.cuda}-" in kernel.file
        assert kernel.file.endswith(f"{kernel.platform.removeprefix('linux-')}.whl")
        assert kernel.url.startswith("https://")
        assert kernel.url.endswith(kernel.file.replace("+", "%2B"))
        assert kernel.release in kernel.url and kernel.provenance
    assert wheels_lock.the_lock().default_release in {kernel.release for kernel in kernels}


def without(key):
    return re.sub(rf"^{key} = .*$", "", TEXT, flags=re.MULTILINE)


DAMAGED = {
    "no file": None,
    "empty": b"",
    "no TOML": b"]",
    "not UTF-8": b"\xff",
    "another schema": TEXT.replace("schema = 1", "schema = 2"),
    **{f"no {key}": without(key) for key in ("schema", "sha256", "provenance", "url", "default")},
    "an unknown key": TEXT.replace("provenance = ", 'sha512 = "0"\nprovenance = '),
    "a short hash": re.sub(r'(sha256 = "[0-9a-f]{63})[0-9a-f]', r"\1", TEXT),
    "an upper-case hash": re.sub(
        r'(sha256 = ")([0-9a-f]*)', lambda match: match[1] + match[2].upper(), TEXT
    ),
    "no table": "schema = 1\nkernels = []\n",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_lock(name, tmp_path):
    path, text = tmp_path / "wheels.lock", DAMAGED[name]
    assert text != TEXT
    if text is not None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    says = "No such file" if text is None else f"{path} is not a readable lock"
    with pytest.raises(LoaderError, match=says):
        wheels_lock.read_lock(path)


def test_other_locks(tmp_path, monkeypatch):
    """One that is named, one that has lost its last entry, one with a section of other times."""
    path = tmp_path / "wheels.lock"
    path.write_text(TEXT.replace('default = "', 'default = "9.'))
    monkeypatch.setenv("FI_FFI_LOCK", str(path))
    assert wheels_lock.read_lock(lock.lock_path()).default_release.startswith("9.")
    path.write_text(TEXT.partition("[[kernels.files]]")[0])
    assert wheels_lock.read_lock(path).kernels == ()
    path.write_text(f'{TEXT}\n[libtvm-ffi]\nversion = "0.1.15"\n')
    assert len(wheels_lock.read_lock(path).kernels) == TEXT.count("[[kernels.files]]")


# Directories and wheels.


@pytest.mark.parametrize("below", ["", "flashinfer_jit_cache", LAYOUT])
def test_every_level_of_an_installation(below, unpacked, built_wheel):
    source = open_source(unpacked / below)
    assert source.modules() == names(built_wheel)
    assert release_of(source) == "0.6.13"
    assert source.location == str(unpacked / below)
    found = source.file("norm")
    assert found.path == unpacked / LAYOUT / "norm" / "norm.so"
    assert found.sha256 == sha256(found.path.read_bytes())


def test_a_wheel(built_wheel, unpacked, root):
    source = open_source(built_wheel)
    assert source.modules() == names(built_wheel)
    assert source.version.startswith("0.6.13+cu1")
    assert not root.exists()  # looking takes nothing out
    for module in ("page", "norm"):
        found = source.file(module)
        assert found.path.is_relative_to(root)
        assert found.sha256 == open_source(unpacked).file(module).sha256
        assert found.path.read_bytes() == (unpacked / LAYOUT / module / f"{module}.so").read_bytes()


def test_a_directory_is_of_the_release_that_is_named(modules, monkeypatch):
    """Where it does not tell its own, and only then."""
    monkeypatch.setenv(search.RELEASE, "0.7.2.post1")
    monkeypatch.setenv(search.KERNELS, str(modules))
    assert release_of(looked_at()["explicit"].source) == "0.7.2.post1"
    assert search.release() == "0.7.2.post1"
    (modules.parent / "_build_meta.py").write_text(META)
    assert release_of(looked_at()["explicit"].source) == "0.6.13"
    monkeypatch.setenv(search.RELEASE, "newest")
    words = "FI_FFI_RELEASE.*'newest'.*a version such as"
    # `looked_at` chooses the kernels anew.
    with allowed("kernels in force"), pytest.raises(fi_ffi.ArgumentError, match=words):
        looked_at()


META = '__version__ = "0.6.13+cu130"\n'
VERSIONS = {META: "0.6.13+cu130", "# kernels\n" + META.replace('"', "'"): "0.6.13+cu130"}
VERSIONS |= dict.fromkeys(["", "version = 1", "__version__ = version()\n", "\xff"])


@pytest.mark.parametrize("text", VERSIONS)
def test_the_version_beside_the_modules(text, modules):
    assert (open_source(modules).version, release_of(open_source(modules))) == (None, None)
    for file in ("__init__.py", "_build_meta.py"):
        (modules.parent / file).write_text(text, encoding="latin-1")
        assert open_source(modules).version == VERSIONS[text]
        (modules.parent / file).unlink()
    (modules.parent / "_build_meta.py").write_text(META)
    assert KernelDirectory(modules, "0.7.1").version == "0.7.1"


def test_only_modules_are_listed(modules, tmp_path):
    for name in ("empty", ".hidden", "other", "folder"):
        (modules / name).mkdir()
    (modules / "other" / "different.so").write_bytes(b"")
    (modules / "loose.so").write_bytes(b"")
    (modules / "folder" / "folder.so").mkdir()
    assert not {"empty", "other", "loose", "folder"} & {*open_source(modules).modules()}
    assert open_source(tmp_path).modules() == []


def test_the_home_directory(unpacked, monkeypatch):
    monkeypatch.setenv("HOME", str(unpacked.parent))
    assert "norm" in open_source(f"~/{unpacked.name}").modules()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none", None, "none: there is no such file"),
        ("norm.so", b"text", "neither a directory nor a .whl file"),
        ("kernels.whl.part", b"text", "neither a directory nor a .whl file"),
        ("k.whl", b"text", "k.whl"),
        ("k.whl", b"PK\x05\x06" + bytes(18), "k.whl"),
    ],
)
def test_what_is_no_source(name, content, says, built_wheel, tmp_path):
    """It changes nothing of the choice that there was."""
    fi_ffi.use_kernels(built_wheel)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    for use in (open_source, fi_ffi.use_kernels):
        with pytest.raises(KernelNotFoundError if content is None else ArtifactError, match=says):
            use(tmp_path / name)
    assert search.release() == "0.6.13"


ODD = {
    "jit_cache/a/b/a/b.so": [],
    "jit_cache/a/b.so": [],
    "jit_cache/evil/evil.so/evil.so": [],
    "flashinfer_jit_cache/jit_cache/evil/evil.so": ["evil"],
}


@pytest.mark.parametrize("member", ODD)
def test_members_that_are_modules(member, tmp_path):
    """Of names that lead out of a wheel it is refused: tests/loader/test_wheel.py."""
    path = tmp_path / "kernels-1-py3-none-any.whl"
    path.write_bytes(make_wheel({member: b"evil"}))
    assert open_source(path).modules() == ODD[member]


# Places, one after the other.


@pytest.fixture
def no_runtime(monkeypatch):
    """A process without a CUDA runtime, whatever tests before have loaded."""
    monkeypatch.setattr(machine, "_runtime", None)
    monkeypatch.setattr(machine, "runtimes_in_process", dict)


def test_a_bare_machine_has_only_the_pinned_wheel(no_runtime):
    found = looked_at()
    assert list(found) == ["installed", "jit", "local", "remote"]
    assert [kind for kind, place in found.items() if place.source] == ["remote"]
    assert all(place.note for place in found.values() if not place.source)
    assert found["remote"].source.location.startswith("https://")
    assert search.release() == wheels_lock.the_lock().default_release


def test_explicit_is_the_only_one(built_wheel, monkeypatch):
    monkeypatch.setenv(search.KERNELS, str(built_wheel))
    assert list(looked_at()) == ["explicit"]
    assert search.release() == "0.6.13"
    with pytest.raises(KernelNotFoundError, match="gdn_prefill_sm90") as caught:
        search.find_module("gdn_prefill_sm90")
    assert "norm, page" in str(caught.value)
    assert "fi-ffi build --release 0.6.13 --arch 9.0a gdn_prefill_sm90" in str(caught.value)


def test_an_installed_distribution(unpacked, monkeypatch):
    monkeypatch.syspath_prepend(str(unpacked))
    place = looked_at()["installed"]
    assert place.source.version.startswith("0.6.13+cu1")
    source, file, _ = search.find_module("norm")
    assert source is place.source
    assert file.path.is_relative_to(unpacked)


def test_installed_providers_one_for_each_sm(modules, tmp_path, monkeypatch):
    """The layout from 0.7.0.post1 on: a shim without kernels, and a distribution per SM."""
    for name in ("flashinfer_jit_cache", "flashinfer_jit_cache_sm90a"):
        info = tmp_path / f"{name}-0.7.2.post1+cu134.dist-info"
        info.mkdir()
        title = name.replace("_", "-")
        text = f"Metadata-Version: 2.1\nName: {title}\nVersion: 0.7.2.post1+cu134\n"
        (info / "METADATA").write_text(text)
        files = [f"{name}/__init__.py"]
        if name.endswith("_sm90a"):
            files.append(f"{name}/jit_cache/norm/norm.so")
            shutil.copytree(modules / "norm", (tmp_path / files[1]).parent)
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    monkeypatch.syspath_prepend(str(tmp_path))
    place = looked_at()["installed"]
    assert place.source.version == "0.7.2.post1+cu134"
    assert place.source.modules() == ["norm"]
    assert search.release() == "0.7.2.post1"


def test_flashinfers_own_compiled_modules(modules, tmp_path, monkeypatch):
    folder = tmp_path / ".cache" / "flashinfer" / "0.6.13" / "90a" / "cached_ops"
    shutil.copytree(modules, folder)
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path))
    assert release_of(looked_at()["jit"].source) == "0.6.13"
    assert search.find_module("norm")[1].path == folder / "norm" / "norm.so"


def test_local_wheels(built_wheel, tmp_path, monkeypatch):
    """In folders that are named; those of another release are passed over, a broken one too."""
    shutil.copy(built_wheel, tmp_path)
    monkeypatch.setenv(search.WHEELS, os.pathsep.join([str(tmp_path / "no"), str(tmp_path)]))
    place = looked_at()["local"]
    assert isinstance(place.source, KernelWheel)
    assert place.source.modules()[0] == "norm"
    monkeypatch.setenv(search.RELEASE, "0.6.18")
    place = looked_at()["local"]
    assert place.source is None
    assert "is of 0.6.13, wanted is 0.6.18" in place.note
    assert search.release() == "0.6.18"
    (tmp_path / built_wheel.name).write_bytes(built_wheel.read_bytes()[:5000])
    assert "is not a readable wheel" in looked_at()["local"].note


@pytest.mark.parametrize(
    ("releases", "named", "settled", "used"),
    [
        (["0.6.18"], None, "0.6.18", ["0.6.18"]),
        (["0.6.18", None], None, "0.6.18", ["0.6.18", None]),
        ([None, "0.6.18"], None, "0.6.18", [None, "0.6.18"]),
        ([None, "0.6.18", None, "0.7.1"], None, "0.6.18", [None, "0.6.18", None]),
        (["0.6.18", "0.7.1", "0.6.18"], None, "0.6.18", ["0.6.18", "0.6.18"]),
        (["0.7.1", None, "0.6.18"], "0.6.18", "0.6.18", [None, "0.6.18"]),
        ([None], "0.6.18", "0.6.18", [None]),
    ],
    ids=str,
)
def test_the_first_source_settles_the_release(
    releases, named, settled, used, tmp_path, monkeypatch
):
    """Also of later places of its own kind; a source that does not tell its release changes
    nothing."""
    folders = []
    for at, release in enumerate(releases):
        folders.append(tmp_path / str(at))
        folders[-1].mkdir()
        name = "flashinfer_jit_cache-0+cu130-cp39-abi3-linux_x86_64.whl"
        info = f"k-{release}+cu130" if release else "k"
        with zipfile.ZipFile(folders[-1] / name, "w") as archive:
            for member in (f"{LAYOUT}/norm/norm.so", f"{info}.dist-info/RECORD"):
                archive.writestr(member, b"")
    monkeypatch.setenv(search.WHEELS, os.pathsep.join(map(str, folders)))
    if named:
        monkeypatch.setenv(search.RELEASE, named)
    runtime.use_source(None)
    local = [place for place in search.places() if place.kind == "local"]
    assert [release_of(place.source) for place in local if place.source] == used
    for place in local:
        assert place.source or f"is of 0.7.1, wanted is {settled}" in place.note
    assert settled in looked_at()["remote"].source.version


def test_sources_may_be_chosen_and_ordered(built_wheel, monkeypatch):
    monkeypatch.setenv(search.WHEELS, str(built_wheel.parent))
    monkeypatch.setenv(search.SOURCES, "remote, local")
    assert list(looked_at()) == ["remote", "local"]
    monkeypatch.setenv(search.SOURCES, "")
    assert looked_at() == {}
    monkeypatch.setenv(search.SOURCES, "local,cloud")
    # `looked_at` chooses the kernels anew.
    with allowed("kernels in force"), pytest.raises(fi_ffi.ArgumentError, match="cloud"):
        looked_at()


@pytest.mark.parametrize(
    ("driver", "forced", "cuda"),
    [
        (None, None, "cu134"),
        ((13, 0), None, "cu134"),
        ((13, 0), "cu130", "cu130"),
        ((12, 8), None, None),
        ((12, 8), "cu130", "cu130"),
        ((13, 0), "cu126", None),
    ],
)
def test_the_pin_is_chosen_by_the_machine(driver, forced, cuda, tmp_path, monkeypatch, no_runtime):
    """Drivers of other CUDA versions cannot be had here; everything else is real."""
    entry = {"release": "0.6.13", "cuda": "cu134", "layout": "monolithic", "sha256": "0" * 64}
    entry |= {"platform": wheels_lock.this_platform(), "file": "a.whl", "provenance": "none"}
    mine = tmp_path / "wheels.lock"
    lines = "".join(f'{key} = "{value}"\n' for key, value in entry.items())
    mine.write_text(f"{TEXT}\n[[kernels.files]]\n{lines}")
    monkeypatch.setenv(lock.ENVIRONMENT, str(mine))
    wheels_lock.the_lock.cache_clear()
    monkeypatch.setattr(machine, "driver_version", lambda: driver)
    if forced:
        monkeypatch.setenv(search.CUDA, forced)
    if cuda is None:
        with pytest.raises(LoaderError, match="pins no kernels of FlashInfer 0.6.13"):
            pinned_wheels.pinned("0.6.13")
    else:
        assert pinned_wheels.pinned("0.6.13").cuda == cuda


@pytest.mark.parametrize(
    ("driver", "here", "cuda"),
    [
        (None, None, "cu130"),
        ((13, 0), None, "cu130"),
        ((12, 6), None, "cu129"),
        ((13, 0), 12, "cu129"),
        ((13, 0), 13, "cu130"),
        ((12, 6), 13, None),
    ],
)
def test_of_two_cudas_that_of_the_process(driver, here, cuda, tmp_path, monkeypatch, no_runtime):
    entry = {"release": "0.6.13", "layout": "monolithic", "provenance": "none"}
    entry |= {"platform": wheels_lock.this_platform()}
    text = TEXT
    for number, tag in enumerate(("cu129", "cu130", "cu128")):
        own = entry | {"cuda": tag, "file": f"{tag}.whl", "sha256": str(number) * 64}
        text += "\n[[kernels.files]]\n" + "".join(f'{k} = "{v}"\n' for k, v in own.items())
    (tmp_path / "wheels.lock").write_text(text)
    monkeypatch.setenv(lock.ENVIRONMENT, str(tmp_path / "wheels.lock"))
    wheels_lock.the_lock.cache_clear()
    monkeypatch.setattr(machine, "driver_version", lambda: driver)
    if here is not None:
        monkeypatch.setattr(machine, "runtimes_in_process", lambda: {here: f"libcudart.so.{here}"})
    if cuda is not None:
        assert pinned_wheels.pinned("0.6.13").cuda == cuda
        return
    with pytest.raises(LoaderError, match=r"CUDA 12\.6, no GPU, libcudart\.so\.13 in this process"):
        pinned_wheels.pinned("0.6.13")


@pytest.mark.parametrize(
    ("driver", "gpus", "here", "words"),
    [
        (None, [], (), "no CUDA driver"),
        (None, [], (13,), "no CUDA driver, libcudart.so.13 in this process"),
        ((12, 6), [], (), "CUDA 12.6, no GPU"),
        ((12, 6), [(9, 0), (12, 1)], (), "CUDA 12.6, sm_90 sm_121"),
        (
            (13, 0),
            [(8, 9)],
            (12, 13),
            "CUDA 13.0, sm_89, libcudart.so.12 in this process, libcudart.so.13 in this process",
        ),
        ((13, 0), None, (), "compute capability 10.3"),
    ],
)
def test_what_cannot_run_a_pin_is_told(driver, gpus, here, words, tmp_path, monkeypatch):
    """The driver, the GPUs and the runtimes; or the GPU that is named. And what is pinned: of the
    release for this platform, or else for any."""
    places = [("cu118", wheels_lock.this_platform()), ("cu117", "linux-s390x")]
    text = TEXT
    for number, (cuda, platform) in enumerate(places):
        for release, pinned in (("9.9.8", places), ("9.9.9", places[1:])):
            if (cuda, platform) in pinned:
                text += f"""
[[kernels.files]]
release = "{release}"
cuda = "{cuda}"
platform = "{platform}"
layout = "monolithic"
file = "{release}.{cuda}.whl"
sha256 = "{number}{release[-1] * 63}"
provenance = "none"
"""
    (tmp_path / "wheels.lock").write_text(text)
    monkeypatch.setenv(lock.ENVIRONMENT, str(tmp_path / "wheels.lock"))
    monkeypatch.delenv(search.CUDA, raising=False)
    monkeypatch.setattr(machine, "driver_version", lambda: driver)
    monkeypatch.setattr(machine, "device_count", lambda: len(gpus or ()))
    monkeypatch.setattr(machine, "capability", lambda device: gpus[device])
    monkeypatch.setattr(machine, "_runtime", None)
    runtimes = {major: f"libcudart.so.{major}" for major in here}
    monkeypatch.setattr(machine, "runtimes_in_process", lambda: runtimes)
    wheels_lock.the_lock.cache_clear()
    named = (10, 3) if gpus is None else None
    for release, listed in (
        ("9.9.8", f"9.9.8 cu118 {wheels_lock.this_platform()}"),
        ("9.9.9", "9.9.9 cu117 linux-s390x"),
    ):
        with pytest.raises(LoaderError) as refused:
            pinned_wheels.pinned(release, named)
        assert str(refused.value) == (
            f"wheels.lock pins no kernels of FlashInfer {release} that this machine "
            f"({wheels_lock.this_platform()}, {words}) can run; it has {listed}"
        )
    wheels_lock.the_lock.cache_clear()


def test_the_pin_for_a_gpu_that_is_not_here(tmp_path, monkeypatch, no_runtime):
    """Of wheels of one SM each, that of the GPU which is named, whatever the machine has."""
    entry = {"release": "0.7.1", "cuda": "cu130", "layout": "provider", "provenance": "none"}
    entry |= {"platform": wheels_lock.this_platform()}
    text = TEXT
    for number, sm in enumerate(("sm90a", "sm100f", "sm100a", "sm103a", "sm120f")):
        own = entry | {"sm": sm, "file": f"{sm}.whl", "sha256": str(number) * 64}
        text += "\n[[kernels.files]]\n" + "".join(f'{k} = "{v}"\n' for k, v in own.items())
    (tmp_path / "wheels.lock").write_text(text)
    monkeypatch.setenv(lock.ENVIRONMENT, str(tmp_path / "wheels.lock"))
    wheels_lock.the_lock.cache_clear()
    monkeypatch.setattr(machine, "driver_version", lambda: None)

    def chosen(*gpus):
        monkeypatch.setattr(machine, "device_count", lambda: len(gpus))
        monkeypatch.setattr(machine, "capability", lambda device: gpus[device])
        return " ".join(place.sm for place in pinned_wheels.published("0.7.1"))

    for count in (0, 1):
        monkeypatch.setattr(machine, "device_count", lambda count=count: count)
        monkeypatch.setattr(machine, "capability", lambda device: (10, 0))
        assert pinned_wheels.pinned("0.7.1", (9, 0)).sm == "sm90a"
        assert pinned_wheels.pinned("0.7.1", (10, 0)).sm == "sm100a"
        with pytest.raises(LoaderError, match=r"pins no kernels of FlashInfer 0\.7\.1"):
            pinned_wheels.pinned("0.7.1", (8, 0))
    assert pinned_wheels.pinned("0.7.1").sm == "sm100a"
    monkeypatch.setattr(machine, "device_count", lambda: 0)
    assert pinned_wheels.pinned("0.7.1").sm  # any, to be read only
    # The nearest of those that it runs, and each kind of GPU's own.
    assert chosen((10, 0)) == "sm100a"
    assert chosen((10, 3)) == "sm103a"
    assert chosen((12, 0), (9, 0), (12, 1), (9, 0)) == "sm120f sm90a"


def test_a_release_that_is_none(monkeypatch):
    monkeypatch.setenv(search.RELEASE, "latest")
    with pytest.raises(fi_ffi.ArgumentError, match="FI_FFI_RELEASE`: got 'latest'.*such as 0.6.13"):
        search.wanted_release()
    monkeypatch.setenv(search.RELEASE, "0.7.2.post1")
    assert search.wanted_release() == Query.of().release == "0.7.2.post1"


def test_a_release_that_is_not_pinned_names_those_that_are():
    says = r"pins no kernels of FlashInfer 9\.9\.9, so none are fetched; it has those of .*0\.6\.13"
    with pytest.raises(LoaderError, match=says):
        pinned_wheels.pinned("9.9.9")


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


def test_other_kernels_are_chosen_while_places_are_asked():
    """What was begun goes on as it was, and finds no hole."""
    search.use_source(None)
    asked = search.places()
    first = next(asked)
    search.use_source(None)
    assert [first, *asked] and next(search.places()).kind == first.kind
