"""Indices that name no place in their tensor: refused on the CPU, where a GPU would read or write
there. Which integers are indices, the rows say.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi import ops
from fi_ffi.abi.tensor import DTYPES
from fi_ffi.catalogue.docs import docstring
from fi_ffi.cli.cases import Case, case_of
from fi_ffi.ops.call.notation import parse_expression
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.call.row import Row, Tensor
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.matmul import rows as of_matmul
from fi_ffi.ops.moe import lora
from fi_ffi.ops.moe import rows as fused
from fi_ffi.ops.moe.interface import INTERFACES
from fi_ffi.ops.moe.modes import MODES
from fi_ffi.ops.plans import rows as of_attention
from fi_ffi.ops.states import gdn, kda, mamba
from fi_ffi.ops.table import ROWS, comm

from tests.attention.cases import Service
from tests.attention.machines import Cpu
from tests.attention.tables import SERVED
from tests.helpers.cases import default_dtypes, make_case
from tests.helpers.inputs import inputs_of

# Codes, scales, bits and flags: any byte is a value.
BYTES = ("uint8", "int8", "bool")


def dtypes_of(row: Row, arg: Tensor) -> tuple[str, ...]:
    return row.dtypes.get(arg.dtype, (arg.dtype,))


def integers(row: Row) -> list[Tensor]:
    """The row's tensors of integers that a kernel reads, other than bytes. Dtypes of a row that
    calls fill in may be any."""
    return [
        arg
        for arg in row.tensors
        if arg.reads
        and any(
            name not in DTYPES or np.dtype(DTYPES[name].numpy).kind in "iu"
            for name in dtypes_of(row, arg)
            if name not in BYTES and (name not in DTYPES or DTYPES[name].lanes == 1)
        )
    ]


def rows_in(value: Any, seen: set[int]) -> Iterator[Row]:
    """The rows that a value holds, in the package's objects and their containers."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Row):
        yield value
        return
    parts: Iterable[Any] = ()
    if isinstance(value, Mapping):
        parts = (*value, *value.values())
    elif isinstance(value, (tuple, list, set, frozenset)):
        parts = value
    elif type(value).__module__.startswith("fi_ffi."):
        slots = (name for of in type(value).__mro__ for name in getattr(of, "__slots__", ()))
        parts = [getattr(value, name, None) for name in slots]
        parts += getattr(value, "__dict__", {}).values()
    for part in parts:
        yield from rows_in(part, seen)


def modules() -> list[ModuleType]:
    """The modules that have rows, or functions which make them."""
    return [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(ops.__path__, "fi_ffi.ops.")
    ]


# Rows that depend on a call, by the function that makes them.
MADE: dict[Callable[..., Row], list[Row]] = {
    gdn.row_of: [
        gdn.row_of(gdn.GdnKernel(2, 4, t, state_dtype=dtype, state_layout=layout, **more))
        for t, dtype, layout in itertools.product((1, 3), ("bfloat16", "float32"), gdn.LAYOUTS)
        for more in ({}, {"is_indexed": False}, {"is_same_pool": False})
        if dtype == "float32" or layout == "VK"
    ],
    kda.row_of: [
        kda.row_of(kda.KdaKernel(size, is_packed=is_packed, t=t, h=2, hv=4))
        for size, is_packed, t in itertools.product(kda.SIZES, (False, True), (1, 3))
    ],
    mamba.row_of: [
        mamba.row_of(kind, read, written, states)
        for kind, read, written in itertools.product(("one", "steps", "sequences"), (1, 2), (1, 2))
        for states in ("", mamba.INT16, mamba.RANDOM)
    ],
    fused.row_of: [
        fused.row_of(interface, method, mode, ("bfloat16", "uint8", "bfloat16"), True, (0,))
        for interface, mode in itertools.product(INTERFACES, MODES)
        for method in ("run_moe", "run_gemm_profile")
    ],
}

OWN = {id(row): row for module in modules() for row in rows_in(vars(module), set())}
OTHERS = [row for row in [*OWN.values(), *itertools.chain(*MADE.values())] if row not in ROWS]
EVERY = [(row, arg) for row in ROWS for arg in integers(row)]
EVERYWHERE = [*EVERY, *((row, arg) for row in OTHERS for arg in integers(row))]
INDICES = [(row, arg) for row, arg in EVERY if arg.index]


def ids(found: list[tuple[Row, Tensor]]) -> list[str]:
    return [f"{row.name} {row.releases} {arg.name}" for row, arg in found]


