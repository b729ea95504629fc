"""The commands of docs/llm.md, as a reader would type them; pip's line is what CI installs."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import generate
import pytest
import requests
import serve
from tiny import make_tiny

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "llm.md").read_text()
BLOCKS = re.findall(
    r"<!-- run by: tests/llm/test_commands.py -->\n```sh\n(.*?)```", PAGE, re.DOTALL
)


def command(line: str, *more: str) -> list[str]:
    words = shlex.split(line.removesuffix(" &"))
    assert words[0] == "python3"
    return [sys.executable, *words[1:], *more]


@pytest.mark.parametrize("kind", ["qwen3", "llama", "qwen3_next"])
def test_the_first_tokens(kind):
    install, generate = BLOCKS[0].splitlines()
    assert install == "python3 -m pip install '.[llm]'"
    line = command(generate, "--cpu", "--tiny", kind, "--max-tokens", "6")
    done = subprocess.run(line, cwd=ROOT, capture_output=True, timeout=120, check=True)
    assert done.stdout.startswith(b"Once upon a time")
    assert re.search(rb"\d tokens, [\d.]+ a second", done.stderr)


def test_two_ranks():
    line = command(BLOCKS[2].strip(), "--cpu", "--tiny", "llama", "--max-tokens", "6")
    done = subprocess.run(line, cwd=ROOT, capture_output=True, timeout=240, check=True)
    assert done.stdout.startswith(b"Once upon a time")


def test_a_prompt_that_ends_at_once_is_printed(tmp_path):
    """A model whose every token ends the text writes the prompt alone."""
    model = Path(make_tiny(tmp_path, "qwen3"))
    described = json.loads((model / "config.json").read_text())
    described["eos_token_id"] = [*range(described["vocab_size"])]
    (model / "config.json").write_text(json.dumps(described))
    program = [sys.executable, "examples/llm/generate.py", "--cpu", "--model", str(model)]
    done = subprocess.run([*program, "Once upon"], cwd=ROOT, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, b"Once upon")


def refusal(program, monkeypatch, *words):
    """What a program says as it ends; in this process, for the process is not what is tested."""
    monkeypatch.setattr(sys, "argv", ["program", "--cpu", *words])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert isinstance(ended.value.code, str)  # which Python prints, and ends with 1
    return ended.value.code


def test_several_prompts():
    program = [sys.executable, "examples/llm/generate.py", "--cpu"]
    done = subprocess.run([*program, "one", "two"], cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == 0
    assert [part[:3] for part in done.stdout.split(b"\n---\n")] == [b"one", b"two"]


def test_what_is_wrong_with_numbers(monkeypatch):
    assert "top_p is 7.0" in refusal(generate, monkeypatch, "--top-p", "7", "one")
    told = refusal(generate, monkeypatch, "--tp", "3", "one")
    assert "num_attention_heads is 4, not a multiple of 3 ranks" in told


def test_a_program_that_ends_with_an_error():
    """One sentence and no traceback."""
    program = [sys.executable, "examples/llm/generate.py", "--cpu", "--model", "/nonexistent", "a"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 1
    assert b"/nonexistent" in done.stderr
    assert b"Traceback" not in done.stderr and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("program", [generate, serve], ids=["generate", "serve"])
def test_a_model_that_is_not_there(program, tmp_path, monkeypatch):
    """A sentence that names it."""
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    for model in ("/nonexistent", str(tmp_path), str(tmp_path / "list")):
        words = ["one"] if program is generate else ["--port", "0"]
        told = refusal(program, monkeypatch, "--model", model, *words)
        assert model in told and "\n" not in told


def test_the_server():
    """Its own lines, on a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    serve, curl = BLOCKS[1].replace("8000", port).replace("\\\n", "").splitlines()
    env, words = os.environ | {"PYTHONUNBUFFERED": "1"}, shlex.split(curl)
    server = subprocess.Popen(command(serve, "--cpu"), cwd=ROOT, env=env)
    try:
        if shutil.which("curl"):  # at once, as a shell runs the second line
            done = subprocess.run(words, capture_output=True, timeout=120, check=True)
            assert done.stdout.endswith(b"data: [DONE]\n\n")
        end = time.monotonic() + 60
        while True:
            try:
                requests.get(f"http://127.0.0.1:{port}/v1/models", timeout=5)
                break
            except requests.ConnectionError:
                assert time.monotonic() < end
                time.sleep(0.1)
        body = words[words.index("-d") + 1]
        header = dict([words[words.index("-H") + 1].split(": ")])
        url = "http://" + next(word for word in words if word.startswith("localhost:"))
        answer = requests.post(url, data=body, headers=header, timeout=60)
        assert answer.status_code == 200
        assert answer.text.endswith("data: [DONE]\n\n")
    finally:
        server.terminate()
        assert server.wait(20) in (0, -15)


@pytest.mark.parametrize("flags", [[], ["--ray", "--tp", "2"]])
def test_what_generate_loads(flags, monkeypatch):
    """Ranks as the flags have them; the device that there is, or the CPU."""
    asked = []

    def load(model, device, **more):
        asked.append((model, device, more))
        raise ValueError("enough")

    monkeypatch.setattr(generate, "load", load)
    monkeypatch.setattr(sys, "argv", ["generate.py", "--model", "m", "--cpu", *flags, "Hi"])
    with pytest.raises(SystemExit, match=r"generate\.py: enough"):
        generate.main()
    way, size = ("ray", 2) if flags else ("processes", 1)
    assert asked == [("m", "cpu", {"num_pages": generate.PAGES, "tp": size, "way": way})]
