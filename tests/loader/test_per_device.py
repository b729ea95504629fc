"""Static variables of kernel files, one for each GPU; with a library compiled here."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fi_ffi.abi import library
from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import Entry
from fi_ffi.errors import ArtifactError
from fi_ffi.loader import machine, per_device, runtime
from fi_ffi.modules import files

from tests.helpers import compiler

# As FlashInfer's launchers have them: a flag, and a pointer inside a lambda.  BASE: compilers let
# variables of one name be shared by all libraries of a process.
SOURCE = """
#include <cstdint>
#include <ctime>
template <int N> struct Universal {
  bool is_initialized(bool set = false) {
    static bool initialized = false;
    if (set) initialized = true;
    return initialized;
  }
};
static int counters[2];
template <int N> int* launch(int device) {
  auto inner = [&]() {
    static int* tbAssign = nullptr;
    if (tbAssign == nullptr) tbAssign = &counters[device];
    return tbAssign;
  };
  return inner();
}
extern "C" int __tvm_ffi_run(void*, const int* device, int32_t count, void*) {
  Universal<BASE> one; Universal<BASE + 1> two;
  int first = !one.is_initialized(), second = 0;
  one.is_initialized(true);
  if (count > 1) { second = !two.is_initialized(); two.is_initialized(true); }
  // Whether this device's counters are the ones found, and who had to be set up.
  return (launch<BASE>(*device) == &counters[*device] ? 0 : 100) + first + 2 * second;
}
extern "C" int __tvm_ffi_meet(void*, int* here, int32_t count, void*) {
  __atomic_add_fetch(here, 1, __ATOMIC_SEQ_CST);
  for (time_t end = time(nullptr) + 20; time(nullptr) < end;)
    if (__atomic_load_n(here, __ATOMIC_SEQ_CST) == count) return 0;
  return 1;
}
"""
BASES = itertools.count(0, 2)


class Gpus:
    """A library's functions on pretended GPUs, of which each thread has a current one."""

    def __init__(self, path: Path) -> None:
        self.path, self._of_thread = path, threading.local()

    def cudaGetDevice(self, index: Any) -> int:
        index[0] = self._of_thread.device
        return 0

    def entry(self, name: str = "run") -> Entry:
        return runtime.exported(files.load_file(self.path), name)

    def call(self, entry: Entry, device: int, count: int = 1, here: Any = None) -> int:
        self._of_thread.device = device
        argument = ffi.new("int *", device) if here is None else here
        return int(entry.address(ffi.NULL, ffi.cast("void *", argument), count, ffi.NULL))


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gpus:
    source, made = tmp_path / "statics.cc", Gpus(tmp_path / "gdn_prefill_sm90.so")
    source.write_text(SOURCE)
    compiler.library(source, made.path, "-O1", f"-DBASE={next(BASES)}")
    monkeypatch.setattr(machine, "device_count", lambda: 2)
    monkeypatch.setattr(machine, "load_cudart", lambda: (made, "a pretended one"))
    return made


def test_each_gpu_has_its_own(gpus: Gpus) -> None:
    """Set up once on each GPU, and then not again, in any order."""
    entry, again = gpus.entry(), gpus.entry()
    assert [gpus.call(entry, device) for device in (1, 1, 0, 0, 1, 0, 1)] == [1, 0, 1, 0, 0, 0, 0]
    # A kernel that is first used on either after both were in use.
    assert [gpus.call(again, device, 2) for device in (1, 0, 1, 0)] == [2, 2, 0, 0]


@pytest.mark.parametrize("what", ["one GPU", "another module", "copies that share"])
def test_without_it_they_are_the_first_gpu_s(
    what: str, gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controls, and what is done where a process sees one GPU: nothing."""
    if what == "one GPU":
        monkeypatch.setattr(machine, "device_count", lambda: 1)
    elif what == "another module":
        gpus.path = gpus.path.rename(gpus.path.with_name("norm.so"))
    else:
        monkeypatch.setattr(per_device, "_STB_GNU_UNIQUE", None)
    entry = gpus.entry()
    assert isinstance(entry.address, ffi.CData) == (what != "copies that share")
    assert gpus.call(entry, 0) == 1
    assert gpus.call(entry, 1) == 100, "GPU 1 is not set up, and has GPU 0's counters"


def test_calls_on_several_gpus_run_at_once(gpus: Gpus) -> None:
    """Each waits in its function until the other is there."""
    entry, here = gpus.entry("meet"), ffi.new("int *", 0)
    with ThreadPoolExecutor(2) as threads:
        met = [threads.submit(gpus.call, entry, device, 2, here) for device in (0, 1)]
        assert [one.result() for one in met] == [0, 0]


def test_threads_share_their_gpu_s_copy(gpus: Gpus) -> None:
    """Also where they are the first to call on it."""
    entry, start = gpus.entry(), threading.Barrier(4)

    def run(device: int) -> list[int]:
        start.wait()
        return [gpus.call(entry, device) for _ in range(100)]

    with ThreadPoolExecutor(4) as threads:
        codes = [code for found in threads.map(run, (0, 1, 0, 1)) for code in found]
    assert max(codes) < 100


def test_a_copy_differs_in_the_binding_of_its_variables(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are global there, no longer unique in the process."""
    found, open_module = [], library.open_module

    def read_and_open(path: str, through: str, **how: Any) -> Any:
        found.append(Path(through).read_bytes())
        return open_module(path, through, **how)

    entry = gpus.entry()
    gpus.call(entry, 0)
    monkeypatch.setattr(library, "open_module", read_and_open)
    gpus.call(entry, 1)
    pairs = zip(gpus.path.read_bytes(), *found, strict=True)
    changed = [(before, after) for before, after in pairs if before != after]
    unique, public = 10, 1  # STB_GNU_UNIQUE, STB_GLOBAL
    assert changed
    assert all(before >> 4 == unique for before, _ in changed)
    assert all(after == public << 4 | before & 0xF for before, after in changed)


def test_a_file_that_was_written_over_is_not_copied(gpus: Gpus) -> None:
    entry = gpus.entry()
    assert gpus.call(entry, 0) == 1
    with gpus.path.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(ArtifactError, match="written to after this process had loaded it"):
        gpus.call(entry, 1)
