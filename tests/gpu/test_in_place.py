"""Every pair of tensors that a row lets be the very same memory, on a GPU: calls in place give
what calls in memory apart do, bit for bit, again and again.

Sizes are from one row to more blocks than run at once: those of a first wave write while others
have yet to read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from cuda.bindings import runtime

from fi_ffi.cli.cases import Case
from fi_ffi.cli.cuda import check
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.call.row import Row

from tests.helpers.calls import EVERY_CALL, padded
from tests.helpers.cases import make_arguments
from tests.helpers.every_op import needs

REPEATED = 20
# So many elements beside each row, of tensors that need not be contiguous.
_PAD = 16

Sizes = dict[str, Any]


def _rows(*sizes: tuple[int, int], **more: int) -> list[Sizes]:
    return [{"n": n, "h": h, **more} for n, h in sizes]


_NORM = _rows((1, 8), (1, 4096), (3, 1001), (33, 127), (130, 16384), (1000, 4096), (5000, 1024),
              (60000, 64))  # fmt: skip
_HEADS = [
    {"n": n, "k": k, "h": h}
    for n, k, h in ((1, 1, 64), (7, 5, 128), (33, 3, 1001), (500, 40, 128), (9000, 8, 64))
]
_DIT = [{"n": n, "num_rows": rows} for n, rows in ((1, 1), (3, 1), (2, 77), (1, 3000), (5, 500))]
_STATES = [
    {"n": n, "num_heads": heads, "head_dim": dim}
    for n, heads, dim in ((1, 1, 64), (5, 3, 128), (33, 32, 256), (400, 32, 512), (5000, 8, 64))
]
# Whole rows of a vocabulary: searched by a block each, and shared by blocks.
_LOGITS = _rows((1, 32), (6, 100), (3, 4099), (130, 4096), (3000, 1000), (2, 32000), (40, 128256),
                (200, 60000), workspace_size=2**20)  # fmt: skip
_TURNED = [
    {"nnz": nnz, "num_qo_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim,
     "rotary_dim": rotary, "b": b, "max_seq_len": 4096}
    for nnz, heads, kv_heads, dim, rotary, b in (
        (1, 1, 1, 64, 64, 1), (7, 4, 2, 128, 128, 3), (33, 8, 2, 256, 128, 4),
        (2000, 32, 8, 128, 128, 30), (6000, 8, 1, 64, 32, 7), (500, 16, 4, 512, 512, 5))
]  # fmt: skip
# Of head sizes that go to the kernel that quantises, where 512 elements are one warp's.
_TURNED_WIDE = [{**_TURNED[3], "head_dim": dim, "rotary_dim": rotary, "nnz": 700}
                for dim, rotary in ((192, 64), (192, 128), (96, 32), (576, 512))]  # fmt: skip
_GDN = [
    {"total_seq_len": tokens, "num_seqs": seqs, "num_q_heads": q, "num_v_heads": v,
     "head_size": 128, "workspace_size": 2**16}
    for tokens, seqs, q, v in ((1, 1, 1, 1), (70, 2, 2, 4), (2000, 30, 8, 4), (900, 150, 2, 4))
]  # fmt: skip
SIZES: dict[str, list[Sizes]] = {
    **dict.fromkeys(("rmsnorm", "gemma_rmsnorm"), _NORM),
    "qk_rmsnorm": _HEADS,
    # Pairs of elements, and rows in shared memory, also where a block has to ask for more of it.
    "layernorm": _rows((1, 2), (3, 64), (33, 1000), (4000, 768), (150, 8192), (9, 30000)),
    **dict.fromkeys(
        (
            "fused_dit_gate_residual_layernorm_gamma_beta",
            "fused_dit_residual_layernorm_scale_shift",
            "fused_dit_gate_residual_layernorm_scale_shift",
        ),
        _DIT,
    ),
    "merge_state": _STATES,
    **dict.fromkeys(
        ("softmax", "top_p_renorm_probs", "top_k_renorm_probs", "top_k_mask_logits"), _LOGITS
    ),
    **dict.fromkeys(
        ("apply_rope", "apply_llama31_rope", "apply_rope_pos_ids", "apply_llama31_rope_pos_ids"),
        _TURNED,
    ),
    "apply_rope_pos_ids_cos_sin_cache": _TURNED + _TURNED_WIDE,
    "gdn_prefill": _GDN,
}
CALLS = [
    pytest.param(op, dtypes, sizes, i, id=f"{call.id} {'x'.join(map(str, sizes.values()))}")
    for call in EVERY_CALL
    for op, dtypes in [call.values]
    if op.row.in_place
    for i, sizes in enumerate(SIZES[op.row.name])
]


def choices(row: Row) -> Iterator[dict[str, str]]:
    """Which input each output is: of one output, and of all of them, each another."""
    for out, of in row.in_place:
        yield {out: of}
    outs = sorted({out for out, _ in row.in_place})
    of_each = [[of for out, of in row.in_place if out == o] for o in outs]
    for chosen in itertools.product(*of_each):
        if len(outs) > 1 and len({*chosen}) == len(outs):
            yield dict(zip(outs, chosen, strict=True))


def exact_probabilities(rng: np.random.Generator, n: int, h: int) -> np.ndarray:
    """Their sums are the same in any order: blocks that share a row add theirs as they come."""
    return rng.integers(0, 64, (n, h)) * 2.0**-20


def drawn(op: Op, dtypes: Mapping[str, str], sizes: Sizes, i: int, rng: Any) -> Case:
    names = {arg.name for arg in op.row.args}
    # Every other call with what a row has of these.
    options = {name: bool(i % 2) for name in ("enable_pdl", "interleave") if name in names}
    scalars = {arg.name: sizes[arg.name] for arg in op.row.given if arg.name in ("rotary_dim",)}
    tables = None
    if op.row.name == "top_k_renorm_probs":
        tables = {"probs": exact_probabilities(rng, sizes["n"], sizes["h"])}
    # Judging millions of elements in float64 takes long, and other tests do it.
    made = make_arguments(op.row, sizes, dtypes, rng, tables, **options, **scalars)
    return Case(op.row, *made, {})


def strided(row: Row, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays with room beside each row of those that may be in place, if they may have it."""
    listed = {name for pair in row.in_place for name in pair}
    free = not any(arg.contiguous for arg in row.tensors if arg.name in listed)
    return {name: padded(a, _PAD) if free and name in listed else a for name, a in arrays.items()}


