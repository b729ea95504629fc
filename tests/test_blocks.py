"""Every code block of every page is run, or says why not: docs/testing.md has the marks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers.blocks import PAGES, ROOT, PageError, blocks_of, shown
from tests.helpers.blocks_page import run_page

IS_LONG = os.environ.get("FI_FFI_STRESS") == "long"


def run(page: Path, folder: Path) -> str:
    options = ["--long"] if IS_LONG else []
    return run_page(page, folder, *options, FI_FFI_CACHE_DIR=str(folder / "cache"))


WITH_BLOCKS = [page for page in PAGES if "```" in page.read_text()]


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=shown)
def test_blocks(page, tmp_path):
    became = run(page, tmp_path)
    print(became)
    assert became.strip()


GOOD = """\
<!-- setup
x = 2
-->
```python
print(x + 1)
```

<!-- output -->
```text
3
```

<!-- raises: KeyError -->
```python
{}["a"]
```

<!-- output -->
```text
KeyError: …
```

<!-- needs: gpu, a word more -->
```python
import no_such_module
```

<!-- not run: needs a machine nobody has -->
```cpp
int main() {
```

<!-- exits: 3 -->
```sh
echo $((x = 3)) > made
exit 3
```

```python
assert open("made").read() == "3\\n"
```
"""


def test_what_is_right_passes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(GOOD)
    became = [line.split(": ", 2)[2] for line in run(page, tmp_path).splitlines()]
    assert became == ["run", "compared", "run", "compared", "skipped: needs a GPU", "left out",
                      "run", "run"]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("print(x + 1)", "print(y + 1)", "NameError"),
        ("print(x + 1)", "print(x + 2)", "the page shows"),
        ("import no_such_module", "import", "SyntaxError"),
        ("raises: KeyError", "raises: ValueError", "KeyError: 'a'"),
        ('{}["a"]', "{}", "did not raise KeyError"),
        ("exit 3", "exit 4", "exit status 4"),
        ("echo $((x = 3)) > made", "no-such-command", "exit status 127"),
        ("exit 3", "if", "syntax error"),
    ],
)
def test_what_is_wrong_fails(old, new, said, tmp_path):
    page = tmp_path / "page.md"
    assert old in GOOD
    page.write_text(GOOD.replace(old, new))
    with pytest.raises(AssertionError) as failure:
        run(page, tmp_path)
    assert said in str(failure.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("needs: gpu", "needs: luck", "unknown mark `needs: luck"),
        ("needs: gpu", "need: gpu", "unknown mark `need: gpu"),
        ("not run: needs a machine nobody has", "not run: because", "unknown mark `not run: bec"),
        ("not run: needs a machine nobody has", "run by: tests/test_blocks.py", "unknown mark"),
        ("<!-- not run: needs a machine nobody has -->", "", "no mark says why"),
        ("<!-- needs: gpu, a word more -->", "<!-- needs: gpu -->\n\nWords.\n", "is not before"),
        ("<!-- needs: gpu, a word more -->", "Words <!-- needs: gpu -->.\n", "is not before"),
        ("<!-- exits: 3 -->", "<!-- run by: tests/no_such.py -->", "does not name"),
        ("```cpp", "```", "without a language"),
        ("```cpp", "    indented", "has no language"),
    ],
)
def test_marks_that_are_wrong_are_refused(old, new, said, tmp_path):
    page = tmp_path / "page.md"
    assert old in GOOD
    page.write_text(GOOD.replace(old, new))
    with pytest.raises(PageError, match=said):
        blocks_of(page)


@pytest.mark.parametrize(
    ("language", "text"), [("json", "{'a': 1}"), ("toml", "a = "), ("python", "fi_ffi.rmsnorm(x)")]
)
def test_what_is_compared_can_fail(language, text, tmp_path):
    page = tmp_path / "page.md"
    mark = "<!-- signature -->\n" if language == "python" else ""
    page.write_text(f"{mark}```{language}\n{text}\n```\n")
    with pytest.raises(AssertionError, match=f"the {language} block is wrong"):
        run(page, tmp_path)


MISSING = """\
```python
x = [1]
```

```python
import fi_ffi
x.append(fi_ffi.module("no_such_module"))
```

<!-- output -->
```text
…
```

```python
assert len(x) == 2
```

<!-- raises: KeyError -->
```python
{}["a"]
```
"""


OLD = """
```python
import fi_ffi
from fi_ffi.errors import ArgumentError

raise ArgumentError("op", "backend", got="'auto'", expected=RELEASES)
```
"""


@pytest.mark.parametrize("releases", ["not in 0.6.13", "not in 0.6.1"])
def test_what_the_release_in_force_lacks_is_skipped(releases, tmp_path):
    """On a GPU, where the kernels are of one release; another refusal is a fault of the page."""
    page = tmp_path / "page.md"
    page.write_text(OLD.replace("RELEASES", repr(f"a backend that has it: >=0.6.18, {releases}")))
    options = {"FI_FFI_RELEASE": "0.6.13", "FI_FFI_CACHE_DIR": str(tmp_path / "cache")}
    if releases.endswith("13"):
        assert "skipped: op: argument `backend`" in run_page(page, tmp_path, "--gpu", **options)
        (tmp_path / "without").mkdir()
        tmp_path, flags = tmp_path / "without", []
    else:
        flags = ["--gpu"]
    with pytest.raises(AssertionError, match="ArgumentError"):
        run_page(page, tmp_path, *flags, **options)


def test_after_a_missing_module_a_page_is_skipped(tmp_path):
    """On a GPU: its later blocks go on with what the skipped one would have left."""
    page = tmp_path / "page.md"
    page.write_text(MISSING)
    options = {"FI_FFI_SOURCES": "installed", "FI_FFI_CACHE_DIR": str(tmp_path / "cache")}
    lines = run_page(page, tmp_path, "--gpu", **options).splitlines()
    first, missing, *after = (line.split(": ", 2)[2] for line in lines)
    assert first == "run" and missing.startswith("skipped: no kernels of module 'no_such_module': ")
    assert len(after) == 3 and all(became.startswith("skipped: so was ") for became in after)
    (tmp_path / "without").mkdir()
    with pytest.raises(AssertionError, match="no kernels of module 'no_such_module'"):
        run_page(page, tmp_path / "without", **options)


def test_the_pages_are_seen():
    """What is read here is what stands there: a fence that is lost would be one that passes."""
    readme = ROOT / "README.md"
    fences = [line for line in readme.read_text().splitlines() if line.startswith("```")]
    assert len(blocks_of(readme)) == len(fences) // 2