def test_the_rows_are_all_there_are():
    """Found in the modules, and made by every function that makes rows for a call."""
    makers = {
        value
        for module in modules()
        for name, value in vars(module).items()
        if name == "row_of" and value.__module__ == module.__name__
    }
    assert makers == MADE.keys()
    assert {*ROWS, *of_attention.ROWS, *of_matmul.ROWS, *lora.ROWS, *comm.OPS} <= {*OWN.values()}
    assert {row.variant for row in MADE[gdn.row_of]} == {
        "", "_float32", "_float32_tokens", "_float32_keys",
    }  # fmt: skip


def test_the_rows_say_of_every_integer_what_it_is():
    assert len(EVERY) > 100 and len(INDICES) > 50 and len(EVERYWHERE) > 2 * len(EVERY)
    said = {f"{row.name}{row.variant} {row.releases}: {arg.name}":
            bool(arg.index) != bool(arg.no_index) for row, arg in EVERYWHERE}  # fmt: skip
    assert not [told for told, is_right in said.items() if not is_right]
    for row, arg in EVERYWHERE:
        told = f"{row.name}{row.variant} {row.releases}: {arg.name}"
        # Each condition is about the argument, and is on the page of the op.
        for text in arg.index:
            assert arg.name in parse_expression(text)[1], told
            assert "".join(text.split()) in "".join(docstring(row).split()), told
    others = {(row.name, arg.name) for row in ROWS for arg in row.tensors if arg.index}
    assert others == {(row.name, arg.name) for row, arg in INDICES}


def test_sizes_in_conditions_are_those_of_the_row():
    """A name that is no size, scalar or tensor would only be noticed in a call."""
    for row, arg in EVERYWHERE:
        known = {arg.name for arg in row.args}
        known |= {name for tensor in row.tensors for name in tensor.axis_variables}
        known |= {"experts", "adapters"} if row is lora.CHECKS else set()  # of lists of weights
        for text in arg.index:
            assert {*parse_expression(text)[1]} - {"where"} <= known, f"{row.name}: {text}"


def drawn(row: Row, arg: Tensor, rng: np.random.Generator, dtype: str = "") -> Case:
    """A right call, with the tensor given and in this dtype."""
    dtypes = default_dtypes(row)
    if dtype and arg.dtype in row.dtypes:
        dtypes[arg.dtype] = dtype
    while True:
        case = make_case(row, inputs_of(row).small, dtypes, rng)
        lengths = case.arrays.get("lengths", np.ones(1))
        if case.arrays[arg.name].size and lengths.any():
            return case


def size_of(case: Case, name: str) -> int | None:
    """The size of an axis, or the value of a scalar."""
    if name in case.scalars:
        return int(case.scalars[name])
    for arg in case.row.tensors:
        if arg.name in case.arrays and name in arg.axis_names:
            return int(case.arrays[arg.name].shape[arg.axis_names.index(name)])
    return None


# Whose runs call the list of pages by its longer name.
PAGED = ("batch_prefill", "batch_decode")


@pytest.mark.parametrize("spec", SERVED.values(), ids=SERVED)
def test_pages_that_a_cache_lacks(spec, rng):
    """It is named, and no request has results, also none of those before it."""
    service = Service(replace(spec, indices_at_run=True), Cpu(), rng)
    case, batch = service.case, service.batch()
    count, used = case.room, int(batch.kv_indptr[-1])
    for page in (count, count + 1, 2**31 - 1, -1, -(2**31)):
        at, wrong = int(rng.integers(used)), batch.indices.copy()
        wrong[at] = page
        with_wrong, out = replace(batch, indices=wrong), case.outputs(batch.rows)
        with pytest.raises(fi_ffi.ArgumentError, match=f"got {page} in element {at}, ") as caught:
            case.run(case.plan(with_wrong), with_wrong, out)
        error = caught.value
        name = "paged_kv_indices" if spec.family in PAGED else "kv_indices"
        assert (error.op, error.argument) == (case.plan_class.__name__, name)
        assert np.isnan(out.o.get().astype(np.float32)).all()
        assert out.lse is None or np.isnan(out.lse.get()).all()
    case.check(batch, case.run(case.plan(batch), batch, case.outputs(batch.rows)))


# Of these, an index below 0 has a meaning: the token is left out.
LEFT_OUT = "batch_indices"


def wrong_values(case: Case, arg: Tensor) -> list[int]:
    """Values that name no place: below 0, past the end, and as far as the dtype reaches."""
    limits = np.iinfo(case.arrays[arg.name].dtype)
    found = [limits.max, limits.max - 1]
    if not (arg.name == LEFT_OUT and case.row.module == "rope"):
        has_none = any(text.startswith("-1 <= ") for text in arg.index)
        found += [-2 if has_none else -1, -2, limits.min]
    for text in arg.index:
        words = text.split()
        # Half a condition, or the end of a whole one.
        if words[-2:-1] == ["<"] and (size := size_of(case, words[-1])) is not None:
            found.append(size)
        if words[-2:-1] == ["<="] and (size := size_of(case, words[-1])) is not None:
            found.append(size + 1)
    return found


