"""Merging attention states against float64: on the CPU, and (tests/gpu) on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

import fi_ffi
from fi_ffi.cli.cases import Case
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.releases import fits

from tests.helpers.calls import HostArray
from tests.helpers.cases import make_case
from tests.helpers.every_op import check_on, check_replayed

PAIR, IN_PLACE, MANY = (
    OPS[name].row for name in ("merge_state", "merge_state_in_place", "merge_states")
)
HEAD_DIMS = (64, 128, 256, 512)
DTYPES = ("float16", "bfloat16")
# Where the kernel for many sets begins, and where its rows of threads have one set each, or
# none, or several, in and past what is loaded ahead.
SETS = [
    (1, 1), (2, 1), (1, 2), (5, 2), (2, 2), (2, 5), (3, 16), (3, 17), (1, 64), (1, 65), (2, 300),
    (7, 0), (7, 6), (7, 7),
]  # fmt: skip


def case(row, rng, n=5, heads=3, head_dim=128, sets=4, dtype="float16", **more) -> Case:
    sizes = {"n": n, "num_heads": heads, "head_dim": head_dim, "num_index_sets": sets}
    dtypes = {"T": dtype, "M": more.pop("mask_dtype", "bool")}
    return make_case(row, sizes, dtypes, rng, more.pop("tables", None), **more)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_two(dtype, head_dim, machine, rng):
    for n, heads in ((1, 1), (33, 4), (7, 32)):
        sizes = {"n": n, "heads": heads, "head_dim": head_dim, "dtype": dtype}
        assert check_on(machine, case(PAIR, rng, **sizes)) <= 1
        assert check_on(machine, case(IN_PLACE, rng, **sizes, without=("mask",))) <= 1
        assert check_on(machine, case(IN_PLACE, rng, **sizes, mask_dtype="uint8")) <= 1


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "sets"), SETS)
def test_many(n, sets, dtype, head_dim, machine, rng):
    sizes = {"n": n, "sets": sets, "head_dim": head_dim, "dtype": dtype}
    assert check_on(machine, case(MANY, rng, heads=2, **sizes)) <= 1


@pytest.mark.parametrize(("n", "sets"), [(50, 8), (8, 50)])
def test_sums_that_differ_by_much(n, sets, machine, rng):
    """Far from 0, and so far apart that a set counts for nothing."""
    for offset, spread in ((0, 40), (3000, 1), (-20000, 200)):
        s = rng.standard_normal((n, sets, 3)) * spread + offset
        assert check_on(machine, case(MANY, rng, n=n, sets=sets, tables={"s": s})) <= 1


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


def test_no_tokens_and_no_heads(machine, rng):
    for row in (PAIR, IN_PLACE, MANY):
        assert check_on(machine, case(row, rng, n=0)) == 0
        assert check_on(machine, case(row, rng, heads=0)) == 0


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
            # Of the -5e4 that the kernel begins with there may be a few more.
            least = -np.inf if MANY.variant and np.isinf(nothing) else -50000

            def nowhere(got: np.ndarray, least: float = least) -> tuple[float, float]:
                right = (got >= least) & (got <= max(least, -50000) + 20 * np.isfinite(least))
                return 0.0, 0.0 if right.all() else np.inf

            zero = np.zeros_like(made.arrays["v_merged"])
            made = replace(made, expected={"v_merged": (zero, None), "s_merged": nowhere})
        assert check_on(machine, made) <= 1, name


@pytest.mark.parametrize("row", [PAIR, IN_PLACE], ids=lambda row: row.name)
def test_two_states_without_keys(row, machine, rng):
    """At FlashInfer's own infinity nothing is what comes out; at the other it is NaN up to
    0.7.1, which docs/cascade.md tells."""
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
    """The reference of their row: nothing of nothing, and all else as before."""
    for row in (PAIR, IN_PLACE, MANY):
        later = next(other for other in OPS[row.name].rows if fits(other, "0.7.2.post1"))
        assert later.variant
        for n, sets in ((5, 3), (3, 40), (5, 0)):
            made = case(later, rng, n=n, sets=sets)
            placed = {name: HostArray(array) for name, array in made.arrays.items()}
            Op(later)(**{name: array.desc() for name, array in placed.items()})
            for name in made.expected:
                assert made.error(name, placed[name].get())[1] <= 1
        names = [arg.name for arg in later.tensors if arg.dtype == "float32" and arg.reads]
        made = case(later, rng, heads=1)
        made.arrays.pop("mask", None)
        for name in names:
            made.arrays[name][...] = -np.inf
        Op(later)(**made.arrays)
        out_v, out_s = list(made.expected)
        assert (made.arrays[out_v] == 0).all()
        assert (made.arrays[out_s] == -np.inf).all()


@pytest.mark.parametrize("row", [PAIR, MANY], ids=lambda row: row.name)
def test_recorded_and_replayed(row, machine, rng):
    for n, sets in ((9, 4), (4, 9)):
        assert check_replayed(machine, case(row, rng, n=n, sets=sets)) <= 1


# The most heads that a block of 1024 threads has.
MOST = [(64, 128), (128, 64), (256, 32), (512, 32)]


@pytest.mark.parametrize(("head_dim", "most"), MOST)
def test_the_most_heads(head_dim, most, machine, rng):
    for row in (PAIR, IN_PLACE, MANY):
        sizes = {"n": 3, "sets": 2, "head_dim": head_dim}
        assert check_on(machine, case(row, rng, heads=most, **sizes)) <= 1
        with pytest.raises(fi_ffi.ArgumentError, match=r"1024|one thread block covers them"):
            check_on(machine, case(row, rng, heads=most + 1, **sizes))
    # No fewer sets than tokens: a block for each head.
    assert check_on(machine, case(MANY, rng, n=2, sets=2, heads=most + 1, head_dim=head_dim)) <= 1


def test_more_than_a_grid_has():
    def desc(*shape: int, dtype: str = "float16") -> fi_ffi.TensorDesc:
        return fi_ffi.TensorDesc(16, shape, dtype, device="cpu")

    v, s = desc(1, 2, 2**16, 64), desc(1, 2, 2**16, dtype="float32")
    out = desc(1, 2**16, 64), desc(1, 2**16, dtype="float32")
    with pytest.raises(fi_ffi.ArgumentError, match="num_heads = 65536 of at most 65535"):
        fi_ffi.merge_states(v, s, *out)
    n = 2**20 + 1
    v, s = desc(n, 32, 128), desc(n, 32, dtype="float32")
    with pytest.raises(fi_ffi.ArgumentError, match="offsets below 4294967296"):
        fi_ffi.merge_state(v, s, v, s, v, s)


@pytest.mark.parametrize("head_dim", [32, 96, 192, 576])
def test_head_dims_that_are_not_compiled(head_dim, rng):
    for row in (PAIR, IN_PLACE, MANY):
        made = case(row, rng, head_dim=head_dim)
        with pytest.raises(fi_ffi.ArgumentError, match="head_dim of 64 or 128 or 256 or 512"):
            OPS[row.name](**made.arrays)


def test_what_a_wrong_merge_would_give_is_seen(rng):
    """Of logarithms to base e, of one set left out, and of weights 2 % off."""
    made = case(MANY, rng, n=20, sets=4)
    v, s = (made.arrays[name].astype(np.float64) for name in "vs")

    def fraction(v: np.ndarray, s: np.ndarray, base: float = 2.0) -> float:
        weights = base ** (s - s.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        got = np.einsum("nkhd,nkh->nhd", v, weights).astype(np.float16)
        return made.error("v_merged", got)[1]

    assert fraction(v, s) <= 1
    assert fraction(v, s, np.e) > 1
    assert fraction(v[:, 1:], s[:, 1:]) > 1
    assert fraction(v, s * 1.02) > 1
