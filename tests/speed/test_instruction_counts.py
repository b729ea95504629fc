"""How many instructions calls take: figures that no machine and no other work on it changes.

Counted are the instructions of Python that a repeated call executes, beyond those of the
statement that makes it, and the functions in C that are called from them.  They say nothing
of how long each takes; benchmarks/host_calls.py does.
"""

from __future__ import annotations

import gc
import linecache
import sys
import timeit
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import numpy as np
import pytest

import fi_ffi
from fi_ffi.abi.interop import as_desc
from fi_ffi.loader import runtime

from tests.helpers import gpu_arrays, instructions
from tests.helpers.benchmarks import Call, kernels_replaced, noop, replans, ways


class Budget(NamedTuple):
    """The most instructions, and calls of functions in C, that a call may take."""

    instructions: int
    in_c: int


# 12 % above what 3.11 counts, whose calls are an instruction longer than those of later versions.
# Each call compares the layouts with those of the call before, and all addresses: nothing is
# remembered by sizes, and an output that overlaps is refused.
BUDGETS = {
    ways.EMPTY: Budget(0, 0),
    ways.PREPARED: Budget(78, 4),
    "prepared call, 3 new pointers, in a scope": Budget(298, 6),
    "prepared call with a stream": Budget(128, 3),
    "typed call, in a scope": Budget(276, 5),
    ways.TYPED: Budget(332, 4),
    ways.REPEATED: Budget(612, 11),
    ways.NUMPY_REPEATED: Budget(594, 27),
    "one TensorDesc made": Budget(140, 3),
    "TensorDesc.rows": Budget(103, 1),
    "TensorDesc.at": Budget(62, 1),
    # Of which up to 70 where arrays lie between the plan's two workspaces, by chance.
    ways.PLAN_TYPED: Budget(560, 4),
    "plan.run, prepared (CPU: no stream)": Budget(109, 3),
    replans.REPLANS["decode"]: Budget(1392, 34),
    replans.REPLANS["ragged"]: Budget(1423, 23),
    replans.REPLANS["ragged fa3"]: Budget(1423, 23),
    replans.REPLANS["paged"]: Budget(2084, 50),
    replans.REPLANS["MLA"]: Budget(1957, 44),
    # Beyond the replan these have the one comparison of every size that another batch changes.
    replans.FIRST_RUNS["decode"]: Budget(2291, 42),
    replans.FIRST_RUNS["ragged"]: Budget(2390, 31),
    replans.FIRST_RUNS["ragged fa3"]: Budget(2483, 31),
}
TOP = 12  # lines that a failure shows
MANY = 1000
SLACK = 4  # blocks and objects that are the measurement's own


@pytest.fixture(scope="module")
def calls() -> Iterator[dict[str, Call]]:
    """The calls that repeat one length, checked; they end in a kernel that does nothing."""
    runtime.ensure_tvm_ffi()
    found = {call.name: call for call in ways.own_calls() if call.repeated is None}
    assert {name: call.problem() for name, call in found.items()} == dict.fromkeys(found)
    with kernels_replaced(noop):
        yield found


@pytest.fixture(autouse=True)
def nothing_else_traces() -> None:
    if sys.gettrace() is not None or sys.getprofile() is not None:
        pytest.skip("a debugger or a coverage tool is tracing")


class Line(NamedTuple):
    """Where an instruction is."""

    file: str
    function: str
    number: int

    def __str__(self) -> str:
        if not Path(self.file).is_file():
            return f"{self.function}, compiled from its row, line {self.number}"
        text = linecache.getline(self.file, self.number).strip()
        return f"{Path(self.file).name}:{self.number} ({self.function}): {text}"


Stop = Callable[[], object]  # in C, as it is called while everything is counted
Start = Callable[[CodeType], Stop]
OWN = {__file__, instructions.__file__}


def traced(call: Call, start: Start) -> None:
    """Make a call, with its statement's code given to `start` before."""
    code, names = compile(call.statement, "<call>", "exec"), {**call.names}
    with call.scope():
        for _ in range(2):  # puts the scope's stream in place, and fills what is remembered
            exec(code, names)
        gc.disable()  # others' callbacks of a collection are not the call's
        stop = start(code)
        try:
            exec(code, names)
        finally:
            stop()
            gc.enable()


