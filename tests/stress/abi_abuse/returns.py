"""What a kernel may return: every type index, objects of every type, and nonsense of each."""

from __future__ import annotations

import gc
import random
from typing import Any

from fi_ffi.abi._cffi import ffi
from fi_ffi.abi.function import Frame, FrameLayout, global_function, make_array, probe
from fi_ffi.abi.library import TypeIndex
from fi_ffi.abi.objects import OBJECT_TYPES, Object
from fi_ffi.abi.tensor import parse_device
from fi_ffi.errors import AbiError, FiFfiError
from fi_ffi.ops.modules.entry import Origin, adopted

from tests.helpers.stress_strength import scaled
from tests.stress.abi_abuse.lab import abuse

PADDINGS = (0, 1, 0xDEADBEEF, 0xFFFFFFFF)
PLAIN = {*range(7), TypeIndex.SMALL_STR, TypeIndex.SMALL_BYTES}
# A view, an rvalue reference, and indices that TVM-FFI keeps for later.
WITHOUT_FORM = [-(2**31), -2, -1, 10, *range(13, 64)]
OBJECTS = [*range(64, 79), 79, 127, 128, 1000, 2**31 - 1]


def refused(function: Any, *args: Any, match: str = "") -> None:
    try:
        found = function(*args)
    except AbiError as error:
        assert match in str(error), error
    else:
        raise AssertionError(f"{args} gave {found!r}")


def counted(use: Any) -> None:
    """`use` leaves no object of abuse.c's behind."""
    before = abuse.alive()
    use()
    gc.collect()
    assert abuse.alive() == before, f"{abuse.alive() - before} objects more"


def case_indices_without_a_form() -> None:
    for index in WITHOUT_FORM:
        for padding in PADDINGS:
            refused(abuse.give, index, padding, 0x10, match=f"index {index} ")


def case_null_pointers() -> None:
    for index in (TypeIndex.DL_TENSOR_PTR, TypeIndex.RAW_STR, TypeIndex.BYTE_ARRAY_PTR, *OBJECTS):
        refused(abuse.give, index, 0xDEADBEEF, 0, match="null pointer")


def case_plain_values_with_garbage_paddings() -> None:
    for padding in PADDINGS:
        give = abuse.give
        assert give(TypeIndex.NONE, padding, 77) is None
        assert give(TypeIndex.INT, padding, -5) == -5
        assert give(TypeIndex.BOOL, padding, 0) is False
        assert give(TypeIndex.BOOL, padding, 256) is True
        assert give(TypeIndex.OPAQUE_PTR, padding, 0x1234) == 0x1234
        bits = ffi.cast("int64_t", 0x7FF8000000000001)
        nan = give(TypeIndex.FLOAT, padding, int(bits))
        assert nan != nan
        assert give(TypeIndex.DEVICE, padding, 2 | 3 << 32) is parse_device("cuda:3")
        assert repr(give(TypeIndex.DATA_TYPE, padding, 2 | 16 << 8 | 1 << 16)) == "float16"


def case_inline_strings() -> None:
    raw = int.from_bytes(b"abcdefgh", "little")
    for size in range(9):
        assert abuse.give(TypeIndex.SMALL_STR, size, raw) == "abcdefgh"[:size]
        assert abuse.give(TypeIndex.SMALL_BYTES, size, raw) == b"abcdefgh"[:size]
    for size in (9, 255, 2**31, 2**32 - 1):
        for index in (TypeIndex.SMALL_STR, TypeIndex.SMALL_BYTES):
            refused(abuse.give, index, size, raw, match=f"{size} bytes")
    assert abuse.give(TypeIndex.SMALL_STR, 7, -1) == "\ufffd" * 7
    assert abuse.give(TypeIndex.SMALL_STR, 3, 0) == "\0\0\0"


def case_devices_and_dtypes() -> None:
    for code, index in ((2, -1), (0, 0), (99, 0), (-1, 0), (10, 0), (1, -(2**31))):
        word = int(ffi.cast("int64_t", (code & 0xFFFFFFFF) | (index & 0xFFFFFFFF) << 32))
        refused(abuse.give, TypeIndex.DEVICE, 7, word, match="device")
    for word in (0, -1, 2 | 17 << 8 | 1 << 16, 5 | 64 << 8 | 1 << 16):
        refused(abuse.give, TypeIndex.DATA_TYPE, 7, word, match="dtype")


def case_objects_of_every_index() -> None:
    """Of a type that has a cell with pointers, all of them null."""
    for index in OBJECTS:

        def one(index: int = index) -> None:
            found = abuse.give_made(index, index, bytes(128))
            expected = {TypeIndex.STR: str, TypeIndex.BYTES: bytes}.get(index)
            if expected:
                assert found == expected()
                return
            assert type(found) is OBJECT_TYPES.get(index, Object)
            assert found.use_count == 1
            if index == TypeIndex.TENSOR:  # of no dtype: it has no place to be called on
                refused(abuse.give_back, found, match="dtype")
                return
            again = abuse.give_back(found)
            assert found.use_count == 2 and again.handle == found.handle
            again.release()
            assert found.use_count == 1
            repr(found), str(type(found))

        counted(one)


