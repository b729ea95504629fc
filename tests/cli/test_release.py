"""`python3 -m tools.release`: two small releases that differ as known, and two published ones."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from fi_ffi.abi.signature import Signature
from fi_ffi.catalogue.ahead_of_time import sha256_of
from fi_ffi.errors import ArgumentError, ArtifactError, BuildError, FetchError
from fi_ffi.loader import cache
from tools.release import Function, command, record
from tools.release.command import main
from tools.release.compare import changes
from tools.release.declared import ABSENT, DIFFERS, FITS, GONE, UNCOVERED, declared
from tools.release.wheels import open_release, published

from tests.helpers import sampling

ROOT = Path(__file__).parents[2]
HASHES = "0123456789abcdef0", "123456789abcdef01", "23456789abcdef012"
PAGE = """
#include "tvm_ffi_utils.h"
using tvm::ffi::Tensor;
void append_paged_mla_kv_cache(TensorView append_ckv, TensorView append_kpe,
                               TensorView batch_indices, TensorView positions,
                               TensorView ckv_cache, TensorView kpe_cache, TensorView kv_indices,
                               TensorView kv_indptr, {more}TensorView kv_last_page_len);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(append_paged_mla_kv_cache, append_paged_mla_kv_cache);
"""
# An entry that nobody has a row of, of which everything changes that can.
PLAIN = """
// TVM_FFI_DLL_EXPORT_TYPED_FUNC is no export here.
{result} mix({parameters}) {{ }}
void kept(TensorView x) {{ }}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(mix, mix);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kept, kept);
"""
EXPORT = "void {0}(TensorView x) {{ }}\nTVM_FFI_DLL_EXPORT_TYPED_FUNC({0}, {0});\n"
GENERATED = "void Run(TensorView x{0}) {{ }}\nTVM_FFI_DLL_EXPORT_TYPED_FUNC(run, Run);\n"
DECODE = """
void Decode(TensorView q, TensorView k, TensorView v, TensorView tmp, TensorView o,
            Optional<TensorView> maybe_lse, int64_t layout,
            int64_t window_left ADDITIONAL_FUNC_PARAMS);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(run, Decode);
"""
MODULES = """
def gen_single_decode_module(dtype_q{parameter}):
    uri = get_single_decode_uri(dtype_q)
    tensors = ["maybe_alibi_slopes"]
    kinds = ["float"]
    numbers = ["logits_soft_cap", "sm_scale", "rope_rcp_scale", "rope_rcp_theta"{more}]
    types = ["double", "double", "double", "double"{type}]
    return gen_customize_single_decode_module(uri, dtype_q, tensors, kinds, numbers, types)


def get_single_decode_uri(dtype_q):
    return f"single_decode_{{dtype_q}}{suffix}"
