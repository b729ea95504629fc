"""Devices as DLPack has them: a type code and an index."""

from __future__ import annotations

from dataclasses import dataclass

from fi_ffi.errors import ArgumentTypeError, printed

# dlpack.h, DLDeviceType
DEVICE_TYPES = {"cpu": 1, "cuda": 2, "cuda_host": 3, "cuda_managed": 13}
_TYPE_NAMES = {code: name for name, code in DEVICE_TYPES.items()}
_MAX_INDEX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Device:
    """A device; equal devices are the same object (see `parse_device`)."""

    type: str
    index: int

    @property
    def type_code(self) -> int:
        return DEVICE_TYPES[self.type]

    @property
    def is_cuda(self) -> bool:
        return self.type == "cuda"

    def __str__(self) -> str:
        return self.type if self.type in ("cpu", "cuda_host") else f"{self.type}:{self.index}"

    def __repr__(self) -> str:
        return str(self)


_DEVICES: dict[object, Device] = {}


def _device(type_name: str, index: int) -> Device:
    return _DEVICES.setdefault((type_name, index), Device(type_name, index))


def device_from_code(type_code: int, index: int) -> Device | None:
    """The device for the fields of a `DLDevice`, or None where there can be no such device."""
    name = _TYPE_NAMES.get(type_code)
    if name is None or not 0 <= index <= _MAX_INDEX:
        return None
    return _DEVICES.get((name, index)) or _device(name, index)


def parse_device(device: object, *, op: str = "TensorDesc", argument: str = "device") -> Device:
    """`"cuda:1"`, `"cuda"` (index 0), `"cpu"`, or a `Device`.

    Raises `ArgumentTypeError` for anything else.
    """
    if isinstance(device, Device):
        known = _DEVICES.get((device.type, device.index))
        if known is not None:
            return known
        device = f"{device.type}:{device.index}"  # made by hand: not checked yet
    if isinstance(device, str):
        known = _DEVICES.get(device)
        if known is not None:
            return known
        name, _, index = device.partition(":")
        digits = index if ":" in device else "0"
        if name in DEVICE_TYPES and digits.isascii() and digits.isdigit() and len(digits) < 11:
            number = int(digits)
            if number <= _MAX_INDEX:
                found = _device(name, number)
                _DEVICES[device] = found
                return found
    raise ArgumentTypeError(
        op,
        argument,
        got=printed(device),
        expected=f"'<type>:<index>' with type in {[*DEVICE_TYPES]}",
    )
