"""ELF files and fatbins made by hand, some that compilers make, and what is wrong with others.

tests/stress/test_parsers.py damages those made here at random.
"""

from __future__ import annotations

import os
import struct
import subprocess
import time
from dataclasses import dataclass, field

import pytest

from fi_ffi.errors import ArtifactError, LoaderError
from fi_ffi.loader.elf import FUNCTION_PREFIX, ElfInfo, inspect_elf, open_section
from fi_ffi.loader.fatbin import architectures
from fi_ffi.loader.machine import CudaCode, sass_named, unfit

from tests.helpers import compiler

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
class Library:
    """A shared library with as much in it as the reader looks at."""

    symbols: list = ()
    tags: list = ()
    machine: int = X86_64
    kind: int = 3  # ET_DYN
    extra: dict = field(default_factory=dict)

    def build(self):
        strings = Strings()
        symbols = bytes(24) + b"".join(
            struct.pack("<IBBHQQ", strings.add(s.name), s.binding << 4 | s.kind, s.visibility,
                        int(s.defined), 0x1000, 16)
            for s in self.symbols
        )  # fmt: skip
        tags = b"".join(struct.pack("<QQ", tag, strings.add(text)) for tag, text in self.tags)
        # Name, kind, content, link, info, size of an entry.
        sections = [
            ("", 0, b"", 0, 0, 0),
            (".dynstr", 3, bytes(strings.data), 0, 0, 0),
            (".dynsym", 11, symbols, 1, 1, 24),
            (".dynamic", 6, tags + bytes(16), 1, 0, 16),
            *((name, 1, data, 0, 0, 0) for name, data in self.extra.items()),
        ]
        names = Strings()
        offsets = [names.add(name) for name, *_ in sections] + [names.add(".shstrtab")]
        sections.append((".shstrtab", 3, bytes(names.data), 0, 0, 0))
        body, headers = b"", b""
        for (_, kind, data, *rest), name in zip(sections, offsets, strict=True):
            fields = (name, kind, 0, 0, 64 + len(body), len(data), *rest[:2], 8, rest[2])
            headers += struct.pack("<IIQQQQIIQQ", *fields)
            body += data + bytes(-len(data) % 8)
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
        Symbol("_ZTIN3tvm3ffi5ErrorE", defined=False, kind=OBJECT),
        Symbol("TVMFFIOptional", defined=False, binding=WEAK),
        Symbol("_ZN7cutlass" + 2000 * "x", defined=False),
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
        requires=("TVMFFIErrorSetRaised", "_ZTIN3tvm3ffi5ErrorE"),
        context=("__tvm_ffi__library_ctx",),
    )
    assert inspect_elf(IMAGE) == inspect_elf(str(path)) == inspect_elf(path)
    nothing = ElfInfo(machine="aarch64", needed=(), runpath=None, functions=(), requires=())
    assert inspect_elf(Library(machine=AARCH64).build()) == nothing
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
        assert window.size == len(b"device code")
        assert window.at(7, 100) == b"code"
        assert window.at(-1, 5) == window.at(11, 5) == b""
        with pytest.raises(ValueError, match="5 bytes at offset 8 of 11"):
            window.part(8, 5)
    with open_section(IMAGE, ".nothing") as window:
        assert window is None


