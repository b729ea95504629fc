"""FlashInfer's wrappers beside the plans: names, defaults, and what a page says of both."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pytest

import fi_ffi
from fi_ffi.ops.attention.options import other_names
from fi_ffi.ops.attention.prefill import RUN_OPTIONS

from tests.helpers.children import ROOT

PAGE = ROOT / "docs" / "howto" / "from-flashinfer.md"
RELEASES = ["0.6.13", "0.7.2.post1"]
# The plan for each wrapper, its runs, and the file of the wrapper.
WRAPPERS: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "BatchDecodeWithPagedKVCacheWrapper": (fi_ffi.BatchDecodePlan, "run", ("decode.py",)),
    "BatchPrefillWithPagedKVCacheWrapper": (
        fi_ffi.BatchPrefillPlan, "paged_run", ("prefill.py",),
    ),
    "BatchPrefillWithRaggedKVCacheWrapper": (
        fi_ffi.BatchPrefillPlan, "ragged_run", ("prefill.py",),
    ),
    "BatchMLAPagedAttentionWrapper": (
        fi_ffi.BatchMlaPlan, "run", ("mla/_core.py", "mla/_batch_mla/_wrapper.py"),
    ),
    "BatchAttention": (fi_ffi.BatchAttentionPlan, "run", ("attention/_core.py",)),
}  # fmt: skip


class Given(NamedTuple):
    """An argument of a wrapper's method; the default as source text, None for none."""

    name: str
    default: str | None


# Required by the wrapper, and of a run here.
ELSEWHERE = {"sm_scale"}
# Defaults that are written otherwise: no cap, keys of the dtype of queries, the planner's choice.
SAME = {
    Given("logits_soft_cap", "None"): {"0.0"},
    Given("kv_data_type", "torch.bfloat16"): {"None"},
    Given("uniform_q_len", "None"): {"0"},
}
MLA_NONE = ("BatchMLAPagedAttentionWrapper", "None")
HAVE_V_SCALE = (fi_ffi.BatchPrefillPlan, fi_ffi.BatchAttentionPlan)


Methods = Mapping[str, list[Given]]


def methods_of(tree: ast.Module, wrapper: str) -> Methods:
    """A wrapper's arguments, by the method; decode's `plan` of 0.7.2 passes them on."""
    (found,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == wrapper)
    methods: dict[str, list[Given]] = {}
    for method in found.body:
        if not isinstance(method, ast.FunctionDef):
            continue
        name, args = method.name.replace("_plan_impl", "plan"), method.args
        if name in ("__init__", "plan", "run"):
            defaults = [None] * (len(args.args) - len(args.defaults)) + args.defaults
            pairs = [*zip(args.args, defaults, strict=True)][1:]
            pairs += zip(args.kwonlyargs, args.kw_defaults, strict=True)
            methods[name] = [Given(arg.arg, value and ast.unparse(value)) for arg, value in pairs]
    return methods


@pytest.fixture(scope="module", params=RELEASES)
def wrappers(request, release_wheel) -> Mapping[str, Methods]:
    wheel, found = release_wheel(request.param), {}
    for name, (_, _, files) in WRAPPERS.items():
        texts = (wheel.text(file) for file in files if file in wheel.members)
        (tree,) = (ast.parse(text) for text in texts if f"class {name}" in text)
        found[name] = methods_of(tree, name)
        assert found[name].keys() == {"__init__", "plan", "run"}
    return found


