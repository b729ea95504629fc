"""ELF files made by hand, one that a C compiler makes, and damaged ones."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fi_ffi.errors import ArtifactError, LoaderError
from fi_ffi.loader.elf import FUNCTION_PREFIX, ElfInfo, inspect_elf, open_section

FUNC, OBJECT = 2, 1
LOCAL, GLOBAL, WEAK = 0, 1, 2
DEFAULT, HIDDEN, PROTECTED = 0, 2, 3
X86_64, AARCH64, RISCV = 62, 183, 243
NEEDED, RPATH, RUNPATH, FLAGS = 1, 15, 29, 30


@dataclass(frozen=True)
class Symbol:
    name: str
    defined: bool = True
    kind: int = FUNC
    binding: int = GLOBAL
    visibility: int = DEFAULT


class Strings:
    def __init__(self):
        self.data = bytearray(1)

    def add(self, text):
        self.data += text.encode() + b"\0"
        return len(self.data) - len(text) - 1


@dataclass
class Section:
    name: str
    kind: int
    data: bytes
    link: int = 0
    info: int = 0
    entry_size: int = 0


@dataclass
class Library:
    """A shared library with as much in it as the reader looks at."""

    symbols: Sequence[Symbol] = ()
    tags: Sequence[tuple[int, str]] = ()
    machine: int = X86_64
    kind: int = 3  # ET_DYN
    extra: dict[str, bytes] = field(default_factory=dict)

    def build(self):
        strings = Strings()
        symbols = bytes(24) + b"".join(self._symbol(each, strings) for each in self.symbols)
        tags = b"".join(struct.pack("<QQ", tag, strings.add(text)) for tag, text in self.tags)
        sections = [
            Section("", 0, b""),
            Section(".dynstr", 3, bytes(strings.data)),
            Section(".dynsym", 11, symbols, link=1, info=1, entry_size=24),
            Section(".dynamic", 6, tags + bytes(16), link=1, entry_size=16),
            *(Section(name, 1, data) for name, data in self.extra.items()),
        ]
        return self._lay_out(sections)

    @staticmethod
    def _symbol(symbol, strings):
        return struct.pack(
            "<IBBHQQ",
            strings.add(symbol.name),
            symbol.binding << 4 | symbol.kind,
            symbol.visibility,
            1 if symbol.defined else 0,
            0x1000,
            16,
        )

    def _lay_out(self, sections):
        names = Strings()
        sections.append(Section(".shstrtab", 3, b""))
        name_offsets = [names.add(section.name) for section in sections]
        sections[-1].data = bytes(names.data)
        body, headers = b"", b""
        for section, name in zip(sections, name_offsets, strict=True):
            headers += struct.pack(
                "<IIQQQQIIQQ",
                *(name, section.kind, 0, 0, 64 + len(body), len(section.data)),
                *(section.link, section.info, 8, section.entry_size),
            )
            body += section.data + bytes(-len(section.data) % 8)
        header = struct.pack(
            "<16sHHIQQQIHHHHHH",
            b"\x7fELF\x02\x01\x01",
            *(self.kind, self.machine, 1, 0, 0, 64 + len(body), 0),
            *(64, 56, 0, 64, len(sections), len(sections) - 1),
        )
        return header + body + headers


LIBRARY = Library(
    symbols=[
        Symbol("__tvm_ffi_run"),
        Symbol("__tvm_ffi_plan", binding=WEAK),
        Symbol("__tvm_ffi_kept", visibility=PROTECTED),
        Symbol("__tvm_ffi_hidden", visibility=HIDDEN),
        Symbol("__tvm_ffi_local", binding=LOCAL),
        Symbol("__tvm_ffi__library_ctx", kind=OBJECT),
        Symbol("__tvm_ffi__metadata_run"),
        Symbol("__tvm_ffi__doc_run"),
        Symbol("__tvm_ffi_elsewhere", defined=False),
        Symbol("not__tvm_ffi_run"),
        Symbol("TVMFFIErrorSetRaised", defined=False),
        Symbol("TVMFFIDefinedHere"),
        Symbol("cudaLaunchKernel", defined=False),
    ],
    tags=[
        (NEEDED, "libcudart.so.13"),
        (NEEDED, "libc.so.6"),
        (RPATH, "/old"),
        (RUNPATH, "$ORIGIN"),
    ],
    extra={".nv_fatbin": b"device code"},
)
IMAGE = LIBRARY.build()


def test_reads_the_whole_interface(tmp_path):
    path = tmp_path / "norm.so"
    path.write_bytes(IMAGE)
    assert inspect_elf(path) == ElfInfo(
        machine="x86_64",
        needed=("libcudart.so.13", "libc.so.6"),
        runpath="$ORIGIN",
        functions=("kept", "plan", "run"),
        requires=("TVMFFIErrorSetRaised",),
    )


def test_reads_the_same_from_bytes_and_from_a_path_as_text(tmp_path):
    path = tmp_path / "norm.so"
    path.write_bytes(IMAGE)
    assert inspect_elf(IMAGE) == inspect_elf(str(path)) == inspect_elf(path)


def test_a_library_that_says_nothing_has_an_empty_interface():
    assert inspect_elf(Library(machine=AARCH64).build()) == ElfInfo(
        machine="aarch64",
        needed=(),
        runpath=None,
        functions=(),
        requires=(),
    )


def test_the_older_search_path_counts_where_the_newer_is_absent():
    assert inspect_elf(Library(tags=[(RPATH, "/old")]).build()).runpath == "/old"


def test_a_name_inside_another_name_is_found():
    """Linkers store a name that ends another one only once."""
    image = bytearray(Library([Symbol("x__tvm_ffi_run"), Symbol("spare")]).build())
    names = image.index(b"\0x__tvm_ffi_run\0")
    spare = struct.pack("<I", image.index(b"\0spare\0") + 1 - names)
    at = image.index(spare + bytes([GLOBAL << 4 | FUNC]))
    image[at : at + 4] = struct.pack("<I", 2)
    assert inspect_elf(bytes(image)).functions == ("run",)


def test_a_section_is_read_only_where_it_is():
    with open_section(IMAGE, ".nv_fatbin") as window:
        assert window is not None
        assert window.size == len(b"device code")
        assert window.at(7, 100) == b"code"
        assert window.at(-1, 5) == window.at(11, 5) == b""
        with pytest.raises(ValueError, match="5 bytes at offset 8 of 11"):
            window.part(8, 5)
    with open_section(IMAGE, ".nothing") as window:
        assert window is None


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"", "not an ELF file: it is empty"),
        (b"PK\x03\x04zip", "not an ELF file: begins with bytes 50 4b 03 04"),
        (b"\x7fELF\x01\x01" + bytes(60), "not 64-bit little-endian"),
        (b"\x7fELF\x02\x02" + bytes(60), "not 64-bit little-endian"),
        (b"\x7fELF\x02\x01", "malformed"),
        (IMAGE[:63], "malformed"),
        (IMAGE[:-1], "malformed"),
        (Library(machine=RISCV).build(), "EM_RISCV, not for x86_64 or aarch64"),
        (Library(kind=1).build(), "not a shared library"),
    ],
)
def test_says_what_is_wrong(image, reason):
    with pytest.raises(ArtifactError, match=reason):
        inspect_elf(image)


def _with_header(name, **fields):
    """IMAGE with a field of one section's header overwritten."""
    positions = {"offset": 24, "size": 32, "link": 40, "info": 44, "entry_size": 56}
    image = bytearray(IMAGE)
    headers, count = struct.unpack_from("<Q", image, 40)[0], struct.unpack_from("<H", image, 60)[0]
    strings = struct.unpack_from("<Q", image, headers + 64 * (count - 1) + 24)[0]
    for at in range(headers, headers + 64 * count, 64):
        start = strings + struct.unpack_from("<I", image, at)[0]
        if image[start : image.index(0, start)].decode() == name:
            for key, value in fields.items():
                struct.pack_into(
                    "<I" if key in ("link", "info") else "<Q", image, at + positions[key], value
                )
    assert image != IMAGE
    return bytes(image)