"""
ACTIVATION = '''
template = r"""
{{% set func_name = act_func_name ~ '_and_mul' %}}
void {{{{ func_name }}}}(TensorView out, TensorView input, bool enable_pdl) {{ }}
TVM_FFI_DLL_EXPORT_TYPED_FUNC({{{{ func_name }}}}, {{{{ func_name }}}});
"""
functions = {{
    "silu": silu_text,{more}
}}
'''
OLD = {
    "data/csrc/flashinfer_page_binding.cu": PAGE.format(more=""),
    "data/csrc/plain.cu": PLAIN.format(
        result="void", parameters="TensorView a, int64_t b, double c, bool d"
    ),
    "data/csrc/went.cu": EXPORT.format("went"),
    "data/csrc/here.cu": EXPORT.format("moves"),
    f"data/csrc/made/k_{HASHES[0]}.cu": GENERATED.format(""),
    f"data/csrc/made/k_{HASHES[1]}.cu": GENERATED.format(", int64_t n"),
    "data/csrc/single_decode_jit_binding.cu": DECODE,
    "jit/attention/modules.py": MODULES.format(parameter="", more="", type="", suffix=""),
    "jit/activation.py": ACTIVATION.format(more=""),
    "jit/old.py": 'def gen_old_module():\n    return gen_jit_spec("old", [])\n',
}
NEW = {
    "data/csrc/flashinfer_page_binding.cu": PAGE.format(more="int64_t page_size, "),
    "data/csrc/plain.cu": PLAIN.format(
        result="int64_t", parameters="TensorView alpha, Optional<int64_t> b, bool d, double e"
    ),
    "data/csrc/there.cu": EXPORT.format("moves"),
    "data/csrc/unclear.cu": "TVM_FFI_DLL_EXPORT_TYPED_FUNC(unclear, nowhere);\n",
    f"data/csrc/made/k_{HASHES[0]}.cu": GENERATED.format(""),
    f"data/csrc/made/k_{HASHES[2]}.cu": GENERATED.format(", double n"),
    "data/csrc/single_decode_jit_binding.cu": DECODE,
    "jit/attention/modules.py": MODULES.format(
        parameter=", stride", more=', "v_scale"', type=', "double"', suffix="_abi2"
    ),
    "jit/activation.py": ACTIVATION.format(more='\n    "gelu": gelu_text,'),
    "jit/new.py": 'def gen_new_module(arch):\n    return gen_jit_spec(f"new_{arch}", [])\n',
}
EXPECTED = """\
FlashInfer 0.6.13 -> 0.6.13.post1

Signatures that changed (3)
---------------------------
append_paged_mla_kv_cache [csrc/flashinfer_page_binding.cu]: 9 -> 10 parameters
    +8 page_size: int
mix [csrc/plain.cu]: 4 -> 4 parameters
    renamed 0 a: DLTensor* => alpha: DLTensor*
    retyped 1 b: int => b: Optional<int>
    -2 c: float
    +3 e: float
    result -> void => int
run [csrc/single_decode_jit_binding.cu, single_decode]: 13 -> 14 parameters
    +13 v_scale: float

Exports that moved (1)
----------------------
moves [csrc/here.cu] -> moves [csrc/there.cu]

Exports of generated sources that changed (1)
---------------------------------------------
run [csrc/made/k_*.cu]: 2 -> 2 signatures

Exports that went (1)
---------------------
csrc/went.cu: went

Exports that came (2)
---------------------
csrc/unclear.cu: unclear
jit/activation.py: gelu_and_mul

Exports of both without a row here (3)
--------------------------------------
csrc/made/k_*.cu: run
csrc/plain.cu: kept, mix

Modules (0 families)
--------------------

Generators
----------
went: flashinfer.jit.old:gen_old_module makes old
came: flashinfer.jit.new:gen_new_module makes new_{arch}
changed: flashinfer.jit.attention.modules:gen_single_decode_module, of single_decode
    parameters +stride
changed: flashinfer.jit.attention.modules:get_single_decode_uri, of single_decode
    names single_decode_{dtype_q} -> single_decode_{dtype_q}_abi2

Exports whose parameters cannot be read (1)
-------------------------------------------
0.6.13.post1: unclear [csrc/unclear.cu]: unclear is exported and not declared
"""
ROWS = {
    "append_paged_mla_kv_cache: fits -> differs": ["+8 page_size: int"],
    "single_decode.run: fits -> differs": ["+13 v_scale: float"],
    "gelu_and_mul: gone -> fits": [],
}


TARGETS = """
def detect_sm_capabilities():
    return {
        "sm90": has_sm("compute_90", "12.3"),
        "sm107": has_sm(
            'compute_107', "12.9"
        ),
        "sm100": has_sm("compute_100", "12.8") or has_sm("compute_90", "12.3"),
    }  # not has_sms("compute_13")
"""


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FI_FFI_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def wheels(tmp_path, own_cache):
    """The two releases' wheels."""
    return [
        wheel(tmp_path, "0.6.13", OLD),
        wheel(tmp_path, "0.6.13.post1", NEW | {"aot.py": TARGETS}),
    ]


