"""Write fi_ffi/ops/functions.pyi from the op table; `--check` only compares.

Signatures alone: the prose is in `help()`, made of the same rows.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from generated import write_or_check  # noqa: E402

from fi_ffi.ops.call.row import (  # noqa: E402
    KV_LAYOUTS,
    Arg,
    KvLayout,
    Row,
    Scalar,
    Tensor,
    Text,
    default_of,
)
from fi_ffi.ops.table import ROWS  # noqa: E402

TARGET = ROOT / "fi_ffi" / "ops" / "functions.pyi"
HEADER = '''"""Generated from the op table by tools/generate_stubs.py."""

from typing import Literal

from fi_ffi.abi.interop import TensorLike
from fi_ffi.ops.call.op import Op

OPS: dict[str, Op]
'''


_WIDTH = 100
_RESULTS = {"void": "None"}


def _parameter(arg: Arg, written: str | None) -> str:
    if isinstance(arg, Tensor):
        default = "" if written is None else " = ..." if not default_of(arg) else f" = {written}"
        return f"{arg.name}: TensorLike" + (" | None" if default_of(arg) else "") + default
    if isinstance(arg, KvLayout):
        return f"{arg.name}: Literal{list(KV_LAYOUTS)} = {arg.default!r}"
    if isinstance(arg, Text):
        return f"{arg.name}: Literal{list(arg.words)}{_default(arg, written)}"
    if not isinstance(arg, Scalar):
        raise TypeError(f"{arg.name}: a plan's result is no argument of a function of its own")
    if arg.size_of:
        return f"{arg.name}: {arg.type.__name__} | None = None"
    return f"{arg.name}: {arg.type.__name__}{_default(arg, written)}"


def _default(arg: Scalar | Text, written: str | None) -> str:
    """What follows an annotation; one that must be given may come after one that need not."""
    if arg.default is not None:
        return f" = {arg.default!r}"
    return " = ..." if written else ""


def _call(row: Row) -> str:
    """The declaration of `__call__`: in a line, or its parameters in as many as they take."""
    given = [_parameter(*each) for each in zip(row.given, row.defaults, strict=True)]
    parameters = ["self", *given, "*", "stream: object = None"]
    result = _RESULTS.get(row.result, row.result)
    call = f"    def __call__({', '.join(parameters)}) -> {result}: ..."
    if len(call) <= _WIDTH:
        return call
    lines = textwrap.wrap(_whole(parameters), _WIDTH - 8, break_on_hyphens=False)
    inside = [" " * 8 + line.replace("\0", " ") for line in lines]
    return "\n".join(["    def __call__(", *inside, f"    ) -> {result}: ..."])


def _whole(parameters: list[str]) -> str:
    """A list of parameters in which lines break between two of them alone."""
    return " ".join(f"{parameter},".replace(" ", "\0") for parameter in parameters)


def text() -> str:
    """The stubs; ops whose signatures are the same share the class of the first of them."""
    # The first row of an op is that of the default release.
    first = {row.name: row for row in reversed(ROWS)}
    sharing: dict[str, list[str]] = {}
    for name in dict.fromkeys(row.name for row in ROWS):
        sharing.setdefault(_call(first[name]), []).append(name)
    stubs = [
        "\n".join([f"\nclass _{names[0]}(Op):", call, *(f"{name}: _{names[0]}" for name in names)])
        for call, names in sharing.items()
    ]
    return HEADER + "\n".join(stubs) + "\n"


if __name__ == "__main__":
    sys.exit(write_or_check(TARGET, text(), __file__))
