"""Arguments made wrong on a GPU: tests/stress/bad_input has what and why.

A call that fits its row, of memory that is not there or of indices that are not its own, is
prepared and not launched.  Small enough for compute-sanitizer.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.functions import OPS

from tests.attention.machines import Gpu
from tests.helpers.every_op import needs
from tests.stress.bad_input.memory import Room
from tests.stress.bad_input.rows import Call, one_call

CALLS = 40


class GpuRoom(Room):
    """A room in GPU memory; `whole` is what is there now."""

    def __init__(self, arrays: Mapping[str, np.ndarray], machine: Gpu) -> None:
        super().__init__(arrays)
        self.machine, self.device = machine, machine.place(self.before)
        starts = {name: array.ctypes.data - self.base for name, array in self.arrays.items()}
        host = super().descs()
        self._descs = {
            name: fi_ffi.TensorDesc(
                self.device.ptr + starts[name], desc.shape, desc.dtype, strides=desc.strides,
                device="cuda:0",
            )
            for name, desc in host.items()
        }  # fmt: skip
        self.base = self.device.ptr

    def descs(self) -> dict[str, fi_ffi.TensorDesc]:
        return dict(self._descs)

    def holds(self, desc: fi_ffi.TensorDesc) -> bool:
        return desc.device.is_cuda and desc.device.index == 0 and self.has(desc)

    def _look(self) -> None:
        """Waits for the device."""
        self.whole = np.ascontiguousarray(self.device.get())
        assert self.device.intact(), "bytes outside the room were written"

    def is_untouched(self) -> bool:
        self._look()
        return super().is_untouched()

    def changed_outside(self, descs: Any) -> int:
        self._look()
        return super().changed_outside(descs)

    def restore(self) -> None:
        self.device._copy_to(self.before)
        self.machine.synchronize()  # streams here wait for no other


class GpuCall(Call):
    """A call that is launched where it can be, and else as far as it is checked."""

    def __init__(self, row: Any, rng: random.Random, machine: Gpu) -> None:
        self.stream = machine.stream
        super().__init__(row, rng, lambda arrays: GpuRoom(arrays, machine))

    def attempt(self, values: dict[str, Any], runs: bool, prepare: bool) -> bool:
        values = {"stream": self.stream, **values}
        try:
            made = self.op.prepare(**values)
        except fi_ffi.ArgumentError:
            self.op(**values)  # is refused as well
            raise AssertionError("refused prepared, and not refused made") from None
        if runs:
            (made if prepare else lambda: self.op(**values))()
        return runs


@pytest.mark.parametrize("name", OPS)
def test_is_refused_or_right(name, machine):
    op = OPS[name]
    machine.need(op.row.module)
    needs(op, machine)
    number = int.from_bytes(os.urandom(8), "little")
    print(f"seed {number}")
    rng, told = random.Random(number), [""]
    call = GpuCall(op.row, rng, machine)
    count = 8 if call.is_slow or call.room.before.size > 2**22 else CALLS
    for _ in range(count):
        try:
            one_call(call, rng, lambda text: told.__setitem__(0, text))
        except Exception as error:
            raise AssertionError(f"{told[0]}\n{type(error).__name__}: {error}") from error


def test_a_byte_beside_a_result_is_seen(machine):
    op = OPS["rmsnorm"]
    machine.need(op.row.module)
    call = GpuCall(op.row, random.Random(), machine)
    call.attempt(call.values, True, False)
    call.room._look()
    other = call.room.whole.copy()
    other[0] ^= 1
    call.room.device._copy_to(other)
    with pytest.raises(AssertionError, match="1 bytes were written"):
        call.check(call.values)
