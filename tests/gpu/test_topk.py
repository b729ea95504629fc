"""The greatest of each row on a GPU: the tests of tests/ops/test_topk.py."""

from __future__ import annotations

import numpy as np
import pytest

import fi_ffi
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
