"""Draw faults by operator: small changes of the text of a line of code, which still compile.

Every line of code of a folder is as likely as any other.  Left out is where no fault of a program
is: docstrings, annotations, `if TYPE_CHECKING`, `__all__`, imports, format strings, what `raise`
is given, the options of `@dataclass`, and sentences.
"""

from __future__ import annotations

import ast
import bisect
import functools
import io
import itertools
import random
import re
import textwrap
import tokenize
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

GENERATED = ("fi_ffi/abi/_cffi.py",)
_COMPARED = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "is": "is not",
    "is not": "is", "in": "not in", "not in": "in",
}  # fmt: skip
_SWAPPED = {"+": "-", "-": "+", "<<": ">>", ">>": "<<", "|": "&", "&": "|"}
_FORMS = (
    "Literal",
    "Union",
    "Optional",
    "Callable",
    "Mapping",
    "Sequence",
    "Iterator",
    "Annotated",
)
_NAMING = (
    "dataclass",
    "cast",
    "TypeVar",
    "ParamSpec",
    "NewType",
    "TypeAlias",
    "namedtuple",
    "NamedTuple",
)
_SYMMETRIC = ("array_equal", "gcd", "lcm", "max", "maximum", "min", "minimum")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_NULL = '__import__("contextlib").nullcontext'


class Edit(NamedTuple):
    """The characters from `start` to `end` of a text become `new`."""

    start: int
    end: int
    new: str


Edits = tuple[Edit, ...]
_Operator = Callable[["Source", Any, Any], Iterator[Edits]]


@dataclass(frozen=True)
class Fault:
    """A drawn fault: whole lines of a file, `old`, become `new`; `line` is where it begins."""

    file: str
    line: int
    operator: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.operator}: {_differing(self.old, self.new)}"

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is, wherever its lines have moved to."""
        return self.file, self.old.strip(), self.new.strip()

    def applied(self, root: Path) -> str:
        """The file's text with the fault, in the lines next to `line` that are `old`."""
        text = (root / self.file).read_text()
        lines, wanted = text.splitlines(True), self.old.splitlines(True)
        starts = [i for i in range(len(lines)) if lines[i : i + len(wanted)] == wanted]
        if not starts:
            raise ValueError(f"{self.file} no longer has {self.old.strip()!r}")
        start = min(starts, key=lambda i: abs(i + 1 - self.line))
        return "".join([*lines[:start], self.new, *lines[start + len(wanted) :]])


def _differing(old: str, new: str) -> str:
    """The part of two texts that differs, and some words beside it."""
    old, new = (" ".join(text.split()) for text in (old, new))
    alike = zip(old, new, strict=False)
    start = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], alike))
    alike = zip(reversed(old[start:]), reversed(new[start:]), strict=False)
    end = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], alike))
    start, end = max(start - 30, 0), max(end - 30, 0)
    texts = (old[start : len(old) - end], new[start : len(new) - end])
    return " -> ".join(f"`{textwrap.shorten(text, 100, placeholder=' ...')}`" for text in texts)


