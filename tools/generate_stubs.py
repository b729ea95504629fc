"""Write fi_ffi/ops/functions.pyi from the op table; `--check` only compares."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from generated import write_or_check  # noqa: E402

from fi_ffi.ops.docs import docstring  # noqa: E402
from fi_ffi.ops.row import (  # noqa: E402
    KV_LAYOUTS,
    Arg,
    KvLayout,
    Row,
    Scalar,
    Tensor,
    Text,
    default_of,
    defaults,
)
from fi_ffi.ops.table import ROWS  # noqa: E402

TARGET = ROOT / "fi_ffi" / "ops" / "functions.pyi"
HEADER = '''"""Generated from the op table by tools/generate_stubs.py."""

from typing import Literal

from fi_ffi.abi.interop import TensorLike
from fi_ffi.ops.call.op import Op

OPS: dict[str, Op]
'''


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


def _stub(row: Row) -> str:
    given = map(_parameter, row.given, defaults(row.given))
    parameters = ["self", *given, "*", "stream: object = None"]
    lines = [f"\nclass _{row.name}(Op):", "    def __call__("]
    lines += [f"        {parameter}," for parameter in parameters]
    doc = textwrap.indent(docstring(row), " " * 8).strip()
    result = _RESULTS.get(row.result, row.result)
    lines += [f"    ) -> {result}:", f'        """{doc}', '        """']
    lines += [f"\n{row.name}: _{row.name}\n"]
    return "\n".join(lines)


def text() -> str:
    # The first row of an op is that of the default release.
    first = {row.name: row for row in reversed(ROWS)}
    return HEADER + "".join(_stub(first[name]) for name in dict.fromkeys(r.name for r in ROWS))


if __name__ == "__main__":
    sys.exit(write_or_check(TARGET, text(), __file__))
