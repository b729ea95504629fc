"""Threads that have called no CUDA yet: kernels with TMA descriptors need a context before."""

from __future__ import annotations

import threading

import pytest

import fi_ffi
from fi_ffi.ops.functions import OPS

from tests.helpers.cases import make_case
from tests.helpers.prepared_calls import or_skip

GDN = OPS["gdn_prefill"]
SIZES = {
    "total_seq_len": 200, "num_seqs": 3, "num_q_heads": 2, "num_v_heads": 4, "head_size": 128,
    "workspace_size": 1 << 16,
}  # fmt: skip


@pytest.mark.parametrize("how", ["typed", "again", "scope", "prepared"])
def test_a_threads_first_call(how, rng, to_gpu, stream):
    or_skip(fi_ffi.loader.search.find_module, "gdn_prefill_sm90", 0)
    without = ("state_checkpoints", "checkpoint_cu_starts")
    case = make_case(GDN.row, SIZES, {"T": "float16"}, rng, without=without)
    arrays = {name: to_gpu(array) for name, array in case.arrays.items()}
    values = {name: array.desc() for name, array in arrays.items()} | case.scalars
    if how == "again":  # its layouts are known then
        GDN(**values, stream=stream)
    prepared = GDN.prepare(**values, stream=stream)

    def launch() -> None:
        if how == "prepared":
            prepared()
        elif how == "scope":
            with fi_ffi.stream(stream):
                GDN(**values)
        else:
            GDN(**values, stream=stream)

    thread = threading.Thread(target=launch)
    with fi_ffi.watchdog(10):
        thread.start()
        thread.join()
    for name in case.expected:
        assert case.error(name, arrays[name].get())[1] <= 1
