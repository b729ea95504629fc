"""Call logs: what they say at each level, where it goes, and what a crash leaves of it.

Tests that take a `machine` run on a GPU as well: tests/gpu/test_call_log.py.
"""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import weakref
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.call import hooks
from fi_ffi.ops.functions import OPS
from fi_ffi.watch import watching
from fi_ffi.watch.call_log import open_by_environment
from fi_ffi.watch.writer import Writer

from tests.helpers import children
from tests.helpers.cases import make_case
from tests.helpers.forking import in_child
from tests.helpers.plan_calls import KINDS, Case
from tests.helpers.prepared_calls import Mine

HEAD = re.compile(r"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}) (\d+)\] #(\d+) (.*)")


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    assert watching.inboxes == watching.logs == () and hooks.watcher is None


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "calls.log"


class Said:
    """What a log has of one call: what was said in each piece, and its lines."""

    def __init__(self) -> None:
        self.heads: list[str] = []
        self.lines: list[list[str]] = []

    @property
    def name(self) -> str:
        return self.heads[0]

    @property
    def values(self) -> dict[str, str]:
        """The first piece's lines by their names."""
        return dict(line.split(": ", 1) for line in self.lines[0])

    def under(self, head: str) -> dict[str, str]:
        return dict(line.split(": ", 1) for line in self.lines[self.heads.index(head)])


def read(text: str | Path) -> list[Said]:
    """A log's calls, in the order in which they began."""
    found: dict[str, Said] = {}
    said = Said()
    for line in (text.read_text() if isinstance(text, Path) else text).splitlines():
        match = HEAD.fullmatch(line)
        if match:
            said = found.setdefault(f"{match[2]} {match[3]}", Said())
            said.heads.append(match[4])
            said.lines.append([])
        else:
            assert line.startswith("  "), line
            if not line.startswith("    "):  # of a message
                said.lines[-1].append(line[2:])
    return [*found.values()]


# ---------------------------------------------------------------- levels


def test_names(mine, path):
    with fi_ffi.call_log(1, path):
        mine.op(*mine.descs)
    (said,) = read(path)
    assert said.heads == ["mine_too"]
    assert said.lines == [[]]


def test_arguments(mine, path):
    line = sys._getframe().f_lineno + 2
    with fi_ffi.call_log(3, path):
        mine.op(*mine.descs, factor=2.0, count=4, flag=True, kv_layout="HND")
    (said,) = read(path)
    assert said.values == {
        "called": f"{__file__}:{line} in test_arguments, thread 'MainThread'",
        "entry": "fi_ffi.reference.norm.mine_too, on cpu",
        "y": f"float16[4, 16] on cpu at {mine.y.ctypes.data:#x}",
        "x": f"float16[4, 16] on cpu at {mine.x.ctypes.data:#x}",
        "w": "None",
        "factor": "2.0",
        "count": "4",
        "flag": "True",
        "kv_layout": "'HND'",
    }
    assert said.heads[0] == "mine_too"
    assert re.fullmatch(r"returned after \d+ us", said.heads[1])
    assert len(said.heads) == 2
    assert mine.is_done(2.0)


def same_statistics(said: str, array: np.ndarray) -> bool:
    """Whether these are the array's: to the letter, but the mean to five digits."""
    wide = array.astype(np.float64).ravel()
    finite = wide[np.isfinite(wide)]
    start = f"min {finite.min():.6g}, max {finite.max():.6g}, mean "
    end = f", {np.isnan(wide).sum()} NaN, {np.isinf(wide).sum()} Inf"
    assert said.startswith(start) and said.endswith(end), said
    mean = float(said.removeprefix(start).removesuffix(end))
    return bool(abs(mean - finite.mean()) <= 1e-5 * np.abs(finite).mean())


