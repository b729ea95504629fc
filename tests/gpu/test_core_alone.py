"""The core without the packages above it, on a GPU with a local kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

import fi_ffi

from tests.helpers import kernels
from tests.test_layers import calls_in, copied

ON_GPU = """
    import numpy as np
    from cuda.bindings import runtime

    import fi_ffi

    def check(answer):
        error, *values = answer
        assert error == 0, error
        return values[0] if values else None

    device = "cuda:0"
    check(runtime.cudaSetDevice(0))
    stream = int(check(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)))

    def copied(to, source, count):
        kind = runtime.cudaMemcpyKind.cudaMemcpyDefault
        check(runtime.cudaMemcpyAsync(to, source, count, kind, stream))
        check(runtime.cudaStreamSynchronize(stream))

    def put(host):
        address = int(check(runtime.cudaMalloc(host.nbytes)))
        host = np.ascontiguousarray(host)
        copied(address, host.ctypes.data, host.nbytes)
        return fi_ffi.TensorDesc(address, host.shape, host.dtype.name, device=device)

    def get(desc):
        host = np.empty(desc.shape, str(desc.dtype))
        copied(host.ctypes.data, desc.ptr, host.nbytes)
        return host
"""


def test_the_core_runs_alone(tmp_path: Path) -> None:
    """Neither the numpy kernels nor what fetches is there."""
    if kernels.first_here() is None:
        pytest.skip("no kernels on this machine, and without what fetches there are no others")
    for op, options in ((fi_ffi.rmsnorm, {}), (fi_ffi.BatchDecodePlan, {"head_dim": 128})):
        if not (found := op.supports(**options)):
            pytest.skip(found.reason)
    calls_in(copied(tmp_path), ON_GPU)
