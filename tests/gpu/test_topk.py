"""The greatest of each row on a GPU: the tests of tests/ops/test_topk.py."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.call.releases import fits, release_in_force
from fi_ffi.ops.call.row import Scalar
from fi_ffi.ops.functions import OPS

from tests.helpers.bodies import bodies_of
from tests.helpers.every_op import check_on
from tests.helpers.sampling_calls import run
from tests.ops import test_topk as on_host

globals().update(bodies_of(on_host))


@pytest.mark.parametrize("d", [4096, 131072])
def test_shared_rows_and_rows_of_a_block_choose_the_same(d, machine, rng, monkeypatch):
    """FlashInfer's own switch between the two kernels."""
    machine.need("topk")
    rows = rng.permutation(np.arange(20 * d) % 60000).reshape(20, d).astype(np.float32)
    made = {}
    for kernel in ("filtered", "multi_cta"):
        monkeypatch.setenv("FLASHINFER_TOPK_ALGO", kernel)
        case = on_host.make(on_host.PLAIN, rng, 20, d, 300, tables={"input": rows},
                            sorted_output=True)  # fmt: skip
        got = run(machine, on_host.PLAIN, case.arrays, **case.scalars)
        assert all(case.error(out, got[out])[1] <= 1 for out in case.expected)
        made[kernel] = got["output_values"]
    assert (made["filtered"] == made["multi_cta"]).all()


def test_page_tables_of_shared_rows_are_refused_before_anything_is_written(machine, rng):
    for n, d, k, dtype in ((64, 131072, 2500, "float32"), (8, 131072, 2048, "float32"),
                           (300, 131072, 64, "bfloat16")):  # fmt: skip
        case = on_host.make(on_host.PAGES, rng, n, d, k, dtype, deterministic=False)
        placed = {name: machine.place(array) for name, array in case.arrays.items()}
        descs = {name: array.desc() for name, array in placed.items()}
        with pytest.raises(fi_ffi.ArgumentError, match="`deterministic`.*several blocks share"):
            OPS[on_host.PAGES](**descs, **case.scalars, stream=machine.stream)
        before = case.arrays["output_page_table"]
        assert placed["output_page_table"].get().tobytes() == before.tobytes()
    case = on_host.make(on_host.PAGES, rng, 9, 131072, 2048, deterministic=False)
    assert check_on(machine, case) <= 1  # a block takes each


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(("n", "k"), [(8, 64), (8, 2048), (64, 2500)])
def test_how_often_page_tables_of_shared_rows_are_wrong(n, k, deterministic, machine, rng,
                                                        record_property):  # fmt: skip
    """docs/sampling.md: where the call is not deterministic, blocks may read what is not yet
    written, and never where it is. The entry itself is called, which refuses neither."""
    machine.need("topk")
    d = 131072
    scores = rng.permutation(np.arange(n * d) % 2**24).reshape(n, d).astype(np.float32)
    tables = rng.permutation(n * d).reshape(n, d).astype(np.int32)
    best = np.argpartition(scores, d - k, axis=1)[:, d - k :]
    wanted = np.sort(np.take_along_axis(tables, best, axis=1), axis=1)
    given = {
        "input": scores, "output_page_table": np.full((n, k), -1, np.int32),
        "src_page_table": tables, "lengths": np.full(n, d, np.int32),
        "maybe_row_states_buffer": np.zeros(1 << 20, np.uint8),
    }  # fmt: skip
    placed = {name: machine.place(array) for name, array in given.items()}
    values = {name: array.desc() for name, array in placed.items()}
    values |= {"top_k": k, "deterministic": deterministic, "tie_break": 0, "page_size": 1}
    entry = fi_ffi.module("topk").radix_topk_page_table_transform
    row = next(row for row in OPS[on_host.PAGES].rows if fits(row, release_in_force()))
    if "deterministic" not in {arg.name for arg in row.args}:
        pytest.skip(f"FlashInfer {release_in_force()} has no such option")
    arguments = [values.get(arg.name, False if isinstance(arg, Scalar) else None)
                 for arg in row.args]  # fmt: skip
    wrong = 0
    for _ in range(100):
        machine.poison(placed["output_page_table"], machine.stream)
        entry(*arguments, stream=machine.stream)
        machine.synchronize()
        wrong += (np.sort(placed["output_page_table"].get(), axis=1) != wanted).any()
    print(f"{wrong} of 100 launches over {n} rows of {d} elements, the greatest {k}, are wrong")
    record_property("wrong", int(wrong))
    assert wrong == 0 or not deterministic