@pytest.mark.parametrize(
    ("op", "dtype"),
    [("rmsnorm", "float16"), ("rmsnorm", "bfloat16"), ("rmsnorm_quant", "bfloat16")],
)
def test_statistics(op, dtype, machine, rng, path):
    row = OPS[op].row
    dtypes = {variable: of[0] for variable, of in row.dtypes.items()} | {"T": dtype}
    case = make_case(row, {"n": 33, "h": 1024}, dtypes, rng)
    x = case.arrays["input"]
    x[3, 5], x[4, 7], x[5, :2] = np.nan, np.inf, -np.inf
    placed = {name: machine.place(array) for name, array in case.arrays.items()}
    machine.synchronize()
    with fi_ffi.call_log(5, path):
        OPS[op](**{name: one.desc() for name, one in placed.items()}, **case.scalars,
                stream=machine.stream)  # fmt: skip
    (said,) = read(path)
    heads = [head.split(" after ")[0] for head in said.heads]
    assert heads == [op, "before:", "returned", "after:"]
    place = machine.device + ("" if machine.stream is None else f", stream {machine.stream:#x}")
    assert said.values["entry"].endswith(f"norm.{op}, on {place}")
    desc = placed["input"].desc()
    assert said.values["input"] == f"{dtype}[33, 1024] on {machine.device} at {desc.ptr:#x}"
    before, after = said.under("before:"), said.under("after:")
    assert "1 NaN, 3 Inf" in before["input"]
    assert before.keys() == placed.keys() - {"out"} and after.keys() == {"out"}
    for name, told in (before | after).items():
        assert same_statistics(told, placed[name].get()), name


def test_statistics_of_rows_apart(mine, path):
    """Of the elements, and not of what lies between them."""
    x = np.full((4, 48), np.inf, np.float16)[:, 8:24]
    x[...] = np.random.default_rng().standard_normal((4, 16))
    with fi_ffi.call_log(5, path):
        mine.op(mine.y, x)
    assert same_statistics(read(path)[0].under("before:")["x"], x)


@pytest.mark.parametrize("dtype", [*fi_ffi.DTYPES])
def test_statistics_of_every_dtype(dtype):
    from fi_ffi.watch.tensor_bytes import statistics

    rng = np.random.default_rng()
    array = np.round(rng.uniform(0, 100, (3, 5))).astype(fi_ffi.DTYPES[dtype].numpy)
    desc = fi_ffi.TensorDesc(array.ctypes.data, (3, 5), dtype, device="cpu")
    said = statistics(desc, None)
    if fi_ffi.DTYPES[dtype].lanes > 1 or fi_ffi.DTYPES[dtype].shares_bytes:
        assert said == f"no statistics of {dtype}: elements share bytes"
    elif array.dtype.kind in "iub":
        mean = array.mean(dtype=np.float64)
        assert said == f"min {int(array.min())}, max {int(array.max())}, mean {mean:.6g}"
    else:
        assert same_statistics(said, array)


def test_what_has_no_statistics(monkeypatch):
    from fi_ffi.watch import tensor_bytes as module

    def of(array: np.ndarray) -> str:
        desc = fi_ffi.as_desc(array)
        return module.statistics(desc, None)

    assert of(np.zeros((0, 4), np.float16)) == "no elements"
    assert of(np.full((2, 2), np.nan, np.float32)) == "no finite element, 4 NaN, 0 Inf"
    monkeypatch.setattr(module, "MAX_BYTES", 15)
    assert of(np.zeros(8, np.float16)) == "no statistics: 16 bytes, more than 15"
    monkeypatch.setattr(module, "MAX_BYTES", 16)
    assert of(np.zeros(8, np.float16)).startswith("min 0,")


def test_nothing_at_level_0(mine, path):
    with fi_ffi.call_log(0, path):
        mine.op(*mine.descs)
    assert not path.exists()
    assert mine.is_done(1.5)


# ---------------------------------------------------------------- every way of calling


