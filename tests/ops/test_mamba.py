"""Pieces of sequences, on the CPU and on a GPU, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi
from fi_ffi.cli.cases import Case
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.table.mamba import ONE_BLOCK, tile_state_bytes

from tests.helpers.cases import make_case
from tests.helpers.every_op import check_on
from tests.helpers.inputs.mamba import pieces

PIECES = OPS["seq_chunk_cumsum"]


def make(rng, num_seqs: int, dtype: str = "int32", **more) -> Case:
    sizes = {"num_seqs": num_seqs, "bytes": tile_state_bytes(num_seqs)}
    return make_case(PIECES.row, sizes, {"I": dtype}, rng, **more)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("num_seqs", [0, 1, 6, ONE_BLOCK, ONE_BLOCK + 1, 3000])
@pytest.mark.parametrize("own", [False, True], ids=["its memory", "fi_ffi's"])
def test_pieces(num_seqs, dtype, own, machine, rng):
    """One block searches, or several that add up, in exactly the memory that they need."""
    without = ("tile_state",) if own else ()
    for chunk_size in (64, 1):
        made = make(rng, num_seqs, dtype, without=without, chunk_size=chunk_size)
        assert check_on(machine, made) == 0


def test_what_is_needed_is_what_is_kept():
    """8 bytes for each of 32 tiles and those that there are, of 256 sequences each."""
    assert [tile_state_bytes(n) for n in (1023, 1024, 1025, 3000)] == [0, 288, 296, 352]


def test_one_piece_for_each_chunk(machine, rng):
    """What is to be seen: three sequences, of 5, 0 and 6 tokens, in chunks of 4."""
    tables = pieces(np.array([5, 0, 6]), 4)
    assert tables["chunk_offsets"].tolist() == [0, 0, 1, 0]
    made = make(rng, 3, tables=tables, chunk_size=4)
    assert made.expected["output"][0].tolist() == [0, 2, 2, 4]
    assert check_on(machine, made) == 0


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"tile_state": np.zeros(tile_state_bytes(2000) - 1, np.uint8)}, "tile_state"),
        ({"chunk_offsets": np.zeros(1, np.int32)}, "chunk_offsets"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"num_seqs": 1999}, "num_seqs"),
        ({"num_logical_chunks": 3}, "num_logical_chunks"),
        ({"seq_idx": np.zeros(0, np.int32)}, "chunk_indices"),
        ({"seq_idx": np.zeros(9, np.int16)}, "seq_idx"),
    ],
    ids=lambda given: "-".join(given) if isinstance(given, dict) else "",
)
def test_refusals(change, argument, rng):
    made = make(rng, 2000)
    given = {**made.arrays, **made.scalars, "num_seqs": 2000, **change}
    with pytest.raises(fi_ffi.ArgumentError) as raised:
        PIECES(**given)
    assert raised.value.argument == argument
    assert (made.arrays["output"] == 0xFF).all()
