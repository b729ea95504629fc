"""Directories and wheels of kernels, in the layouts there are of them."""

from __future__ import annotations

import hashlib
import shutil
import zipfile

import pytest

from fi_ffi.errors import ArtifactError, KernelNotFoundError, LoaderError
from fi_ffi.loader.kernels import LAYOUT, KernelDirectory, open_source, release_of

META = '__version__ = "0.6.13+cu130"\n'


@pytest.fixture(scope="session")
def unpacked(built_wheel, tmp_path_factory):
    """The built wheel as `pip install --target` leaves it."""
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(built_wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def bare(unpacked, tmp_path):
    """A directory of modules and nothing else."""
    folder = tmp_path / "somewhere" / "kernels"
    shutil.copytree(unpacked / LAYOUT, folder)
    return folder


def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return sorted(n.split("/")[2] for n in archive.namelist() if n.endswith(".so"))


@pytest.mark.parametrize("below", ["", "flashinfer_jit_cache", LAYOUT])
def test_every_level_of_an_installation(below, unpacked, built_wheel):
    source = open_source(unpacked / below)
    assert source.modules() == names(built_wheel)
    assert "norm" in source.modules()
    assert release_of(source) == "0.6.13"
    assert source.location == str(unpacked / below)
    found = source.file("norm")
    assert found.path == unpacked / LAYOUT / "norm" / "norm.so"
    assert found.sha256 == hashlib.sha256(found.path.read_bytes()).hexdigest()


def test_a_wheel(built_wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("FI_FFI_CACHE_DIR", str(tmp_path / "cache"))
    source = open_source(built_wheel)
    assert source.modules() == names(built_wheel)
    assert source.version is not None
    assert source.version.startswith("0.6.13+cu130")
    assert not (tmp_path / "cache").exists()  # looking takes nothing out
    found = source.file("page")
    assert found.path.is_relative_to(tmp_path / "cache")
    assert hashlib.sha256(found.path.read_bytes()).hexdigest() == found.sha256
    with zipfile.ZipFile(built_wheel) as archive:
        assert archive.read(f"{LAYOUT}/page/page.so") == found.path.read_bytes()


def test_the_same_file_from_either(unpacked, built_wheel):
    digests = [open_source(place).file("norm").sha256 for place in (unpacked, built_wheel)]
    assert digests[0] == digests[1]


def test_modules_without_a_version(bare):
    source = open_source(bare)
    assert "norm" in source.modules()
    assert source.version is None
    assert release_of(source) is None


@pytest.mark.parametrize("file", ["_build_meta.py", "__init__.py"])
@pytest.mark.parametrize("text", [META, META.replace('"', "'"), "# kernels\n" + META])
def test_the_version_beside_the_modules(file, text, bare):
    (bare.parent / file).write_text(text)
    assert open_source(bare).version == "0.6.13+cu130"
    assert release_of(open_source(bare)) == "0.6.13"


@pytest.mark.parametrize("text", ["", "version = 1", "__version__ = version()\n", "\xff"])
def test_no_version_where_nothing_tells_it(text, bare):
    (bare.parent / "_build_meta.py").write_text(text, encoding="latin-1")
    assert open_source(bare).version is None


def test_a_version_that_is_given(bare):
    (bare.parent / "_build_meta.py").write_text(META)
    assert KernelDirectory(bare, "0.7.1").version == "0.7.1"


def test_only_modules_are_listed(bare):
    for name in ("empty", ".hidden", "other"):
        (bare / name).mkdir()
    (bare / "other" / "different.so").write_bytes(b"")
    (bare / "loose.so").write_bytes(b"")
    (bare / "folder").mkdir()
    (bare / "folder" / "folder.so").mkdir()
    assert not {"empty", "other", "loose", "folder"} & {*open_source(bare).modules()}


def test_a_directory_without_modules(tmp_path):
    assert open_source(tmp_path).modules() == []


def test_the_home_directory(unpacked, monkeypatch):
    monkeypatch.setenv("HOME", str(unpacked.parent))
    assert "norm" in open_source(f"~/{unpacked.name}").modules()


def test_nothing_there(tmp_path):
    with pytest.raises(KernelNotFoundError, match=f"{tmp_path}/none: there is no such file"):
        open_source(tmp_path / "none")


@pytest.mark.parametrize("name", ["kernels.txt", "norm.so", "kernels.whl.part"])
def test_files_of_another_kind(name, tmp_path):
    path = tmp_path / name
    path.write_text("text")
    with pytest.raises(ArtifactError, match="neither a directory nor a .whl file"):
        open_source(path)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x05\x06" + bytes(18)])
def test_wheels_that_are_none(content, tmp_path):
    path = tmp_path / "kernels-1-py3-none-any.whl"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=str(path)):
        open_source(path)


def test_a_wheel_that_was_damaged(built_wheel, tmp_path, monkeypatch):
    """A byte of a module: its own file is refused, the others are as good as before."""
    monkeypatch.setenv("FI_FFI_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / built_wheel.name
    content = bytearray(built_wheel.read_bytes())
    with zipfile.ZipFile(built_wheel) as archive:
        info = archive.getinfo(f"{LAYOUT}/norm/norm.so")
    content[info.header_offset + 200] ^= 0xFF
    path.write_bytes(content)
    source = open_source(path)
    with pytest.raises(ArtifactError, match="norm.so"):
        source.file("norm")
    assert source.file("page").path.is_file()


ODD = [
    "flashinfer_jit_cache/jit_cache/../evil/evil.so",
    "flashinfer_jit_cache/jit_cache/evil/../../evil.so",
    "/jit_cache/evil/evil.so",
    "flashinfer_jit_cache/jit_cache/evil/evil.so/evil.so",
    "flashinfer_jit_cache/jit_cache/../...so",
]


@pytest.mark.parametrize("member", ODD)
def test_members_of_odd_names_escape_nothing(member, tmp_path, monkeypatch):
    monkeypatch.setenv("FI_FFI_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "kernels-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, b"evil")
        digest = hashlib.sha256(b"evil").digest()
        import base64

        line = f"{member},sha256={base64.urlsafe_b64encode(digest).decode().rstrip('=')},4\n"
        archive.writestr("kernels-1.dist-info/RECORD", line)
    try:
        source = open_source(path)
    except ArtifactError as error:
        assert "leads out of the wheel" in str(error)
        return
    for module in source.modules():
        try:
            found = source.file(module).path
        except LoaderError:
            continue
        assert found.resolve().is_relative_to(tmp_path / "cache")
    assert {p.name for p in tmp_path.iterdir()} <= {"cache", path.name}
