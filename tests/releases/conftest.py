"""The sources of FlashInfer's releases."""

from __future__ import annotations

import functools
import os

import pytest

from tools.release.interface import Interface
from tools.release.wheels import SourceWheel, open_release

from tests.helpers import sampling
from tests.releases.bindings import RELEASES, SOME


@pytest.fixture(scope="session")
def release_wheel():
    """The wheel of a flashinfer-python release: out of the cache, or from the package index.

    Also in tests that have a cache of their own, or no network.
    """
    before = {name: os.environ.get(name) for name in ("FI_FFI_CACHE_DIR", "FI_FFI_OFFLINE")}

    @functools.cache
    def get(release: str) -> SourceWheel:
        sampling.only_in_full("downloads FlashInfer's releases")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in before.items():
                patch.delenv(name, raising=False)
                if value is not None:
                    patch.setenv(name, value)
            return open_release(release)

    return get


@pytest.fixture(scope="session")
def sources(release_wheel):
    """The text of a file of a flashinfer-python release."""
    return lambda release, source: release_wheel(release).text(source)


@pytest.fixture(scope="session")
def interface(release_wheel):
    """All that a flashinfer-python release declares."""

    @functools.cache
    def get(release: str) -> Interface:
        return release_wheel(release).interface()

    return get


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the releases that only `--all` reads."""
    if config.option.all:
        return
    rest = {*RELEASES} - SOME

    def is_left_out(item: pytest.Item) -> bool:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        return "tests/releases/" in item.path.as_posix() and given.get("release") in rest

    left = [item for item in items if is_left_out(item)]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if not is_left_out(item)]
