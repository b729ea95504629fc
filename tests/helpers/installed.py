"""Distributions of kernels, installed by pip as FlashInfer publishes them from 0.7.0.post1 on."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

from tests.loader.server import digest

RELEASE, CUDA = "0.7.2.post1", "cu130"


def library_of(wheel: Path, module: str) -> bytes:
    """A module's library in a wheel that was built."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(f"/{module}.so"))
        return archive.read(name)


def shim(folder: Path, sms: tuple[str, ...], version: str = f"{RELEASE}+{CUDA}") -> Path:
    """The wheel of `flashinfer-jit-cache`: no kernels, and the names of those that have them."""
    needs = "".join(f"Requires-Dist: flashinfer-jit-cache-{sm}=={version}\n" for sm in sms)
    members = {"flashinfer_jit_cache/__init__.py": f'__version__ = "{version}"\n'.encode()}
    return _wheel(folder, "flashinfer-jit-cache", version, members, needs)


def provider(
    folder: Path, sm: str, modules: Mapping[str, bytes], version: str = f"{RELEASE}+{CUDA}"
) -> Path:
    """The wheel of one SM's kernels."""
    package = f"flashinfer_jit_cache/providers/{sm}"
    manifest = (
        "def get_manifest():\n"
        f"    return {{'schema_version': 1, 'distribution': 'flashinfer-jit-cache-{sm}', "
        f"'version': {version!r}, 'cuda_architectures': [{sm!r}], "
        f"'modules': {sorted(modules)!r}}}\n"
    )
    members = {f"{package}/__init__.py": manifest.encode()}
    members |= {f"{package}/jit_cache/{m}/{m}.so": content for m, content in modules.items()}
    points = f"[flashinfer.jit_cache_providers]\n{sm} = {package.replace('/', '.')}:get_manifest\n"
    return _wheel(folder, f"flashinfer-jit-cache-{sm}", version, members, "", points)


def _wheel(
    folder: Path,
    project: str,
    version: str,
    members: Mapping[str, bytes],
    needs: str,
    points: str = "",
) -> Path:
    name = project.replace("-", "_")
    info = f"{name}-{version}.dist-info"
    head = f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n{needs}"
    tag = "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: false\nTag: py3-none-any\n"
    every = {**members, f"{info}/METADATA": head.encode(), f"{info}/WHEEL": tag.encode()}
    if points:
        every[f"{info}/entry_points.txt"] = points.encode()
    record = "".join(f"{path},{digest(c)},{len(c)}\n" for path, c in every.items())
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in every.items():
            archive.writestr(member, content)
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    return path


def install(target: Path, *wheels: Path) -> Path:
    """Have pip install wheels into a folder."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    options = ["--no-compile", "--disable-pip-version-check", "--target", str(target)]
    subprocess.run([*pip, *options, *map(str, wheels)], check=True)
    return target