@pytest.mark.parametrize(("op", "dtypes", "sizes", "i"), CALLS)
def test_in_place(op, dtypes, sizes, i, machine, rng):
    needs(op, machine)
    machine.need(op.row.module)
    case = drawn(op, dtypes, sizes, i, rng)
    arrays = strided(op.row, case.arrays) if i % 3 else case.arrays
    apart = {name: machine.place(array) for name, array in arrays.items()}
    written = [arg.name for arg in op.row.tensors if arg.writes and arg.name in arrays]
    scratch = {arg.name for arg in op.row.tensors if arg.is_scratch}
    machine.synchronize()
    op(**{name: a.desc() for name, a in apart.items()}, **case.scalars, stream=machine.stream)
    machine.synchronize()
    results = [name for name in written if name not in scratch and arrays[name].size]
    expected = {name: apart[name].get().tobytes() for name in results}
    kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    for joined in choices(op.row):
        rooms = {of: machine.place(arrays[of]) for of in joined.values()}
        outs = {n: machine.place(arrays[n]) for n in expected if n not in joined}
        placed = {**apart, **outs, **rooms, **{out: rooms[of] for out, of in joined.items()}}
        descs = {name: array.desc() for name, array in placed.items()}
        for _ in range(REPEATED):
            for of, room in rooms.items():
                copy = room.ptr, apart[of].ptr, room.nbytes, kind, machine.stream
                check(runtime.cudaMemcpyAsync(*copy))
            for out in outs.values():
                machine.poison(out, machine.stream)
            op(**descs, **case.scalars, stream=machine.stream)
            machine.synchronize()
            for name, value in expected.items():
                got = placed[name].get().tobytes()
                assert got == value, f"{name}, where {joined} are one"
        assert all(array.intact() for array in [*rooms.values(), *outs.values()])
        for array in (*rooms.values(), *outs.values()):
            array.free()
    for name, array in apart.items():
        if name not in written:
            assert array.get().tobytes() == arrays[name].tobytes(), f"{name} was changed"


def test_every_pair_has_sizes():
    assert {call.values[0].row.name for call in CALLS} == {*SIZES}