def wheel(folder: Path, release: str, files: dict[str, str]) -> str:
    path = folder / f"flashinfer_python-{release}-py3-none-any.whl"
    info = f"flashinfer_python-{release}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: flashinfer-python\nVersion: {release}\n"
    tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(f"flashinfer/{name}", text)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", tags)
        archive.writestr(f"{info}/RECORD", "")
    return str(path)


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code, result.output
    return result.output


def test_two_releases_of_a_known_difference(wheels):
    output = run("diff", *wheels, code=1)
    summary, rows = output.split("\n\n")[1:3]
    assert output.replace(f"{summary}\n\n{rows}\n\n", "") == EXPECTED
    old, new, both = summary.splitlines()
    assert old.startswith("0.6.13: 6 names exported in 7 files of csrc, 8 entries; of ")
    assert new.startswith("0.6.13.post1: 6 names exported in 7 files of csrc, 8 entries; of ")
    assert both.startswith(
        "6 entries in both, 3 of them with other parameters; 2 came, 1 went, 1 moved; "
    )
    found: dict[str, list[str]] = {}
    last = ""
    for line in rows.splitlines()[2:]:
        if line.startswith("    "):
            found[last].append(line.strip())
        else:
            last = line.partition("  [")[0]
            found[last] = []
    gone = {line for line in found if line.endswith(": gone -> gone")}
    assert {line: found[line] for line in found if line not in gone} == ROWS
    # All other entries that a row is of, which neither of the two small releases has.
    named = {line.partition(": ")[0] for line in found}
    rest = [entry.name for entry in declared() if entry.form("0.6.13")]
    assert sorted({*rest} - named) == ["silu_and_mul"]
    assert len(gone) == len({*rest}) - 4


@pytest.mark.parametrize("options", [[], ["--json"]])
@pytest.mark.parametrize("releases", [*itertools.product(("0.5.0", "0.6.13"), repeat=2)])
def test_a_binding_that_is_gone_in_either_release_ends_with_1(
    releases, options, tmp_path, own_cache
):
    """No row claims 0.5.0; of 0.6.13 these sources have almost nothing."""
    files = {"data/csrc/plain.cu": OLD["data/csrc/plain.cu"]}
    named = [wheel(tmp_path, release, files) for release in releases]
    run("diff", *named, *options, code=int("0.6.13" in releases))


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize(
    ("answer", "code"), [(FITS, 0), (ABSENT, 0), (UNCOVERED, 0), (DIFFERS, 1), (GONE, 1)]
)
def test_one_wrong_row_of_either_release_ends_with_1(answer, code, place, wheels, monkeypatch):
    entry, *_ = declared()

    def row(before: str = FITS, after: str = FITS) -> command.Touched:
        return command.Touched(entry, before, after, (), (">=0.6.3",), "")

    monkeypatch.setattr(command, "touched", lambda old, new: [row(), row(**{place: answer}), row()])
    run("diff", *wheels, code=code)


def test_json_has_what_the_text_has(wheels):
    document = json.loads(run("diff", *wheels, "--json", code=1))
    (mix,) = (each for each in document["changed"] if each["name"] == "mix")
    assert mix["old"] == {
        "params": [["a", "DLTensor*"], ["b", "int"], ["c", "float"], ["d", "bool"]],
        "result": "void",
    }
    assert [(c["kind"], c["old"], c["new"]) for c in mix["changes"]] == [
        ("renamed", 0, 0), ("retyped", 1, 1), ("removed", 2, None), ("added", None, 3),
        ("result", None, None),
    ]  # fmt: skip
    (row,) = (each for each in document["rows"] if each["name"] == "append_paged_mla_kv_cache")
    assert (row["before"], row["after"], row["touched"]) == ("fits", "differs", True)
    assert [m["new"]["source"] for m in document["moved"]] == ["csrc/there.cu"]
    assert [g["name"] for g in document["gone"]] == ["went"]
    assert {g["name"] for g in document["came"]} == {"unclear", "gelu_and_mul"}
    assert document["generators"]["changed"].keys() == {
        "flashinfer.jit.attention.modules:gen_single_decode_module",
        "flashinfer.jit.attention.modules:get_single_decode_uri",
    }
    without = {(key["source"], key["name"]) for key in document["without_row"]}
    assert ("csrc/plain.cu", "kept") in without
    assert not any(source == "jit/activation.py" for source, _ in without)


