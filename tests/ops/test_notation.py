"""Conditions of rows: one text is the check, the words of its error, and a sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest
from packaging.specifiers import SpecifierSet

import fi_ffi
from fi_ffi.catalogue.ahead_of_time import known_releases
from fi_ffi.loader.distributions import is_in
from fi_ffi.ops.call.compiled import CompiledRow
from fi_ffi.ops.call.notation import Condition, parse_expression, round_up
from fi_ffi.ops.call.releases import forms_of, span_of
from fi_ffi.ops.call.row import Row, Rule, Scalar, Tensor

from tests.helpers.limits import limits


def row_of(*requires: str | Rule, **fields: object) -> Row:
    """Three sizes, two of them of a tensor that may not be there."""
    args = (
        Tensor("y", "a b", "T", "result", writes=True, reads=False),
        Tensor("x", "a b", "T", "argument"),
        Tensor("z", "a c", "T", "more", optional=True),
        Scalar("count", int, 1, "a number"),
    )
    fields = {"releases": ">=0.6.3", **fields}
    return Row("conditions", "norm", "conditions", "here", "Conditions.", args,
               {"T": ("float32",)}, requires=requires, **fields)  # fmt: skip


def refused(row: Row, a: int, b: int, c: int | None = None, count: int = 1) -> str:
    """The error's words, or "" where nothing is wrong."""

    def desc(*shape: int, ptr: int) -> fi_ffi.TensorDesc:
        return fi_ffi.TensorDesc(ptr, shape, "float32", device="cpu")

    z = None if c is None else desc(a, c, ptr=3 << 20)
    try:
        CompiledRow(row).check(desc(a, b, ptr=1 << 20), desc(a, b, ptr=2 << 20), z, count)
    except fi_ffi.ArgumentError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("text", "right", "wrong", "words", "sentence"),
    [
        ("b >= 2", (1, 2), (1, 1), "b of at least 2", "b is at least 2."),
        ("b <= 2", (1, 2), (1, 3), "b = 3 of at most 2, as far as the kernel counts",
         "b is at most 2."),
        ("a * b <= 6", (2, 3), (3, 3), "a * b = 9 of at most 6, as far as the kernel counts",
         "a * b is at most 6."),
        ("b in (2, 4)", (1, 4), (1, 3), "b of 2 or 4", "b is 2 or 4."),
        ("b in (2,)", (1, 2), (1, 3), "b of 2", "b is 2."),
        ("b % 4 == 0", (1, 8), (1, 6), "b = 6 to be a multiple of 4", "b is a multiple of 4."),
        ("b % a == 0", (3, 9), (3, 8), "b = 8 to be a multiple of a = 3", "b is a multiple of a."),
        ("a >= b", (3, 3), (2, 3), "a of at least b = 3", "a is at least b."),
        ("a == 0 or b >= 1", (0, 0), (2, 0), "b of at least 1, for a = 2",
         "b is at least 1, unless a is 0."),
        ("c == max(a, b)", (2, 5, 5), (2, 5, 2), "c = 5, the max of a = 2 and b = 5",
         "c is the max of a and b."),
        ("c == min(a, b)", (2, 5, 2), (2, 5, 5), "c = 2, the min of a = 2 and b = 5",
         "c is the min of a and b."),
    ],
)  # fmt: skip
def test_check_and_words_and_sentence(text, right, wrong, words, sentence):
    row = row_of(text)
    assert refused(row, *right) == ""
    error = refused(row, *wrong)
    assert error.endswith(f"expected {words}")
    argument = "z" if text.startswith("c") else "y"
    assert f"`{argument}`" in error
    assert Condition.of(text).sentence == sentence


def test_a_multiple_of_nothing_is_refused():
    assert refused(row_of("b % a == 0"), 0, 4).endswith("b = 4 to be a multiple of a = 0")


def test_a_size_that_no_tensor_has_is_not_looked_at():
    row = row_of("c >= 5", "c == max(a, b)", "c % b == 0")
    assert refused(row, 2, 3) == ""
    assert "c of at least 5" in refused(row, 2, 3, 4)


@pytest.mark.parametrize("text", ["a + b", "a == b", "a % 4 == 1", "a < b", "a == 3"])
def test_a_condition_without_words_is_a_mistake(text):
    with pytest.raises(AssertionError, match="is no condition that has words"):
        Condition.of(text)


def test_a_rule_has_names_of_all_kinds():
    rule = Rule(
        "count", "count == round_up(a, 4) or z or T == 'count' or half(b)", "right",
        {"half": lambda size: size == 7},
    )  # fmt: skip
    assert rule.names == ("count", "a", "z", "T", "b")
    row = row_of(rule)
    assert refused(row, 3, 2, count=4) == refused(row, 3, 2, 1) == refused(row, 3, 7) == ""
    error = refused(row, 3, 2, count=3)
    assert "got count = 3, a = 3, z = none, T = float32, b = 2, expected right" in error


