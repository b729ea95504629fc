"""The sources of FlashInfer's releases."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers import sampling


@pytest.fixture(scope="session")
def release_wheel(tmp_path_factory):
    """The wheel of a flashinfer-python release, from the package index."""
    folder = tmp_path_factory.mktemp("flashinfer-python")

    def get(release: str) -> Path:
        wheel = folder / f"flashinfer_python-{release}-py3-none-any.whl"
        sampling.only_in_full("downloads FlashInfer's releases")
        if not wheel.exists():
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--only-binary=:all:", "--dest", str(folder)]
            subprocess.run([*command, f"flashinfer-python=={release}"], check=True, timeout=300)
        return wheel

    return get


@pytest.fixture(scope="session")
def sources(release_wheel):
    """The text of a file of a flashinfer-python release."""

    def read(release: str, source: str) -> str:
        name = source if source.endswith(".py") else f"data/{source}"
        with zipfile.ZipFile(release_wheel(release)) as archive:
            return archive.read(f"flashinfer/{name}").decode()

    return read