def refused(case: Case, arg: Tensor) -> fi_ffi.ArgumentError:
    """Call, and return the refusal, which wrote nothing."""
    before = {name: array.tobytes() for name, array in case.arrays.items()}
    with pytest.raises(fi_ffi.ArgumentError) as caught:
        Op(case.row)(**case.arrays, **case.scalars)
    assert {name: array.tobytes() for name, array in case.arrays.items()} == before
    error = caught.value
    assert type(error) is fi_ffi.ArgumentError
    assert (error.op, error.argument) == (case.row.name, arg.name)
    assert error.expected.endswith(("or more", "or less")) or "than" in error.expected
    return error


def with_wrong(case: Case, name: str, value: int, at: Any) -> Case:
    arrays = {**case.arrays, name: case.arrays[name].copy()}
    arrays[name][at] = value
    return Case(case.row, arrays, case.scalars, case.expected)


@pytest.mark.parametrize(("row", "arg"), INDICES, ids=ids(INDICES))
def test_a_place_that_there_is_not_is_refused(row, arg, rng):
    for dtype in dtypes_of(row, arg):
        case = drawn(row, arg, rng, dtype)
        array = case.arrays[arg.name]
        for value in wrong_values(case, arg):
            error = refused(with_wrong(case, arg.name, value, ...), arg)
            assert str(value) in error.got or "steps(" in error.got or " = " in error.got
            if all("[" not in text and "where" not in text for text in arg.index):
                at = tuple(rng.integers(0, array.shape))
                refused(with_wrong(case, arg.name, value, at), arg)


@pytest.mark.parametrize(("row", "arg"), INDICES, ids=ids(INDICES))
def test_a_right_call_is_taken(row, arg, rng):
    case = drawn(row, arg, rng)
    Op(case.row)(**case.arrays, **case.scalars)
    for name in case.expected:
        assert case.error(name, case.arrays[name])[1] <= 1


def call(name: str, rng: np.random.Generator, **tables: Any) -> Case:
    row = OPS[name].row
    sizes = {**inputs_of(row).small}
    return make_case(row, sizes, default_dtypes(row), rng, tables or None)


SAMPLERS = sorted({row.name for row, arg in INDICES if arg.name == "maybe_indices"})


@pytest.mark.parametrize("name", SAMPLERS)
def test_first_and_last_rows_are_rows(name, rng):
    case = call(name, rng)
    rows = len(next(iter(case.arrays.values())))
    indices = case.arrays["maybe_indices"]
    indices[...] = rng.choice([0, rows - 1], len(indices))
    again = make_case(case.row, inputs_of(case.row).small, default_dtypes(case.row), rng,
                      {"maybe_indices": indices})  # fmt: skip
    OPS[name](**again.arrays, **again.scalars)
    assert again.error("output", again.arrays["output"])[1] <= 1
    indices[rng.integers(len(indices))] = rows
    with pytest.raises(fi_ffi.ArgumentError, match=f"less than r = {rows}"):
        OPS[name](**again.arrays | {"maybe_indices": indices}, **again.scalars)


def windows(lengths: list[int], starts: list[int], **more: Any) -> np.ndarray:
    """The indices of the two greatest of each row's window, of 8 columns."""
    x = np.tile(np.arange(8, dtype=np.float32), (len(lengths), 1))
    out = np.full((len(lengths), 2), 77, np.int32)
    table = np.tile(np.arange(100, 108, dtype=np.int32), (len(lengths), 1))
    fi_ffi.radix_topk_page_table_transform(
        x, out, table, None, np.array(lengths, np.int32), top_k=2,
        maybe_row_starts=np.array(starts, np.int32), **more,
    )  # fmt: skip
    return out


def test_a_window_ends_with_its_row():
    assert {*windows([8], [0])[0]} == {106, 107} and {*windows([5], [3])[0]} == {106, 107}
    for length, start, argument in ((9, 0, "lengths"), (5, 4, "maybe_row_starts"),
                                    (8, -20, "maybe_row_starts"), (-1, 0, "lengths"),
                                    (10**6, 0, "lengths")):  # fmt: skip
        with pytest.raises(fi_ffi.ArgumentError) as caught:
            windows([8, length], [0, start])
        assert caught.value.argument == argument and " in element 1" in caught.value.got


