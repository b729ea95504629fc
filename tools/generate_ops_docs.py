"""Write docs/ops.md from the op table; `--check` only compares."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from generated import write_or_check  # noqa: E402

import fi_ffi  # noqa: E402
from fi_ffi.families import FAMILIES  # noqa: E402
from fi_ffi.loader.lock import the_lock  # noqa: E402
from fi_ffi.ops import attention  # noqa: E402
from fi_ffi.ops.attention.rows import FORMS  # noqa: E402
from fi_ffi.ops.call.op import Op  # noqa: E402
from fi_ffi.ops.capability.judgement import listed_codes  # noqa: E402
from fi_ffi.ops.capability.matrix import PACKAGES, package_entries  # noqa: E402
from fi_ffi.ops.functions import OPS  # noqa: E402
from fi_ffi.ops.moe import interface  # noqa: E402
from fi_ffi.ops.releases import span_of  # noqa: E402
from fi_ffi.ops.row import Arg, Row, Tensor, default_of, defaults  # noqa: E402

TARGET = ROOT / "docs" / "ops.md"
HEADER = """\
# Every op

Generated from the op table by tools/generate_ops_docs.py. `help(fi_ffi.NAME)` says more of an op:
what is aligned how, how far offsets reach, what may be the same memory.

A tensor is a `TensorDesc` or anything with a tensor protocol; a shape names its axes, and the
same name is the same size; for [1] a tensor of no axis will do. T and other capitals are dtypes,
which a line below the arguments names. An argument that is `REQUIRED` has to be given, although
one before it need not be. Every call takes `stream=` as well; on `device="cpu"` it runs the
reference. *SMs* are those that FlashInfer {release} compiles the module for, [matrix.md](matrix.md)
says more. Arguments are those of {release}; where another release has others, the op takes those
of the kernels in use.
"""


def _first_line(text: str) -> str:
    return " ".join((text or "").strip().partition("\n\n")[0].split())


def _anchor(name: str) -> str:
    return "".join(c for c in name.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _signature(row: Row) -> str:
    written = defaults(row.given)
    parameters = [
        arg.name if default is None else f"{arg.name}={default}"
        for arg, default in zip(row.given, written, strict=True)
    ]
    return f"{row.name}({', '.join(parameters)}, *, stream=None)"


def _kind(arg: Arg) -> str:
    """An argument's shape and dtype, or its Python type."""
    if not isinstance(arg, Tensor):
        kind = getattr(arg, "type", str)
        words = getattr(arg, "words", ())
        return " or ".join(map(repr, words)) if words else kind.__name__
    shape = ", ".join(arg.axis_names)
    marks = [f"[{shape}]{f' or [{shape}, 1]' if arg.column else ''} {arg.dtype}"]
    marks += ["written"] if arg.writes else []
    marks += ["or None"] if default_of(arg) else []
    return ", ".join(marks)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _dtypes(row: Row) -> str:
    return ", ".join(f"{name} is {' or '.join(types)}" for name, types in row.dtypes.items())


def _a_gpu(row: Row) -> tuple[int, int] | None:
    """A GPU that has another module than the row's own, of a form that is only for such."""
    others = {capability[0] for capability in row.modules}
    return next(iter(row.modules)) if others and others == {*row.capabilities} else None


