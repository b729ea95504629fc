"""Merging attention states against float64: on the CPU, and (tests/gpu) on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from fi_ffi.cli.cases import Case
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.call.releases import fits
from fi_ffi.ops.functions import OPS

from tests.helpers.cases import make_case
from tests.helpers.every_op import check_on

PAIR, IN_PLACE, MANY = (
    OPS[name].row for name in ("merge_state", "merge_state_in_place", "merge_states")
)


def case(row, rng, n=5, heads=3, head_dim=128, sets=4, dtype="float16", **more) -> Case:
    sizes = {"n": n, "num_heads": heads, "head_dim": head_dim, "num_index_sets": sets}
    dtypes = {"T": dtype, "M": more.pop("mask_dtype", "bool")}
    return make_case(row, sizes, dtypes, rng, more.pop("tables", None), **more)


def test_one_set_is_copied(machine, rng):
    """Bit for bit, whatever it holds."""
    made = case(MANY, rng, n=6, sets=1)
    made.arrays["v"][3, 0, 1, :4] = [np.nan, np.inf, -np.inf, -0.0]
    made.arrays["s"][2, 0, 0] = -np.inf
    copied = {f"{name}_merged": (made.arrays[name][:, 0], None) for name in "vs"}
    assert check_on(machine, replace(made, expected=copied)) == 0


@pytest.mark.parametrize("mask_dtype", ["bool", "uint8"])
def test_masked_tokens_keep_every_bit(mask_dtype, machine, rng):
    made = case(IN_PLACE, rng, n=200, mask_dtype=mask_dtype)
    before = {name: made.arrays[name].copy() for name in "vs"}
    chosen = made.arrays["mask"] != 0
    assert 0 < chosen.sum() < len(chosen)

    def kept(name: str):
        error = Case.error

        def judge(got: np.ndarray) -> tuple[float, float]:
            same = got[~chosen].tobytes() == before[name][~chosen].tobytes()
            return error(made, name, got) if same else (np.inf, np.inf)

        return judge

    assert check_on(machine, replace(made, expected={name: kept(name) for name in "vs"})) <= 1


def empties(n: int, sets: int) -> Iterator[tuple[str, np.ndarray]]:
    """Which sets have no keys."""
    none = np.zeros((n, sets, 1), bool)
    first, last, every, most = none.copy(), none.copy(), ~none, ~none
    first[:, 0], last[:, -1], most[:, -1] = True, True, False
    yield from {"first": first, "last": last, "every": every, "all but the last": most}.items()


@pytest.mark.parametrize(("n", "sets"), [(5, 3), (3, 40)])
@pytest.mark.parametrize("nothing", [-np.inf, -5e4])
def test_sets_without_keys(nothing, n, sets, machine, rng):
    """They count for nothing, be they at minus infinity or at FlashInfer's own, -5e4."""
    for name, empty in empties(n, sets):
        made = case(MANY, rng, n=n, sets=sets, heads=1)
        s = np.where(empty, nothing, made.arrays["s"])
        v = np.where(empty[..., None], 0, made.arrays["v"])
        made = case(MANY, rng, n=n, sets=sets, heads=1, tables={"s": s, "v": v})
        if name == "every":
            # The -5e4 that one or nine rows of threads begin with, and those of the sets.
            least = -np.inf
            if not MANY.variant or np.isfinite(nothing):
                begun = (9 if sets >= n else 1) * (not MANY.variant)
                least = np.float32(np.log2(begun + np.isfinite(nothing) * sets) - 5e4)

            def nowhere(got: np.ndarray, least: float = least) -> tuple[float, float]:
                right = np.isclose(got, least, rtol=0, atol=0.01)
                return 0.0, 0.0 if right.all() else np.inf

            zero = np.zeros_like(made.arrays["v_merged"])
            made = replace(made, expected={"v_merged": (zero, None), "s_merged": nowhere})
        assert check_on(machine, made) <= 1, name


@pytest.mark.parametrize("row", [PAIR, IN_PLACE], ids=lambda row: row.name)
def test_two_states_without_keys(row, machine, rng):
    """At FlashInfer's own infinity nothing is what comes out; at the other it is NaN before
    0.7.0, which docs/attention.md tells."""
    one, both = ("s_a", "s_b") if row is PAIR else ("s", "s_other")
    out_v, out_s = ("v_merged", "s_merged") if row is PAIR else ("v", "s")
    values = {name: np.zeros((4, 3, 128)) for name in ("v_a", "v_b", "v", "v_other")}
    given = {"without": ("mask",)} if row is IN_PLACE else {}

    def made(s: float, other: float) -> Case:
        sums = {one: np.full((4, 3), s), both: np.full((4, 3), other)}
        return case(row, rng, n=4, tables={**values, **sums}, **given)

    zero = np.zeros((4, 3, 128), np.float16)
    own = made(-5e4, -5e4)
    expected = {out_v: (zero, None), out_s: (np.full((4, 3), -49999, np.float32), None)}
    assert check_on(machine, replace(own, expected=expected)) == 0
    assert check_on(machine, made(-np.inf, 3.0)) <= 1
    is_fixed = bool(OPS[row.name].row.variant)

    def judge(got: np.ndarray) -> tuple[float, float]:
        nothing = 0 if got.ndim == 3 else -np.inf
        right = (got == nothing).all() if is_fixed else np.isnan(got.astype(float)).all()
        return (0.0, 0.0 if right else np.inf)

    strange = replace(made(-np.inf, -np.inf), expected={out_v: judge, out_s: judge})
    assert check_on(machine, strange) == 0


