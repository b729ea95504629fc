"""Module names: built and read as FlashInfer's own generators do; what a source of them lacks.

`data/uris.json` has what the generators of every supported release answered
(`python3 -m tools.release record` made it); those of the default release are asked again here.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_ffi.catalogue.advice import build_advice, missing_module_message
from fi_ffi.catalogue.families import DEFAULT_RELEASE
from fi_ffi.catalogue.modules import modules_of, nearest
from fi_ffi.catalogue.requests import parse_request
from fi_ffi.errors import ArgumentError
from fi_ffi.loader.kernels import open_source
from fi_ffi.loader.uris import DTYPES, KINDS, ROWS, Number, Words, family_row
from fi_ffi.module_names import match, parse, pattern_of, refusal, row_pattern, uri
from fi_ffi_build.build import available
from fi_ffi_build.questions import question_of
from tools import gpu_kernels
from tools.release.described import generated_names
from tools.release.record import EVERY_ARCH

from tests.helpers.compiler import why_not_build

DATA = json.loads((Path(__file__).parent / "data" / "uris.json").read_text())
RELEASES = DATA["releases"]


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
    assert len(names) == 951
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
    if refusal(params):
        with pytest.raises(ArgumentError):
            uri(row.family, release=release, **params)
        return
    name = uri(row.family, release=release, **params)
    found = parse(name, release)
    assert (found.family, dict(found.params)) == (row.family, params)
    assert [other for other in ROWS if other.holds_for(release) and match(other, name)] == [row]


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


def test_keys_of_4_bits_have_a_name_in_every_release():
    given = {"dtype_q": "bf16", "head_dim_qk": 64}
    for release, word in (("0.6.10", "u8"), ("0.6.13", "u8"), ("0.7.2.post1", "fp4x2_e2m1")):
        for dtype in ("fp4", "u8", "uint8"):
            name = uri("batch_decode", release=release, dtype_kv=dtype, **given)
            assert f"_dtype_kv_{word}_" in name
    xqa = {"input_dtype": "bf16", "page_size": 16, "head_dim": 128, "head_group_ratio": 4}
    name = uri("xqa", release="0.7.0", kv_cache_dtype="fp4", use_sliding_window=False, **xqa)
    assert "_kv_cache_u8_" in name
    with pytest.raises(ArgumentError, match="argument `dtype_kv`: got 'fp4'"):
        uri("batch_decode", release="0.6.9", dtype_kv="fp4", **given)


@pytest.mark.parametrize("release", ["0.6.13", "0.6.18", "0.7.0", "0.7.2.post1"])
def test_modules_of_the_gpu_tests_in_each_release(release, capsys):
    """By the release's own names; what it has not is left out, and said."""
    found = [*gpu_kernels.names(gpu_kernels.PARTS, release)]
    assert len(found) == len({*found}) > 90
    assert all(parse(name, release) is not None for name in found)
    said = capsys.readouterr().err
    gone = f"left out: gdn_prefill_sm90: FlashInfer {release} has no such module"
    assert (gone in said) == ("gdn_prefill_sm90" not in found) == (release != "0.6.13")
    assert ("_planabi2" in " ".join(found)) == release.startswith("0.7")
    assert any("fp4x2" in name for name in found) == (release != "0.6.13")


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
    sized = uri("single_decode", release="0.6.13", dtype_q="f16", head_dim_qk=64)
    for size in ("0", "064", "-64", "²"):
        assert parse(sized.replace("_64_", f"_{size}_")) is None
    with pytest.raises(ArgumentError, match="argument `release`"):
        parse("norm", "x")


def test_a_name_of_another_release_is_read_without_one():
    name = uri("batch_mla", release="0.7.2.post1", dtype_q="f16")
    assert parse(name, "0.6.13") is None
    assert parse(name).releases == "from 0.7.0"