class Source:
    """A file's text, its syntax tree, and where in the text a node is."""

    def __init__(self, text: str) -> None:
        self.text, self.tree = text, ast.parse(text)
        self._lines = text.splitlines(True)
        self._starts = [0, *itertools.accumulate(map(len, self._lines))]
        self._tokens = [
            Edit(self._at(token.start), self._at(token.end), token.string)
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type in (tokenize.OP, tokenize.NAME)
        ]
        self._token_starts = [token.start for token in self._tokens]
        self._dumped = ast.dump(self.tree)
        self.keys = sorted({self.of(node) for node in _keys(self.tree)})

    def _at(self, place: tuple[int, int]) -> int:
        return self._starts[place[0] - 1] + place[1]

    def _offset(self, line: int, column: int) -> int:
        """The place of a byte of a line, which is how nodes count."""
        text = self._lines[line - 1]
        if text.isascii():
            return self._starts[line - 1] + column
        return self._starts[line - 1] + len(text.encode()[:column].decode())

    def start(self, node: Any) -> int:
        return self._offset(node.lineno, node.col_offset)

    def end(self, node: Any) -> int:
        return self._offset(node.end_lineno, node.end_col_offset)

    def of(self, node: ast.AST) -> str:
        """A node's text."""
        return self.text[self.start(node) : self.end(node)]

    def replaced(self, node: ast.AST, new: str) -> Edits:
        return (Edit(self.start(node), self.end(node), new),)

    def swapped(self, one: ast.AST, other: ast.AST) -> Edits:
        return self.replaced(one, self.of(other)) + self.replaced(other, self.of(one))

    def tokens(self, start: int, end: int) -> list[Edit]:
        """The operators and words between two places."""
        first = bisect.bisect_left(self._token_starts, start)
        return [*itertools.takewhile(lambda token: token.start < end, self._tokens[first:])]

    def operator(self, left: ast.AST, right: ast.AST) -> Edit:
        """What is between two operands, which may be two words."""
        between = self.tokens(self.end(left), self.start(right))
        words = [token for token in between if token.new not in "()"]
        return Edit(words[0].start, words[-1].end, " ".join(token.new for token in words))

    def line(self, offset: int) -> int:
        return bisect.bisect_right(self._starts, offset)

    def fault(self, file: str, operator: str, edits: Edits) -> Fault | None:
        """The fault of these edits; None if they are none, or what comes of them is no program."""
        text = self.text
        for edit in sorted(edits, reverse=True):
            text = text[: edit.start] + edit.new + text[edit.end :]
        program = _compiled(text)
        if program is None or ast.dump(program) == self._dumped:
            return None
        first, last = self.line(min(edits).start), self.line(max(edits).end)
        start, end = self._starts[first - 1], self._starts[last]
        changed = text[start : len(text) - (len(self.text) - end)]
        return Fault(file, first, operator, self.text[start:end], changed)