def test_typed_and_prepared_calls(mine, path):
    prepared = mine.op.prepare(*mine.descs, factor=4.0)
    for _ in range(3):
        mine.op(*mine.descs, factor=2.0)
    prepared()
    assert not path.exists()
    with fi_ffi.call_log(3, path):
        for _ in range(3):
            mine.op(*mine.descs, factor=3.0)
        prepared()
        prepared.update(factor=5.0)
        prepared()
        with fi_ffi.watchdog(30.0):
            prepared()
    assert [said.values["factor"] for said in read(path)] == [*["3.0"] * 3, "4.0", "5.0", "5.0"]
    mine.op(*mine.descs, factor=6.0)
    prepared()
    assert len(read(path)) == 6
    assert mine.is_done(5.0)


@pytest.mark.parametrize("kind", KINDS)
def test_plans_and_their_runs(kind, path):
    case = Case(kind)
    plan = case.plan()
    case.run(plan)
    method = {"ragged": "ragged_run", "paged": "paged_run"}.get(kind, "run")
    given = {name: case.memory[name] for name in case.run_names}
    prepared = fi_ffi.prepare(getattr(plan, method), **given)
    prepared()
    with fi_ffi.call_log(3, path):
        case.run(plan)
        case.replan(plan)
        case.run(plan)
        prepared()
        case.plan()
    case.check()
    name = type(plan).__name__
    told = read(path)
    names = [method, "replan", method, "call"]
    assert [said.name for said in told] == [*(f"{name}.{one}" for one in names), name]
    for said in told:
        assert said.values["plan"].startswith(f"{name}, ")
        assert plan.module in said.values["plan"]
        where = __file__ if said.name == f"{name}.call" else "plan_calls.py"
        assert f"{where}:" in said.values["called"]
    first = "q_nope" if kind == "mla" else "q"
    where = case.memory[first]
    assert told[0].values[first].endswith(f"{list(where.shape)} on cpu at {where.ctypes.data:#x}")
    assert "page_size" in told[4].values or kind in ("ragged", "mla")


def test_a_function_that_no_row_describes(mine, path):
    """What calls of `fi_ffi.module` are told by."""
    from fi_ffi.abi.tensor import parse_device

    made = []

    def call() -> int:
        made.append(1)
        return 7

    y, x = mine.descs
    args = (y, 3, 0.5, None, "word", parse_device("cuda:1"), [x, y])
    tensors = [("0: DLTensor*", y), ("6: Array<Tensor>", x), ("6: Array<Tensor>", y)]
    with fi_ffi.call_log(5, path):
        assert watching.called("mine.entry", call, args, tensors, parse_device("cpu")) == 7
    assert watching.called("mine.entry", call, args, tensors, None) == 7
    assert len(made) == 2
    (said,) = read(path)
    assert said.name == "mine.entry"
    values = said.values
    assert values.pop("entry") == "mine.entry, on cpu"
    assert values.pop("called").startswith(f"{__file__}:")
    assert values.pop("0").endswith(f"at {mine.y.ctypes.data:#x}")
    assert values.pop("6").endswith(f"at {mine.x.ctypes.data:#x}")
    assert values.pop("6.1").endswith(f"at {mine.y.ctypes.data:#x}")
    assert values == {"1": "3", "2": "0.5", "3": "None", "4": "'word'", "5": "Device cuda:1"}
    assert said.under("before:") == said.under("after:")
    assert [*said.under("after:")] == ["0", "6", "6.1"]


def test_refused_calls_and_calls_of_nothing_are_not_made_and_not_told(mine, path):
    with fi_ffi.call_log(3, path):
        with pytest.raises(fi_ffi.ArgumentError):
            mine.op(*mine.descs, factor="two")
        mine.op(mine.y[:0], mine.x[:0])
    assert path.read_text() == ""


def test_calls_that_fail(mine, path):
    def fail():
        raise ValueError("as it was told to")

    mine.work = fail
    with fi_ffi.call_log(5, path), pytest.raises(fi_ffi.KernelError):
        mine.op(*mine.descs)
    (said,) = read(path)
    assert said.heads[-1].startswith("raised KernelError: ")
    assert "ValueError: as it was told to" in said.heads[-1]


