"""Runs ninja over the build files that FlashInfer wrote, and follows its progress."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from fi_ffi.errors import BuildError
from fi_ffi.loader.building.toolkit import header_extra, missing_library

_NINJA_STATUS = "[%f/%t] "
_STATUS = re.compile(r"^\[(\d+)/(\d+)\] ", re.MULTILINE)
_TELLING = re.compile(
    r"\berror\b|undefined reference|cannot find -l|No such file|Killed|out of memory|not found",
    re.IGNORECASE,
)
_MEMORY_PER_JOB = 3 << 30  # what one nvcc process takes for FlashInfer's larger sources
_KEPT = 400  # lines of output that are looked at after a failure
_SHOWN = 8
_PATIENCE_S = 15.0


class MissingHeader(BuildError):
    """The compiler lacks a header that the package index has, in a `cuda-toolkit` extra."""

    def __init__(self, extra: str, log: str) -> None:
        self.extra = extra
        super().__init__(f"headers of {extra} are missing", log)


class MissingLibrary(BuildError):
    """The linker lacks a library that the package index has."""

    def __init__(self, name: str, log: str) -> None:
        self.name = name
        super().__init__(f"lib{name}.so is missing", log)


def default_jobs() -> int:
    """As many compilers as there are processors, and as memory is likely to hold."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // _MEMORY_PER_JOB))


def write_index(folder: Path, module_files: Iterable[Path]) -> Path:
    """One build file over those of all modules ever asked for in `folder`.

    Ninja forgets what it knows of outputs that its build file does not name, and
    would then make them again.
    """
    known = sorted({*folder.glob("*/build.ninja"), *module_files})
    index = folder / "build.ninja"
    lines = ["ninja_required_version = 1.3", *(f"subninja {_escape(path)}" for path in known)]
    text = "\n".join(lines) + "\n"
    if not index.is_file() or index.read_text() != text:
        index.write_text(text)
    return index


def _escape(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def meaningful_lines(output: Sequence[str]) -> list[str]:
    """The lines of a failed build that say why, the last ones if there are many."""
    lines = [line for line in output if _TELLING.search(line) and len(line) < 600]
    lines = [line for line in lines if not _STATUS.match(line)]
    return (lines or [line[:600] for line in output if line.strip()])[-_SHOWN:]


def _stop(process: subprocess.Popen[str]) -> None:
    """End ninja and, through it, its compilers: it removes half-written outputs itself."""
    if process.poll() is not None:
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_PATIENCE_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
        return


def _follow(process: subprocess.Popen[str], log: Path, step: Callable[[int, int], None]) -> str:
    """Copy ninja's output to `log` and report each finished step; the last of the output."""
    last: deque[str] = deque(maxlen=_KEPT)
    assert process.stdout is not None
    with log.open("a") as file:
        for line in process.stdout:
            file.write(line)
            last.append(line)
            if match := _STATUS.match(line):
                step(int(match[1]), int(match[2]))
    return "".join(last)


def count_steps(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> int:
    """How many steps `command` would run: ninja itself says so only when the first is done."""
    done = subprocess.run(
        [*command, "-n"],
        cwd=folder,
        env={**os.environ, **environment, "NINJA_STATUS": _NINJA_STATUS},
        capture_output=True,
        text=True,
        check=False,
    )
    match = _STATUS.search(done.stdout)
    return int(match[2]) if match else 0


def run_ninja(
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    log: Path,
    step: Callable[[int, int], None],
) -> None:
    """Run ninja in `folder`; `step(finished, total)` is called as it goes.

    It gets a process group of its own, so that an interruption reaches this process
    first, which then ends ninja in order and leaves what is finished for the next time.
    """
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    with log.open("a") as file:
        file.write(f"# {started}\n$ {' '.join(command)}\n")
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **environment, "NINJA_STATUS": _NINJA_STATUS},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output = _follow(process, log, step)
        code = process.wait()
    finally:
        _stop(process)
    if code == 0:
        return
    if extra := header_extra(output):
        raise MissingHeader(extra, str(log))
    if name := missing_library(output):
        raise MissingLibrary(name, str(log))
    raise BuildError(_explain(output.splitlines()), str(log))


def _explain(lines: Sequence[str]) -> str:
    failed = next((line.split()[-1] for line in lines if line.startswith("FAILED:")), None)
    what = f"compiling {Path(failed).name} failed" if failed else "ninja failed"
    text = "\n".join([f"{what}:", *meaningful_lines(lines)])
    if re.search(r"\bKilled\b|out of memory", text):
        text += "\nThe machine ran out of memory: use fewer --jobs."
    return text
