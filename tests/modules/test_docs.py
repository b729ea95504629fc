"""The table of types in docs/modules.md."""

from __future__ import annotations

import re
from pathlib import Path

import fi_ffi

DOCS = Path(fi_ffi.__file__).parents[1] / "docs" / "modules.md"


def test_every_type_in_the_table_is_taken(every):
    """What the table of types says is there has a packer."""
    from fi_ffi.abi.values import packer_of

    table = DOCS.read_text().partition("| type | takes | gives |")[2].partition("\n\n")[0]
    spelled = re.findall(r"`([^`]+)`", "\n".join(r.split(" | ")[0] for r in table.splitlines()))
    assert len(spelled) > 20
    for text in spelled:
        text = text.replace("<T>", "<int>").replace("<K, V>", "<str, int>").replace("...", "int")
        assert callable(packer_of(text))