@pytest.mark.parametrize("error", [KeyboardInterrupt("stop"), SystemExit(3)], ids=repr)
def test_calls_that_are_interrupted(error, mine, path):
    def stop():
        raise error

    mine.work = stop
    with fi_ffi.call_log(5, path), pytest.raises(type(error)):
        mine.op(*mine.descs)
    (said,) = read(path)
    assert said.heads[-1].startswith(f"raised {type(error).__name__}")


# ---------------------------------------------------------------- where it goes


@pytest.mark.parametrize("dest", ["stdout", "stderr"])
def test_the_processs_own_streams(mine, dest, capfd):
    with fi_ffi.call_log(1, dest):
        mine.op(*mine.descs)
    streams = capfd.readouterr()._asdict()
    assert read(streams[dest[3:]])[0].name == "mine_too"
    assert streams["err" if dest == "stdout" else "out"] == ""


def test_stderr_is_the_default(mine, capsys):
    with fi_ffi.call_log():
        mine.op(*mine.descs)
    assert [said.heads for said in read(capsys.readouterr().err)] == [["mine_too"]]


def test_a_stream_that_the_program_has_put_there(mine, monkeypatch, capfd):
    taken = io.StringIO()
    monkeypatch.setattr(sys, "stderr", taken)
    with fi_ffi.call_log(1, "stderr"):
        mine.op(*mine.descs)
        monkeypatch.setattr(sys, "stderr", None)
        mine.op(*mine.descs)
        taken.close()
        monkeypatch.setattr(sys, "stderr", taken)
        mine.op(*mine.descs)
    assert len(read(capfd.readouterr().err)) == 2


def test_a_file_is_added_to(mine, path):
    for _ in range(2):
        with fi_ffi.call_log(1, str(path)):
            mine.op(*mine.descs)
    assert len(read(path)) == 2
    assert path.stat().st_mode & 0o777 & ~0o644 == 0


LINES = "".join(f"{i} naïve € 😀 {'x' * i}\n" for i in range(60))


@pytest.mark.parametrize("dest", ["file", "stdout", "stderr"])
def test_what_is_written_in_parts_is_whole(dest, path, short_writes, monkeypatch, capfd):
    """Nothing is lost or told twice; the process's own streams have it where Python has none."""
    writer = Writer(path if dest == "file" else dest)
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, None)
    for text in (LINES, "", "one\n", LINES):
        writer.write(text)
    writer.close()
    said = capfd.readouterr()._asdict()
    said["file"] = path.read_text() if dest == "file" else ""
    named = {"stdout": "out", "stderr": "err"}.get(dest, dest)
    assert {name for name, text in said.items() if text} == {named}
    assert said[named] == f"{LINES}one\n{LINES}"


def test_the_processs_id_in_a_path(mine, tmp_path):
    with fi_ffi.call_log(1, tmp_path / "%i-calls-%i"):
        mine.op(*mine.descs)
    pid = os.getpid()
    assert [file.name for file in tmp_path.iterdir()] == [f"{pid}-calls-{pid}"]


def test_a_file_that_cannot_be_written(mine, tmp_path, capfd):
    with pytest.raises(fi_ffi.ArgumentError, match="call_log: argument `dest`: got /.*cannot|No"):
        fi_ffi.call_log(1, tmp_path / "nowhere" / "calls.log")
    with fi_ffi.call_log(3, "/dev/full"):
        for _ in range(3):
            mine.op(*mine.descs)
    assert mine.is_done(1.5), "calls are made all the same"
    said = capfd.readouterr().err
    assert re.fullmatch(r"fi_ffi.call_log: /dev/full cannot be written: .*No space.*\n", said)


def test_what_is_written_is_in_the_file_before_the_call_is_made(mine, path):
    seen = []
    mine.work = lambda: seen.append(path.read_text())
    with fi_ffi.call_log(3, path):
        mine.op(*mine.descs, factor=2.25)
    assert "  factor: 2.25\n" in seen[0]
    assert path.read_text().startswith(seen[0])


# ---------------------------------------------------------------- opening and closing


