"""What an artifact has, and what is said of what it lacks."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest

from fi_ffi.errors import KernelNotFoundError
from fi_ffi.loader.building.names import parse_request
from fi_ffi.loader.catalogue import Catalogue, build_advice, explain_missing, without
from fi_ffi.loader.kernels import open_source
from fi_ffi.loader.uris import parse, uri

DATA = json.loads((Path(__file__).parent / "data" / "uris.json").read_text())
HALF = {"dtype_q": "f16", "head_dim_qk": 128}


class Source:
    """A source that has names only: whoever opens a module fails."""

    location = "the wheel"

    def __init__(self, *names: str, version: str | None = "0.6.13+cu130") -> None:
        self.names, self.version = names, version

    def modules(self) -> list[str]:
        return sorted(self.names)

    def file(self, module: str):
        raise AssertionError(f"{module} was opened")


@pytest.fixture(scope="module")
def published() -> Source:
    """All that FlashInfer builds ahead of time of the default release."""
    lists = [names for key, names in DATA["listed"].items() if "0.6.13" in key.split()]
    return Source(*itertools.chain(*lists), *DATA["listed_for_every_arch"])


def name(family: str, **params: object) -> str:
    return uri(family, release="0.6.13", **params)


def test_a_whole_artifact_without_opening_a_module(published):
    begun = time.perf_counter()
    catalogue = Catalogue.of(published)
    assert time.perf_counter() - begun < 1  # it takes 30 ms
    assert (len(catalogue), catalogue.release) == (950, "0.6.13")
    assert all(module.parsed for module in catalogue)
    prefill = catalogue.family("batch_prefill")
    assert {module.parsed.backend for module in prefill} == {"fa2", "fa3"}
    assert {module.parsed.head_dims for module in prefill} >= {(64, 64), (192, 128), (256, 256)}
    assert "norm" in catalogue
    assert catalogue.modules["norm"].size is None


def test_a_real_wheel(built_wheel):
    catalogue = Catalogue.of(open_source(built_wheel))
    assert {"norm", "page", "single_decode"} <= {module.family for module in catalogue}
    assert "rmsnorm" in catalogue.entries("norm")
    assert "append_paged_kv_cache" in catalogue.entries("page")
    assert [code.name for code in catalogue.architectures("page")] == ["sm_90a"]
    (decode,) = catalogue.family("single_decode")
    assert decode.parsed.head_dims == (128, 128)
    assert set(decode.parsed.dtypes.values()) == {"f16"}
    file = open_source(built_wheel).file("page").path
    assert catalogue.modules["page"].size == file.stat().st_size


def test_a_directory_of_modules(tmp_path):
    for module in ("norm", "mine"):
        (tmp_path / module).mkdir()
        (tmp_path / module / f"{module}.so").write_bytes(b"12345")
    catalogue = Catalogue.of(open_source(tmp_path))
    assert [(m.name, m.family, m.size) for m in catalogue] == [
        ("mine", "mine", 5), ("norm", "norm", 5),
    ]  # fmt: skip
    assert catalogue.modules["mine"].parsed is None


@pytest.mark.parametrize(
    ("family", "wanted", "nearest"),
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
def test_nearest(published, family, wanted, nearest):
    found = Catalogue.of(published).nearest(name(family, **wanted), count=len(nearest))
    assert {module.name for module in found} == {name(family, **params) for params in nearest}


def test_nearest_of_names_without_parameters(published):
    catalogue = Catalogue.of(published)
    assert catalogue.nearest("norn")[0].name == "norm"
    assert {m.name for m in catalogue.nearest("fused_moe_89")} <= {
        f"fused_moe_{arch}" for arch in ("90", "100", "103", "120")
    }


def test_missing_names_the_nearest_and_the_build_line(published):
    wanted = name("batch_prefill", dtype_q="bf16", head_dim_qk=96, backend="fa3")
    error = Catalogue.of(published).missing(wanted, arch="9.0a")
    assert isinstance(error, KernelNotFoundError)
    text = str(error)
    assert text.startswith(f"the wheel has no module {wanted}; the nearest it has:\n")
    near = name("batch_prefill", dtype_q="bf16", head_dim_qk=128, backend="fa3")
    assert f"    {near} (head_dim 128x128, not 96x96)\n" in text
    assert f"`fi-ffi build --release 0.6.13 --arch 9.0a {wanted}` makes it" in text
    # The line is one that the build understands: it calls a generator with what was read.
    assert parse_request(wanted).as_json("0.6.13")["arguments"]["head_dim_qk"] == 96


def test_what_cannot_be_opened_is_missing(published):
    with pytest.raises(KernelNotFoundError, match="has no module norn; the nearest"):
        Catalogue.of(published).entries("norn")


def test_sources_with_little():
    assert without(Source(), "norm") == "the wheel has no module norm; it has none at all"
    text = without(Source("norm", "page"), name("single_decode", **HALF))
    assert text.endswith("; it has norm, page")
    many = Source(*(f"m{number}" for number in range(20)))
    assert without(many, "gdn_prefill_sm90").endswith(" and 8 more")


def test_a_release_that_lacks_the_module():
    text = explain_missing(Source("norm", version="0.6.18"), "gdn_prefill_sm90")
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
