"""What the commands print: at 80 columns, on a terminal, in a pipe, and for a program."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from click.testing import CliRunner

from fi_ffi.cli import main, output
from fi_ffi.loader import runtime

from tests.helpers.children import done

COMMAND = [sys.executable, "-c", "from fi_ffi.cli import main; main(prog_name='fi-ffi')"]
LONG = (
    "batch_decode_with_kv_cache_dtype_q_f16_dtype_kv_f16_dtype_o_f16_dtype_idx_i32_head_dim_qk_"
    "128_head_dim_vo_128_posenc_0_use_swa_False_use_logits_cap_False"
)
HOSTILE = "\x1b]0;owned\x07\x1b[2J"
ESCAPED = r"\x1b]0;owned\x07\x1b[2J"


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """A folder in the layout of kernels, with names alone."""
    for name in ("norm", "page", LONG):
        (tmp_path / "kernels" / name).mkdir(parents=True)
        (tmp_path / "kernels" / name / f"{name}.so").write_bytes(b"none")
    return tmp_path / "kernels"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FI_FFI_", "NO_COLOR"))}
    kept.pop("COLUMNS", None)
    return kept | {
        "FI_FFI_CACHE_DIR": str(tmp_path / "cache"), "FI_FFI_SOURCES": "local",
        "FI_FFI_WHEELS": str(tmp_path / "wheels"), "TERM": "xterm-256color",
    }  # fmt: skip


@pytest.fixture
def pipe(environment):
    def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *map(str, arguments)], env=environment | variables, capture_output=True,
            text=True, timeout=120, check=False,
        )  # fmt: skip

    return run


@pytest.fixture
def terminal(environment):
    def run(*arguments: object, columns: int = 80, **variables: str) -> str:
        """All that a terminal of so many columns is sent."""
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)], env=environment | variables, stdin=theirs,
            stdout=theirs, stderr=theirs, close_fds=True,
        )  # fmt: skip
        os.close(theirs)
        sent = b""
        try:
            while part := os.read(ours, 65536):
                sent += part
        except OSError:  # Linux's word for the other end being closed
            pass
        os.close(ours)
        process.wait(timeout=120)
        return sent.decode()

    return run


def shown(sent: str) -> list[str]:
    """The lines that stay, without what colours them and what was shown and removed."""
    kept = re.sub(
        r"\x1b\[\?25l.*?\x1b\[\?25h(\r?\x1b\[1A\x1b\[2K|\r\x1b\[2K)*", "", sent, flags=re.S
    )
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", kept).replace("\r", "").splitlines()


def is_narrow(line: str, columns: int = 80) -> bool:
    """Whether a line fits; a name that is longer than the rest of a line may stand alone."""
    return len(line) <= columns or len(line.split()) == 1


def commands(kernels: Path) -> list[tuple[object, ...]]:
    return [
        ("doctor",), ("doctor", "--kernels", kernels), ("doctor", "rmsnorm", "page", "--sm", "90"),
        ("list", "--matrix", "--family", "norm"), ("cache", "list"),
    ]  # fmt: skip


def test_80_columns(kernels, pipe, terminal):
    for command in commands(kernels):
        whole = pipe(*command).stdout
        narrow = pipe(*command, COLUMNS="80").stdout
        for text in (whole, narrow):
            assert not [line for line in text.splitlines() if line != line.rstrip()], command
        assert not [line for line in narrow.splitlines() if not is_narrow(line)], command
        on_terminal = shown(terminal(*command))
        assert not [line for line in on_terminal if not is_narrow(line)], command
        # Names are whole at every width.
        names = set(re.findall(r"[\w/.]*_[\w/.]*", whole))
        assert names <= set(re.findall(r"[\w/.]*_[\w/.]*", narrow)), command
        assert names <= set(re.findall(r"[\w/.]*_[\w/.]*", "\n".join(on_terminal))), command


def test_modules_are_lines_that_can_be_copied(kernels, pipe, terminal):
    text = pipe("list", "--kernels", kernels).stdout
    assert text.startswith(f"3 modules of {kernels}, ")
    assert f"  {LONG}\n" in text
    assert LONG in "\n".join(shown(terminal("list", "--kernels", kernels)))


def test_a_pipe_has_a_line_for_each_row(kernels, pipe):
    lines = pipe("doctor", "--kernels", kernels).stdout.splitlines()
    assert [line for line in lines if line.startswith("libtvm_ffi ") and ".so" in line]
    assert all(len(line.split()) > 1 for line in lines[1:] if line)


def test_columns_are_obeyed(pipe):
    widths = {
        columns: max(map(len, pipe("cache", "--help", COLUMNS=columns).stdout.splitlines()))
        for columns in ("60", "80")
    }
    assert widths["60"] <= 60 < widths["80"] <= 80
    for columns in (50, 70, 100):
        lines = pipe("doctor", "rmsnorm", "--sm", "90", COLUMNS=str(columns)).stdout.splitlines()
        assert max(map(len, lines)) <= columns and len(lines) > 1


def test_colours(terminal, pipe):
    """On a terminal; none where `NO_COLOR` is set, and none in a pipe."""
    assert "\x1b[32mok" in terminal("doctor")
    assert not re.search(r"\x1b\[[0-9;]*m", terminal("doctor", NO_COLOR="1").split("fi_ffi 0")[1])
    assert "\x1b" not in pipe("doctor").stdout


# For a program


FAILING = [
    (("doctor", "rmsnrom", "--sm", "90"), 2, "UsageError", "the nearest: rmsnorm"),
    (("doctor", "rmsnorm", "--sm", "9000"), 2, "ArgumentError", "such as 90"),
    (("demo", "--device", "gpu"), 2, "BadParameter", "'gpu' is not a device"),
    (("demo", "--kernels", "/nowhere/at/all"), 1, "KernelNotFoundError", "/nowhere/at/all"),
    (("demo", "--tokens", "none"), 2, "BadParameter", "'none' is not a valid integer"),
    (("inspect", "/nowhere.so"), 2, "BadParameter", "does not exist"),
    (("inspect", __file__), 1, "ArtifactError", "test_terminal.py"),
    (("list",), 1, "KernelNotFoundError", "no kernels in any of the places"),
    (("list", "--family", "nrom", "--matrix"), 1, "Failure", "the nearest: norm"),
    (("replay", "/nowhere"), 2, "_NotReplayed", "cannot be replayed"),
    (("build",), 2, "UsageError", "name what to build"),
    (("cache", "prune", "--all", "--builds"), 2, "UsageError", "exclude each other"),
    (("lock", "verify", "none"), 2, "ArgumentError", "none"),
    (("trace",), 2, "UsageError", "FI_FFI_LOG_LEVEL"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "kind", "words"), FAILING, ids=[" ".join(c[0]) for c in FAILING]
)
def test_errors(arguments, code, kind, words, pipe):
    """An error's exit status is docs/commands.md's; with `--json` it is a document."""
    done = pipe(*arguments)
    assert done.returncode == code, done.stderr
    assert not done.stdout and "Error: " in done.stderr and "Traceback" not in done.stderr
    assert words in " ".join(done.stderr.split())
    done = pipe(*arguments, "--json")
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["exit_status"], done.stderr) == (code, code, "")
    assert words in " ".join(error["message"].split())
    assert error["type"] == kind


def test_an_error_that_begins_with_a_long_name(pipe, tmp_path):
    path = tmp_path / ("no" * 60)
    for columns in ("30", "80", "200"):
        text = pipe("demo", "--kernels", path, COLUMNS=columns).stderr
        assert text.startswith(f"Error: {path}:") and text.count("Error") == 1


def test_a_document_is_printed_once(tmp_path):
    """A result that is wrong is in the document, and the error goes to standard error."""
    from fi_ffi.cli import demo

    runner = CliRunner()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo.Result, "status", "fail")
        given = ["demo", "--device", "cpu", "--tokens", "1", "--hidden", "8", "--json"]
        done = runner.invoke(main, given)
    runtime.use_source(None)
    assert done.exit_code == 1
    assert [each["status"] for each in json.loads(done.stdout)["results"]].count("fail") > 5
    assert done.stderr.startswith("Error: a result is further")


def test_statuses_are_on_the_page():
    """Of every command, in docs/commands.md's table."""
    page = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()
    rows = re.findall(r"^\| `fi-ffi ([\w ]+?)(?: [A-Z\[].*?)?` \|", page, re.MULTILINE)
    named = {row.split()[0] for row in rows}
    assert named == {*main.list_commands(None)}  # type: ignore[arg-type]
    for number in ("| 0 |", "| 1 |", "| 2 |", "| 130 |"):
        assert number in page