def with_header(name, **fields):
    """IMAGE with a field of one section's header overwritten."""
    positions = {"offset": 24, "size": 32, "link": 40, "info": 44, "entry_size": 56}
    image = bytearray(IMAGE)
    headers, count = struct.unpack_from("<Q", image, 40)[0], struct.unpack_from("<H", image, 60)[0]
    strings = struct.unpack_from("<Q", image, headers + 64 * (count - 1) + 24)[0]
    for at in range(headers, headers + 64 * count, 64):
        start = strings + struct.unpack_from("<I", image, at)[0]
        if image[start : image.index(0, start)].decode() == name:
            for key, value in fields.items():
                layout = "<I" if key in ("link", "info") else "<Q"
                struct.pack_into(layout, image, at + positions[key], value)
    assert image != IMAGE
    return bytes(image)


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
        (with_header(".dynsym", size=1 << 62), "malformed"),
        (with_header(".dynsym", offset=1 << 63), "malformed"),
        (with_header(".dynsym", size=25), "malformed"),
        (with_header(".dynsym", link=999), "malformed"),
        (with_header(".dynsym", entry_size=0), "malformed"),
        (with_header(".dynstr", size=1 << 62), "malformed"),
        (with_header(".dynamic", offset=(1 << 64) - 1), "malformed"),
        (with_header(".shstrtab", offset=1 << 62), "malformed"),
        # No section count, no size of a section header: the count is then the size
        # of the first section, and every section is the first.
        (IMAGE[:58] + struct.pack("<HH", 0, 0) + IMAGE[62:], "malformed"),
        (Library(tags=[(FLAGS, "")] * 60_000).build(), "without end"),
        (Library([Symbol(FUNCTION_PREFIX + "x" * 5000)]).build(), "symbol name of more than"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_said_at_once(image, reason):
    before = time.monotonic()
    with pytest.raises(ArtifactError, match=reason):
        inspect_elf(image)
    assert time.monotonic() - before < 5


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(LoaderError, match="no regular file"):
            inspect_elf(path)
    for path in (tmp_path / "missing", "nul\0inside"):
        with pytest.raises(LoaderError, match="cannot be opened") as caught:
            inspect_elf(path)
        assert not isinstance(caught.value, ArtifactError)


def test_the_message_names_the_file_and_none_stays_open(tmp_path):
    path = tmp_path / "cut.so"
    path.write_bytes(IMAGE[:100])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(ArtifactError, match=f"^{path}: malformed: "):
            inspect_elf(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_sparse_file_is_not_read_in_full(tmp_path):
    path = tmp_path / "sparse.so"
    path.write_bytes(with_header(".dynsym", size=24 << 34))
    os.truncate(path, 1 << 40)
    with pytest.raises(ArtifactError, match=r"section \.dynsym has 412316860416 bytes"):
        inspect_elf(path)


def test_ten_thousand_symbols_take_no_time():
    symbols = [Symbol(f"_ZN10flashinfer{i}E", defined=bool(i % 2)) for i in range(10_000)]
    image = Library([*symbols, Symbol("__tvm_ffi_run")]).build()
    inspect_elf(IMAGE)  # imports pyelftools
    before = time.process_time()
    assert inspect_elf(image).functions == ("run",)
    assert time.process_time() - before < 1


# Fatbins.

PTX, SASS, LTO_IR = 1, 2, 8
ZSTD, A, F = 1 << 15, 1 << 20, 1 << 21


def entry(kind, sm, flags=0, payload=bytes(16), header=64):
    fields = (kind, 0x101, header, len(payload), 0, 0, 8, 1, sm, 0, 0, 0x11 | flags)
    return struct.pack("<HHIQIIHHIIIQ", *fields).ljust(header, b"\0") + payload


def container(*entries, header=16):
    body = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, header, len(body)).ljust(header, b"\0") + body


def names(fatbin):
    return [code.name for code in architectures(fatbin)]


def code(name):
    if name.startswith("sm_"):
        return sass_named(name)
    digits = name.removeprefix("compute_").rstrip("af")
    return CudaCode("ptx", int(digits), name.partition(digits)[2])


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (entry(SASS, 75), "sm_75"),
        (entry(SASS, 90, A | ZSTD), "sm_90a"),
        (entry(SASS, 100, F | ZSTD | 1 << 24, header=120), "sm_100f"),
        (entry(PTX, 80, header=80), "compute_80"),
        (entry(PTX, 90, A, header=80), "compute_90a"),
        (entry(PTX, 120, F, payload=b"", header=80), "compute_120f"),
    ],
)
def test_one_entry(made, name):
    assert architectures(container(made)) == (code(name),)
    assert names(container(made)) == [name]


def test_several_entries_in_several_containers_each_once_and_sorted():
    fatbin = (
        container(entry(SASS, 90, A), entry(PTX, 80), entry(SASS, 100, F))
        + bytes(8)
        + container()
        + container(entry(SASS, 90, A), entry(SASS, 80), header=24)
        + bytes(40)
    )
    assert names(fatbin) == ["sm_80", "compute_80", "sm_90a", "sm_100f"]


@pytest.mark.parametrize("fatbin", [b"", bytes(64), container(), container(entry(LTO_IR, 90, A))])
def test_nothing_that_the_driver_would_load(fatbin):
    assert architectures(fatbin) == ()


WHOLE = container(entry(SASS, 90, A), entry(PTX, 80, header=80)) + container(entry(SASS, 87))


def claiming(at):
    """WHOLE, where a container (8) or an entry (24) says that it is of nearly 2**64 bytes."""
    return WHOLE[:at] + struct.pack("<Q", (1 << 64) - 8) + WHOLE[at + 8 :]