def test_two_functions_of_one_name_are_a_mistake():
    rules = (Rule("count", "f(a)", "right", {"f": f}) for f in (bool, abs))
    with pytest.raises(AssertionError, match="conditions: f"):
        refused(row_of(*rules), 1, 1)


def test_names_are_replaced_and_words_are_not():
    text = "a > 1.5e-07 or not a or b in (None, 1, a) and f(a, b) == 'a' if b else min(ab, a)"
    template, names = parse_expression(text)
    assert names == ("a", "b", "ab")
    now = template.format_map({"a": "x", "b": "y", "ab": "z"}).split(" or not ")
    assert now == ["x > 1.5e-07", "x or y in (None, 1, x) and f(x, y) == 'a' if y else min(z, x)"]


def test_limits_are_those_of_one_size():
    row = row_of("a >= 3", "b % 8 == 0", "b % a == 0", "a * b <= 9", "b <= 7", "b in (1, 2)",
                 "a == 0 or b >= 1", "b >= a")  # fmt: skip
    assert limits(row, ">=") == {"a": (3,)}
    assert limits(row, "%") == {"b": (8,)}
    assert limits(row, "<=") == {"b": (7,)}
    assert limits(row, "in") == {"b": (1, 2)}


@pytest.mark.parametrize("step", [1, 3, 8])
def test_rounding_up(step):
    for size in range(30):
        up = round_up(size, step)
        assert up % step == 0 and size <= up < size + step


SPECIFIERS = (
    ">=0.6.3", "<0.7", ">=0.6.16,<0.6.16.post3", ">=0.6.16.post3,<0.6.18", ">=0.7.2.post1",
    "<0.7.2.post1", ">=0.6.10,!=0.6.16,<0.6.18", "==0.6.17.*",
)  # fmt: skip


@pytest.mark.parametrize("releases", SPECIFIERS)
def test_a_release_is_in_a_specifier_as_packaging_says(releases):
    specifier = SpecifierSet(releases)
    for release in (*known_releases(), "0.6.13rc1", "0.8.0", "0.6.2", "0.7"):
        assert is_in(release, releases) == specifier.contains(release, prereleases=True), release


def test_spans_with_posts():
    number = Scalar("n", int, 0, "", since="0.6.16.post3", until="0.7.2.post1")
    forms = forms_of(replace(row_of(), args=(number,)))
    assert {form.releases: len(form.args) for form in forms} == {
        ">=0.6.3,<0.6.16.post3": 0, ">=0.6.16.post3,<0.7.2.post1": 1, ">=0.7.2.post1": 0,
    }  # fmt: skip
    assert span_of(forms) == ">=0.6.3" and span_of(forms[1:]) == ">=0.6.16.post3"


def test_forms_of_a_row():
    """Arguments and rules come and go, and fields change; the default release's form is first."""
    rules = Rule("b", "b", "old", until="0.6.7"), Rule("b", "b", "new", since="0.6.7")
    row = row_of("a >= 1", *rules, releases=">=0.6.5,<0.7.2", together=("z", "new"))
    x = row.args[1]
    args = (
        row.args[0], Tensor("x", "a b", "T", x.doc, until="0.6.18"),
        Tensor("new", "a", "N", "came", since="0.6.18", optional=True), *row.args[2:],
    )  # fmt: skip
    dtypes = {**row.dtypes, "N": ("int32",)}
    made = forms_of(replace(row, args=args, dtypes=dtypes), {"0.6.18": {"variant": "_new"}})
    assert [form.releases for form in made] == [">=0.6.7,<0.6.18", ">=0.6.5,<0.6.7",
                                                ">=0.6.18,<0.7.2"]  # fmt: skip
    assert [[arg.name for arg in form.args] for form in made] == [
        ["y", "x", "z", "count"], ["y", "x", "z", "count"], ["y", "new", "z", "count"],
    ]  # fmt: skip
    assert [[rule.expected for rule in form.rules] for form in made] == [["new"], ["old"], ["new"]]
    assert [form.variant for form in made] == ["", "", "_new"]
    assert [form.together for form in made] == [("z",), ("z",), ("z", "new")]
    assert [[*form.dtypes] for form in made] == [["T"], ["T"], ["T", "N"]]
    assert all(form.requires[0] == "a >= 1" for form in made)
    assert span_of(made) == ">=0.6.5,<0.7.2"