def test_what_was_read_is_kept(wheels):
    first = open_release(wheels[0])
    fresh = first.interface()
    (note,) = (cache.cache_root() / "sources").glob("*.json")
    text = note.read_text()
    assert open_release(wheels[0]).interface() == fresh
    # What another reader kept is read again.
    note.write_text(text.replace('"reader": "', '"reader": "x').replace("append_ckv", "other"))
    assert open_release(wheels[0]).interface() == fresh
    assert note.read_text() == text


def test_releases_come_from_where_pip_is_told(wheels, monkeypatch):
    """Here from a folder: once, and then out of the cache."""
    folder = Path(wheels[0]).parent
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    sha256 = hashlib.sha256(Path(wheels[1]).read_bytes()).hexdigest()
    monkeypatch.setenv("FI_FFI_OFFLINE", "1")
    with pytest.raises(FetchError, match=r"flashinfer-python 0.6.13.post1"):
        open_release("0.6.13.post1")
    monkeypatch.delenv("FI_FFI_OFFLINE")
    assert published() == ("0.6.13", "0.6.13.post1")
    first = open_release("0.6.13.post1")
    assert (first.release, first.sha256) == ("0.6.13.post1", sha256)
    assert first.path.is_relative_to(cache.cache_root())
    assert first.interface() == open_release(wheels[1]).interface()
    # That of a release that is recorded has to be the recorded file.
    with pytest.raises(ArtifactError, match=f"recorded is {sha256_of('0.6.13')}"):
        open_release("0.6.13")
    with pytest.raises(BuildError, match=r"looking for flashinfer-python 0.9 failed:\nERROR"):
        open_release("0.9")
    for wheel in wheels:
        Path(wheel).unlink()
    monkeypatch.setenv("FI_FFI_OFFLINE", "1")
    assert open_release("0.6.13.post1") == first
    monkeypatch.delenv("FI_FFI_OFFLINE")
    with pytest.raises(BuildError, match="listing the releases failed"):
        published()


CHANGES = {
    "nothing": ("a:int b:float", "a:int b:float", []),
    "the last": ("a:int", "a:int b:float", ["+1 b: float"]),
    "the first": ("a:int b:int", "b:int", ["-0 a: int"]),
    "the type": ("a:int b:int", "a:int b:float", ["retyped 1 b: int => b: float"]),
    "the type, further back": (
        "a:int b:int", "n:bool a:int b:float", ["+0 n: bool", "retyped 1>2 b: int => b: float"],
    ),
    "the name": ("a:int b:int", "a:int c:int", ["renamed 1 b: int => c: int"]),
    "name and type": ("a:int b:int", "a:int c:float", ["-1 b: int", "+1 c: float"]),
    "the order": ("a:int b:float", "b:float a:int", ["+0 b: float", "-1 b: float"]),
    "more for less": (
        "a:int x:int z:int", "a:int p:int q:int z:int", ["-1 x: int", "+1 p: int", "+2 q: int"],
    ),
}  # fmt: skip


def function(text: str) -> Function:
    pairs = [word.split(":") for word in text.split()]
    return Function(Signature("f", tuple(t for _, t in pairs)), tuple(n for n, _ in pairs))


@pytest.mark.parametrize("case", CHANGES)
def test_changes(case):
    old, new, expected = CHANGES[case]
    assert [*map(str, changes(function(old), function(new)))] == expected