def executed(call: Call) -> Counter[Line]:
    """The instructions of one call, by line."""
    found: Counter[Line] = Counter()

    def count(code: CodeType, line: int) -> None:
        found[Line(code.co_filename, code.co_name, line)] += 1

    def start(statement: CodeType) -> Stop:
        def is_the_calls(code: CodeType) -> bool:
            return code is not statement and code.co_filename not in OWN

        return instructions.start(is_the_calls, count)

    traced(call, start)
    return found


def functions_in_c(call: Call) -> Counter[str]:
    """What one call calls of functions written in C, by name."""
    found: Counter[str] = Counter()

    def profile(_: CodeType) -> Stop:
        def tell(frame: FrameType, event: str, function: Any) -> None:
            if event == "c_call" and frame.f_code.co_filename != __file__:
                found[function.__qualname__] += 1

        sys.setprofile(tell)
        return partial(sys.setprofile, None)

    traced(call, profile)
    return found


def counted(call: Call) -> tuple[Counter[Line], Counter[str]]:
    """A repeated call's instructions and functions in C; the former are the same twice."""
    once, again = executed(call), executed(call)
    assert once == again, f"two calls differ: {(once - again) + (again - once)}"
    return once, functions_in_c(call)


def told(name: str, lines: Counter[Line], functions: Counter[str]) -> str:
    """What a call took, beside its budget, and where most of it is."""
    got = Budget(sum(lines.values()), sum(functions.values()))
    text = [f"{name}: {got}, and the most is {BUDGETS[name]}"]
    text += [f"  {count:4}  {line}" for line, count in lines.most_common(TOP)]
    text.append(f"  in C: {', '.join(f'{count} {of}' for of, count in functions.most_common())}")
    return "\n".join(text)


def is_within(budget: Budget, lines: Counter[Line], functions: Counter[str]) -> bool:
    return sum(lines.values()) <= budget.instructions and sum(functions.values()) <= budget.in_c


@pytest.mark.parametrize("name", BUDGETS)
def test_a_call_is_within_its_budget(calls: dict[str, Call], name: str) -> None:
    call, budget = calls[name], BUDGETS[name]
    lines, functions = counted(call)
    text = told(name, lines, functions)
    print(text)
    assert is_within(budget, lines, functions), text
    is_near = sum(lines.values()) >= budget.instructions / 2
    assert is_near, f"this budget holds nothing any more; lower it: {text}"


@pytest.mark.parametrize("kind", ["decode", "paged", "MLA"])
def test_names_that_are_not_used_cost_nothing(calls: dict[str, Call], kind: str) -> None:
    """A replan by a plan's own names looks up none: it asks once whether there are others."""
    lines, _ = counted(calls[replans.REPLANS[kind]])
    assert not [line for line in lines if line.file.endswith("attention/options.py")]
    asked = {n for line, n in lines.items() if str(line).endswith(": if others:")}
    assert asked in ({2}, {3}), asked  # from Python 3.13 on, TO_BOOL is an instruction of its own


# The most instructions that `as_desc` takes to read a torch tensor, beyond the tensor's own code.
TORCH = {"float16": 105, "int32": 100}
# Of a tensor whose kind was seen before; of the dtypes of a complex tensor's parts also is_neg.
ATTRIBUTES = ["stride", "get_device", "dtype", "data_ptr", "shape"]