@pytest.mark.parametrize(
    ("fatbin", "reason"),
    [
        (b"text", "cut off after 4 bytes"),
        (b"no fatbin at all", "no fatbin container at offset 0"),
        (bytes(8) + b"\x50\xed\x55\xbb" + WHOLE[4:], "no fatbin container at offset 8"),
        (WHOLE[:4] + b"\x02" + WHOLE[5:], "version 2"),
        (WHOLE[:6] + b"\x08" + WHOLE[7:], "header of 8 bytes"),
        (WHOLE[:-1], "bytes at offset"),
        (container(entry(SASS, 90)[:40]), "cut off after 40 bytes"),
        (container(entry(SASS, 90)[:-1]), "claims 64 [+] 16 bytes where its container has 79"),
        (container(entry(SASS, 90, header=48)[:4] + bytes(60)), "claims 0 [+] 0 bytes"),
        (container(entry(PTX, 90), entry(SASS, 90)[:-1]), "where its container has 79"),
        (container(entry(SASS, 0)), "architecture 0"),
        (container(entry(SASS, 1 << 31)), "architecture 2147483648"),
        (container(entry(SASS, 90, A | F)), "contradictory flags"),
        (bytes(5000) + WHOLE, "no fatbin container"),
        (claiming(8), "malformed"),
        (claiming(24), "malformed"),
    ],
)
def test_says_what_is_wrong(fatbin, reason):
    with pytest.raises(ArtifactError, match=reason):
        architectures(fatbin)


