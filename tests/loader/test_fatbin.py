"""Fatbins made by hand, some that nvcc makes, and damaged ones."""

from __future__ import annotations

import shutil
import struct
import subprocess
from typing import Literal, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fi_ffi.errors import ArtifactError
from fi_ffi.loader.fatbin import CudaCode, architectures, runs_on

PTX, SASS, LTO_IR = 1, 2, 8
ZSTD, A, F = 1 << 15, 1 << 20, 1 << 21


def entry(kind, sm, flags=0, payload=bytes(16), header=64):
    fields = struct.pack(
        "<HHIQIIHHIIIQ",
        *(kind, 0x101, header, len(payload), 0, 0, 8, 1, sm, 0, 0, 0x11 | flags),
    )
    return fields.ljust(header, b"\0") + payload


def container(*entries, header=16):
    body = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, header, len(body)).ljust(header, b"\0") + body


def names(fatbin):
    return [code.name for code in architectures(fatbin)]


def codes(*spelled):
    return tuple(_code(name) for name in spelled)


def _code(name):
    kind, _, number = name.partition("_")
    digits = number.rstrip("af")
    suffix = cast(Literal["", "a", "f"], number.removeprefix(digits))
    return CudaCode("sass" if kind == "sm" else "ptx", int(digits), suffix)


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (entry(SASS, 75), "sm_75"),
        (entry(SASS, 90, A), "sm_90a"),
        (entry(SASS, 90, A | ZSTD), "sm_90a"),
        (entry(SASS, 100, F | ZSTD | 1 << 24, header=120), "sm_100f"),
        (entry(SASS, 121), "sm_121"),
        (entry(PTX, 80, header=80), "compute_80"),
        (entry(PTX, 90, A, header=80), "compute_90a"),
        (entry(PTX, 120, F, payload=b"", header=80), "compute_120f"),
    ],
)
def test_one_entry(made, name):
    assert architectures(container(made)) == (_code(name),)
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
        (container(entry(SASS, 0)), "architecture 0"),
        (container(entry(SASS, 1 << 31)), "architecture 2147483648"),
        (container(entry(SASS, 90, A | F)), "contradictory flags"),
        (bytes(5000) + WHOLE, "no fatbin container"),
    ],
)
def test_says_what_is_wrong(fatbin, reason):
    with pytest.raises(ArtifactError, match=reason):
        architectures(fatbin)


def test_a_claimed_size_is_not_believed():
    for at in (8, 24):  # the container's and the first entry's
        fatbin = bytearray(WHOLE)
        struct.pack_into("<Q", fatbin, at, (1 << 64) - 8)
        with pytest.raises(ArtifactError):
            architectures(bytes(fatbin))