def test_several_logs(mine, tmp_path):
    paths = [tmp_path / name for name in ("outer", "inner", "later")]
    outer = fi_ffi.call_log(1, paths[0])
    with fi_ffi.call_log(3, paths[1]):
        mine.op(*mine.descs)
        later = fi_ffi.call_log(1, paths[2])
    mine.op(*mine.descs)
    outer.close()
    outer.close()
    mine.op(*mine.descs)
    later.close()
    mine.op(*mine.descs)
    assert [len(read(path)) for path in paths] == [2, 1, 2]
    assert mine.is_done(1.5)


def test_a_closed_log_keeps_no_file_open(mine, path):
    def opened():
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        return sum(os.path.exists(link) and os.path.samefile(link, path) for link in links)

    for _ in range(3):
        with fi_ffi.call_log(1, path):
            mine.op(*mine.descs)
            assert opened() == 1
    assert opened() == 0
    assert len(read(path)) == 3


def test_a_watchdog_beside_a_log(mine, path):
    """Each sees all calls, whichever was opened or closed first."""
    inner = []
    mine.work = lambda: inner.append(len(watching.inboxes + watching.logs))
    log = fi_ffi.call_log(1, path)
    mine.op(*mine.descs)
    with fi_ffi.watchdog(30):
        mine.op(*mine.descs)
        log.close()
        mine.op(*mine.descs)
        with fi_ffi.call_log(1, path):
            mine.op(*mine.descs)
    assert inner == [1, 2, 1, 2]
    assert len(read(path)) == 3


