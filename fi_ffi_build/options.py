"""Options of module families: `batch_prefill:backend=fa3,dtype=bf16`."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """One option of a family: the values it takes (None: any that match `form`) and its default."""

    values: tuple[str, ...] | None
    default: str
    doc: str
    form: str = ""

    def accepts(self, value: str) -> bool:
        return value in self.values if self.values else bool(re.fullmatch(self.form, value))

    @property
    def expected(self) -> str:
        return " or ".join(self.values) if self.values else self.doc