def test_an_empty_window_is_nowhere():
    """As the kernels do: of a row without elements nothing is read, wherever it starts."""
    assert windows([0, 5], [-7, 3]).tolist()[0] == [-1, -1]
    assert windows([0], [10**6]).tolist() == [[-1, -1]]


def test_a_drafted_token_is_one_of_the_vocabulary(rng):
    case = call("chain_speculative_sampling", rng)
    vocabulary = case.arrays["draft_probs"].shape[2]
    ids_ = case.arrays["draft_token_ids"]
    at = tuple(rng.integers(0, ids_.shape))
    for value, words in ((-1, "0 or more"), (vocabulary, f"less than h = {vocabulary}")):
        wrong = with_wrong(case, "draft_token_ids", value, at)
        error = refused(wrong, next(a for a in case.row.tensors if a.name == "draft_token_ids"))
        assert error.got == f"{value} in element {at[0]}, {at[1]}" and error.expected == words


def test_a_token_of_no_request_is_left_out(rng):
    """Its other indices may be anything, as in a batch that is padded for a graph."""
    for name in ("rope_quantize_append_paged_kv_cache", "rope_quantize_append_paged_mla_kv_cache"):
        case = call(name, rng)
        tables = {n: case.arrays[n].copy() for n in ("batch_indices", "positions", "pos_ids")}
        pages = {n: case.arrays[n] for n in ("kv_indices", "kv_indptr")}
        pages["kv_last_page_len"] = np.ones(len(pages["kv_indptr"]) - 1, np.int32)
        out = rng.permutation(len(tables["positions"]))[:2]
        tables["batch_indices"][out] = [-1, -(2**31)]
        tables["positions"][out] = [2**31 - 1, -5]
        tables["pos_ids"][out] = [-9, 10**9]
        case = call(name, rng, **tables, **pages)
        for of in ("q_rope_out", "q_nope_out"):  # a NaN that stays would be of no use
            case.arrays[of][...] = 7
        case = case_of(case.row, case.arrays, case.scalars)
        OPS[name](**case.arrays, **case.scalars)
        for result in case.expected:
            assert case.error(result, case.arrays[result])[1] <= 1
        kept = np.flatnonzero(tables["batch_indices"] >= 0)
        at = int(rng.choice(kept))
        for argument, value in (("positions", -1), ("pos_ids", -1), ("batch_indices", 10**9)):
            wrong = with_wrong(case, argument, value, at)
            arg = next(a for a in case.row.tensors if a.name == argument)
            assert f"{value} in element {at}" in refused(wrong, arg).got


def test_places_are_computed_in_64_bits():
    """2^30 * 4 is 0 in the tensor's own int32."""
    seq_idx, offsets = np.array([0, 0, 0, 0, 1, 1], np.int32), np.zeros(2, np.int32)
    chunks, out = np.array([0, 2**30], np.int32), np.full(3, 77, np.int32)
    sizes = {"chunk_size": 4, "num_logical_chunks": 2, "num_seqs": 2}
    right = np.array([0, 1], np.int32)
    fi_ffi.seq_chunk_cumsum(seq_idx, right, offsets, out, **sizes)  # scratch memory stays
    out[:] = 77
    with pytest.raises(fi_ffi.ArgumentError, match=f" = {2**32} in element 1"):
        fi_ffi.seq_chunk_cumsum(seq_idx, chunks, offsets, out, **sizes)
    assert out.tolist() == [77] * 3


def test_the_last_piece_starts_in_its_chunk():
    seq_idx = np.array([0, 0, 0, 1, 1, 1], np.int32)
    chunks, offsets = np.array([0, 0, 1], np.int32), np.array([0, 3, 0], np.int32)
    out = np.full(3, 77, np.int32)
    sizes = {"num_logical_chunks": 3, "num_seqs": 2}
    fi_ffi.seq_chunk_cumsum(seq_idx, chunks, offsets, out, chunk_size=4, **sizes)
    assert out.tolist() == [0, 1, 3]
    for value in (-1, 4, 2**31 - 1):
        offsets[2] = value
        with pytest.raises(fi_ffi.ArgumentError, match=f"chunk_offsets`: got {value} in element 2"):
            fi_ffi.seq_chunk_cumsum(seq_idx, chunks, offsets, out, chunk_size=4, **sizes)
    for chunk, offset, words in ((1, 2, "chunk_offsets`: .* = 6 in element 2, .*= 6"),
                                 (2, 0, "chunk_indices`: .* = 8 in element 2, .*= 6")):  # fmt: skip
        chunks[2], offsets[2] = chunk, offset
        with pytest.raises(fi_ffi.ArgumentError, match=words):
            fi_ffi.seq_chunk_cumsum(seq_idx, chunks, offsets, out, chunk_size=4, **sizes)