@pytest.mark.parametrize(
    ("given", "kind", "told"),
    [
        *(({"level": level}, fi_ffi.ArgumentError, "level.*0 or 1 or 3 or 5")
          for level in (2, -1, 10)),
        *(({"level": level}, fi_ffi.ArgumentTypeError, "level.*0 or 1 or 3 or 5")
          for level in ("3", 3.0, True, None)),
        *(({"dest": dest}, fi_ffi.ArgumentTypeError, "dest.*stdout, stderr or a path")
          for dest in (3, None, "", b"log")),
        ({"dump": "file/folder"}, fi_ffi.ArgumentError, "dump.*a directory that can be made"),
        ({"dump": "file"}, fi_ffi.ArgumentError, "dump.*a directory that can be made"),
        ({"max_dump_calls": -1}, fi_ffi.ArgumentError, "max_dump_calls"),
        ({"max_dump_bytes": 1.5}, fi_ffi.ArgumentTypeError, "max_dump_bytes"),
        ({"dump_ops": ["rmsnorm"]}, fi_ffi.ArgumentTypeError, "dump_ops"),
    ],
)  # fmt: skip
def test_what_is_wrong_to_ask_for(given, kind, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(kind, match=f"(?s)call_log: argument `{told}") as caught:
        fi_ffi.call_log(**given)
    assert type(caught.value) is kind


def test_a_closed_log_opens_no_block():
    log = fi_ffi.call_log(0)
    log.close()
    with pytest.raises(fi_ffi.ArgumentError, match="a closed log"), log:
        pass


# ---------------------------------------------------------------- processes


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_goes_on(mine, tmp_path):
    own, shared = tmp_path / "%i.log", tmp_path / "all.log"
    pids = []

    def run():
        assert len(watching.logs) == 2 and watching.inboxes == ()
        mine.op(*mine.descs)
        with fi_ffi.watchdog(30):
            mine.op(*mine.descs)

    with fi_ffi.call_log(1, own), fi_ffi.call_log(1, shared):
        mine.op(*mine.descs)
        assert in_child(run) == 0
        mine.op(*mine.descs)
    pids = {file.name: len(read(file)) for file in tmp_path.glob("[0-9]*.log")}
    assert pids.pop(f"{os.getpid()}.log") == 2
    assert [*pids.values()] == [2]
    assert len(read(shared)) == 4


KILLED = """
    import os, signal, sys

    import numpy as np

    import fi_ffi
    from fi_ffi.reference import norm

    def dies(out, input, weight, eps, enable_pdl):
        if eps == 0.25:
            DIE

    norm.KERNELS["norm"]["rmsnorm"] = dies
    x = np.ones((2, 16), np.float16)
    for eps in (0.125, 0.25, 0.5):
        fi_ffi.rmsnorm(np.full_like(x, np.nan), x, np.ones(16, np.float16), eps=eps)
"""
ENDS = {
    "SIGKILL": "os.kill(os.getpid(), signal.SIGKILL)",
    "SIGABRT": "os.abort()",
    "SIGSEGV": "import ctypes; ctypes.string_at(8)",
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("dest", ["stdout", "stderr", "file"])
def test_a_crash_leaves_the_calls_arguments(end, dest, path):
    given = {"FI_FFI_LOG_LEVEL": "5", "FI_FFI_LOG_DEST": str(path) if dest == "file" else dest}
    status, out, err = children.done(KILLED.replace("DIE", ENDS[end]), **given)
    assert status == -getattr(signal, end), err
    text = {"stdout": out, "stderr": err}[dest] if dest != "file" else path.read_text()
    # Handlers of signals write to stderr as well, after all of these.
    text = "".join(takewhile(lambda line: line.startswith(("[", "  ")), text.splitlines(True)))
    first, last = read(text)
    assert first.values["eps"] == "0.125" and first.heads[-1] == "after:"
    assert last.values["eps"] == "0.25"
    assert "float16[2, 16] on cpu at 0x" in last.values["input"]
    assert last.under("before:")["input"] == "min 1, max 1, mean 1, 0 NaN, 0 Inf"
    assert last.heads == ["rmsnorm", "before:"], "nothing after the call that ended it"


def test_the_environment():
    def opened(**environment: str) -> Any:
        log = open_by_environment(environment)
        if log is not None:
            log.close()
        return log

    assert opened() is None
    assert opened(FI_FFI_LOG_LEVEL="0", FI_FFI_LOG_DEST="/nowhere/at/all") is None
    assert opened(FI_FFI_LOG_LEVEL="") is None
    assert opened(FI_FFI_LOG_LEVEL="1") is not None
    for name, wrong in (
        ("LOG_LEVEL", "2"), ("LOG_LEVEL", "-1"), ("LOG_LEVEL", "high"), ("LOG_DEST", "/nowhere/x"),
        ("DUMP_MAX_CALLS", "many"), ("DUMP_MAX_BYTES", "-5"),
    ):  # fmt: skip
        given = {"FI_FFI_LOG_LEVEL": "1", f"FI_FFI_{name}": wrong}
        with pytest.raises(fi_ffi.ArgumentError, match="call_log: argument `"):
            open_by_environment(given)


def test_a_wrong_environment_is_told_at_once():
    status, _, err = children.done("import fi_ffi", FI_FFI_LOG_LEVEL="7")
    assert status == 1
    assert "argument `FI_FFI_LOG_LEVEL`: got 7, expected 0 or 1 or 3 or 5" in err


@pytest.mark.parametrize("level", ["0", "1", "3"])
def test_what_a_level_imports(level):
    """numpy is for statistics; without a log, nothing of it is imported."""
    code = """
        import sys
        import fi_ffi
        from fi_ffi.watch import watching
        from fi_ffi.abi.tensor import parse_device

        if watching.logs:
            x = fi_ffi.TensorDesc(4096, (4,), "float16", device="cpu")
            watching.called("mine", print, (x, 3), [("0", x)], parse_device("cpu"))
        print("numpy" in sys.modules, "fi_ffi.watch.call_log" in sys.modules)
    """
    _, out, err = children.done(code, FI_FFI_LOG_LEVEL=level)
    assert out.strip() == f"False {level != '0'}", err
    assert err.count("mine") == {"0": 0, "1": 1, "3": 2}[level]


# ---------------------------------------------------------------- a pretended GPU


@pytest.fixture
def cuda(gpu):
    """A pretended GPU that is waited for, too."""
    gpu.runtime.cudaEventSynchronize = lambda event: 0
    gpu.runtime.cudaThreadExchangeStreamCaptureMode = lambda mode: 0
    return gpu


def on_cuda(mine: Mine) -> list[fi_ffi.TensorDesc]:
    return [fi_ffi.TensorDesc(d.ptr, d.shape, d.dtype, device="cuda:0") for d in mine.descs]


def test_streams(mine, cuda, path):
    with fi_ffi.call_log(5, path):
        mine.op(*on_cuda(mine), stream=0x51)
        with fi_ffi.stream(0x61):
            mine.op(*on_cuda(mine))
    first, second = read(path)
    assert first.values["entry"].endswith(", on cuda:0, stream 0x51")
    assert second.values["entry"].endswith(", on cuda:0, stream 0x61")
    assert same_statistics(first.under("after:")["y"], mine.y)
    copies = [entry for entry in cuda.runtime.log if entry[0] == "copy"]
    assert [stream for _, stream in copies] == [0x51, 0x51, 0x61, 0x61]


def test_nothing_is_read_while_a_stream_records_a_graph(mine, cuda, path, tmp_path):
    cuda.runtime.capturing.add(0x51)
    with fi_ffi.call_log(5, path, dump=tmp_path / "dumps"):
        mine.op(*on_cuda(mine), stream=0x51)
        assert not [entry for entry in cuda.runtime.log if entry[0] == "copy"]
        mine.op(*on_cuda(mine), stream=0x61)
    captured, free = read(path)
    assert captured.heads[1] == "is recorded into a graph, and not run: nothing is read"
    assert len(captured.heads) == 3 and captured.heads[2].startswith("returned")
    assert "y" in captured.values
    assert "before:" in free.heads
    assert len([*(tmp_path / "dumps").iterdir()]) == 2


def test_memory_that_cannot_be_read(mine, cuda, path, tmp_path):
    """It is said, the call is made, and CUDA's error is not left to be the kernel's."""
    cuda.runtime.cudaMemcpyAsync = lambda *args: 700
    with fi_ffi.call_log(5, path, dump=tmp_path / "dumps"):
        mine.op(*on_cuda(mine), stream=0x51)
    (said,) = read(path)
    assert "CUDA error 700" in said.under("before:")["x"]
    assert any(re.match("not dumped: DeviceError: .*700", head) for head in said.heads)
    assert "CUDA error 700" in said.under("after:")["y"]
    assert cuda.runtime.log.count(("last error",)) == 3
    assert mine.is_done(1.5)


def test_graphs(cuda, path):
    """Their launches are told while a log is open, and are CUDA's function and nothing more
    while none is."""
    from fi_ffi import graphs

    runtime, launched = cuda.runtime, []
    runtime.cudaStreamBeginCapture = lambda stream, mode: 0
    runtime.cudaStreamEndCapture = lambda stream, graph: 0
    runtime.cudaGraphGetNodes = lambda graph, nodes, count: 0
    runtime.cudaGraphInstantiate = lambda made, graph, flags: 0
    runtime.cudaGraphExecUpdate = lambda made, graph, result: 0
    runtime.cudaGraphExecDestroy = lambda made: 0
    runtime.cudaGraphLaunch = lambda made, stream: launched.append(stream) or 0
    with fi_ffi.capture(0x51) as graph:
        pass
    launch = graph.launch  # kept from before
    with fi_ffi.call_log(3, path):
        launch(0x61)
        with fi_ffi.capture(0x51, into=graph):
            pass
        with fi_ffi.capture(0x51) as other:
            pass
        other.launch(0x71)
    launch(0x61)
    other.launch(0x71)
    assert len(launched) == 4
    assert graph._launch.func is runtime.cudaGraphLaunch
    told = read(path)
    assert [said.name for said in told] == [
        "Graph is launched", "Graph was recorded", "Graph was recorded", "Graph is launched",
    ]  # fmt: skip
    assert told[0].values["entry"] == (
        f"a graph of 0 nodes at {id(graph):#x}, updated 0 times, on cuda:0, stream 0x61"
    )
    assert "updated 1 times" in told[1].values["entry"]
    assert graphs._graphs >= {*map(weakref.ref, (graph, other))}
