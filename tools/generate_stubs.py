"""Write fi_ffi/ops/functions.pyi from the op table; `--check` only compares."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from generated import write_or_check  # noqa: E402

from fi_ffi.ops.docs import docstring  # noqa: E402
from fi_ffi.ops.row import KV_LAYOUTS, Arg, KvLayout, Row, Scalar, Tensor, Text, default_of  # noqa: E402
from fi_ffi.ops.table import ROWS  # noqa: E402

TARGET = ROOT / "fi_ffi" / "ops" / "functions.pyi"
HEADER = '''"""Generated from the op table by tools/generate_stubs.py."""

from typing import Literal

from fi_ffi.abi.interop import TensorLike
from fi_ffi.ops.op import Op

OPS: dict[str, Op]
'''


_RESULTS = {"void": "None"}


def _parameter(arg: Arg) -> str:
    if isinstance(arg, Tensor):
        return f"{arg.name}: TensorLike" + (" | None = None" if default_of(arg) else "")
    if isinstance(arg, KvLayout):
        return f"{arg.name}: Literal{list(KV_LAYOUTS)} = {arg.default!r}"
    if isinstance(arg, Text):
        default = "" if arg.default is None else f" = {arg.default!r}"
        return f"{arg.name}: Literal{list(arg.words)}{default}"
    if not isinstance(arg, Scalar):
        raise TypeError(f"{arg.name}: a plan's result is no argument of a function of its own")
    default = "" if arg.default is None else f" = {arg.default!r}"
    return f"{arg.name}: {arg.type.__name__}{default}"


def _stub(row: Row) -> str:
    parameters = ["self", *map(_parameter, row.args), "*", "stream: object = None"]
    lines = [f"\nclass _{row.name}(Op):", "    def __call__("]
    lines += [f"        {parameter}," for parameter in parameters]
    doc = textwrap.indent(docstring(row), " " * 8).strip()
    lines += [f"    ) -> {_RESULTS.get(row.result, row.result)}:", f'        """{doc}', '        """', f"\n{row.name}: _{row.name}\n"]
    return "\n".join(lines)


def text() -> str:
    # The first row of an op is that of the default release.
    first = {row.name: row for row in reversed(ROWS)}
    return HEADER + "".join(_stub(first[name]) for name in dict.fromkeys(r.name for r in ROWS))


if __name__ == "__main__":
    sys.exit(write_or_check(TARGET, text(), __file__))
