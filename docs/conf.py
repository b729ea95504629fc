"""The site made of these pages: `python3 -m sphinx -W --keep-going -n docs OUT`.

Pages link as a code host wants it, to files outside of docs/ too.  Here such a link leads to
the page that shows the file (see `PAGES`), and any other file is offered as a download.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

project = "fi_ffi"
copyright = "the fi_ffi authors, Apache-2.0"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "fi_ffi"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_copy_source = False
pygments_style = "friendly"
smartquotes = False  # "float16" is to be copied

# The slugs of a code host: `#refused-before-launch` leads to the same place on both.
myst_heading_anchors = 4
myst_links_external_new_tab = False
# A block that shows a part of a program, or `…`, is no program that a lexer must take.
suppress_warnings = ["misc.highlighting_failure"]

# Which page shows a file that lies outside of docs/.
PAGES = {
    "README.md": "overview",
    "SECURITY.md": "security",
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
}
LANGUAGES = {".py": "python", ".c": "c", ".cpp": "cpp", ".h": "c", ".rs": "rust", ".sh": "bash"}
EXAMPLES = sorted(
    (file for file in (ROOT / "examples").rglob("*") if file.suffix in (*LANGUAGES, ".md")),
    key=lambda file: (file.parent, file.suffix != ".md", file.name),
)


def slug(file: Path) -> str:
    """The anchor of an example on its page."""
    return re.sub(r"[^\w-]", "", file.relative_to(ROOT / "examples").as_posix()).lower()


def page_of(file: Path) -> tuple[str, str | None] | None:
    """The page that shows a file or folder outside of docs/, and the anchor in it."""
    if file.suffix == "" and file.with_suffix(".md").is_file():
        file = file.with_suffix(".md")  # Sphinx names a document without its suffix
    if not file.is_relative_to(ROOT) or file.is_relative_to(DOCS):
        return None
    for example in EXAMPLES:
        if example.is_relative_to(file):
            return "examples", slug(example)
    page = PAGES.get(file.relative_to(ROOT).as_posix())
    return (page, None) if page else None


class LinksOut(SphinxTransform):
    """Lead links to files outside of docs/ to the pages that show them."""

    default_priority = 400

    def apply(self, **_: Any) -> None:
        kinds = (addnodes.pending_xref, addnodes.download_reference)
        for node in [node for kind in kinds for node in self.document.findall(kind)]:
            if node.get("reftype") != "myst":
                continue
            _, path = self.env.relfn2path(node["reftarget"], self.env.docname)
            if node.get("refdomain") == "doc":
                path = node["reftarget"]
            found = page_of(Path(path))
            if found is not None:
                node.replace_self(self.reference(node, *found))

    def reference(self, node: nodes.Element, page: str, anchor: str | None) -> nodes.Element:
        link = addnodes.pending_xref(
            refdomain="doc", reftype="myst", reftarget=page, refexplicit=node["refexplicit"],
            reftargetid=node.get("reftargetid") or anchor, refdoc=self.env.docname,
        )  # fmt: skip
        link.source, link.line = node.source, node.line
        link += nodes.inline("", "", *(child.deepcopy() for child in node.children[0].children))
        return link


def add_toctrees(_: Sphinx, docname: str, source: list[str]) -> None:
    """The site has the order and the titles of the first page's links, a caption a heading."""
    if docname == "index":
        for section in re.findall(r"^## .*(?:\n(?!## ).*)*", source[0], re.MULTILINE):
            links = re.findall(r"\[([^\]]+)\]\(([^)#:]+\.md)\)", section)
            pages = [f"{text[0].upper()}{text[1:]} <{_inside(link)}>" for text, link in links]
            lines = ["```{toctree}", ":hidden:", f":caption: {section.split(chr(10))[0][3:]}", ""]
            tree = "\n".join([*lines, *pages, "```"])
            source[0] = source[0].replace(section, f"{section}\n\n{tree}\n\n")


def _inside(link: str) -> str:
    return PAGES.get(link.removeprefix("../"), link)


def add_examples(_: Sphinx, docname: str, source: list[str]) -> None:
    """The files of examples/, each with a heading, after the text of their page."""
    if docname != "examples":
        return
    for file in EXAMPLES:
        name = file.relative_to(ROOT).as_posix()
        source[0] += f"\n({slug(file)})=\n## `{name.removeprefix('examples/')}`\n\n"
        if file.suffix == ".md":
            source[0] += f"```{{include}} ../{name}\n:heading-offset: 2\n```\n"
        else:
            options = f":language: {LANGUAGES[file.suffix]}"
            source[0] += f"```{{literalinclude}} ../{name}\n{options}\n```\n"


def from_docs(_: Sphinx, path: Path, __: str, content: list[str]) -> None:
    """The links of an included page, as seen from docs/, where it is included."""
    if path.suffix == ".md":
        content[0] = re.sub(r"\]\((?!\w+:|#)", f"]({path.parent.as_posix()}/", content[0])


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_transform(LinksOut)
    app.connect("source-read", add_toctrees)
    app.connect("source-read", add_examples)
    app.connect("include-read", from_docs)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
