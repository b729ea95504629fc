"""The documentation site builds without a warning, has everything, and notices what is broken."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import fi_ffi
from fi_ffi.ops.functions import OPS

from tests.helpers import sampling

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
MISSING = [n for n in ("sphinx", "myst_parser", "furo") if importlib.util.find_spec(n) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"the site is made with {', '.join(MISSING)}: pip install '.[docs]'"
)


def build(docs: Path, out: Path) -> subprocess.CompletedProcess[str]:
    sampling.only_in_full("builds the site")
    options = ["-W", "--keep-going", "-n", "-q"]
    command = [sys.executable, "-m", "sphinx", *options, str(docs), str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(DOCS, out)
    assert done.returncode == 0, done.stderr
    return out


def test_every_public_name_is_on_a_reference_page(site):
    pages = [(site / name).read_text() for name in ("ops.html", "reference.html")]
    for name in fi_ffi.__all__:
        anchor = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        assert f'id="{anchor}"' in pages[name not in OPS], name


def test_all_has_what_is_public():
    public = {
        name
        for name in dir(fi_ffi)
        if not name.startswith("_") and not isinstance(getattr(fi_ffi, name), types.ModuleType)
    }
    assert public - {"OPS", "TYPE_CHECKING", "annotations"} == {*fi_ffi.__all__}


def test_every_page_and_example_is_there(site):
    for page in DOCS.rglob("*.md"):
        assert (site / page.relative_to(DOCS)).with_suffix(".html").is_file(), page
    examples = (site / "examples.html").read_text()
    for file in (ROOT / "examples").rglob("*.py"):
        name = file.relative_to(ROOT / "examples").as_posix()
        assert f">{name}</span>" in examples, file


def test_links_out_of_docs_lead_to_pages(site):
    page = (site / "howto" / "paged-kv-in-your-runtime.html").read_text()
    assert 'href="../examples.html#paged-attention-cuda-python' in page
    assert 'href="security.html"' in (site / "index.html").read_text()
    overview = (site / "overview.html").read_text()
    assert re.search(r'href="_downloads/\w+/wheels\.lock"', overview)
    assert re.search(r'src="_images/decode-step\.svg"', overview)


PAGE = "# A page\n\n[here](#a-page), [there](other.md#another), [it](../examples/x.py)\n"
INDEX = (
    "# Index\n\n## One\n\n- [Page](page.md), [other](other.md)\n\n## Two\n\n- [All](examples.md)\n"
)


def small_site(root: Path, changes: dict[str, str]) -> subprocess.CompletedProcess[str]:
    docs = root / "docs"
    pages = {"index.md": INDEX, "page.md": PAGE}
    pages |= {"other.md": "# Another\n", "examples.md": "# All\n"}
    docs.mkdir(parents=True)
    (root / "examples").mkdir()
    (root / "examples" / "x.py").write_text("print(1)\n")
    shutil.copy(DOCS / "conf.py", docs)
    shutil.copytree(DOCS / "_static", docs / "_static")
    for name, text in (pages | changes).items():
        (docs / name).write_text(text)
    return build(docs, root / "site")


def test_what_is_right_builds(tmp_path):
    done = small_site(tmp_path, {})
    assert done.returncode == 0, done.stderr


def test_what_is_broken_is_an_error(tmp_path):
    broken = {
        "index.md": INDEX.replace("page.md", "gone.md"),
        "page.md": PAGE.replace("#a-page", "#no-such").replace("#another", "#nowhere")
        + "\n[a](lost.md), [b](../examples/none.py)\n",
    }
    done = small_site(tmp_path, broken)
    assert done.returncode == 1
    for said in (
        "nonexisting document 'gone'", "target not found: 'gone.md'",
        "page.md: WARNING: document isn't included in any toctree",
        "target not found: 'no-such'", "id not found in doc 'other': 'nowhere'",
        "target not found: 'lost.md'", "target not found: '../examples/none.py'",
    ):  # fmt: skip
        assert said in done.stderr, (said, done.stderr)