# Names


@pytest.mark.parametrize(
    ("typed", "said"),
    [(("doctr",), "doctor"), (("cache", "lst"), "list"), (("lock", "verfy"), "verify"),
     (("release", "diff"), "python3 -m tools.release"), (("qqqq",), "the commands are build,"),
     (("trace",), "FI_FFI_DUMP_DIR=FOLDER PROGRAM"), (("download", "x"), "fi-ffi fetch NAME"),
     (("demo", "--devise", "cpu"), "--device"), (("fetch", "rmsnrom"), "rmsnorm"),
     (("list", "--matrix", "--family", "rmsnrom"), "rmsnorm")],
)  # fmt: skip
def test_near_names_are_told(typed, said, pipe):
    done = pipe(*typed)
    assert done.returncode in (1, 2) and said in " ".join(done.stderr.split()), done.stderr


def test_python_tells_the_nearest_op():
    assert "Did you mean: 'rmsnorm'?" in done("import fi_ffi; fi_ffi.rmsnrom")[2]


def test_one_is_no_plural(pipe, tmp_path):
    assert [output.counted(n, "file") for n in (0, 1, 2, 1234)] == [
        "0 files", "1 file", "2 files", "1,234 files",
    ]  # fmt: skip
    (tmp_path / "one" / "norm").mkdir(parents=True)
    (tmp_path / "one" / "norm" / "norm.so").write_bytes(b"")
    assert pipe("list", "--kernels", tmp_path / "one").stdout.startswith("1 module of ")
    assert pipe("cache", "verify").stdout.startswith("0 files hashed")


def test_names_of_files_are_not_obeyed(pipe, terminal, tmp_path, kernels):
    """Of modules, folders and files of the cache, on a terminal as in a pipe."""
    hostile = tmp_path / HOSTILE
    shutil.copytree(kernels, hostile)
    (hostile / f"bad{HOSTILE}").mkdir()
    (hostile / f"bad{HOSTILE}" / f"bad{HOSTILE}.so").write_bytes(b"none")
    for command in (("list", "--kernels", hostile), ("list", "--entries", "--kernels", hostile),
                    ("list", "--kernels", hostile, "--family", "x"), ("inspect", hostile / "x"),
                    ("cache", "verify"), ("cache", "list"), ("cache", "prune")):  # fmt: skip
        room = str(tmp_path / f"cache{HOSTILE}")
        done = pipe(*command, FI_FFI_CACHE_DIR=room)
        text = done.stdout + done.stderr
        assert "\x1b" not in text and "\x07" not in text, command
        assert ESCAPED in text, command
        assert "\x1b]0;" not in terminal(*command, FI_FFI_CACHE_DIR=room), command
