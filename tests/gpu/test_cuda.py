"""The CUDA that kernels were compiled with is the one that this process runs on."""

from __future__ import annotations

import json
import os

from cuda.bindings import runtime

from fi_ffi.cli import cuda as of_python
from fi_ffi.loader import machine, search
from fi_ffi.loader.kernels import cuda_of

from tests.helpers import kernels
from tests.helpers.children import done

# Memory first, then a kernel: the runtime is chosen before the kernel's file is opened.
PROGRAM = """
import json, sys
import numpy as np
import fi_ffi
from fi_ffi.cli.cuda import DeviceArray
from fi_ffi.loader import machine, runtime
from fi_ffi.ops.call import cuda

device = fi_ffi.parse_device("cuda:0")
room = cuda.allocate(1 << 20, device, zeroed=True)
locked = cuda.allocate_page_locked(4096, device)
first = sorted(machine.runtimes_in_process())
rng = np.random.default_rng(int(sys.argv[1]))
x = rng.standard_normal((33, 4096)).astype(np.float16)
weight = rng.standard_normal(4096).astype(np.float16)
arrays = [DeviceArray(a) for a in (np.full_like(x, np.nan), x, weight)]
fi_ffi.rmsnorm(*(a.desc() for a in arrays), eps=1e-6, stream=0)
cuda.synchronize(device)
wide = x.astype(np.float64)
expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * weight.astype(np.float64)
found = arrays[0].get().astype(np.float64)
facts = runtime.load("norm", 0).facts
print(json.dumps({
    "first": first, "mapped": sorted(machine.runtimes_in_process()), "needed": facts.needed,
    "error": float(np.abs(found - expected).max() / np.abs(expected).max()),
    "intact": all(a.intact() for a in arrays),
}))
"""


def test_memory_and_kernels_have_one_runtime() -> None:
    """In a process of its own: nothing else has brought a runtime there."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    code, out, err = done(PROGRAM, str(seed))
    kernels.skip_if_missing(err)
    assert code == 0, err
    found = json.loads(out)
    (needed,) = (name for name in found["needed"] if name.startswith("libcudart"))
    major = int(needed.rpartition(".")[2])
    assert found["first"] == found["mapped"] == [major]
    assert found["error"] < 2e-3 and found["intact"]


def test_the_driver_tells_what_cuda_python_tells() -> None:
    gpus = of_python.gpus()
    assert machine.driver_version() == of_python.driver_version()
    assert machine.device_count() == len(gpus)
    for gpu in gpus:
        properties = of_python.check(runtime.cudaGetDeviceProperties(gpu.index))
        assert machine.capability(gpu.index) == (properties.major, properties.minor)
        assert machine.multiprocessors(gpu.index) == properties.multiProcessorCount
        assert machine.shared_memory(gpu.index) == properties.sharedMemPerBlockOptin
        assert gpu.memory == properties.totalGlobalMem
        assert gpu.name == properties.name.decode().rstrip("\0")


def test_the_driver_runs_the_kernels_in_use() -> None:
    major = search.cuda_of_kernels()
    for source in search.sources():
        for module in source.modules()[:1]:
            _, _, facts = search.find_module(module)
            assert cuda_of(facts) in (None, major)
    assert major is not None and major <= machine.driver_version()[0]
    assert major in machine.majors_here()
