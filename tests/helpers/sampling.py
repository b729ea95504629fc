"""What a run of the tests is of: `SHOWN` without arguments, `--sample` or `--all`.

`SHOWN` is what a user wants to see: results of every family beside their definitions, a library
that is compiled, loaded and called, modules fetched from a server.  All that it writes, a cache
included, is in one folder, which it removes.  `--sample` has a few cases of nearly every test: it
leaves out what takes nvcc, the network or minutes, and the folders `LEFT_OUT`.  `--all` runs every
case, and so does naming a file, a test or a folder; `--unsettled` and `--settle` are those of
`settled.py`.  tests/gpu is one skipped item without FI_FFI_RUN_GPU_TESTS=1: no file of it is read.

The first two draw at most `CASES` of a test's cases, anew each time: the seed is in the header,
and `--sample-seed` repeats a draw.  All processes of pytest-xdist draw alike.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NoReturn

import pytest

NEEDS_GPU = "needs a GPU, and kernels for it: FI_FFI_RUN_GPU_TESTS=1"
ON_GPU = os.environ.get("FI_FFI_RUN_GPU_TESTS") == "1"
CASES = 4  # of a test, at most
LEFT_OUT = ("llm", "releases", "speed", "stress")  # folders of tests/
# Files of tests/, by what they show.
SHOWN = (
    # Every op is called; results of every family, beside definitions in float64.
    "ops/test_every_op.py", "ops/test_results.py", "ops/test_norm.py", "ops/test_activation.py",
    "ops/test_rope.py", "ops/test_page.py", "ops/test_paged.py", "ops/test_cascade.py",
    "ops/test_sampling.py", "ops/test_topk.py", "ops/test_masks.py", "ops/test_quantization.py",
    "ops/test_gemm.py", "ops/test_segment_gemm.py", "ops/test_block_scale_gemm.py",
    "ops/test_routing.py", "ops/test_bgmv_moe.py", "ops/test_gdn.py", "ops/test_gdn_decode.py",
    "ops/test_mamba.py", "ops/test_state_update.py", "moe/test_results.py",
    "attention/test_results.py", "attention/test_batch_attention.py", "attention/test_pod.py",
    "attention/test_batch_pod.py", "attention/test_sparse.py", "attention/test_xqa.py",
    "attention/test_xqa_mla.py", "attention/test_nvfp4.py",
    # Bad arguments are refused by name; calls are prepared, and repeated.
    "ops/test_refusals.py", "ops/test_run_refusals.py", "ops/test_prepared.py",
    # A library is compiled, loaded and called; kernels are fetched from a server.
    "modules/test_modules.py", "loader/test_remote.py",
    # The commands, and the examples.
    "cli/test_demo.py", "cli/test_doctor.py", "cli/test_terminal.py", "test_examples.py",
)  # fmt: skip
_SEED = pytest.StashKey[int | None]()
_ROOM = pytest.StashKey["tempfile.TemporaryDirectory[str] | None"]()
_is_sample = False


def only_in_full(why: str) -> None:
    """Skip the test that asks in a run that draws cases."""
    if _is_sample:
        pytest.skip(f"{why}: --all")


def add_options(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run every case of every test")
    parser.addoption("--unsettled", action="store_true", help="the same, but what a hash settles")
    parser.addoption("--settle", action="store_true", help="run and settle what has changed")
    parser.addoption("--sample", action="store_true", help="run a few cases of every test")
    parser.addoption("--sample-seed", type=int, help="the seed of the sample of cases")


def pytest_configure(config: pytest.Config) -> None:
    worker = getattr(config, "workerinput", None)
    seed = room = None
    if worker is not None:
        seed = worker["sample_seed"]
    elif not _is_whole(config) and config.args_source is not pytest.Config.ArgsSource.ARGS:
        seed = config.option.sample_seed
        if seed is None:
            seed = random.SystemRandom().randrange(2**32)
        if _is_shown(config):
            room = tempfile.TemporaryDirectory(prefix="fi-ffi-shown-")
            # Of processes of pytest-xdist as well.
            os.environ |= {"TMPDIR": room.name, "FI_FFI_CACHE_DIR": f"{room.name}/cache"}
            tempfile.tempdir = room.name
    config.stash[_SEED], config.stash[_ROOM] = seed, room
    global _is_sample
    _is_sample = seed is not None


def pytest_unconfigure(config: pytest.Config) -> None:
    room = config.stash.get(_ROOM, None)
    if room is not None:
        room.cleanup()


def _is_whole(config: pytest.Config) -> bool:
    return bool(config.option.all or config.option.unsettled or config.option.settle)


def _is_shown(config: pytest.Config) -> bool:
    return not (config.option.sample or _is_whole(config))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: object) -> None:
    """Tell a process of pytest-xdist the seed."""
    node.workerinput["sample_seed"] = node.config.stash[_SEED]  # type: ignore[attr-defined]


def pytest_report_header(config: pytest.Config) -> list[str]:
    seed = config.stash[_SEED]
    if seed is None:
        return []
    of = "what shows that it works" if _is_shown(config) else "of every test that needs little"
    told = f"{of}, {CASES} cases of each test at most (--sample, --all: more)"
    return [f"{told}: --sample-seed {seed}"]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    tests = config.rootpath / "tests"
    if config.stash[_SEED] is None or tests not in collection_path.parents:
        return None
    name = collection_path.relative_to(tests).as_posix()
    if _is_shown(config):
        is_wanted = any(file == name or file.startswith(f"{name}/") for file in SHOWN)
    else:
        is_wanted = name not in LEFT_OUT
    return None if is_wanted else True


class _WithoutGpu(pytest.File):  # of a Directory pytest would import the conftest.py
    """The folder of GPU tests, where there is none."""

    def collect(self) -> NoReturn:
        pytest.skip(NEEDS_GPU)


@pytest.hookimpl(tryfirst=True)
def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if ON_GPU or path != parent.config.rootpath / "tests" / "gpu":
        return None
    return _WithoutGpu.from_parent(parent, path=path)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seed = config.stash[_SEED]
    if seed is None:
        return
    tests: dict[tuple[object, str], list[pytest.Item]] = defaultdict(list)
    for item in items:
        tests[item.parent, getattr(item, "originalname", item.name)].append(item)
    draw, chosen = random.Random(seed), set[pytest.Item]()
    for cases in tests.values():
        chosen |= set(cases if len(cases) <= CASES else draw.sample(cases, CASES))
    left = [item for item in items if item not in chosen]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item in chosen]