@pytest.mark.parametrize(
    "image",
    [
        _with_header(".dynsym", size=1 << 62),
        _with_header(".dynsym", offset=1 << 63),
        _with_header(".dynsym", size=25),
        _with_header(".dynsym", link=999),
        _with_header(".dynsym", entry_size=0),
        _with_header(".dynstr", size=1 << 62),
        _with_header(".dynamic", offset=(1 << 64) - 1),
        _with_header(".shstrtab", offset=1 << 62),
        # No section count, no size of a section header: the count is then the size
        # of the first section, and every section is the first.
        IMAGE[:58] + struct.pack("<HH", 0, 0) + IMAGE[62:],
    ],
)
def test_a_table_that_lies_is_refused_at_once(image):
    before = time.monotonic()
    with pytest.raises(ArtifactError):
        inspect_elf(image)
    assert time.monotonic() - before < 5


def test_a_table_that_takes_too_many_reads_is_given_up():
    with pytest.raises(ArtifactError, match="without end"):
        inspect_elf(Library(tags=[(FLAGS, "")] * 60_000).build())


def test_a_symbol_name_without_end_is_refused():
    with pytest.raises(ArtifactError, match="symbol name of more than"):
        inspect_elf(Library([Symbol(FUNCTION_PREFIX + "x" * 5000)]).build())


