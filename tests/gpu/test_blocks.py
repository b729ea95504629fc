"""The pages whose blocks need a GPU, or whose set-up puts its arrays on one, run on a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("markdown_it", reason="finds the blocks")

from tests.helpers.blocks import PAGES, PageError, blocks_of, shown
from tests.helpers.blocks_page import run_page

# What chooses kernels.  The page is run in another folder, where a path of this one's is not.
PATHS = ("FI_FFI_KERNELS", "FI_FFI_WHEELS", "FI_FFI_CACHE_DIR")
CHOICES = ("FI_FFI_RELEASE", "FI_FFI_SOURCES", "FI_FFI_CUDA", "FI_FFI_OFFLINE")


def _is_of_a_gpu(page: Path) -> bool:
    try:
        blocks = blocks_of(page)
    except PageError:  # tests/test_blocks.py tells it
        return False
    return any(block.needs == "gpu" or "on_device" in block.setup for block in blocks)


@pytest.mark.parametrize("page", [*filter(_is_of_a_gpu, PAGES)], ids=shown)
def test_blocks(page, tmp_path):
    environment = {name: os.environ[name] for name in (*PATHS, *CHOICES) if name in os.environ}
    for name in environment.keys() & {*PATHS}:
        paths = environment[name].split(os.pathsep)
        environment[name] = os.pathsep.join(map(os.path.abspath, paths))
    became = run_page(page, tmp_path, "--gpu", FI_FFI_BLOCKS_DEVICE="cuda:0", **environment)
    print(became)
    missing = [line for line in became.splitlines() if ": skipped: " in line]
    if missing and ": run\n" not in became:
        pytest.skip(missing[0])