@pytest.mark.parametrize("dtype", ["float16", "int32"])
def test_a_torch_tensor_is_read_within_its_budget(
    monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    library = gpu_arrays.torch()
    monkeypatch.setitem(sys.modules, "torch", library)
    tensor, read = library.Tensor(4096, (3, 5), dtype, 0), list[str]()
    call = Call("", "as_desc(tensor)", lambda: {"as_desc": as_desc, "tensor": tensor}, str)
    found = executed(call)
    assert found == executed(call)
    total = sum(n for line, n in found.items() if "/fi_ffi/abi/" in line.file)
    assert TORCH[dtype] / 2 <= total <= TORCH[dtype], found.most_common(TOP)

    def note(self: Any, name: str) -> Any:
        if (
            not name.startswith("_")
            and sys._getframe(1).f_globals["__name__"] == "fi_ffi.abi.interop"
        ):
            read.append(name)
        return object.__getattribute__(self, name)

    monkeypatch.setattr(library.Tensor, "__getattribute__", note, raising=False)
    desc = as_desc(tensor)
    assert (desc.ptr, desc.shape, desc.strides, desc.dtype.name) == (4096, (3, 5), (5, 1), dtype)
    assert sorted(read) == sorted([*ATTRIBUTES, *["is_neg"] * (dtype == "float16")])


# The most instructions of a typed `rmsnorm` of three torch tensors, beyond the tensors' own code.
OF_TORCH_TENSORS = 543


def test_a_call_of_torch_tensors_reads_each_once(
    calls: dict[str, Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = gpu_arrays.torch()
    monkeypatch.setitem(sys.modules, "torch", library)
    shapes = (3, 64), (3, 64), (64,)
    made = [library.Tensor((i + 1) << 40, of, "float16", 0) for i, of in enumerate(shapes)]
    names = {"op": fi_ffi.OPS["rmsnorm"], **dict(zip("oxw", made, strict=True))}
    call = Call("", "op(o, x, w, 1e-6, stream=77)", lambda: names, str)
    found = executed(call)
    package = str(Path(fi_ffi.__file__).parent)
    total = sum(n for line, n in found.items() if line.file.startswith(package))
    assert OF_TORCH_TENSORS / 2 <= total <= OF_TORCH_TENSORS, found.most_common(TOP)
    read = Counter[tuple[int, str]]()

    def note(self: Any, name: str) -> Any:
        of = sys._getframe(1).f_globals["__name__"]
        if not name.startswith("_") and of.startswith("fi_ffi"):
            read[id(self), name] += 1
        return object.__getattribute__(self, name)

    monkeypatch.setattr(library.Tensor, "__getattribute__", note, raising=False)
    names["op"](*made, 1e-6, stream=77)
    assert read == {(id(one), name): 1 for one in made for name in (*ATTRIBUTES, "is_neg")}


def test_every_call_has_a_budget(calls: dict[str, Call]) -> None:
    assert calls.keys() == BUDGETS.keys()


def test_the_full_way_is_past_the_budget_and_told(calls: dict[str, Call]) -> None:
    """What a call that works everything out anew would look like."""
    # A number that is no plain float is checked anew each time.
    full = replace(
        calls[ways.PLAN_TYPED],
        statement="plan.run(q, k, v, o, k_scale=one)",
        make=lambda: calls[ways.PLAN_TYPED].names | {"one": np.float64(1)},
    )
    lines, functions = executed(full), functions_in_c(full)
    assert not is_within(BUDGETS[ways.PLAN_TYPED], lines, functions)
    text = told(ways.PLAN_TYPED, lines, functions)
    assert "values.py:" in text
    assert "in C: " in text


@pytest.mark.parametrize("name", BUDGETS)
def test_repeated_calls_leave_nothing_behind(calls: dict[str, Call], name: str) -> None:
    call = calls[name]
    timer = timeit.Timer(call.statement, globals={**call.names})
    growths = []
    with call.scope():
        gc.collect()  # before they are warm: it empties what the interpreter keeps for reuse
        timer.timeit(MANY)
        for _ in range(4):
            before = sys.getallocatedblocks(), len(gc.get_objects())
            timer.timeit(MANY)
            after = sys.getallocatedblocks(), len(gc.get_objects())
            growths.append((after[0] - before[0], after[1] - before[1]))
    # What leaks does so every time; the interpreter's caches settle.
    blocks, objects = (min(growth[i] for growth in growths) for i in range(2))
    assert blocks <= SLACK, f"{blocks} blocks of memory more after {MANY} calls"
    assert objects <= SLACK, f"{objects} objects more after {MANY} calls"


@pytest.mark.parametrize("name", BUDGETS)
def test_a_call_log_leaves_nothing_behind(calls: dict[str, Call], name: str) -> None:
    """With none open a call takes what it took before there was one, to the instruction."""
    before = counted(calls[name])
    fi_ffi.call_log(1).close()
    assert counted(calls[name]) == before


def test_what_calls_leave_behind_is_seen() -> None:
    kept: list[Any] = []
    call = Call("keeps", "kept.append([])", lambda: {"kept": kept}, lambda: None)
    with pytest.raises(AssertionError, match="more after"):
        test_repeated_calls_leave_nothing_behind({"keeps": call}, "keeps")