def test_every_template_has_a_pattern_without_groups_of_its_own():
    for kind in KINDS.values():
        assert "(" not in pattern_of(kind).replace("(?:", "").replace(r"\(", "")
    assert all(row_pattern(family_row(row.family, row.since or "0.6.3")) for row in ROWS)


# What an artifact has, and what is said of what it lacks.

HALF = {"dtype_q": "f16", "head_dim_qk": 128}


class Source:
    """A source that has names only: whoever opens a module fails."""

    location = "the wheel"
    distribution = ""

    def __init__(self, *names: str, version: str | None = "0.6.13+cu130") -> None:
        self.names, self.version = names, version

    def modules(self) -> list[str]:
        return sorted(self.names)

    def file(self, module: str):
        raise AssertionError(f"{module} was opened")


@pytest.fixture(scope="module")
def published() -> Source:
    """All that FlashInfer builds ahead of time of the default release."""
    return Source(*listed(DEFAULT_RELEASE), *DATA["listed_for_every_arch"])


def name(family: str, **params: object) -> str:
    return uri(family, release="0.6.13", **params)


def test_a_whole_artifact_without_opening_a_module(published):
    begun = time.process_time()
    modules = modules_of(published)
    assert time.process_time() - begun < 1  # it takes 30 ms
    assert len(modules) == 951
    assert all(module.parsed for module in modules.values())
    prefill = [module for module in modules.values() if module.family == "batch_prefill"]
    assert {module.parsed.backend for module in prefill} == {"fa2", "fa3"}
    assert {module.parsed.head_dims for module in prefill} >= {(64, 64), (192, 128), (256, 256)}
    assert modules["norm"].size is None


def test_a_real_wheel(built_wheel):
    source = open_source(built_wheel)
    modules = modules_of(source)
    assert {"norm", "page", "single_decode"} <= {module.family for module in modules.values()}
    (decode,) = [module for module in modules.values() if module.family == "single_decode"]
    assert decode.parsed.head_dims == (128, 128)
    assert set(decode.parsed.dtypes.values()) == {"f16"}
    assert modules["page"].size == source.file("page").path.stat().st_size


def test_a_directory_of_modules(tmp_path):
    for module in ("norm", "mine"):
        (tmp_path / module).mkdir()
        (tmp_path / module / f"{module}.so").write_bytes(b"12345")
    modules = modules_of(open_source(tmp_path))
    assert [(m.name, m.family, m.size) for m in modules.values()] == [
        ("mine", "mine", 5), ("norm", "norm", 5),
    ]  # fmt: skip
    assert modules["mine"].parsed is None


@pytest.mark.parametrize(
    ("family", "wanted", "expected"),
    [
        # Another head size is nearer than another dtype of all tensors.
        ("batch_prefill", {"dtype_q": "bf16", "head_dim_qk": 96, "backend": "fa3"},
         [{"dtype_q": "bf16", "head_dim_qk": size, "backend": "fa3"} for size in (128, 64)]),
        # Of the same size, the one compiled for what was asked.
        ("batch_prefill", {**HALF, "use_fp16_qk_reduction": True}, [HALF]),
        ("batch_decode", {**HALF, "dtype_kv": "e5m2"},
         [HALF | {"dtype_kv": "f16"}, HALF | {"dtype_kv": "e4m3"}]),
        ("batch_prefill_with_attention_sink", {**HALF, "backend": "fa3"},
         [{"dtype_q": "f16", "head_dim_qk": 64, "backend": "fa3"}]),
        ("batch_prefill", {"dtype_q": "e4m3", "dtype_o": "bf16", "head_dim_qk": 64,
                           "backend": "fa3"},
         [{"dtype_q": "e4m3", "dtype_o": "bf16", "head_dim_qk": 128, "backend": "fa3"}]),
    ],
)  # fmt: skip
def test_nearest(published, family, wanted, expected):
    found = nearest(published, name(family, **wanted), count=len(expected))
    assert {module.name for module in found} == {name(family, **params) for params in expected}


