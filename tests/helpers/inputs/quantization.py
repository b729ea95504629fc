"""Random bits, and segments of them."""

from __future__ import annotations

import numpy as np

from fi_ffi.ops.on_host import packed_indptr

from tests.helpers.inputs.family import Call, Inputs

# Bytes that no segment has.
SPARE = 3


def make(call: Call) -> None:
    """Bits, and where segments start: some of them may be empty."""
    sizes, n = call.sizes, call.sizes["n"]
    call.default(x=call.rng.integers(0, 2, n))
    sizes["n"] = count = len(call.tables["x"])
    if call.row.name == "packbits":
        sizes["num_bytes"] = -(-count // 8)
        return
    inner = np.sort(call.rng.integers(0, n + 1, sizes["b"] - 1))
    call.default(input_indptr=np.array([0, *inner, n]))
    starts = call.tables["input_indptr"]
    call.default(output_indptr=packed_indptr(starts))
    ends = call.tables["output_indptr"][:-1] + -(-np.diff(starts) // 8)
    sizes |= {"b": len(starts) - 1, "num_bytes": int(max(ends, default=0)) + SPARE}


# By module, or by op.
INPUTS: dict[str, Inputs] = {
    "quantization": Inputs(small={"n": 61, "b": 3}, usual={"n": 2**16, "b": 8}, make=make)
}
