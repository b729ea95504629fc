"""Static variables of kernel files, kept apart for each GPU; with a library compiled here."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import Entry
from fi_ffi.errors import BuildError
from fi_ffi.loader import machine, per_device, runtime
from fi_ffi.loader.building.environment import find_cxx

# As FlashInfer's launchers have them: a flag, and a pointer inside a lambda.
SOURCE = """
#include <cstdint>
template <int N> struct Universal {
  bool is_initialized(bool set = false) {
    static bool initialized = false;
    if (set) initialized = true;
    return initialized;
  }
};
static thread_local int device = 0;
extern "C" int* device_of_thread() { return &device; }
static int counters[2];
template <int N> int* launch() {
  auto inner = [&]() {
    static int* tbAssign = nullptr;
    if (tbAssign == nullptr) tbAssign = &counters[device];
    return tbAssign;
  };
  return inner();
}
extern "C" int __tvm_ffi_run(void*, const void* args, int32_t count, void* result) {
  Universal<1> one; Universal<2> two;
  int first = !one.is_initialized(), second = 0;
  one.is_initialized(true);
  if (count > 1) { second = !two.is_initialized(); two.is_initialized(true); }
  for (volatile int i = 0; i < 2000; i = i + 1) {}
  // Whether this device's counters are the ones found, and who had to be set up.
  return (launch<1>() == &counters[device] && launch<2>() == &counters[device] ? 0 : 100)
      + first + 2 * second;
}
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        compiler = str(find_cxx())
    except BuildError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("statics")
    source, made = folder / "statics.cc", folder / "gdn_prefill_sm90.so"
    source.write_text(SOURCE)
    options = ["-shared", "-fPIC", "-O1", "-std=c++17"]
    subprocess.run([compiler, *options, str(source), "-o", str(made)], check=True, timeout=60)
    return made


class Gpus:
    """A library's function on pretended GPUs."""

    def __init__(self, path: Path) -> None:
        self.handle = library.open_module(str(path))
        self.path = path
        self._of_thread = ffi.cast(
            "int *(*)(void)", library.find_symbol(self.handle, "device_of_thread")
        )

    def cudaGetDevice(self, index: Any) -> int:
        index[0] = self._of_thread()[0]
        return 0

    def entry(self) -> Entry:
        return runtime.exported(self.handle, self.path, "run")

    def call(self, entry: Entry, device: int, count: int = 1) -> int:
        self._of_thread()[0] = device
        return int(entry.address(ffi.NULL, ffi.NULL, count, ffi.NULL))


@pytest.fixture
def gpus(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gpus:
    # GNU_UNIQUE variables are one for all copies of a library in a process.
    made = Gpus(built)
    for variable in per_device.variables(built, made.handle):
        variable[:] = bytes(len(variable))
    monkeypatch.setattr(machine, "device_count", lambda: 2)
    monkeypatch.setattr(machine, "load_cudart", lambda: (made, "a pretended one"))
    monkeypatch.setattr(per_device, "_files", {})
    return made


def test_the_variables_are_found(built: Path, gpus: Gpus) -> None:
    found = sorted(len(variable) for variable in per_device.variables(built, gpus.handle))
    assert found == [1, 1, 8, 8]


def test_each_gpu_has_its_own(gpus: Gpus) -> None:
    """Set up once on each GPU, and then not again, in any order."""
    entry, again = gpus.entry(), gpus.entry()
    assert [gpus.call(entry, device) for device in (0, 0, 1, 1, 0, 1, 0)] == [1, 0, 1, 0, 0, 0, 0]
    # A kernel that is first used on either after both were in use.
    assert [gpus.call(again, device, 2) for device in (1, 0, 1, 0)] == [2, 2, 0, 0]


def test_without_it_they_are_the_first_gpu_s(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control, and what is done where a process sees one GPU: nothing."""
    monkeypatch.setattr(machine, "device_count", lambda: 1)
    entry = gpus.entry()
    assert isinstance(entry.address, ffi.CData)
    assert gpus.call(entry, 0) == 1
    assert gpus.call(entry, 1) == 100, "GPU 1 is not set up, and has GPU 0's counters"


def test_threads_take_turns(gpus: Gpus) -> None:
    """A call has the variables to itself until it ends."""
    entry, wrong = gpus.entry(), []

    def run(device: int) -> None:
        wrong.extend(code for _ in range(300) if (code := gpus.call(entry, device)) >= 100)

    threads = [threading.Thread(target=run, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_other_modules_are_not_read(gpus: Gpus, tmp_path: Path) -> None:
    path = tmp_path / "norm.so"  # which is not even there
    call = object()
    assert per_device.guarded(path, gpus.handle, call) is call  # type: ignore[arg-type]