def test_newer_kernels_merge_empty_states(rng):
    """The reference of their row: nothing of nothing."""
    for row in (PAIR, IN_PLACE, MANY):
        later = next(other for other in OPS[row.name].rows if fits(other, "0.7.2.post1"))
        assert later.variant
        made = case(later, rng, heads=1)
        made.arrays.pop("mask", None)
        for arg in later.tensors:
            if arg.dtype == "float32" and arg.reads:
                made.arrays[arg.name][...] = -np.inf
        Op(later)(**made.arrays)
        out_v, out_s = list(made.expected)
        assert (made.arrays[out_v] == 0).all()
        assert (made.arrays[out_s] == -np.inf).all()


def by_threads(v: np.ndarray, s: np.ndarray, rows: int) -> tuple[np.ndarray, np.float32]:
    """A head's sets merged in float32 as before 0.7.0, by `state_t` of state.cuh; with rows of
    threads as in `MergeStatesLargeNumIndexSetsKernel`, which merge what each has."""

    def merged(sets: list[tuple[np.ndarray, np.float32]]) -> tuple[np.ndarray, np.float32]:
        o, m, d = np.zeros(v.shape[-1], np.float32), np.float32(-5e4), np.float32(1)
        for of, other in sets:
            before, m = m, np.maximum(m, other)
            kept, more = (np.exp2(np.float32(x - m)) for x in (before, other))
            d, o = d * kept + more, o * kept + of * more
        return o / d, np.float32(m + np.log2(d))

    sets = [(np.float32(of), np.float32(lse)) for of, lse in zip(v, s, strict=True)]
    if not rows:
        return merged(sets)
    each = [merged(sets[i::rows]) for i in range(rows)]
    return merged([(of.astype(v.dtype).astype(np.float32), lse) for of, lse in each])


@pytest.mark.parametrize(("head_dim", "rows"), [(64, 16), (128, 8), (256, 4), (512, 4)])
@pytest.mark.parametrize(("n", "sets"), [(5, 3), (2, 2), (1, 1), (3, 40)])
@pytest.mark.parametrize("at", [-5e4, -50010.0, -49990.0, -83095.0, 0.0])
def test_sets_as_low_as_those_without_keys(at, n, sets, head_dim, rows, rng):
    """Beside the states at -5e4 that the kernels begin with, these weigh as much or little."""
    old = next(row for row in OPS["merge_states"].rows if not row.variant)
    s = at + rng.uniform(-3, 3, (n, sets, 1))
    if sets > 1:
        s[0, 0] = -5e4
    made = case(old, rng, n=n, sets=sets, heads=1, head_dim=head_dim, tables={"s": s})
    Op(old)(**made.arrays)
    got = made.arrays["v_merged"], made.arrays["s_merged"]
    assert all(made.error(name, made.arrays[name])[1] <= 1 for name in made.expected)
    for i in range(n):
        v, s = made.arrays["v"][i, :, 0], made.arrays["s"][i, :, 0]
        value, lse = by_threads(v, s, rows if n <= sets else 0)
        # A step of float32 is 2**-8 there, and a logarithm is rounded several times.
        assert np.abs(got[1][i, 0] - lse) <= 0.02
        np.testing.assert_allclose(np.float32(got[0][i, 0]), value, rtol=0.03, atol=0.02)


def test_a_valid_state_below_that_of_no_keys(rng):
    """A state at -5e4, which before 0.7.0 is that of no keys, outweighs one of lower logits: zeros,
    as the kernels give them."""
    for row in (PAIR, IN_PLACE):
        one, both = ("s_a", "s_b") if row is PAIR else ("s", "s_other")
        empty = "v_a" if row is PAIR else "v"
        values = {empty: np.zeros((4, 3, 128)), one: np.full((4, 3), -5e4)}
        made = case(row, rng, n=4, tables={**values, both: np.full((4, 3), -83095.0)},
                    **({"without": ("mask",)} if row is IN_PLACE else {}))  # fmt: skip
        Op(row)(**made.arrays)
        out_v, out_s = list(made.expected)
        assert not made.arrays[out_v].any() and (made.arrays[out_s] == -5e4).all()
