"""What reads bytes of others: its own error or an answer, in bounded time, for damaged real ones.

tools/fuzz.py looks further, guided by what of the code was reached.  RECORD and zips that are
damaged in other ways: tests/loader.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fi_ffi.abi.signature import parse_signature
from fi_ffi.errors import AbiError, ArtifactError, LoaderError
from fi_ffi.loader.fetch import wheels_lock
from fi_ffi.loader.wheel import parse_record
from fi_ffi.modules.types import parse_type

from tests.helpers.stress_strength import scaled
from tests.stress.parsers import PARSERS, InMemory, feed, seeds_of

TOKENS = [
    b"", b"<", b">", b"->", b"(0: ", b")", b", ", b"`", b"`. Expected 1 but got 2 arguments", b"\0",
    b"\xff", b"\xe2\x80\xae", "٠".encode(), b"9" * 30, b"{", b"[", b"]", b'"', b"\r\n", b"=",
    b"{0}", b"{file.x}", b"1e999", b"-1", b"Array<", b"Optional<", b"std::array<",
    b"\xff" * 8, b"\0" * 8,
    b"\x7f" * 4, b"sha256=", b"\x80\0\0\0", b"_ZZ9", b"__tvm_ffi_", b"null", b"NaN", b"true",
]  # fmt: skip
# Of fields, that many bytes wide; `OVER` writes over as many as there were.
NUMBERS = st.builds(
    lambda number, width: number.to_bytes(8, "little")[:width],
    st.sampled_from([0, 1, 2**16 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]),
    st.sampled_from([1, 2, 4, 8]),
)
OVER = -1
EDITS = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.integers(0, 40) | st.sampled_from([0, OVER]),
        st.sampled_from(TOKENS) | st.binary(max_size=12) | NUMBERS,
        st.sampled_from([1, 1, 1, 2, 50]),
    ),
    min_size=1,
    max_size=6,
)
# A second of it is a great deal for some kB.
SECONDS = 2


def damaged(seed, edits):
    for place, gone, token, times in edits:
        at, token = int(place * len(seed)), token * times
        seed = seed[:at] + token + seed[at + (len(token) if gone == OVER else gone) :]
    return seed


def fed_in_time(name, data):
    started = time.process_time()
    feed(name, data)
    assert time.process_time() - started < SECONDS, (name, len(data), data[:200])


@pytest.mark.parametrize("name", PARSERS)
def test_damaged_ones(name):
    seeds = seeds_of(name)
    slow = name in ("lock", "wheel")

    @given(st.sampled_from(seeds), EDITS)
    @settings(
        max_examples=scaled(20_000, 40 if slow else 150),
        deadline=None,
        suppress_health_check=[*HealthCheck],
        database=None,
    )
    def run(seed, edits):
        fed_in_time(name, damaged(seed, edits))

    run()


@pytest.mark.parametrize("name", PARSERS)
def test_seeds_and_what_is_random(name):
    seeds = seeds_of(name)
    for seed in seeds:
        fed_in_time(name, seed)
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    print(f"seed {seed}")
    for _ in range(scaled(2000, 20)):
        fed_in_time(name, rng.randbytes(rng.choice([0, 1, 10, 1000])))
        one, other = rng.choice(seeds), rng.choice(seeds)
        fed_in_time(name, one[: rng.randint(0, len(one))] + other[rng.randint(0, len(other)) :])


@pytest.mark.parametrize(
    "name", ["signature", "refusal", "type", "elf", "fatbin", "record", "lock"]
)
@pytest.mark.parametrize("unit", [
    b"(", b"<", b"[", b'"', b"a,", b"{", b"\n", b"\x00", b"`", b">", b"0: int, ", b"Array<",
    b"Mismatched number of arguments when calling: `",
])  # fmt: skip
def test_a_megabyte_of_one_thing(name, unit):
    """After what a real one begins with: neither quadratic nor recursive."""
    size = 2**20 // len(unit)
    before = seeds_of(name)[0][:60]
    for data in (unit * size, before + unit * size):
        fed_in_time(name, data)


def test_a_type_as_deep_as_may_be():
    deep = "Array<" * 32 + "int" + ">" * 32
    spelled = parse_type(deep)
    while spelled.args:
        spelled = spelled.args[0]
    assert spelled.name == "int"
    with pytest.raises(AbiError, match="nested more than 32 deep"):
        parse_type(f"Array<{deep}>")
    assert len(parse_signature(f"f(0: {deep}) -> void").params) == 1


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Where the stack is full, finalizers of other tests' garbage cannot run."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
def test_locks_nested_without_end():
    for unit in ("[", "{a=", "{"):
        text = "a = " + unit * 50_000
        with pytest.raises(LoaderError, match="in memory is not a readable lock"):
            wheels_lock.read_lock(InMemory(text.encode()))


def test_a_record_of_many_lines_is_read_in_time():
    line = "a/{}.so,sha256=hOxeCKkzGnVn_lKyPBfbnlN1lRpWpXEH3R1k-hRIrVo,32\n"
    text = "".join(line.format(i) for i in range(20_000)).encode()
    started = time.process_time()
    assert len(parse_record(text, "x")) == 20_000
    assert time.process_time() - started < SECONDS
    with pytest.raises(ArtifactError):
        parse_record(text + b"a,b", "x")
