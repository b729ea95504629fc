"""The wheel writer: layout, RECORD, equal bytes for equal input, and nothing left behind."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.utils import parse_wheel_filename

from fi_ffi_build.wheel_writer import WheelContents, write_wheel


@pytest.fixture
def wheel(tmp_path: Path) -> WheelContents:
    modules = {}
    for name in ("page", "norm"):
        modules[name] = tmp_path / f"{name}.so"
        modules[name].write_bytes(b"\x7fELF " + name.encode() * 1000)
    licence = tmp_path / "LICENSE"
    licence.write_text("the licence")
    return WheelContents(
        "0.6.13", "13.0", ("sm90a",), "linux_x86_64", modules, "abc", {"LICENSE": licence}
    )


def test_name_tells_release_cuda_gpu_and_platform(wheel: WheelContents) -> None:
    assert wheel.filename == "flashinfer_jit_cache-0.6.13+cu130.sm90a-cp39-abi3-linux_x86_64.whl"
    name, version, _, tags = parse_wheel_filename(wheel.filename)
    assert (name, str(version)) == ("flashinfer-jit-cache", "0.6.13+cu130.sm90a")
    assert {tag.platform for tag in tags} == {"linux_x86_64"}


def test_record_has_every_member_with_its_hash_and_size(
    wheel: WheelContents, tmp_path: Path
) -> None:
    with zipfile.ZipFile(write_wheel(wheel, tmp_path / "new" / "folder")) as archive:
        own, package = f"{wheel.dist_info}/RECORD", "flashinfer_jit_cache"
        rows = list(csv.reader(io.StringIO(archive.read(own).decode())))
        names = [f"{package}/{name}" for name in ("__init__.py", "_build_meta.py")]
        names += [f"{package}/jit_cache/{name}/{name}.so" for name in ("norm", "page")]
        info = ("METADATA", "WHEEL", "licenses/LICENSE", "RECORD")
        names += [f"{package}-0.6.13+cu130.sm90a.dist-info/{name}" for name in info]
        assert [row[0] for row in rows] == archive.namelist() == names
        assert rows[-1] == [own, "", ""]
        for name, digest, size in rows[:-1]:
            content = archive.read(name)
            expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            assert digest == f"sha256={expected.decode()}"
            assert int(size) == len(content)


def test_equal_input_gives_equal_bytes(wheel: WheelContents, tmp_path: Path) -> None:
    first = write_wheel(wheel, tmp_path / "a").read_bytes()
    for path in wheel.modules.values():
        path.touch()
    again = write_wheel(wheel, tmp_path / "b")
    assert again.read_bytes() == first
    with zipfile.ZipFile(again) as archive:  # whenever they are written
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_failure_leaves_the_older_wheel_and_no_rubbish(
    wheel: WheelContents, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    path = write_wheel(wheel, output)
    before = path.read_bytes()
    wheel.modules["page"].unlink()
    with pytest.raises(FileNotFoundError):
        write_wheel(wheel, output)
    assert path.read_bytes() == before
    assert list(output.iterdir()) == [path]


def test_pip_installs_it_and_flashinfer_would_accept_it(
    wheel: WheelContents, tmp_path: Path
) -> None:
    path, target = write_wheel(wheel, tmp_path), tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip("this environment has no pip")
    subprocess.run([*pip, "--target", str(target), str(path)], check=True)
    # The questions of flashinfer/jit/env.py: up to 0.7.0, and from 0.7.0.post1 on.
    script = (
        "import flashinfer_jit_cache as cache, pathlib;"
        "assert cache.__version__.startswith('0.6.13+');"
        "folder = pathlib.Path(cache.get_jit_cache_dir());"
        "assert (folder / 'norm' / 'norm.so').is_file();"
        "(provider,) = cache.get_jit_cache_providers();"
        "assert provider.version == cache.__version__;"
        "assert pathlib.Path(provider.jit_cache_dir) == folder;"
        "assert set(provider.cuda_architectures) == {'sm90a'};"
        "assert set(provider.modules) == {'norm', 'page'}"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=target, check=False)
    assert done.returncode == 0