def case_objects_of_another_index_than_told() -> None:
    for told in OBJECTS:
        for made in (0, -1, 63, 64, 71, 5000):
            if made != told:
                refused(abuse.give_made, told, made, bytes(128), match=f"its object of {made}")


def cell(*fields: int) -> bytes:
    return b"".join(field.to_bytes(8, "little") for field in fields)


def case_heap_strings() -> None:
    for size in (0, 1, 7, 8, 1000, 2**20):
        memory = ffi.new("char[]", random.randbytes(size) + b"\xff\0\xc3")
        address = int(ffi.cast("uintptr_t", memory))
        raw = bytes(ffi.buffer(memory, size))

        def one(size: int = size, address: int = address, raw: bytes = raw) -> None:
            text = abuse.give_made(TypeIndex.STR, TypeIndex.STR, cell(address, size))
            assert text == raw.decode(errors="replace")
            assert abuse.give_made(TypeIndex.BYTES, TypeIndex.BYTES, cell(address, size)) == raw

        counted(one)

    def impossible() -> None:
        for index in (TypeIndex.STR, TypeIndex.BYTES):
            for size in (2**48 + 1, 2**63, 2**64 - 1):
                refused(abuse.give_made, index, index, cell(address, size), match=f"{size} bytes")

    counted(impossible)


def _tensor(shape: Any, strides: Any, ndim: int, data: int = 0x1000, byte_offset: int = 0) -> Any:
    made = ffi.new("DLTensor *")
    made.data, made.ndim, made.byte_offset = ffi.cast("void *", data), ndim, byte_offset
    made.device.device_type = 1
    made.dtype.code, made.dtype.bits, made.dtype.lanes = 2, 16, 1
    keep = [
        ffi.new("int64_t[]", dims) if dims is not None else ffi.NULL for dims in (shape, strides)
    ]
    made.shape, made.strides = keep
    return made, keep


# Shape, strides, number of dimensions, address, offset.
SILLY: dict[str, tuple[Any, ...]] = {
    "negative ndim": ((2, 3), None, -1),
    "least ndim": ((2, 3), None, -(2**31)),
    "65 dimensions": ((1,) * 65, None, 65),
    "two thousand million dimensions": ((2, 3), None, 2**31 - 1),
    "no shape": (None, None, 2),
    "negative size": ((2, -3), None, 2),
    "past int64": ((2**62, 2**62), None, 2),
    "strides past int64": ((2, 2), (2**62, 2**62), 2),
    "past the end of memory": ((2**40,), None, 1, 2**64 - 16),
    "an offset past the end": ((), None, 0, 0x1000, 2**64 - 1),
}


def case_tensors_with_silly_fields() -> None:
    for name, fields in SILLY.items():
        made, _keep = _tensor(*fields)
        address = int(ffi.cast("intptr_t", made))
        refused(abuse.give, TypeIndex.DL_TENSOR_PTR, 9, address, match="DLTensor")

        def one(made: Any = made, name: str = name) -> None:
            raw = bytes(ffi.buffer(made))
            tensor = abuse.give_made(TypeIndex.TENSOR, TypeIndex.TENSOR, raw)
            refused(adopted, tensor, Origin(name, None, False), match="DLTensor")

        counted(one)


def case_tensors_that_are_fine() -> None:
    for shape, strides in (((), None), ((0,), None), ((2, 3), (7, 2)), ((1,) * 64, None)):
        made, _keep = _tensor(shape, strides, len(shape))
        desc = abuse.give(TypeIndex.DL_TENSOR_PTR, 9, int(ffi.cast("intptr_t", made)))
        assert desc.shape == shape and (strides is None or desc.strides == strides)


def case_shapes() -> None:
    origin = Origin("give_made", None, False)
    words = ffi.new("int64_t[]", [1, -1, 2**63 - 1])
    address = int(ffi.cast("uintptr_t", words))

    def fine() -> None:
        give = abuse.give_made
        found = give(TypeIndex.SHAPE, TypeIndex.SHAPE, cell(address, 3))
        assert adopted(found, origin) == (1, -1, 2**63 - 1)
        assert adopted(give(TypeIndex.SHAPE, TypeIndex.SHAPE, cell(0, 0)), origin) == ()

    def silly() -> None:
        for at, size in ((0, 3), (address, 2**62), (address, 2**64 - 1)):
            found = abuse.give_made(TypeIndex.SHAPE, TypeIndex.SHAPE, cell(at, size))
            refused(adopted, found, origin, match="ffi.Shape")

    counted(fine)
    counted(silly)


