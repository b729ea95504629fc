"""What reads bytes of others: its own error or an answer, in bounded time, for damaged real ones.

tools/fuzz.py looks further, guided by what of the code was reached.  RECORD and zips that are
damaged in other ways: tests/loader.
"""

from __future__ import annotations

import ast
import gc
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fi_ffi.abi.signature import parse_signature
from fi_ffi.errors import AbiError, ArtifactError, LoaderError
from fi_ffi.loader.fetch import wheels_lock
from fi_ffi.loader.wheel import parse_record
from fi_ffi.modules.types import parse_type
from tools.release.exports import Source, read
from tools.release.generators import _parsed as parsed

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
SECONDS = 4


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


@pytest.mark.parametrize("name", [
    "signature", "refusal", "type", "elf", "fatbin", "record", "lock", "cpp", "page", "address",
    "schema", "index", "module-name",
])  # fmt: skip
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


CPP = [
    b"/*", b'"\\"', b"A()", b"x AB()", b"#if (\n", b"#if A\n", b"#if 1\n#else\n", b"#define A A\n",
    b"namespace ", b"class A:b ", b"class A : ModuleObj;", b"void f(A_B);", b"using a = b;", b"a<",
    b"static inline ", b"'", b"-> ", b"= ", b" ",
]  # fmt: skip
PYTHON = [
    b"(", b"-", b"not ", b"a+", b"a.", b"'a'+", b"if a:\n ", b"f'{", b"a if b else ", b"\0",
    b"lambda:", b"gen_jit_spec(x);", b"def gen_a(): pass\n",
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "unit"), [*(("cpp", unit) for unit in CPP), *(("python", unit) for unit in PYTHON)]
)
def test_a_source_of_one_thing(name, unit):
    """Among what a real one has: a quadratic reader takes minutes."""
    seed = seeds_of(name)[0]
    many = unit * (2**18 // len(unit))
    for data in (seed + b"\n" + many, many + b"\n" + seed, seed[: len(seed) // 2] + many):
        fed_in_time(name, data)


def _cpp(text, headers=()):
    headers = dict(headers)
    source = Source("a.cu", text, {})
    return read([source], lambda path, name: headers.get(name), lambda name: True, is_lenient=True)


def test_macros_without_end():
    """Many, of many, and of each other."""
    export = "TVM_FFI_DLL_EXPORT_TYPED_FUNC({0}, {0});\n".format
    names = ["M_" + "".join(chr(65 + int(digit)) for digit in str(i)) for i in range(20_000)]
    defined = "".join(f"#define {name} int64_t x{i},\n" for i, name in enumerate(names))
    declared = f"void f({' '.join(names)} int64_t y);\n{export('f')}"
    for text, headers in ((defined + declared, {}), ('#include "h"\n' + declared, {"h": defined})):
        started = time.process_time()
        found = _cpp(text, headers)
        assert time.process_time() - started < SECONDS
        assert found.exports["f"].names == (*(f"x{i}" for i in range(len(names))), "y")
    laughs = "#define A_B int64_t x,\n" + "".join(
        f"#define A_{'B' * i} {('A_' + 'B' * (i - 1) + ' ') * 8}\n" for i in range(2, 20)
    )
    calls = "".join(f"void f{i}(A_BBBBBBBB int64_t y);{export(f'f{i}')}" for i in range(5_000))
    started = time.process_time()
    found = _cpp(laughs + calls)
    assert time.process_time() - started < SECONDS
    assert not found.exports and len(found.unread) == 5_000


@pytest.mark.parametrize("name", PARSERS)
def test_a_seed_is_taken(name):
    """Or what is made of it by damage is never read far."""
    seeds = PARSERS[name].seeds() or seeds_of(name)
    assert any(feed(name, seed) for seed in seeds)


# What reads bytes: of a library, or the last part of a name.
DECODERS = {
    "json.loads", "json.load", "tomllib.loads", "tomlkit.parse", "ast.parse", "ast.literal_eval",
    "zipfile.ZipFile", "unpack_from", "iter_unpack", "ELFFile", "feed", "b64decode",
}  # fmt: skip
# Only what is fi_ffi's own or this user's.
OWN = {
    "capability/judgement.py:gpu_runs": "the package's data",
    "catalogue/ahead_of_time.py:_data": "the package's data",
    "catalogue/ahead_of_time.py:_releases": "the package's data",
    "catalogue/api_map.py:release": "the package's data",
    "catalogue/api_map.py:rows": "the package's data",
    "loader/tvm_ffi.py:releases_record": "the package's data",
    "modules/files.py:_records": "the package's data",
    "loader/uris.py:": "the package's data",
    "jax/xla.py:CallText.read": "what fi_ffi wrote into a program of XLA's",
    "questions.py:ask": "what a driver of ours wrote",
    "cute_driver.py:": "what fi_ffi asks it",
    "driver.py:": "what fi_ffi asks it",
    "described.py:": "what fi_ffi asks it",
    "wheel_writer.py:write_wheel": "is written",
    "entries.py:read_entries": "a file of the repository",
    "record.py:recorded": "files of the repository",
    "wheels.py:_fetch": "what pip prints",
}
ROOT = Path(__file__).parents[2]


def _decoding():
    """The functions that call a decoder, as FILE:QUALIFIED NAME."""

    def visit(node, names):
        for child in ast.iter_child_nodes(node):
            inner = names
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = [*names, child.name]
            if isinstance(child, ast.Call):
                called = ast.unparse(child.func)
                if {called, called.rpartition(".")[2]} & DECODERS:
                    yield ".".join(names)
            yield from visit(child, inner)

    for folder in ("fi_ffi", "fi_ffi_build", "tools/release"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for name in visit(ast.parse(path.read_text()), []):
                yield f"{path.relative_to(ROOT / folder)}:{name}"


def test_everything_that_decodes_is_fuzzed():
    """A new one fails here until it is in the table; each is entered, by what is fed."""
    entered = set()

    def profile(frame, event, argument):
        path = frame.f_code.co_filename
        for folder in ("fi_ffi", "fi_ffi_build", "tools/release"):
            if path.startswith(f"{ROOT / folder}/"):
                file = path.removeprefix(f"{ROOT / folder}/")
                entered.add((file, frame.f_code.co_name))

    before = sys.getprofile()
    parsed.cache_clear()
    sys.setprofile(profile)
    try:
        for name in PARSERS:
            for seed in seeds_of(name):
                feed(name, seed)
    finally:
        sys.setprofile(before)
    found = {*_decoding()}
    assert {*OWN} <= found, "the table names what is no more"
    missed = [
        each
        for each in sorted(found - {*OWN})
        if (each.partition(":")[0], each.rpartition(":")[2].rpartition(".")[2]) not in entered
    ]
    assert not missed, f"no parser of tests/stress/parsers.py reads {missed}"


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