def test_nearest_of_names_without_parameters(published):
    assert nearest(published, "norn")[0].name == "norm"
    assert {m.name for m in nearest(published, "fused_moe_89")} <= {
        f"fused_moe_{arch}" for arch in ("90", "100", "103", "120")
    }


def test_what_is_missing_names_the_nearest_and_the_build_line(published):
    wanted = name("batch_prefill", dtype_q="bf16", head_dim_qk=96, backend="fa3")
    text = missing_module_message(published, wanted)
    assert text.startswith(f"the wheel has no module {wanted}; the nearest it has:\n")
    near = name("batch_prefill", dtype_q="bf16", head_dim_qk=128, backend="fa3")
    assert f"    {near} (head_dim 128x128, not 96x96)\n" in text
    assert build_advice(wanted, "0.6.13", "9.0a").startswith(
        f"`fi-ffi build --release 0.6.13 --arch 9.0a {wanted}` makes it"
    )
    # The line is one that the build understands: it calls a generator with what was read.
    assert question_of(parse_request(wanted), "0.6.13")["arguments"]["head_dim_qk"] == 96


def test_sources_with_little():
    assert (
        missing_module_message(Source(), "norm")
        == "the wheel has no module norm; it has none at all"
    )
    text = missing_module_message(Source("norm", "page"), name("single_decode", **HALF))
    assert text.endswith("; it has norm, page")
    many = Source(*(f"m{number}" for number in range(20)))
    assert missing_module_message(many, "gdn_prefill_sm90").endswith(" and 8 more")


def test_a_release_that_lacks_the_module():
    text = build_advice("gdn_prefill_sm90", "0.6.18")
    assert "FlashInfer 0.6.18 has no such module: the name is of a release before 0.6.14." in text
    assert "fi-ffi build" not in text


def test_a_name_of_another_release_is_translated():
    old, new = (
        uri("batch_prefill", release=release, **HALF) for release in ("0.6.13", "0.7.2.post1")
    )
    assert new != old
    assert f"0.6.13 calls it {old}" in build_advice(new, "0.6.13")
    # The old name is one of the new release as well, and is built under it.
    assert f"{old}` makes it" in build_advice(old, "0.7.2.post1")
    mla = uri("batch_mla", release="0.6.13", dtype_q="bf16", backend="fa3")
    assert "0.7.2.post1 calls it batch_mla_attention" in build_advice(mla, "0.7.2.post1")


def test_the_architecture_of_the_build_line():
    fa3 = name("batch_prefill", **HALF, backend="fa3")
    assert f"--arch 9.0a {fa3}`" in build_advice(fa3, "0.6.13")
    fa2 = name("batch_prefill", **HALF)
    assert build_advice(fa3, "0.6.13", "8.7") == (
        f"fa3 is for SM90 GPUs only; `fi-ffi build --release 0.6.13 --arch 8.7 {fa2}` "
        "makes its fa2 counterpart for 8.7."
    )
    assert "--arch 8.7 page`" in build_advice("page", "0.6.13", "8.7")
    assert "--arch 10.3a fused_moe_103`" in build_advice("fused_moe_103", "0.6.13", "9.0a")
    assert "--arch 9.0a gemm_sm90`" in build_advice("gemm_sm90", None, "8.0")
    assert "--arch 9.0a norm`" in build_advice("norm")


def test_what_cannot_be_built():
    text = build_advice(name("batch_decode_mla", dtype_q="f16"), "0.6.13")
    assert text.endswith("fi-ffi cannot build it.")
    assert "has no module of this name; `fi-ffi build --release 0.6.13 " in build_advice("x")


def test_every_build_line_of_a_listed_module_is_understood(published):
    for module in published.modules():
        line = build_advice(module, "0.6.13")
        assert line.endswith(f"{module}` makes it from FlashInfer's sources.")
        assert parse_request(module).exact
        assert parse(module, "0.6.13")


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
        request = question_of(parse_request(name), DEFAULT_RELEASE)
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