@pytest.mark.parametrize(
    ("name", "runs", "does_not_run"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (8, 7), (9, 0)]),
        ("sm_87", [(8, 7)], [(8, 0), (8, 6), (8, 9), (9, 0)]),
        ("sm_90", [(9, 0)], [(8, 9), (10, 0)]),
        ("sm_90a", [(9, 0)], [(8, 7), (9, 1), (10, 0)]),
        ("sm_100", [(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
        ("sm_100a", [(10, 0)], [(10, 3)]),
        ("sm_100f", [(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
        ("sm_103f", [(10, 3)], [(10, 0)]),
        ("sm_120f", [(12, 0), (12, 1)], [(10, 0), (11, 0)]),
        ("sm_121a", [(12, 1)], [(12, 0)]),
        ("compute_80", [(8, 0), (8, 7), (9, 0), (12, 1)], [(7, 5)]),
        ("compute_87", [(8, 7), (9, 0)], [(8, 6)]),
        ("compute_90a", [(9, 0)], [(8, 9), (10, 0), (12, 0)]),
        ("compute_100f", [(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
    ],
)
def test_where_code_runs(name, runs, does_not_run):
    for capability in runs:
        assert runs_on(codes(name), capability).ok, capability
    for capability in does_not_run:
        assert not runs_on(codes(name), capability).ok, capability


# What one H100 (9.0, driver 580.159.04) answered to a program with only this code in it.
@pytest.mark.parametrize(
    ("ran", "forms"),
    [
        (True, "sm_90 sm_90a compute_75 compute_80 compute_87 compute_89 compute_90 compute_90a"),
        (False, "sm_75 sm_80 sm_87 sm_89 sm_100 sm_100a sm_100f sm_120"),
        (False, "compute_100 compute_100a compute_100f compute_120"),
    ],
)
def test_agrees_with_a_device(ran, forms):
    for name in forms.split():
        assert runs_on(codes(name), (9, 0)).ok is ran, name


@pytest.mark.parametrize(
    ("has", "capability", "reason"),
    [
        ("sm_90a", (8, 7), "has sm_90a only; the device is sm_87"),
        ("sm_80 compute_90a", (12, 1), "has sm_80, compute_90a only; the device is sm_121"),
        ("", (9, 0), "has no device code; the device is sm_90"),
        ("sm_80 sm_86 compute_80", (8, 9), "has sm_86, which runs as it is; the device is sm_89"),
        ("sm_80 sm_86", (8, 7), "has sm_80, sm_86 only; the device is sm_87"),
        (
            "compute_75 compute_80 sm_90a",
            (8, 6),
            "has compute_80, which is compiled by the driver when loaded; the device is sm_86",
        ),
    ],
)
def test_the_reason_in_words(has, capability, reason):
    assert runs_on(codes(*has.split()), capability).reason == reason


KERNEL = """
__global__ void NAME(float *y, float a) { y[threadIdx.x] *= a; }
extern "C" void run_NAME(float *y) { NAME<<<1, 32>>>(y, 2.f); }
"""


class Nvcc:
    def __init__(self, path, folder):
        self._path, self._folder = path, folder
        listed = subprocess.run([path, "--list-gpu-arch"], check=True, capture_output=True)
        self._known = set(listed.stdout.decode().split())
        for name in ("one", "two"):
            (folder / f"{name}.cu").write_text(KERNEL.replace("NAME", name))

    def known(self, names):
        """Those that this nvcc can compile for; it lists them without suffixes."""
        return [each for each in names if f"compute_{_code(each).sm}" in self._known]

    def library(self, names, *flags, sources=("one",)):
        target = self._folder / "kernels.so"
        gencode = [
            f"-gencode=arch=compute_{name.partition('_')[2]},code={name}"
            for name in self.known(names)
        ]
        subprocess.run(
            [self._path, "-shared", "-Xcompiler=-fPIC", "--threads=0", *gencode, *flags]
            + [str(self._folder / f"{name}.cu") for name in sources]
            + ["-o", str(target)],
            check=True,
        )
        return target


@pytest.fixture(scope="module")
def nvcc(tmp_path_factory):
    path = shutil.which("nvcc")
    if path is None:
        pytest.skip("there is no nvcc on this machine to make fatbins with")
    return Nvcc(path, tmp_path_factory.mktemp("nvcc"))


def test_nvcc_every_form_in_one_file(nvcc):
    wanted = [
        *("sm_75", "sm_87", "compute_87", "sm_90", "sm_90a", "compute_90a"),
        *("sm_100f", "compute_100f", "sm_103a", "compute_110"),
        *("sm_120a", "compute_120f", "sm_121a"),
    ]
    assert names(nvcc.library(wanted)) == nvcc.known(wanted)


@pytest.mark.parametrize("mode", ["none", "size", "speed"])
def test_nvcc_compressed_and_not_in_two_translation_units(nvcc, mode):
    wanted = ["compute_80", "sm_90a"]
    library = nvcc.library(wanted, f"--compress-mode={mode}", sources=("one", "two"))
    assert names(library) == wanted


def test_nvcc_relocatable_code_counts_once_it_is_linked(nvcc):
    wanted = ["sm_87", "sm_90a"]
    assert names(nvcc.library(wanted, "-rdc=true", sources=("one", "two"))) == wanted
    # Without a CUDA runtime nvcc skips the device link: nothing there can be loaded.
    assert names(nvcc.library(["sm_90a"], "-rdc=true", "-cudart=none")) == []


def test_a_damaged_library_from_nvcc(nvcc):
    image = bytearray(nvcc.library(["sm_90a"]).read_bytes())
    at = image.index(struct.pack("<IHH", 0xBA55ED50, 1, 16))
    image[at] ^= 0xFF
    with pytest.raises(ArtifactError, match="no fatbin container"):
        architectures(bytes(image))


def _reads_or_refuses(fatbin):
    try:
        found = architectures(fatbin)
    except ArtifactError:
        return
    assert len(found) <= len(fatbin) // 48


@given(st.binary(max_size=200))
@example(container(b"\xff" * 48))
@settings(deadline=1000)
def test_arbitrary_bytes_are_read_or_refused(data):
    _reads_or_refuses(data)
    _reads_or_refuses(container(data))
    _reads_or_refuses(container(entry(SASS, 90), data))


@given(
    st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=8))),
    st.integers(0, len(WHOLE)) | st.just(len(WHOLE)),
)
@settings(deadline=1000, max_examples=500)
def test_a_damaged_fatbin_is_read_or_refused(damage, length):
    fatbin = bytearray(WHOLE)
    for at, data in damage:
        fatbin[at : at + len(data)] = data
    _reads_or_refuses(bytes(fatbin[:length]))
