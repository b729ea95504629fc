"""Releases, specifiers and architectures at their bounds, from lists written by hand."""

from __future__ import annotations

import base64
import itertools

import pytest
from packaging.version import Version

from fi_ffi.errors import ArtifactError
from fi_ffi.loader.distributions import hex_of, is_in, version_key
from fi_ffi.loader.machine import CudaCode, architecture_named, sass_named, unfit

# In order; a release candidate is before what it is of, and a post release after it.
RISING = [
    "0.6.2", "0.6.3", "0.6.9", "0.6.10", "0.6.10.post1", "0.6.10.post2", "0.6.10.post10", "0.6.11",
    "0.6.99", "0.7.0", "0.7.0.post1", "0.7.1", "0.10.0", "1.0.0", "1.0.0.post1",
]  # fmt: skip
EARLY = ["0.6.10.dev1", "0.6.10a1", "0.6.10rc1", "0.6.10rc2"]  # before 0.6.10, after 0.6.9


def test_releases_rise():
    for one, other in itertools.combinations(RISING, 2):
        assert version_key(one) < version_key(other)
        assert Version(one) < Version(other)


@pytest.mark.parametrize("bound", RISING)
def test_a_bound_divides_releases(bound):
    at = RISING.index(bound)
    for i, release in enumerate(RISING):
        assert is_in(release, f">={bound}") is (i >= at), release
        assert is_in(release, f"<{bound}") is (i < at), release
        assert is_in(release, f"!={bound}") is (i != at), release
        assert is_in(release, f">={bound},<{bound}") is False
        after = RISING[min(at + 2, len(RISING) - 1)]
        assert is_in(release, f">={bound},<{after}") is (at <= i < RISING.index(after)), release


@pytest.mark.parametrize("release", EARLY)
def test_early_releases(release):
    """PEP 440: before the release itself, which `<` leaves out with all that is early of it."""
    assert is_in(release, ">=0.6.9") and not is_in(release, ">=0.6.10")
    assert is_in(release, "<0.6.11") and not is_in(release, "<0.6.9")
    assert not is_in(release, "<0.6.10")
    assert not is_in(release, ">=0.6.9", False)


@pytest.mark.parametrize(
    ("release", "specifier", "is_inside"),
    [("0.6.16.post2", ">=0.6.16,<0.6.16.post3", True), ("0.6.16.post3", "<0.6.16.post3", False),
     ("0.6.16", "<0.6.16.post3", True), ("0.6.17", ">=0.6.16.post3,<0.6.18", True),
     ("0.6.18.post1", ">=0.6.16.post3,<0.6.18", False), ("0.7", ">=0.7.0", True),
     ("0.7.0", ">=0.7,<0.7.1", True), ("0.7.0.post1", ">=0.7,<0.7.1", True),
     ("0.7.0.post1", "==0.7.*", True), ("0.6.18.post1", "==0.7.*", False),
     ("0.8.0", "==0.7.*", False), ("0.7.2+cu130", ">=0.7.2", True),
     ("0.7.2+cu130", "<0.7.2", False)],
)  # fmt: skip
def test_specifiers(release, specifier, is_inside):
    assert is_in(release, specifier) is is_inside


DEVICES = [
    (7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1),
    (13, 0),
]  # fmt: skip
# Device code, and the GPUs that run it.  CUDA's compatibility guide: machine code runs on its own
# major from its minor on, but a Jetson's (8.7) alone; so does "f", and "a" on one GPU; PTX is
# compiled for all that are later.
RUN = {
    "sm_75": [(7, 5)], "sm_80": [(8, 0), (8, 6), (8, 9)], "sm_86": [(8, 6), (8, 9)],
    "sm_87": [(8, 7)], "sm_89": [(8, 9)], "sm_90": [(9, 0)], "sm_90a": [(9, 0)],
    "sm_100": [(10, 0), (10, 3)], "sm_100a": [(10, 0)], "sm_100f": [(10, 0), (10, 3)],
    "sm_103": [(10, 3)], "sm_103f": [(10, 3)], "sm_120": [(12, 0), (12, 1)], "sm_120a": [(12, 0)],
    "sm_120f": [(12, 0), (12, 1)], "sm_121": [(12, 1)],
    "compute_80": DEVICES[1:], "compute_89": DEVICES[4:], "compute_90": DEVICES[5:],
    "compute_90a": [(9, 0)], "compute_100": DEVICES[6:], "compute_100f": [(10, 0), (10, 3)],
    "compute_120": DEVICES[9:], "compute_120a": [(12, 0)], "compute_121": DEVICES[10:],
}  # fmt: skip


@pytest.mark.parametrize("name", RUN)
def test_device_code_runs_from_its_architecture_on(name):
    kind, digits = name.split("_")
    sm, suffix = (digits[:-1], digits[-1]) if digits[-1] in "af" else (digits, "")
    code = CudaCode("sass" if kind == "sm" else "ptx", int(sm), suffix)
    assert code.name == name
    assert [device for device in DEVICES if code.runs_on(device)] == RUN[name]
    for device in DEVICES:
        assert (unfit([code], device) == "") is (device in RUN[name])
    assert unfit([], (9, 0)) == "has no device code; the device is sm_90"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("80", (8, 0, "")), ("8.9", (8, 9, "")), ("sm90a", (9, 0, "a")), ("sm_90A", (9, 0, "a")),
     (" 10.0f ", (10, 0, "f")), ("100", (10, 0, "")), ("12.1", (12, 1, "")), ("9", None),
     ("1000", None), ("9.00", None), ("90b", None), ("sm", None), ("", None), ("-90", None),
     ("9,0", None), ("compute_90", None)],
)  # fmt: skip
def test_names_of_architectures(name, expected):
    assert architecture_named(name) == expected
    if expected is None:
        with pytest.raises(ArtifactError, match="names no architecture"):
            sass_named(name)
        return
    major, minor, suffix = expected
    assert sass_named(name) == CudaCode("sass", 10 * major + minor, suffix)


@pytest.mark.parametrize("count", [0, 31, 32, 33])
def test_a_sha256_has_32_bytes(count):
    text = "sha256=" + base64.urlsafe_b64encode(bytes(count)).decode().rstrip("=")
    if count == 32:
        assert hex_of(text, "a wheel") == "00" * 32
        return
    with pytest.raises(ArtifactError, match="no sha256"):
        hex_of(text, "a wheel")
