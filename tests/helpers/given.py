"""Names that the invisible set-up of a page's blocks can import: the device it runs on.

On the CPU they are numpy's own; on a GPU arrays are copied to it.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

device = os.environ.get("FI_FFI_BLOCKS_DEVICE", "cpu")
_held: dict[int, Any] = {}


def _stream() -> int:
    if device == "cpu":
        return 0
    from cuda.bindings import runtime

    from fi_ffi.cli.cuda import check

    return int(check(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)))


stream = _stream()


def on_device(array: np.ndarray) -> Any:
    """The array, on `device`, for as long as the process lives."""
    if device == "cpu":
        return array
    from fi_ffi.cli.cuda import DeviceArray

    made = DeviceArray(array)
    _held[made.ptr] = made
    return made.desc()


def on_host(tensor: Any) -> np.ndarray:
    """What is in a tensor of `on_device` now."""
    return tensor if device == "cpu" else _held[tensor.ptr].get()


def wheel_of(*modules: str) -> None:
    """A wheel of FlashInfer 0.6.13 that has these modules, with nothing in them, in this folder."""
    from tests.loader.server import record

    members = {f"flashinfer_jit_cache/jit_cache/{name}/{name}.so": b"" for name in modules}
    wheel = "flashinfer_jit_cache-0.6.13+cu130-cp39-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr("flashinfer_jit_cache-0.6.13+cu130.dist-info/RECORD", record(members))


def testing_library() -> None:
    """libtvm_ffi_testing.so of the installed wheel, or of the pinned one, in this folder."""
    from fi_ffi.loader import runtime

    from tests.helpers.pinned import TESTING_MEMBER, download_pinned_wheel

    here = Path(Path(TESTING_MEMBER).name)
    installed = Path(runtime.ensure_tvm_ffi().path).with_name(here.name)
    if installed.is_file():
        here.write_bytes(installed.read_bytes())
        return
    with zipfile.ZipFile(download_pinned_wheel()) as archive:
        here.write_bytes(archive.read(TESTING_MEMBER))