def test_a_directory_a_fifo_and_a_missing_file(tmp_path):
    with pytest.raises(ArtifactError, match="not a regular file"):
        inspect_elf(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="not a regular file"):
        inspect_elf(tmp_path / "pipe")
    with pytest.raises(LoaderError, match="missing: cannot be opened") as caught:
        inspect_elf(tmp_path / "missing")
    assert not isinstance(caught.value, ArtifactError)
    with pytest.raises(LoaderError, match="cannot be opened"):
        inspect_elf("nul\0inside")


def test_the_message_names_the_file(tmp_path):
    path = tmp_path / "cut.so"
    path.write_bytes(IMAGE[:100])
    with pytest.raises(ArtifactError, match=f"^{path}: malformed: "):
        inspect_elf(path)


def test_a_sparse_file_is_not_read_in_full(tmp_path):
    path = tmp_path / "sparse.so"
    path.write_bytes(_with_header(".dynsym", size=24 << 34))
    os.truncate(path, 1 << 40)
    with pytest.raises(ArtifactError, match=r"section \.dynsym has 412316860416 bytes"):
        inspect_elf(path)


def test_no_file_stays_open(tmp_path):
    path = tmp_path / "cut.so"
    path.write_bytes(IMAGE[:100])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(ArtifactError):
            inspect_elf(path)
    assert len(os.listdir("/proc/self/fd")) == before


C_SOURCE = """
int TVMFFIErrorSetRaised(const char*);
int puts(const char*);
static int hidden(void) { return puts(""); }
__attribute__((visibility("hidden"))) int __tvm_ffi_hidden(void) { return 0; }
int __tvm_ffi_value = 1;
int __tvm_ffi_add(void) { return TVMFFIErrorSetRaised("x") + __tvm_ffi_hidden() + hidden(); }
__attribute__((weak)) int __tvm_ffi_plan(void) { return 0; }
"""


def test_a_library_from_a_c_compiler(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler on this machine to make a shared library with")
    (tmp_path / "k.c").write_text(C_SOURCE)
    flags = ["-shared", "-fPIC", "-Wl,-rpath,$ORIGIN/../lib"]
    subprocess.run(
        [compiler, *flags, str(tmp_path / "k.c"), "-o", str(tmp_path / "k.so")], check=True
    )
    info = inspect_elf(tmp_path / "k.so")
    assert info.functions == ("add", "plan")
    assert info.requires == ("TVMFFIErrorSetRaised",)
    assert info.runpath == "$ORIGIN/../lib"
    assert info.machine == os.uname().machine
    assert any(name.startswith("libc.so") for name in info.needed)


def test_ten_thousand_symbols_take_no_time():
    symbols = [Symbol(f"_ZN10flashinfer{i}E", defined=bool(i % 2)) for i in range(10_000)]
    image = Library([*symbols, Symbol("__tvm_ffi_run")]).build()
    inspect_elf(IMAGE)  # imports pyelftools
    before = time.perf_counter()
    assert inspect_elf(image).functions == ("run",)
    assert time.perf_counter() - before < 0.25


def _reads_or_refuses(image):
    try:
        info = inspect_elf(image)
    except ArtifactError:
        return
    assert info.machine in ("x86_64", "aarch64")


@given(st.binary(max_size=300))
@example(b"\x7fELF\x02\x01")
@settings(deadline=2000)
def test_arbitrary_bytes_are_refused(tail):
    for image in (tail, b"\x7fELF\x02\x01\x01" + tail):
        with pytest.raises(ArtifactError):
            inspect_elf(image)


_INTERESTING = st.sampled_from([0, 1, 2**16 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1])
_HEADERS = struct.unpack_from("<Q", IMAGE, 40)[0]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 63)
            | st.integers(64, _HEADERS)
            | st.integers(_HEADERS // 8, len(IMAGE) // 8 - 1).map(lambda word: word * 8),
            _INTERESTING | st.integers(0, 2**64 - 1),
            st.sampled_from([1, 2, 4, 8]),
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, len(IMAGE)) | st.just(len(IMAGE)),
)
@settings(deadline=5000, max_examples=500)
def test_a_damaged_library_is_read_or_refused(damage, length):
    image = bytearray(IMAGE)
    for at, value, width in damage:
        data = value.to_bytes(8, "little")[:width]
        image[at : at + width] = data
    _reads_or_refuses(bytes(image[:length]))