def case_containers_nested_deep() -> None:
    """1,000 deep are released by libtvm_ffi's own destructors, and read one at a time."""
    count = global_function("ffi.ArraySize")
    for depth in (1, 100, 1000):
        nested: Any = make_array([1])
        for _ in range(depth):
            outer = make_array([nested, "x" * 100])
            nested.release()
            nested = outer
        found = abuse.give_back(nested)
        assert nested.use_count == 2
        for _ in range(depth):
            assert count(found) == 2
            found = global_function("ffi.ArrayGetItem")(found, 0)
        assert count(found) == 1
        found.release()
        assert nested.use_count == 1


def case_a_repr_of_containers_nested_deep() -> None:
    origin = Origin("nested", None, False)
    nested: Any = make_array([1])
    for _ in range(5000):
        nested = make_array([nested])
    found = adopted(abuse.give_back(nested), origin)
    try:
        repr(found)
    except RecursionError:
        pass
    assert len(found) == 1
    mapping: Any = global_function("ffi.Map")("a", 1)
    for _ in range(200):
        mapping = global_function("ffi.Map")("key", mapping)
    inner = adopted(abuse.give_back(mapping), origin)
    for _ in range(200):
        inner = inner["key"]
    assert dict(inner) == {"a": 1}


def case_objects_of_the_library() -> None:
    """One of each that a process has, there and back: one reference each."""
    listed: Any = global_function("ffi.List")(1, "two")
    makers = (
        lambda: make_array([1, "long enough for the heap", None]),
        lambda: global_function("ffi.Map")("a", 1, "b", make_array([1])),
        lambda: global_function("ffi.Dict")("a", 1),
        lambda: global_function("ffi.Shape")(1, 2, 3),
        lambda: abuse.give_back(listed),
        lambda: global_function("ffi.ModuleLoadFromFile")(abuse.path),
    )
    for make in makers:
        made = make()
        before = made.use_count
        for _ in range(100):
            assert abuse.give_back(made).handle == made.handle
        assert made.use_count == before
        with abuse.give_back(made) as again:
            assert made.use_count == before + 1
            del again


def case_a_frame_after_what_it_could_not_read() -> None:
    """Neither taken for the next call's result, nor released twice."""
    layout = FrameLayout([None, None, None])
    give, fail = (Frame(layout, [int, int, int], entry) for entry in (abuse.give, abuse.fail))

    def call(frame: Frame, *numbers: int) -> Any:
        for i, number in enumerate(numbers):
            frame.words[layout.value(i)] = number
        return frame.call()

    for index in (10, TypeIndex.STR, TypeIndex.DATA_TYPE, TypeIndex.TENSOR):
        refused(call, give, index, -1, 0)
        assert give._result.type_index == TypeIndex.NONE
        assert call(give, TypeIndex.INT, 7, 9) == 9
        try:
            call(fail, -1, 0, 0)
        except FiFfiError as error:
            assert "left no error" in str(error)
        assert fail._result.type_index == TypeIndex.NONE


def case_a_failure_with_a_result() -> None:
    """What an entry that fails has written is neither released nor the next call's result."""
    array, count = make_array([1, "two"]), global_function("ffi.ArraySize")
    for value in (array, 7, "a string of the heap", None):
        for _ in range(10):
            try:
                abuse.fail_holding(value)
            except FiFfiError as error:
                assert "with a result" in str(error)
            assert abuse.give(TypeIndex.INT, 0, 5) == 5
            assert abuse.give(TypeIndex.NONE, 0, 0) is None
            assert (count(array), array.use_count) == (2, 1)


def case_what_a_probe_is_answered() -> None:
    """The function is given 512 of None: whatever it returns is no signature."""
    refused(probe, abuse.alive)
    before = abuse.alive()
    for name in ("give", "give_made"):
        refused(probe, getattr(abuse, name))
    gc.collect()
    assert abuse.alive() - before <= 1  # `give_made`'s own, of index 0: no object is told


def _random(rng: random.Random) -> None:
    index = rng.choice([rng.randint(-3, 140), rng.randint(-(2**31), 2**31 - 1)])
    pointers = {TypeIndex.DL_TENSOR_PTR, TypeIndex.RAW_STR, TypeIndex.BYTE_ARRAY_PTR}
    payload = rng.choice([0, rng.randint(-(2**63), 2**63 - 1)])
    if index in pointers or index >= TypeIndex.OBJECT_BEGIN:
        payload = 0  # an address is not to be judged
    padding = rng.choice([rng.randint(0, 16), rng.randint(0, 2**32 - 1)])
    try:
        abuse.give(index, padding, payload)
    except AbiError:
        return
    assert index in PLAIN


def case_anything() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for number in range(scaled(1_000_000, 5000)):
        try:
            _random(rng)
        except BaseException as error:
            raise AssertionError(f"seed {seed}, number {number}") from error