RUNS = {
    "sm_80": ([(8, 0), (8, 6), (8, 9)], [(7, 5), (8, 7), (9, 0)]),
    "sm_87": ([(8, 7)], [(8, 0), (8, 6), (8, 9), (9, 0)]),
    "sm_90a": ([(9, 0)], [(8, 7), (9, 1), (10, 0)]),
    "sm_100": ([(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
    "sm_100a": ([(10, 0)], [(10, 3)]),
    "sm_100f": ([(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
    "sm_103f": ([(10, 3)], [(10, 0)]),
    "compute_80": ([(8, 0), (8, 7), (9, 0), (12, 1)], [(7, 5)]),
    "compute_87": ([(8, 7), (9, 0)], [(8, 6)]),
    "compute_90a": ([(9, 0)], [(8, 9), (10, 0), (12, 0)]),
    "compute_100f": ([(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
}
# What one H100 (9.0, driver 580.159.04) answered to a program with only this code in it.
RAN = "sm_90 sm_90a compute_75 compute_80 compute_87 compute_89 compute_90 compute_90a"
FAILED = (
    "sm_75 sm_80 sm_87 sm_89 sm_100 sm_100a sm_100f sm_120 "
    "compute_100 compute_100a compute_100f compute_120"
)


def test_where_code_runs():
    told = {(name, where): True for name, (runs, _) in RUNS.items() for where in runs}
    told |= {(name, where): False for name, (_, not_on) in RUNS.items() for where in not_on}
    told |= {(name, (9, 0)): True for name in RAN.split()}
    told |= {(name, (9, 0)): False for name in FAILED.split()}
    found = {(name, where): not unfit([code(name)], where) for name, where in told}
    assert found == told


@pytest.mark.parametrize(
    ("has", "capability", "reason"),
    [
        ("sm_90a", (8, 7), "has sm_90a only; the device is sm_87"),
        ("sm_80 compute_90a", (12, 1), "has sm_80, compute_90a only; the device is sm_121"),
        ("", (9, 0), "has no device code; the device is sm_90"),
        ("sm_80 sm_86 compute_89", (8, 9), ""),
        ("compute_75 compute_80 sm_90a", (8, 6), ""),
    ],
)
def test_the_reason_in_words(has, capability, reason):
    assert unfit(map(code, has.split()), capability) == reason


KERNEL = """
__global__ void NAME(float *y, float a) { y[threadIdx.x] *= a; }
extern "C" void run_NAME(float *y) { NAME<<<1, 32>>>(y, 2.f); }
"""


@pytest.fixture(scope="module")
def nvcc(tmp_path_factory):
    """Compiles two sources for those of the architectures that it knows; it and these."""
    path = compiler.nvcc()
    folder = tmp_path_factory.mktemp("nvcc")
    listed = subprocess.run([path, "--list-gpu-arch"], check=True, capture_output=True)
    for name in ("one", "two"):
        (folder / f"{name}.cu").write_text(KERNEL.replace("NAME", name))

    def library(names, *flags):
        known = [n for n in names if f"compute_{code(n).sm}" in listed.stdout.decode().split()]
        target = folder / "kernels.so"
        command = [path, "-shared", "-Xcompiler=-fPIC", "--threads=0", *flags, "-o", str(target)]
        command += [f"-gencode=arch=compute_{n.partition('_')[2]},code={n}" for n in known]
        sources = [str(folder / f"{name}.cu") for name in ("one", "two")]
        subprocess.run([*command, *sources], check=True)
        return target, known

    return library


EVERY_FORM = [
    *("sm_75", "sm_87", "compute_87", "sm_90", "sm_90a", "compute_90a"),
    *("sm_100f", "compute_100f", "sm_103a", "compute_110"),
    *("sm_120a", "compute_120f", "sm_121a"),
]


@pytest.mark.parametrize(
    ("wanted", "flags"),
    [
        (EVERY_FORM, ["--compress-mode=size"]),
        (["compute_80", "sm_90a"], ["--compress-mode=none"]),
        (["sm_87", "sm_90a"], ["-rdc=true"]),
        # Without a CUDA runtime nvcc skips the device link: nothing there can be loaded.
        (["sm_90a"], ["-rdc=true", "-cudart=none"]),
    ],
)
def test_what_nvcc_makes(wanted, flags, nvcc):
    path, known = nvcc(wanted, *flags)
    assert names(path) == ([] if "-cudart=none" in flags else known)
    if wanted is EVERY_FORM:
        image = bytearray(path.read_bytes())
        image[image.index(struct.pack("<IHH", 0xBA55ED50, 1, 16))] ^= 0xFF
        with pytest.raises(ArtifactError, match="no fatbin container"):
            architectures(bytes(image))


# Cubins as they are, among read-only data: what CuTe DSL makes.


def cubin(sm, option="", **changed):
    """An ELF file of device code, compiled with an option."""
    note = b"\1\0\0\0 ptxas\0 -O 3 " + option.encode() + b" -m 64 \0"
    made = bytearray(Library(machine=190, kind=2, extra={".note.nv.tkinfo": note}).build())
    made[7:9] = bytes([0x41, changed.get("version", 8)])
    made[48:52] = struct.pack("<I", 0x6000004 | sm << 8)
    return bytes(made)


def holding(*cubins, section=".rodata", before=100, **more):
    data = bytes(before) + bytes(3).join(cubins)
    return Library(LIBRARY.symbols, extra={section: data, **more}).build()


CUBIN = cubin(90, "-arch sm_90a")


def test_a_cubin_among_constants():
    assert names(holding(CUBIN)) == names(holding(CUBIN, section=".lrodata")) == ["sm_90a"]
    both = cubin(100, "-arch sm_100f"), CUBIN, cubin(80, "-arch sm_80"), CUBIN
    assert names(holding(*both)) == ["sm_80", "sm_90a", "sm_100f"]
    # Without the note nobody says that it runs anywhere else.
    assert names(holding(cubin(120))) == ["sm_120a"]
    # Where pieces meet that the file is read in.
    for before in range((1 << 20) - 80, (1 << 20) + 2, 16):
        assert names(holding(CUBIN, before=before)) == ["sm_90a"]


def test_what_is_no_cubin_among_constants():
    assert names(holding(b"\x7fELF", IMAGE)) == names(holding(cubin(90, version=7))) == []
    assert names(holding(CUBIN, section=".data")) == []
    # What the compiler registers is all that the driver is given.
    assert names(holding(CUBIN, **{".nv_fatbin": WHOLE})) == names(WHOLE)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (holding(cubin(3)), "a cubin for architecture 3, compiled with -$"),
        (holding(cubin(90, "-arch sm_100a")), "architecture 90, compiled with -arch sm_100a"),
        (holding(CUBIN[:100]), "malformed"),
    ],
)
def test_a_damaged_cubin(image, reason):
    with pytest.raises(ArtifactError, match=reason):
        architectures(image)


def test_cubins_that_nvcc_makes(tmp_path):
    (tmp_path / "one.cu").write_text(KERNEL)
    for name in ("sm_80", "sm_90", "sm_90a", "sm_100f", "sm_120a"):
        made = tmp_path / f"{name}.cubin"
        command = [compiler.nvcc(), "-cubin", f"-arch={name}", "-o", str(made)]
        subprocess.run([*command, str(tmp_path / "one.cu")], check=True)
        assert names(holding(made.read_bytes())) == [name]
