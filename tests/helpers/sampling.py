"""What `python3 -m pytest` runs without arguments: of each test with many cases a few, drawn anew.

Left out is what takes a compiler, the network or minutes, and the folders `LEFT_OUT`.
`--all` runs every case, and so does naming a file, a test or a marker.  The seed is in the header;
`--sample-seed` repeats a draw.  All processes of pytest-xdist draw alike.
"""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path

import pytest

CASES = 6  # of a test, at most
LEFT_OUT = ("llm", "releases", "speed", "stress")  # folders of tests/
_SEED = pytest.StashKey[int | None]()
_is_sample = False


def only_in_full(why: str) -> None:
    """Skip the test that asks in a run of a sample."""
    if _is_sample:
        pytest.skip(f"{why}: --all")


def add_options(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run every case, and not a sample")
    parser.addoption("--sample-seed", type=int, help="the seed of the sample of cases")


def pytest_configure(config: pytest.Config) -> None:
    worker = getattr(config, "workerinput", None)
    seed = None
    if worker is not None:
        seed = worker["sample_seed"]
    elif not config.option.all and config.args_source is not pytest.Config.ArgsSource.ARGS:
        seed = config.option.sample_seed
        if seed is None:
            seed = random.SystemRandom().randrange(2**32)
    config.stash[_SEED] = seed
    global _is_sample
    _is_sample = seed is not None


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: object) -> None:
    """Tell a process of pytest-xdist the seed."""
    node.workerinput["sample_seed"] = node.config.stash[_SEED]  # type: ignore[attr-defined]


def pytest_report_header(config: pytest.Config) -> list[str]:
    seed = config.stash[_SEED]
    if seed is None:
        return []
    told = f"{CASES} cases of each test at most, without tests/{{{','.join(LEFT_OUT)}}}"
    return [f"{told} (--all: everything): --sample-seed {seed}"]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_left_out = collection_path.name in LEFT_OUT and collection_path.parent.name == "tests"
    return True if is_left_out and config.stash[_SEED] is not None else None


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