def _sms(module: str, row: Row) -> str:
    """What the default release compiles a module, or a family's modules, for."""
    codes = listed_codes(module, the_lock().default_release) or ()
    able = [c for c in codes if not row.capabilities or c.sm // 10 in row.capabilities]
    names = [f"{c.sm}{c.suffix}" for c in sorted(able, key=lambda c: (c.sm, c.suffix))]
    if names:
        return ", ".join(names)
    only = " or ".join(f"{major}.x" for major in row.capabilities)
    return f"{only or 'any'}; not in FlashInfer's own list: `fi-ffi build` makes it"


def _op(op: Op, family: str) -> Iterator[str]:
    row = op.row
    yield f"### `{row.name}`\n"
    yield f"{row.doc}\n"
    yield f"<!-- signature -->\n```python\nfi_ffi.{_signature(row)}\n```\n"
    yield "| argument | | |\n|---|---|---|"
    for arg in row.given:
        yield f"| `{arg.name}` | {_escaped(_kind(arg))} | {_escaped(getattr(arg, 'doc', ''))} |"
    facts = [
        _dtypes(row),
        f"entry `{row.symbol}` of module `{row.module}`",
        f"FlashInfer {span_of(op.rows)}" + (f" in {len(op.rows)} forms" * (len(op.rows) > 1)),
        f"SMs {_sms(row.module, row)}",
        f"source `{row.source}`, reference `fi_ffi/reference/{family}.py`",
    ]
    yield "\n" + "; ".join(fact for fact in facts if fact) + ".\n"


def _attention() -> Iterator[str]:
    yield "## Family: attention\n"
    yield "[attention.md](attention.md) has the plans and their options. These are public:\n"
    for name in attention.__all__:
        yield f"- `fi_ffi.{name}`: {_first_line(getattr(fi_ffi, name).__doc__)}"
    yield "\nand these are the kernels' entries that they call, each a row as those above:\n"
    yield "| entry | kernel | of | FlashInfer | arguments | dtypes | SMs |"
    yield "|---|---|---|---|---|---|---|"
    for first, forms in FORMS.items():
        kernel = first.variant.strip("_").replace("_", ", ") or "fa2"
        cells = (
            f"`{first.name}`", kernel, f"`{first.source}`", span_of(forms),
            str(len(first.args)), _dtypes(first) or "int32", _attention_sms(first),
        )  # fmt: skip
        yield f"| {' | '.join(map(_escaped, cells))} |"
    yield ""


def _packages() -> Iterator[str]:
    """A table for each package that has rows and is not attention."""
    for package, group in itertools.groupby(package_entries(), key=lambda found: found[0]):
        module = importlib.import_module(f"fi_ffi.ops.{package}")
        yield f"## Family: {package}\n\n{_first_line(module.__doc__)} These are public:\n"
        for name in getattr(module, "__all__", ()):
            yield f"- `{name}`: {_first_line(getattr(module, name).__doc__)}"
        yield "\nand these are the entries that they call:\n"
        yield "| entry | module | of | FlashInfer | arguments | dtypes | SMs |"
        yield "|---|---|---|---|---|---|---|"
        for _, name, forms in group:
            first = forms[0]
            # One of each module: those of other GPUs have sources and arguments of their own.
            of_modules = {form.source: form for form in reversed(forms)}.values()
            modules = {form.module_on(_a_gpu(form)): form for form in reversed(of_modules)}
            ways = [
                (f"`{module}`", f"`{form.source}`", str(len(form.args)), _sms(module, form))
                for module, form in modules.items()
            ]
            module, source, count, sms = (", ".join(each) for each in zip(*ways, strict=True))
            cells = f"`{name}`", module, source, span_of(forms), count, _dtypes(first), sms
            yield f"| {' | '.join(map(_escaped, cells))} |"
        yield ""


def _moe() -> Iterator[str]:
    """What follows the table of its package: the module whose methods have no rows."""
    release = the_lock().default_release
    yield f"The others call module `{interface.MODULE}`, of which they use, in {release}:\n"
    made = interface.of_release(release)
    for function in (made.init, *made.methods.values(), interface.INTERLEAVE):
        yield f"- `{function.signature.name}({', '.join(function.names)})`"
    yield ""


def _attention_sms(row: Row) -> str:
    return "90a" if "fa3" in row.variant else _sms(row.module, row)


def _by_family() -> dict[str, list[Op]]:
    names = {f: {row.name for row in importlib.import_module(f"fi_ffi.ops.table.{f}").ROWS}
             for f in FAMILIES}  # fmt: skip
    found = {f: [op for name, op in OPS.items() if name in names[f]] for f in FAMILIES}
    return {family: ops for family, ops in found.items() if ops}


def _contents(families: dict[str, Sequence[Op]]) -> Iterator[str]:
    for family, ops in families.items():
        links = ", ".join(f"[`{op.__name__}`](#{_anchor(op.__name__)})" for op in ops)
        yield f"- **[{family}](#family-{_anchor(family)})**: {links}"
    for package in PACKAGES:
        public = getattr(importlib.import_module(f"fi_ffi.ops.{package}"), "__all__", ())
        links = ", ".join(f"`{name}`" for name in public)
        yield f"- **[{package}](#family-{_anchor(package)})**: {links}"
    yield "- **[attention](#family-attention)**: " + ", ".join(
        f"`{name}`" for name in attention.__all__
    )
    yield ""


def text() -> str:
    families = _by_family()
    lines = [HEADER.format(release=the_lock().default_release), *_contents(families)]
    for family, ops in families.items():
        module = importlib.import_module(f"fi_ffi.ops.table.{family}")
        lines += [f"## Family: {family}\n", f"{_first_line(module.__doc__)}\n"]
        for op in ops:
            lines += _op(op, family)
    return "\n".join([*lines, *_packages(), *_moe(), *_attention()]).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(write_or_check(TARGET, text(), __file__))