def _compiled(text: str) -> ast.Module | None:
    """A program's tree; None if it has a mistake of syntax."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(text, "fault", "exec")
        except (SyntaxError, ValueError):
            return None
        return ast.parse(text)


def _keys(tree: ast.AST) -> Iterator[ast.Constant]:
    """Strings that are a key of a dictionary."""
    for node in ast.walk(tree):
        found: list[ast.AST | None] = []
        if isinstance(node, ast.Dict):
            found = [*node.keys]
        elif isinstance(node, ast.Subscript):
            found = [node.slice]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            is_of_keys = node.func.attr in ("get", "pop", "setdefault") and node.args
            found = [node.args[0]] if is_of_keys else []
        yield from (one for one in found if _is_text(one))


def _is_text(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_number(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def _name_of(node: ast.AST) -> str:
    return getattr(node, "id", None) or getattr(node, "attr", None) or ""


# The operators.  Each has a node, and yields ways to make a fault of it.


def _comparison(source: Source, node: ast.Compare, _: object) -> Iterator[Edits]:
    for left, right in itertools.pairwise([node.left, *node.comparators]):
        operator = source.operator(left, right)
        yield (operator._replace(new=_COMPARED[operator.new]),)


def _off_by_one(source: Source, node: ast.Constant | ast.Slice, _: object) -> Iterator[Edits]:
    if isinstance(node, ast.Slice):
        for bound in (node.lower, node.upper):
            if bound is not None and not isinstance(bound, ast.Constant):
                for sign in "+-":
                    yield source.replaced(bound, f"({source.of(bound)}) {sign} 1")
    elif type(node.value) is int:
        for value in (node.value - 1, node.value + 1):
            if value >= 0:
                yield source.replaced(node, str(value))


def _arithmetic(source: Source, node: ast.BinOp, _: object) -> Iterator[Edits]:
    operator = source.operator(node.left, node.right)
    if operator.new in _SWAPPED:
        yield (operator._replace(new=_SWAPPED[operator.new]),)
    elif operator.new == "//":
        left, right = source.of(node.left), source.of(node.right)
        if isinstance(node.left, ast.UnaryOp) and isinstance(node.left.op, ast.USub):
            yield source.replaced(node.left, source.of(node.left.operand))
        else:
            yield source.replaced(node, f"(-(-({left}) // ({right})))")


def _rounded_down(source: Source, node: ast.UnaryOp, _: object) -> Iterator[Edits]:
    """`-(-a // b)` becomes `a // b`."""
    inner = node.operand
    if not (isinstance(node.op, ast.USub) and isinstance(inner, ast.BinOp)):
        return
    is_ceiling = isinstance(inner.op, ast.FloorDiv) and isinstance(inner.left, ast.UnaryOp)
    if is_ceiling and isinstance(inner.left.op, ast.USub):
        yield source.replaced(
            node, f"(({source.of(inner.left.operand)}) // ({source.of(inner.right)}))"
        )


def _swapped_arguments(source: Source, node: ast.Call, _: object) -> Iterator[Edits]:
    if _name_of(node.func) in _SYMMETRIC:
        return
    for one, other in itertools.pairwise(node.args):
        if not isinstance(one, ast.Starred) and not isinstance(other, ast.Starred):
            yield source.swapped(one, other)
    named = [keyword.value for keyword in node.keywords if keyword.arg]
    for one, other in itertools.pairwise(named):
        yield source.swapped(one, other)


def _another_function(source: Source, node: ast.Call, _: object) -> Iterator[Edits]:
    other = {"min": "max", "max": "min", "any": "all", "all": "any"}.get(_name_of(node.func))
    if isinstance(node.func, ast.Name) and other:
        yield source.replaced(node.func, other)


def _dropped_call(source: Source, node: ast.Expr, _: object) -> Iterator[Edits]:
    called = node.value.value if isinstance(node.value, ast.Await) else node.value
    if isinstance(called, ast.Call):
        yield source.replaced(node, "pass")


def _dropped_assignment(
    source: Source, node: ast.Assign | ast.AugAssign | ast.Delete, _: object
) -> Iterator[Edits]:
    targets = [node.target] if isinstance(node, ast.AugAssign) else node.targets
    if isinstance(node, ast.AugAssign) or isinstance(targets[0], (ast.Attribute, ast.Subscript)):
        yield source.replaced(node, "pass")


def _dropped_finally(source: Source, node: ast.Try, _: object) -> Iterator[Edits]:
    if node.finalbody:
        start, end = source.start(node.finalbody[0]), source.end(node.finalbody[-1])
        yield (Edit(start, end, "pass"),)


def _lost_context(source: Source, node: ast.With | ast.AsyncWith, _: object) -> Iterator[Edits]:
    for item in node.items:
        yield source.replaced(item.context_expr, f"{_NULL}({source.of(item.context_expr)})")


def _condition(source: Source, node: ast.AST, _: object) -> Iterator[Edits]:
    tests = node.ifs if isinstance(node, ast.comprehension) else [node.test]  # type: ignore[attr-defined]
    for test in tests:
        if not isinstance(test, ast.Constant):
            for new in (f"not ({source.of(test)})", "True", "False"):
                yield source.replaced(test, new)


def _dropped_not(source: Source, node: ast.UnaryOp, _: object) -> Iterator[Edits]:
    if isinstance(node.op, ast.Not):
        yield source.replaced(node, f"({source.of(node.operand)})")


def _and_or(source: Source, node: ast.BoolOp, _: object) -> Iterator[Edits]:
    other = "or" if isinstance(node.op, ast.And) else "and"
    for left, right in itertools.pairwise(node.values):
        yield (source.operator(left, right)._replace(new=other),)


def _wrong_key(source: Source, node: ast.AST, _: object) -> Iterator[Edits]:
    for key in _keys_of(node):
        for other in source.keys:
            if other != source.of(key):
                yield source.replaced(key, other)


def _keys_of(node: ast.AST) -> list[ast.Constant]:
    alone = ast.Module(body=[], type_ignores=[])
    alone.body = [node]  # type: ignore[list-item]
    children = [*ast.iter_child_nodes(node)]
    return [key for key in _keys(alone) if key in children]


def _wrong_constant(source: Source, node: ast.Constant, pool: Pool) -> Iterator[Edits]:
    if isinstance(node.value, bool):
        yield source.replaced(node, str(not node.value))
    elif _is_number(node) or _is_text(node):
        for other in pool.like(node):
            if other != source.of(node):
                yield source.replaced(node, other)


def _wrong_return(source: Source, node: ast.AST, _: object) -> Iterator[Edits]:
    """Nothing is returned, or the function ends before what it changes."""
    if isinstance(node, ast.Return):
        if node.value is not None and getattr(node.value, "value", node) is not None:
            yield source.replaced(node, "return None")
    elif not isinstance(node, ast.Assign) or isinstance(
        node.targets[0], (ast.Attribute, ast.Subscript)
    ):
        yield source.replaced(node, "return None")


def _dropped_except(source: Source, node: ast.ExceptHandler, _: object) -> Iterator[Edits]:
    if node.type is not None:
        yield source.replaced(node.type, "()")


def _changed_default(source: Source, node: ast.arguments, _: object) -> Iterator[Edits]:
    for default in [*node.defaults, *filter(None, node.kw_defaults)]:
        if isinstance(default, ast.Constant):
            yield source.replaced(default, _other_default(default.value))


def _other_default(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return repr(not value)
    if isinstance(value, (int, float)):
        return repr(value + 1)
    return "None"


def _loop_control(source: Source, node: ast.Break | ast.Continue, _: object) -> Iterator[Edits]:
    yield source.replaced(node, "continue" if isinstance(node, ast.Break) else "break")


_CONDITIONAL = (ast.If, ast.While, ast.IfExp, ast.comprehension)
_CHANGING = (ast.Assign, ast.AugAssign, ast.Delete)
OPERATORS: dict[str, tuple[tuple[type[ast.AST], ...], _Operator]] = {
    "comparison": ((ast.Compare,), _comparison),
    "off by one": ((ast.Constant, ast.Slice), _off_by_one),
    "arithmetic": ((ast.BinOp,), _arithmetic),
    "rounding": ((ast.UnaryOp,), _rounded_down),
    "swapped arguments": ((ast.Call,), _swapped_arguments),
    "another function": ((ast.Call,), _another_function),
    "dropped call": ((ast.Expr,), _dropped_call),
    "dropped assignment": (_CHANGING, _dropped_assignment),
    "dropped finally": ((ast.Try,), _dropped_finally),
    "lost context": ((ast.With, ast.AsyncWith), _lost_context),
    "condition": (_CONDITIONAL, _condition),
    "dropped not": ((ast.UnaryOp,), _dropped_not),
    "and, or": ((ast.BoolOp,), _and_or),
    "wrong key": ((ast.Dict, ast.Subscript, ast.Call), _wrong_key),
    "wrong constant": ((ast.Constant,), _wrong_constant),
    "return": ((ast.Return, ast.Expr, *_CHANGING), _wrong_return),
    "dropped except": ((ast.ExceptHandler,), _dropped_except),
    "default": ((ast.arguments,), _changed_default),
    "break, continue": ((ast.Break, ast.Continue), _loop_control),
}
_BY_TYPE: dict[type[ast.AST], list[tuple[str, _Operator]]] = defaultdict(list)
for _name, (_types, _operator) in OPERATORS.items():
    for _type in _types:
        _BY_TYPE[_type].append((_name, _operator))


class Pool:
    """The constants of a function, or of a statement outside of one."""

    def __init__(self, source: Source, scope: ast.AST) -> None:
        self._texts: dict[type, set[str]] = defaultdict(set)
        for node, _ in _nodes(scope, scope):
            if isinstance(node, ast.Constant) and not _is_sentence(node):
                self._texts[type(node.value)].add(source.of(node))

    def like(self, node: ast.Constant) -> list[str]:
        return sorted(self._texts[type(node.value)])


def _is_sentence(node: ast.AST) -> bool:
    return (
        _is_text(node)
        and len(re.findall(r"\b[A-Za-z]{2,}\b", node.value)) >= 3
        and (  # type: ignore[attr-defined]
            " " in node.value.strip()  # type: ignore[attr-defined]
        )
    )


def _left_out(node: ast.AST) -> list[ast.AST | None]:
    """The children of a node in which no fault is drawn."""
    if isinstance(node, _FUNCTIONS):
        is_overload = any(_name_of(one) == "overload" for one in node.decorator_list)
        return [node.returns, *(node.body if is_overload else [])]
    if isinstance(node, ast.arg):
        return [node.annotation]
    if isinstance(node, ast.ClassDef):
        is_protocol = any(_name_of(base) == "Protocol" for base in node.bases)
        return [*node.bases, *node.keywords, *(node.body if is_protocol else [])]
    if isinstance(node, ast.AnnAssign):
        return [node.annotation, *([node.value] if _name_of(node.target) == "__all__" else [])]
    if isinstance(node, ast.Assign) and _name_of(node.targets[0]) == "__all__":
        return [node.value]
    if isinstance(node, ast.Raise):
        return [node.exc, node.cause]
    if isinstance(node, ast.If) and _name_of(node.test) == "TYPE_CHECKING":
        return [node.test, *node.body]
    if isinstance(node, ast.Subscript) and _name_of(node.value) in _FORMS:
        return [node.slice]
    if isinstance(node, ast.Call) and _name_of(node.func) in _NAMING:
        return [*node.args, *node.keywords]
    return []


def _nodes(node: ast.AST, scope: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """The nodes that may have a fault, and the function, or the outer statement, each is in."""
    left_out = _left_out(node)
    if any(isinstance(one, ast.expr) and one is getattr(node, "test", None) for one in left_out):
        yield from ()
    else:
        yield node, scope
    for child in ast.iter_child_nodes(node):
        is_text = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
        is_left_out = isinstance(child, (ast.JoinedStr, ast.Import, ast.ImportFrom))
        if is_text or is_left_out or child in left_out or _is_sentence(child):
            continue
        is_scope = isinstance(child, _FUNCTIONS) or isinstance(node, ast.Module)
        yield from _nodes(child, child if is_scope else scope)


def ways(source: Source) -> dict[int, dict[str, list[Edits]]]:
    """All ways to make a fault, by line and operator."""
    pool = functools.cache(lambda scope: Pool(source, scope))
    ways: dict[int, dict[str, list[Edits]]] = defaultdict(lambda: defaultdict(list))
    for node, scope in _nodes(source.tree, source.tree):
        for name, operator in _BY_TYPE[type(node)]:
            for edits in operator(source, node, pool(scope)):
                ways[source.line(min(edits).start)][name].append(edits)
    return ways


def drawn(root: Path, files: Iterable[str], count: int, seed: str) -> Iterator[Fault]:
    """Faults in `count` lines of the files, or as many as there are: the same for a seed."""
    draw = random.Random(seed)
    sources = {file: Source((root / file).read_text()) for file in sorted(files)}
    by_file = {file: ways(source) for file, source in sources.items()}
    places = [(file, line) for file, lines in by_file.items() for line in sorted(lines)]
    draw.shuffle(places)
    faults = (_one(sources[file], file, by_file[file][line], draw) for file, line in places)
    return itertools.islice(filter(None, faults), count)


def _one(
    source: Source, file: str, ways: dict[str, list[Edits]], draw: random.Random
) -> Fault | None:
    """A fault of a line: operators are as likely as each other, and then their ways."""
    for operator in draw.sample(sorted(ways), len(ways)):
        for edits in draw.sample(ways[operator], len(ways[operator])):
            fault = source.fault(file, operator, edits)
            if fault is not None:
                return fault
    return None


def files_of(root: Path, folders: Iterable[str]) -> list[str]:
    """The sources below folders, or the files themselves, but those that a tool writes."""
    found: set[str] = set()
    for folder in folders:
        path = root / folder
        paths = [path] if path.is_file() else path.rglob("*.py")
        found |= {one.relative_to(root).as_posix() for one in paths}
    return sorted(found.difference(GENERATED))
