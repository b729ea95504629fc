"""FlashInfer's own module that asks for device code: it is asked for, and its absence told.

The device code is for SM100, and is nowhere here.  The module asks before it looks at a GPU, and
needs the driver's library to be loaded at all.
"""

from __future__ import annotations

from tests.helpers.children import done
from tests.helpers.untyped_calls import module

PROGRAM = """
import ml_dtypes
import numpy as np
import fi_ffi

found = fi_ffi.module("fmha_cudnn_gen")
q = np.zeros((4, 2, 128), ml_dtypes.bfloat16)
kv = np.zeros((4, 2, 1, 128), ml_dtypes.bfloat16)
workspace, lengths = np.zeros(1 << 20, np.uint8), np.ones((1, 1, 1, 1), np.int32)
tables, lse = np.zeros((1, 4), np.int32), np.zeros((4, 2), np.float32)
for words in ("no device code", "remembers this failure"):
    try:
        found.prefill(1, 4, 4, q, kv, kv, 1.0, workspace, lengths, lengths, lengths, lengths,
                      tables, True, True, q.copy(), lse, None, None, None, None, False)
        raise SystemExit("it ran without device code")
    except fi_ffi.KernelNotFoundError as error:
        assert words in str(error) and "/fmha/cudnn/cudnn_sm100_" in str(error), error
        assert "Failed to load cubin" in error.__cause__.message, error.__cause__
print("told")
"""


def test_what_cudnns_module_asks_for():
    module("fmha_cudnn_gen")  # or the test is skipped
    code, out, err = done(PROGRAM, FI_FFI_OFFLINE="1", FLASHINFER_CUBIN_DIR="/nonexistent")
    assert (code, out.strip()) == (0, "told"), err
