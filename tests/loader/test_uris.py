"""Module names: built and read alike, and called as FlashInfer's own generators call them.

`data/uris.json` has what the generators of every supported release answered
(`tools/record_uris.py` made it); those of the default release are asked again here.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_ffi.errors import ArgumentError
from fi_ffi.loader.building.build import available
from fi_ffi.loader.building.names import DEFAULT_RELEASE, parse_request
from fi_ffi.loader.uris import DTYPES, KINDS, ROWS, Number, Words, family_row, parse, uri
from tools.generators import generated_names

from tests.helpers.compiler import why_not_build

DATA = json.loads((Path(__file__).parent / "data" / "uris.json").read_text())
RELEASES = DATA["releases"]
EVERY_ARCH = "7.5 8.0 8.9 9.0a 10.0a 10.3a 11.0a 12.0a 12.1a"


def recorded(release: str) -> list[tuple[dict, str]]:
    """The cases that a release was asked, with the name it gave."""
    return [
        (case, name)
        for case in DATA["cases"]
        for name, releases in case["names"].items()
        if release in releases
    ]


def listed(release: str) -> list[str]:
    names = [n for key, names in DATA["listed"].items() if release in key.split() for n in names]
    return sorted(names)


def called(params: dict) -> str:
    return ", ".join(f"{name}={value}" for name, value in params.items())


@pytest.mark.parametrize("release", RELEASES)
def test_names_are_the_generators_own(release):
    cases = recorded(release)
    assert len(cases) > 120
    for case, name in cases:
        family, params = case["family"], case["params"]
        if not name:
            with pytest.raises(ArgumentError, match="argument `(release|arch)`"):
                uri(family, release=release, **params)
            continue
        assert uri(family, release=release, **params) == name, f"{family}: {called(params)}"
        found = parse(name, release)
        assert found.family == family
        assert params.items() <= found.params.items()


@pytest.mark.parametrize("release", RELEASES)
def test_every_name_flashinfer_lists_is_read_and_written(release):
    names = listed(release)
    assert len(names) > 600
    unknown = []
    for name in names:
        found = parse(name, release)
        if found is None:
            unknown.append(name)
        else:
            assert uri(found.family, release=release, **found.params) == name
    # What has a hash for a name is listed under it, and not taken apart.
    assert [name for name in unknown if not name.startswith("cake_")] == []


def test_the_default_releases_list_for_every_architecture_is_read():
    names = [*listed(DEFAULT_RELEASE), *DATA["listed_for_every_arch"]]
    assert len(names) == 950
    assert [name for name in names if parse(name, DEFAULT_RELEASE) is None] == []


def _value(kind):
    if isinstance(kind, Words):
        return st.sampled_from(list(kind.words))
    assert isinstance(kind, Number)
    numbers = st.integers(kind.low, 10**9 - 1)
    return st.one_of(st.just(0), numbers) if kind.before else numbers


@st.composite
def rows_with_params(draw):
    row = draw(st.sampled_from([row for row in ROWS if row.kinds]))
    release = draw(st.sampled_from([r for r in RELEASES if row.holds_for(r)] or [row.since]))
    return release, row, {name: draw(_value(kind)) for name, kind in row.kinds.items()}


@given(rows_with_params())
@settings(max_examples=400, deadline=None)
def test_parse_is_the_inverse_of_uri(drawn):
    release, row, params = drawn
    if row.refusal(params):
        with pytest.raises(ArgumentError):
            uri(row.family, release=release, **params)
        return
    name = uri(row.family, release=release, **params)
    found = parse(name, release)
    assert (found.family, dict(found.params)) == (row.family, params)
    assert [other for other in ROWS if other.holds_for(release) and other.match(name)] == [row]


@given(st.sampled_from(listed(DEFAULT_RELEASE)), st.data())
@settings(max_examples=300, deadline=None)
def test_what_is_read_is_written_the_same(name, data):
    """Also of damaged names: either they are no names, or they are read to the letter."""
    at = data.draw(st.integers(0, len(name) - 1))
    piece = data.draw(st.sampled_from(["", "_", "0", "1", "True", "_sm90", "f16", "\n", "²"]))
    damaged = name[:at] + piece + name[at + data.draw(st.integers(0, 3)) :]
    found = parse(damaged, DEFAULT_RELEASE)
    if found is not None:
        assert uri(found.family, release=DEFAULT_RELEASE, **found.params) == damaged


@pytest.mark.parametrize("release", RELEASES)
def test_no_two_families_share_a_name(release):
    rows = [row for row in ROWS if row.holds_for(release)]
    assert len({row.family for row in rows}) == len(rows)


def test_ranges_of_a_family_do_not_overlap_and_meet():
    for family in {row.family for row in ROWS}:
        rows = [row for row in ROWS if row.family == family]
        for earlier, later in itertools.pairwise(rows):
            assert earlier.until == later.since != ""


def test_defaults():
    name = uri("batch_prefill", release="0.6.13", dtype_q="f16", head_dim_qk=128)
    assert name == (
        "batch_prefill_with_kv_cache_dtype_q_f16_dtype_kv_f16_dtype_o_f16_dtype_idx_i32_"
        "head_dim_qk_128_head_dim_vo_128_posenc_0_use_swa_False_use_logits_cap_False_f16qk_False"
    )
    assert uri("batch_prefill", release="0.7.2.post1", dtype_q="f16", head_dim_qk=128) == (
        f"{name}_kv_stride_equal"
    )
    fa3 = {"dtype_q": "f16", "head_dim_qk": 128, "backend": "fa3"}
    assert uri("batch_prefill", release="0.7.2.post1", **fa3) == f"{name}_sm90"
    assert uri("norm", release="0.6.13") == "norm"


def test_long_names_of_dtypes_and_local_versions():
    for short in ("f16", "bf16"):
        given = {"release": "0.6.13+cu130.sm90a", "head_dim_qk": 64}
        assert uri("single_decode", dtype_q=DTYPES[short], **given) == (
            uri("single_decode", dtype_q=short, **given)
        )
    new = {"release": "0.6.18", "dtype_q": "bf16", "head_dim_qk": 64}
    assert "_dtype_kv_fp4x2_e2m1_" in uri("batch_decode", dtype_kv="float4_e2m1fn_x2", **new)


def test_what_a_name_says():
    case = {"dtype_q": "e4m3", "dtype_o": "bf16", "head_dim_qk": 192, "head_dim_vo": 128}
    found = parse(uri("batch_prefill", release="0.6.13", backend="fa3", **case))
    assert found.backend == "fa3"
    assert found.dtypes == {
        "dtype_q": "e4m3", "dtype_kv": "e4m3", "dtype_o": "bf16", "dtype_idx": "i32",
    }  # fmt: skip
    assert found.head_dims == (192, 128)
    assert found.releases == "every release"  # fa3's did not change when fa2's did
    assert hash(found) == hash(parse(found.name))


@pytest.mark.parametrize(
    ("family", "release", "params", "message"),
    [
        ("batch_prefil", "0.6.13", {}, "argument `family`: .*batch_prefill"),
        ("gdn_prefill_sm90", "0.6.18", {}, r"argument `release`: .*before 0\.6\.14"),
        ("batch_decode_mla", "0.7.2.post1", {"dtype_q": "f16"}, r"before 0\.7\.0"),
        ("norm", "newest", {}, "argument `release`: got 'newest'"),
        ("norm", "0.6.13", {"dtype": "f16"}, "argument `dtype`: .*expected none"),
        ("batch_decode", "0.6.13", {"head_dim": 128}, "argument `head_dim`: .*head_dim_qk"),
        ("batch_decode", "0.6.13", {}, "argument `dtype_q`: got nothing, expected f16 or bf16"),
        ("batch_decode", "0.6.13", {"dtype_q": "f16"}, "argument `head_dim_qk`: got nothing"),
        ("single_decode", "0.6.13", {"dtype_q": "f64", "head_dim_qk": 64}, "got 'f64'"),
        ("single_decode", "0.6.13", {"dtype_q": "f16", "head_dim_qk": 0}, "at least 1"),
        ("single_decode", "0.6.13", {"dtype_q": "f16", "head_dim_qk": True}, "got True"),
        ("single_decode", "0.6.13", {"dtype_q": "f16", "head_dim_qk": "64"}, "got '64'"),
        ("single_decode", "0.6.13",
         {"dtype_q": "f16", "head_dim_qk": 64, "use_sliding_window": 1}, "got 1, expected False"),
        ("single_decode", "0.6.13",
         {"dtype_q": "f16", "head_dim_qk": 64, "dtype_kv": "fp4x2_e2m1"}, "u8 or fp4_e2m1"),
        ("batch_prefill", "0.6.13", {"dtype_q": "e4m3", "head_dim_qk": 64}, "`dtype_o`: got noth"),
        ("batch_prefill", "0.7.2.post1",
         {"dtype_q": "f16", "head_dim_qk": 64, "backend": "fa3",
          "paged_kv_stride_mode": "equal"}, "runtime.* with fa3"),
        ("batch_prefill", "0.6.13", {"dtype_q": ["f16"], "head_dim_qk": 64}, r"got \['f16'\]"),
    ],
)  # fmt: skip
def test_refusals(family, release, params, message):
    with pytest.raises(ArgumentError, match=message):
        uri(family, release=release, **params)


def test_strangers_are_not_read():
    for name in ("", "nor", "norm2", "norm\n", "single_decode", "../norm", "fused_moe_91"):
        assert parse(name) is None
    with pytest.raises(ArgumentError, match="argument `release`"):
        parse("norm", "x")


def test_a_name_of_another_release_is_read_without_one():
    name = uri("batch_mla", release="0.7.2.post1", dtype_q="f16")
    assert parse(name, "0.6.13") is None
    assert parse(name).releases == "from 0.7.0"


def test_every_template_has_a_pattern_without_groups_of_its_own():
    for kind in KINDS.values():
        assert "(" not in kind.pattern.replace("(?:", "").replace(r"\(", "")
    assert all(family_row(row.family, row.since or "0.6.3").pattern for row in ROWS)


def test_reading_a_whole_artifact_is_quick():
    names = [*listed(DEFAULT_RELEASE), *DATA["listed_for_every_arch"]]
    begun = time.perf_counter()
    for name in names:
        parse(name, DEFAULT_RELEASE)
    assert time.perf_counter() - begun < 1  # it takes 20 ms


@pytest.fixture(scope="module")
def build_dir(tmp_path_factory):
    reason = why_not_build()
    if reason is not None:
        pytest.skip(f"{reason}, so FlashInfer's generators cannot be asked")
    return tmp_path_factory.mktemp("generators")


def test_the_generators_of_the_default_release(build_dir):
    """The record is what they say now, and what we read out of a name leads to that name."""
    assert DATA["default"] == DEFAULT_RELEASE
    cases = [(case, name) for case, name in recorded(DEFAULT_RELEASE) if name]
    requests = [
        {"text": str(n), "generator": case["generator"], "arguments": _arguments(case)}
        for n, (case, _name) in enumerate(cases)
    ]
    expected = {str(n): name for n, (_case, name) in enumerate(cases)}
    plain = [r.family for r in ROWS if not r.kinds and r.generator and r.holds_for(DEFAULT_RELEASE)]
    for name in [*expected.values(), *plain]:
        request = parse_request(name).as_json(DEFAULT_RELEASE)
        if "generator" in request:
            requests.append(request)
    expected |= {request["text"]: request["text"] for request in requests[len(cases) :]}
    assert len(requests) > 200
    answers, failed = generated_names(
        requests, release=DEFAULT_RELEASE, arch=EVERY_ARCH, build_dir=build_dir
    )
    assert failed == {}
    assert answers == expected


def _arguments(case: dict) -> dict:
    found = case["params"] | case["arguments"]
    return {
        key: f"torch.{DTYPES[value]}" if _is_dtype(case["family"], key, value) else value
        for key, value in found.items()
    }


def _is_dtype(family: str, key: str, value: object) -> bool:
    return "dtype" in key and value in DTYPES and family != "rmsnorm_silu"


def test_flashinfers_list_is_the_recorded_one(build_dir):
    entries = available(arch=DATA["arch"], build_dir=build_dir)
    assert sorted(e.name for e in entries if e.kind == "module") == listed(DEFAULT_RELEASE)