def test_bad_input(tmp_path, own_cache):
    other = tmp_path / "norm-1.0-py3-none-any.whl"
    other.touch()
    absent = tmp_path / "flashinfer_python-0.6.13-py3-none-any.whl"
    for name in (str(other), str(absent), str(tmp_path / "x.whl")):
        with pytest.raises(ArgumentError, match="expected a release such as 0.6.13, or the path"):
            open_release(name)
    with pytest.raises(ArgumentError, match="expected a version such as"):
        open_release("latest")
    absent.write_bytes(b"no zip")
    with pytest.raises(ArtifactError, match="is not a readable wheel"):
        open_release(str(absent)).interface()


@pytest.fixture
def checkout(tmp_path):
    """A folder with the records of this checkout."""
    root = tmp_path / "checkout"
    for name in (record.RELEASES, record.MODULES, record.NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    return root


def test_a_release_is_recorded(wheels, checkout):
    path = checkout / record.RELEASES
    before = json.loads(path.read_text())["releases"]
    asked = ("record", wheels[1], "--to", str(checkout))
    assert run(*asked, "--check", code=1).endswith(f"{path}: stale\n")
    assert json.loads(path.read_text())["releases"] == before
    assert run(*asked).endswith(f"{path}: written\n")
    after = json.loads(path.read_text())["releases"]
    sha256 = hashlib.sha256(Path(wheels[1]).read_bytes()).hexdigest()
    made = {"sha256": sha256, "names": 6, "files": 7, "entries": 8, "gpus": [90, 100, 107]}
    assert after == before | {"0.6.13.post1": made}
    assert [*after][17:20] == ["0.6.12", "0.6.13", "0.6.13.post1"]
    assert "written" not in run(*asked) and "stale" not in run(*asked, "--check")
    result = CliRunner().invoke(main, ["record", "0.6.13", "--to", str(checkout / "x")])
    assert result.exit_code == 2 and "expected a checkout of the repository" in result.output
    text = run("record", wheels[0], "--to", str(checkout), code=1)
    assert "aot.py asks for no GPU, so its list cannot be read" in text


def test_what_is_recorded_is_written_alike():
    """Reading a record and writing it changes nothing; of a release, only its part is replaced."""
    modules = json.loads((ROOT / record.MODULES).read_text())
    again = record.with_modules(modules, {})
    assert record.text_of_groups(again | {"about": modules["about"]}) == (
        ROOT / record.MODULES
    ).read_text()  # fmt: skip
    flags = {"cflags": [], "cuda_cflags": ["-gencode=arch=compute_90a,code=sm_90a"], "sources": []}
    answer = {"modules": [{"name": "norm", **flags}], "unavailable": {}, "architectures": []}
    fresh = record.with_modules(modules, {"0.6.12": answer})
    about = {"architectures": record.EVERY_ARCH, "count": 1, "unknown": []}
    assert fresh["releases"]["0.6.12"] == about
    of_it = [group for group in fresh["groups"] if "0.6.12" in group["releases"]]
    assert of_it == [{"family": "norm", "compiled_for": "sm90a", "releases": ["0.6.12"]}]
    rest = [
        g | {"releases": [r for r in g["releases"] if r != "0.6.12"]} for g in modules["groups"]
    ]
    assert [g for g in fresh["groups"] if g not in of_it] == [g for g in rest if g["releases"]]
    names = json.loads((ROOT / record.NAMES).read_text())
    assert record.text_of_names(names) == (ROOT / record.NAMES).read_text()


def test_the_real_pair():
    """FlashInfer 0.6.13 and 0.7.2.post1: counts of what is in the wheels, and of what changed."""
    sampling.only_in_full("downloads FlashInfer's releases")
    document = json.loads(run("diff", "0.6.13", "0.7.2.post1", "--json"))
    assert (document["old"]["names"], document["old"]["files"]) == (186, 78)
    assert (document["new"]["names"], document["new"]["files"]) == (477, 1078)
    assert document["common"] == 238 and len(document["changed"]) == 50
    assert [(g["source"], g["name"]) for g in document["gone"]] == [
        ("csrc/gdn_prefill_launcher.cu", "gdn_prefill")
    ]
    counts = {
        (each["source"], each["name"]): tuple(len(each[of]["params"]) for of in ("old", "new"))
        for each in document["changed"]
    }
    assert counts["csrc/batch_mla_binding.cu", "run"] == (15, 18)
    assert counts["csrc/batch_mla_sm90_binding.cu", "run"] == (15, 18)
    assert counts["csrc/flashinfer_gemm_binding.cu", "bmm_fp8"] == (7, 6)
    (plan,) = (
        each for each in document["changed"]
        if (each["source"], each["name"]) == ("csrc/batch_mla_binding.cu", "plan")
    )  # fmt: skip
    assert [c["after"] for c in plan["changes"]] == ["Tuple<Array<int>, int>"]
    wrong = [row["name"] for row in document["rows"] if GONE in (row["before"], row["after"])]
    assert not wrong and len(document["rows"]) > 120


UNREADABLE = {
    "a wrong line": ("x = 1\ndef gen_a(:\n", "line 2: invalid syntax"),
    "a zero byte": ("x = 1\0\n", "null byte"),
    "parentheses": ("x = " + "(" * 1000, "line 1: too many nested parentheses"),
    "negations": ("x = " + "-" * 100_000 + "1", "nested too deeply"),
    "a sum": ("x = " + "1+" * 100_000 + "1", "nested too deeply"),
    "branches": (
        "\ndef gen_pod_module(backend):\n if backend == 'a': pass\n"
        + " elif backend == 'b': pass\n" * 400 + " return f([], [], [], [])\n", "",
    ),
    "a condition": (
        "\ndef gen_pod_module(backend):\n    if is_new(backend):\n        pass\n",
        r"line 3: whether is_new\(backend\) holds is unknown",
    ),
    "no lists": (
        "\ndef gen_pod_module(backend):\n    return f(1)\n",
        "line 2: gen_pod_module passes no lists",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", UNREADABLE)
def test_python_that_cannot_be_read_is_named(what, tmp_path, own_cache):
    text, match = UNREADABLE[what]
    binding = "csrc/pod_jit_binding.cu"
    files = {"jit/attention/modules.py": text, f"data/{binding}": EXPORT.format("run")}
    path = wheel(tmp_path, "0.6.13", files)
    if not match:
        assert open_release(path).interface().of(binding, "pod", "run")
        return
    where = "0.6.13-py3-none-any.whl: jit/attention/modules.py: "
    with pytest.raises(BuildError, match=where + ".*" + match):
        open_release(path).interface()
    output = run("diff", path, path, code=1)
    assert "jit/attention/modules.py" in output.replace("\n", "") and "Traceback" not in output


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("#endif\n", "line 1, #endif: no conditional is open"),
        ("/* a\nb */\n#if " + "(" * 60 + "1\n#endif\n", "line 3, #if: .* nested more than 50 deep"),
        ('int x; \\\n\n#include "a.inc"\n', r"a\.inc, line 1, #include: \.inc files nest"),
        ("class A : public ModuleObj { };\n", "the class A has no GetFunction"),
        ("class A : public ModuleObj { GetFunction() { } };\n", "no method of the class A"),
    ],
)
def test_cpp_that_cannot_be_read_is_named(text, reason, tmp_path, own_cache):
    files = {
        "data/csrc/a.cu": text + EXPORT.format("f"), "data/csrc/a.inc": '#include "a.inc"\n',
        "data/csrc/b.cu": EXPORT.format("g"),
    }  # fmt: skip
    found = open_release(wheel(tmp_path, "0.6.13", files)).interface()
    ((key, why),) = found.unread.items()
    assert key == ("csrc/a.cu", "", "f") and re.fullmatch(f"csrc/a.cu: .*{reason}.*", why)
    assert [key.name for key in found.exports] == ["g"]


def test_a_release_that_is_no_file(tmp_path):
    """A pipe is not waited for."""
    path = tmp_path / "flashinfer_python-0.6.13-py3-none-any.whl"
    os.mkfifo(path)
    with pytest.raises(ArgumentError, match=r"the path of a wheel"):
        open_release(str(path))
