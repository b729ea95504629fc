"""Which entry serves a row: one of another release is told apart before anything is loaded."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import fi_ffi
from fi_ffi.abi.tensor import parse_device
from fi_ffi.loader import machine, runtime
from fi_ffi.loader.tvm_ffi import ACCEPTED
from fi_ffi.ops.call.op import Op
from fi_ffi.ops.call.releases import entry_for, fits
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.table import ROWS

ROW = OPS["rmsnorm"].row


@pytest.fixture(autouse=True)
def kernels(built_wheel):
    fi_ffi.use_kernels(built_wheel)
    yield
    runtime.use_source(None)
    for op in OPS.values():
        op.forget()


def test_an_op_the_release_lacks_says_which_have_it():
    gone = replace(ROW, name="gone", releases=">=0.6.1,<0.6.13")
    with pytest.raises(fi_ffi.KernelNotFoundError) as caught:
        entry_for(gone, parse_device("cuda:0"))
    assert "gone is in FlashInfer >=0.6.1,<0.6.13" in str(caught.value)
    assert "the kernels in use are of 0.6.13" in str(caught.value)


def test_a_gpu_that_is_not_there_is_told(built_wheel):
    index = machine.device_count()
    with pytest.raises(fi_ffi.LoaderError, match=f"there is no cuda:{index}"):
        entry_for(ROW, parse_device(f"cuda:{index}"))
    desc = fi_ffi.TensorDesc(4096, (1, 8), "float16", device=f"cuda:{index}")
    weight = fi_ffi.TensorDesc(8192, (8,), "float16", device=f"cuda:{index}")
    with pytest.raises(fi_ffi.LoaderError, match="there is no cuda"):
        fi_ffi.rmsnorm(desc, desc, weight, stream=0)


def test_the_reference_needs_no_kernels(tmp_path: Path):
    runtime.use_source(tmp_path)  # where there are none
    assert entry_for(ROW, parse_device("cpu")).name.startswith("fi_ffi.reference.norm")


def test_an_op_takes_the_form_of_its_kernels():
    old, new = replace(ROW, releases="<0.6"), replace(ROW, releases=">=0.6", doc="New.")
    op = Op(old, new)
    assert op.row is new, "of the kernels of 0.6.13"
    assert op.__doc__.startswith("New.")
    op.select_release("0.5.1")
    assert op.row is old
    assert fits(new, "0.7.2.post1")


RELEASES = ["0.6.2", "0.6.3", "0.6.8", "0.6.13", "0.6.14", "0.6.100", "0.7.0", "1.0.0",
            "0.6.13.post1", "0.1.12", "0.1.13", "0.1.13.post0"]  # fmt: skip
SPECIFIERS = [*{row.releases for row in ROWS}, ">=0.6.4,<0.7", ">=0", "<1", ACCEPTED]


@pytest.mark.parametrize("release", RELEASES)
def test_releases_are_compared_as_packaging_does(release):
    for specifier in SPECIFIERS:
        row = replace(ROW, releases=specifier)
        assert fits(row, release) == SpecifierSet(specifier).contains(release, prereleases=True)


ABLE = [(op.row, op.row.capabilities) for op in OPS.values() if op.row.capabilities]


@pytest.mark.parametrize(("row", "able"), ABLE, ids=[row.name for row, _ in ABLE])
def test_gpus_that_a_kernel_is_not_for(row, able, monkeypatch):
    """No such GPU is here: the machine is said to have one."""
    for major in {7, 8, 9, 10, 11, 12} - {*able}:
        monkeypatch.setattr(machine, "capability", lambda _, major=major: (major, 0))
        words = " or ".join(rf"{known}\.x" for known in able)
        words += re.escape(f" ({row.elsewhere})") if row.elsewhere else ""
        with pytest.raises(fi_ffi.ArchitectureError, match=rf"{words}; cuda:0 has {major}\.0"):
            entry_for(row, parse_device("cuda:0"))