def planned(plan: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(plan).parameters


def of_run(plan: Any, run: str) -> set[str]:
    parameters = inspect.signature(getattr(plan, run)).parameters
    return {*parameters, *(RUN_OPTIONS if "options" in parameters else ())}


def is_index(name: str) -> bool:
    return bool(re.search("indptr|indices|last_page_len|kv_len_arr", name))


@pytest.mark.parametrize("name", WRAPPERS)
def test_plans_take_the_names_of_the_wrapper(wrappers, name):
    """Arrays and sizes by FlashInfer's names; other arguments of that name by its default."""
    plan = WRAPPERS[name][0]
    own = planned(plan)
    for given in wrappers[name]["plan"]:
        is_size = given.default is None and given.name not in ELSEWHERE
        assert not is_size or given.name in own or given.name in other_names(own), given
        # Of 0.7.2's MLA all are optional, in form.
        if given.default is not None and given.name in own and (name, given.default) != MLA_NONE:
            default = own[given.name].default
            known = {given.default.removeprefix("torch.").strip("'")} | SAME.get(given, set())
            assert str(default) in known, given


def test_the_two_defaults_of_dtypes(wrappers):
    """docs/reference.md says why they differ."""
    found = {
        name: None if (name, given.default) == MLA_NONE else given.default
        for name, methods in wrappers.items()
        for given in methods["plan"]
        if given.name == "q_data_type"
    }
    wanted = dict.fromkeys(WRAPPERS, "'float16'")
    assert found == wanted | {"BatchAttention": "torch.bfloat16",
                              "BatchMLAPagedAttentionWrapper": None}  # fmt: skip
    for name, (plan, _, _) in WRAPPERS.items():
        default = planned(plan)["q_data_type"].default
        assert default == ("float16" if found[name] == "'float16'" else "bfloat16")


def rows() -> Iterator[tuple[set[str], set[str], str]]:
    """The page's rows: FlashInfer's arguments, of which methods, and what stands for them."""
    text = re.search(r"^## Options of wrappers$.*?(?=^## )", PAGE.read_text(), re.M | re.S)[0]
    for line in text.splitlines():
        if line.startswith(("| `", "| index", "| others")):
            theirs, of, here = line.strip("| ").split(" | ")
            for names, methods in zip(theirs.split("; "), of.split("; "), strict=True):
                kinds = {*re.findall("`([^`]+)`", names), *re.findall("index arrays|others", names)}
                yield kinds, {*re.findall(r"`(\w+)`", methods)}, here


def told(wrapper: str, method: str, given: Given) -> list[str]:
    """What rows say of an argument: those that name it, or else those of its kind."""
    of = [(names, here) for names, methods, here in rows() if method in methods]
    ends = [("buf", "…_buf"), ("buffer", "…_buffer")]
    kinds = {kind for end, kind in ends if given.name.endswith(f"_{end}")}
    kinds |= {"index arrays"} if is_index(given.name) and not kinds else set()
    named = [here for names, here in of if given.name in names]
    found = named or [here for names, here in of if kinds & names]
    if not found and wrapper == "BatchMLAPagedAttentionWrapper":
        return [here for names, here in of if "others" in names]
    return found


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_page_says_where_each_argument_goes(wrappers, name):
    plan, run, _ = WRAPPERS[name]
    own = {*planned(plan), *other_names(planned(plan))}
    runs, of = of_run(plan, run), inspect.signature(getattr(plan, run)).parameters.values()
    tensors = {each.name for each in of if each.default is inspect.Parameter.empty}
    for method, arguments in wrappers[name].items():
        for given in arguments:
            if method == "run" and (given.default is None or given.name in tensors):
                continue
            found = told(name, method, given)
            assert len(found) == 1, (method, given, found)
            (here,) = found
            there = set(re.findall(r"`(\w+)=", here))
            lacks = re.search(r"; not of `(\w+)`", here)
            alone = re.search(r"; of `(\w+)` alone", here)
            if (lacks and lacks[1] == plan.__name__) or (alone and alone[1] != plan.__name__):
                assert not (there | {given.name}) & (own | runs), (given, here)
            elif here.startswith(("nothing", "`BatchPrefillPlan`")):
                assert given.name not in own | runs and there <= own, (given, here)
            elif here.startswith("of the plan"):
                assert given.name in own and given.name not in runs, (given, here)
            elif here.startswith("of a run") or here.endswith("of a run"):
                assert (there or {given.name}) <= own | runs, (given, here)
                assert here.startswith("`kv_layout=") or given.name in runs, (given, here)
            elif here.startswith("`o` and `lse`"):
                assert {"o", "lse"} <= runs
            elif given.name == "v_scale":
                assert (given.name in runs) == (plan in HAVE_V_SCALE), (given, here)
            elif here.startswith(("the same", "[the same")):
                assert given.name in (runs if method == "run" else own), (given, here)
            else:
                assert there and there <= own | runs, (given, here)
