"""The dtype and device tables, and every spelling that names an entry."""

from __future__ import annotations

import copy

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fi_ffi.abi.tensor import (
    DEVICE_TYPES,
    DTYPES,
    Device,
    DType,
    device_from_code,
    dtype_from_code,
    parse_device,
    parse_dtype,
)
from fi_ffi.errors import ArgumentTypeError

WITH_NUMPY = [name for name in DTYPES if name != "float4_e2m1fn_x2"]


@pytest.mark.parametrize("name", DTYPES)
def test_dtype_by_name_and_code(name: str) -> None:
    dtype = DTYPES[name]
    assert parse_dtype(name) is dtype
    assert parse_dtype(dtype) is dtype
    assert parse_dtype(f"torch.{name}") is dtype  # what str() of a torch dtype says
    assert dtype_from_code(dtype.code, dtype.bits, dtype.lanes) is dtype
    assert repr(dtype) == name
    assert dtype.numpy.itemsize == dtype.itemsize


@pytest.mark.parametrize("name", WITH_NUMPY)
def test_dtype_of_numpy(name: str) -> None:
    dtype = DTYPES[name].numpy
    assert dtype.name == name
    assert parse_dtype(dtype) is DTYPES[name]
    assert parse_dtype(dtype.type) is DTYPES[name]


def test_dtypes_of_ml_dtypes() -> None:
    assert parse_dtype(ml_dtypes.bfloat16) is DTYPES["bfloat16"]
    assert parse_dtype(np.dtype(ml_dtypes.float8_e5m2)) is DTYPES["float8_e5m2"]


def test_packed_float4_is_two_values_in_a_byte() -> None:
    dtype = DTYPES["float4_e2m1fn_x2"]
    assert (dtype.bits, dtype.lanes, dtype.itemsize) == (4, 2, 1)
    assert dtype.numpy == np.uint8


@pytest.mark.parametrize(
    "dtype",
    [None, 2, 2.0, int, float, "half", "float8_e4m3", "", "complex64", np.complex64, object(), []],
)
def test_unknown_dtype(dtype: object) -> None:
    with pytest.raises(ArgumentTypeError, match="float8_e4m3fn") as caught:
        parse_dtype(dtype, op="rmsnorm", argument="out")
    assert (caught.value.op, caught.value.argument) == ("rmsnorm", "out")


@pytest.mark.parametrize("code", [">f4", ">i8", ">u2"])
def test_big_endian_dtype_is_unknown(code: str) -> None:
    with pytest.raises(ArgumentTypeError):
        parse_dtype(np.dtype(code))


@pytest.mark.parametrize("dtype", [DTYPES["float16"], DType("float16", 2, 16)])
def test_equal_dtypes_are_the_tables_own(dtype: DType) -> None:
    """Layouts compare dtypes by identity, so a copy must not pass for another dtype."""
    assert parse_dtype(copy.deepcopy(dtype)) is DTYPES["float16"]


def test_unknown_codes() -> None:
    assert dtype_from_code(5, 64, 1) is None  # complex64
    assert dtype_from_code(2, 16, 2) is None
    assert device_from_code(10, 0) is None  # ROCm


SPELLINGS = {
    "cpu": ("cpu", 0),
    "cpu:0": ("cpu", 0),
    "cuda": ("cuda", 0),
    "cuda:0": ("cuda", 0),
    "cuda:7": ("cuda", 7),
    "cuda_host": ("cuda_host", 0),
    "cuda_managed:1": ("cuda_managed", 1),
    f"cuda:{2**31 - 1}": ("cuda", 2**31 - 1),
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_device(text: str) -> None:
    device = parse_device(text)
    assert (device.type, device.index) == SPELLINGS[text]
    assert device.type_code == DEVICE_TYPES[device.type]
    assert device.is_cuda == (device.type == "cuda")
    assert parse_device(str(device)) is device
    assert parse_device(device) is device
    assert device_from_code(device.type_code, device.index) is device


@pytest.mark.parametrize(
    "device",
    ["", "gpu", "cuda:", "cuda:-1", "cuda:+1", "cuda: 1", "cuda:1:2", "cuda:x", "CUDA:0"]
    + [f"cuda:{2**31}", "cuda:" + "9" * 5000, "cuda:٣", None, 0, True, b"cuda", ("cuda", 0)],
)
def test_no_device(device: object) -> None:
    with pytest.raises(ArgumentTypeError) as caught:
        parse_device(device, op="rmsnorm", argument="input")
    assert (caught.value.op, caught.value.argument) == ("rmsnorm", "input")


def test_equal_devices_are_one_object() -> None:
    """Checks compare devices by identity, however the caller came by them."""
    ours = parse_device("cuda:3")
    assert parse_device(Device("cuda", 3)) is ours
    assert parse_device(copy.deepcopy(ours)) is ours


@pytest.mark.parametrize("device", [Device("tpu", 0), Device("cuda", -1), Device("cuda", 2**31)])
def test_devices_made_by_hand_are_checked(device: Device) -> None:
    with pytest.raises(ArgumentTypeError):
        parse_device(device)


@given(st.text())
def test_any_text_is_a_device_or_refused(text: str) -> None:
    try:
        assert parse_device(text).type in DEVICE_TYPES
    except ArgumentTypeError:
        pass
