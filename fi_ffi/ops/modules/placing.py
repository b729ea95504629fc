"""Where a call is made: the device of its tensors, and the stream it is launched on."""

from __future__ import annotations

from fi_ffi.abi.device import Device, parse_device
from fi_ffi.abi.lent import Call
from fi_ffi.abi.streams import current_scope, launching
from fi_ffi.errors import ArgumentError


def place_of(call: Call, told: object, home: Device | None) -> tuple[Device | None, bool]:
    """The GPU of a call, None where it has none, and whether it needs a stream.

    All tensors on GPUs are on one.  Where none is, `told` says which the call is for, or
    `home`, where the object was made whose method is called.
    """
    found: tuple[str, Device] | None = None
    is_managed = False
    for where, desc in call.descs:
        device = desc.layout.device
        if device.type == "cuda_managed":  # of any GPU
            is_managed = True
        if not device.is_cuda:
            continue
        if found is None:
            found = where, device
        elif device is not found[1]:
            expected = f"{found[1]}, the device of `{found[0]}`"
            raise ArgumentError(call.op, where, got=device, expected=expected)
    place = found[1] if found else None
    if told is not None:
        given = parse_device(told, op=call.op, argument="device")
        if found is not None and given is not found[1]:
            expected = f"{found[1]}, the device of `{found[0]}`"
            raise ArgumentError(call.op, "device", got=given, expected=expected)
        place = given if given.is_cuda else None
    if home is not None and place is not None and place is not home:
        where = "device" if found is None else found[0]
        expected = f"{home}, where the object was made"
        raise ArgumentError(call.op, where, got=place, expected=expected)
    place = place or home
    if is_managed and place is None:
        expected = "the GPU that uses the managed memory"
        raise ArgumentError(call.op, "device", got=None, expected=expected)
    return place, is_managed or found is not None


def stream_of(stream: object, place: Device, is_needed: bool, op: str) -> launching | None:
    """The stream that is current during a call on a GPU; None where none is given or needed."""
    if is_needed or stream is not None:
        return launching(stream, place, op)
    scope = current_scope()
    if scope is None or scope.device not in (None, place):
        return None
    return launching(None, place, op)
