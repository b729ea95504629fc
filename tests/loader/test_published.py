"""Libraries of other distributions: installed, pinned, and as the package index has them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

import fi_ffi
from fi_ffi.abi.signature import Signature
from fi_ffi.capability import judgement
from fi_ffi.cli import main
from fi_ffi.errors import AbiError, ArgumentError, ArtifactError, FetchError, KernelNotFoundError
from fi_ffi.loader import kernels, runtime, search
from fi_ffi.loader.fetch import published, wheels_lock
from fi_ffi.loader.permission import fetching, is_withheld
from fi_ffi.modules import files
from fi_ffi.ops.table import ROWS
from tools.published import CALLED, NOT_CALLED, SIGNATURES

from tests.gpu import test_published, test_published_comm
from tests.helpers import compiler
from tests.loader.server import File, Server, make_wheel, sha256

SOURCE = Path(__file__).with_name("own_module.cc")
INFO, FILE = "some_kernels-1.0.dist-info", "some_kernels-1.0-py3-none-any.whl"
PIN = """
[[distributions]]
name = "some-kernels"
version = "1.0"
platform = "{platform}"
file = "{file}"
sha256 = "{sha256}"
record-sha256 = "{record}"
size = {size}
license = "none"
provenance = "a test"
{more}
"""
LOCK = (
    'schema = 1\n[kernels]\ndefault = "1.2.3"\nurl = "https://nowhere.invalid/{release}/{file}"\n'
)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> bytes:
    return compiler.library(SOURCE, tmp_path_factory.mktemp("made") / "own.so").read_bytes()


@pytest.fixture(scope="module")
def wheel(library) -> bytes:
    """With a package that cannot be imported, a library, and a large file beside it."""
    return make_wheel(
        {
            "some_kernels/__init__.py": b"raise ImportError",
            "some_kernels/objs/own/own.so": library,
            "some_kernels/large.bin": os.urandom(4 << 20),
            f"{INFO}/METADATA": b"Metadata-Version: 2.1\nName: some-kernels\nVersion: 1.0\n",
            f"{INFO}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        },
        info=INFO,
    )


def lock_of(folder: Path, monkeypatch, wheel: bytes, **changes: str) -> Path:
    """Have this lock in use, which pins the wheel."""
    with zipfile.ZipFile(folder / FILE) as archive:
        record = sha256(archive.read(f"{INFO}/RECORD"))
    told = {
        "platform": wheels_lock.this_platform(), "file": FILE, "sha256": sha256(wheel),
        "record": record, "size": str(len(wheel)), "more": "",
    }  # fmt: skip
    path = folder / "wheels.lock"
    path.write_text(LOCK + PIN.format(**told | changes))
    monkeypatch.setenv("FI_FFI_LOCK", str(path))
    wheels_lock.the_lock.cache_clear()
    return path


@pytest.fixture
def folder(root, wheel, tmp_path, monkeypatch):
    """A folder with the wheel, which is all of pip's index, and a lock that pins it."""
    (tmp_path / FILE).write_bytes(wheel)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    lock_of(tmp_path, monkeypatch, wheel)
    yield tmp_path
    wheels_lock.the_lock.cache_clear()


def test_names_of_libraries():
    """By their files; as many folders as tell files of one name apart."""
    paths = ["p/a.so", "p/x/b.so", "p/y/b.so", "p/c.py", "q/x/b.so"]
    assert kernels.libraries_of(paths) == {
        "a": "p/a.so", "p/x/b": "p/x/b.so", "y/b": "p/y/b.so", "q/x/b": "q/x/b.so",
    }  # fmt: skip


def test_a_pinned_wheel_that_pip_finds(folder):
    """It is checked by the lock, and runs."""
    made = fi_ffi.module("own", distribution="some.Kernels")
    assert made.ask(made.make(), "seven") == 7
    assert made.path.is_relative_to(os.environ["FI_FFI_CACHE_DIR"])
    assert fi_ffi.module("own", distribution="some-kernels").path == made.path
    assert "some_kernels" not in sys.modules


def test_only_what_is_asked_for_is_fetched(folder, wheel, monkeypatch):
    """By ranges, once; and not where that is forbidden."""
    with Server({f"/{FILE}": File(wheel)}) as server:
        lock_of(folder, monkeypatch, wheel, more=f'url = "{server.url(f"/{FILE}")}"')
        monkeypatch.setenv("FI_FFI_OFFLINE", "1")
        with pytest.raises(FetchError, match="FI_FFI_OFFLINE=1"):
            fi_ffi.module("own", distribution="some-kernels")
        assert not server.seen
        monkeypatch.delenv("FI_FFI_OFFLINE")
        fi_ffi.module("own", distribution="some-kernels")
        assert 0 < server.sent < len(wheel) / 8
        monkeypatch.setenv("FI_FFI_OFFLINE", "1")
        count = len(server.seen)
        assert published.library_of("some-kernels", "own")[0].trust == "record-pinned"
        assert len(server.seen) == count


@pytest.mark.parametrize("what", ["sha256", "record"])
def test_another_wheel_than_the_pinned_one(folder, wheel, what, monkeypatch):
    lock_of(folder, monkeypatch, wheel, **{what: "0" * 64})
    with pytest.raises(ArtifactError, match=f"{FILE}.*sha256.*pinned is 000"):
        fi_ffi.module("own", distribution="some-kernels")


def test_pip_that_finds_nothing(folder):
    (folder / FILE).unlink()
    with pytest.raises(FetchError, match="pip does not say where some_kernels.*No matching"):
        fi_ffi.module("own", distribution="some-kernels")


def test_an_installed_one(folder, library, tmp_path, monkeypatch):
    """Before a pinned one, by its RECORD; one that was changed is refused."""
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-compile", "--target", str(site)]
    subprocess.run([*pip, "some-kernels"], check=True)
    monkeypatch.syspath_prepend(str(site))
    made = fi_ffi.module("own", distribution="some-kernels")
    assert made.ask(made.make(), "seven") == 7
    assert made.path == site / "some_kernels/objs/own/own.so"
    made.path.write_bytes(library + b" ")
    with pytest.raises(ArtifactError, match="own.so: sha256 is .*RECORD of the distribution has"):
        fi_ffi.module("own", distribution="some-kernels")
    assert "some_kernels" not in sys.modules


@pytest.mark.parametrize(
    ("name", "distribution", "words"),
    [("own", "some-kernel", "some-kernel is not installed.*nearest: some-kernels"),
     ("owns", "some-kernels", "some-kernels 1.0 has no library 'owns'; it has own")],
)  # fmt: skip
def test_what_is_not_there(folder, name, distribution, words):
    with pytest.raises(KernelNotFoundError, match=words):
        fi_ffi.module(name, distribution=distribution)


@pytest.mark.parametrize("wrong", ["", "a/b", "../x", "-x", 7])
def test_names_that_are_none(wrong):
    with pytest.raises(ArgumentError, match="argument `distribution`: got .*, expected"):
        fi_ffi.module("own", distribution=wrong)
    with pytest.raises(TypeError, match="argument `name`: got pathlib.PosixPath"):
        fi_ffi.module(Path("own"), distribution="some-kernels")


def test_a_pin_for_other_machines(folder, wheel, monkeypatch):
    lock_of(folder, monkeypatch, wheel, platform="plan9-mips")
    with pytest.raises(KernelNotFoundError, match="pinned for plan9-mips alone"):
        fi_ffi.module("own", distribution="some-kernels")


MAKE = Signature("make", (), "ffi.Module")
OWN = "some-kernels/own"


@pytest.fixture
def searched(folder, monkeypatch):
    """The folder of the pinned wheel; kernels are searched from the start."""
    for name in ("KERNELS", "SOURCES", "RELEASE"):
        monkeypatch.delenv(f"FI_FFI_{name}", raising=False)
    runtime.use_source(None)
    yield folder
    monkeypatch.undo()
    runtime.use_source(None)


def test_an_entry_of_a_distributions_library_is_attested(searched):
    """As FlashInfer's: by its signature, and by the distribution's version."""
    entry = runtime.kernel_entry(OWN, MAKE, ">=1.0")
    assert entry.name == "some-kernels/own.make"
    assert entry()
    words = r"some-kernels/own.make: .*\(some-kernels >=1.0\).*binary \(some-kernels 1.0\)"
    with pytest.raises(AbiError, match=f"(?s){words}"):
        runtime.kernel_entry(OWN, Signature("make", ("int",), "ffi.Module"), ">=1.0")
    words = "own is typed for some-kernels >=1.1,<2, and some-kernels 1.0 is of 1.0: `pip install"
    with pytest.raises(KernelNotFoundError, match=words):
        runtime.kernel_entry(OWN, Signature("make", (), "void"), ">=1.1,<2")


@pytest.mark.parametrize("named", ["folder", "wheel"])
def test_the_named_place_comes_first(searched, library, tmp_path, monkeypatch, named):
    """If it has a library of that name; it has no release of FlashInfer's."""
    place = searched / FILE
    if named == "folder":
        place = tmp_path / "objs"
        (place / "own").mkdir(parents=True)
        (place / "own" / "own.so").write_bytes(library)
    monkeypatch.setenv("FI_FFI_KERNELS", str(place))
    runtime.use_source(None)
    source, file, _ = search.find_module(OWN)
    assert source.location == str(place) and search.release() is None
    assert file.module == "own" and search.find_module("own")[1].path == file.path
    assert runtime.kernel_entry(OWN, MAKE, ">=1.0")()
    with pytest.raises(KernelNotFoundError, match="some-kernels 1.0 has no module other"):
        search.find_module("some-kernels/other")


def test_a_release_of_flashinfer_says_nothing_of_a_distribution(searched, built_wheel, monkeypatch):
    monkeypatch.setenv("FI_FFI_KERNELS", str(built_wheel))
    runtime.use_source(None)
    assert search.find_module(OWN)[0].location == "some-kernels 1.0"


def test_where_no_place_has_a_distribution(searched, monkeypatch):
    """What is missing is said, and how to get it; FI_FFI_SOURCES may leave a place out."""
    words = "no kernels of module 'some-kernel/own':.*not installed, and not pinned.*nearest: "
    advice = ".*`pip install --no-deps some-kernel` installs its libraries"
    with pytest.raises(KernelNotFoundError, match=f"(?s){words}some-kernels{advice}"):
        search.find_module("some-kernel/own")
    with fetching(False), pytest.raises(KernelNotFoundError, match="unasked") as raised:
        search.find_module(OWN)
    assert is_withheld(raised.value)
    monkeypatch.setenv("FI_FFI_SOURCES", "installed,local")
    with pytest.raises(KernelNotFoundError, match="leaves out `remote`, where some-kernels is"):
        search.find_module(OWN)


def test_a_row_has_the_signature_that_a_gpu_told():
    for row in ROWS:
        if row.distribution:
            record = files.recorded_as(f"{row.module.replace('/', ' 0.1.4: ')}")
            assert record["functions"][row.symbol] == files.as_recorded(row.signature), row.name


@pytest.mark.parametrize("name", sorted({row.name for row in ROWS if row.distribution}))
def test_supports(root, name, monkeypatch):
    """By what was recorded of the pinned wheel, whatever FlashInfer's release is."""
    monkeypatch.setenv("FI_FFI_OFFLINE", "1")
    wheels_lock.the_lock.cache_clear()
    ask = getattr(fi_ffi, name).supports
    module = getattr(fi_ffi, name).row.module
    for asked in ({"release": "0.6.3"}, {"cuda": "cu134"}, {"release": "0.7.2.post1"}):
        answer = ask(sm=90, **asked)
        assert answer and (answer.module, answer.release) == (module, "0.1.4")
        assert "compiled for sm_90a, sm_100a, sm_103a" in answer.reason
        assert "in the pinned wheel tokenspeed_kernel-0.1.4" in answer.reason
    refused = ask(sm=80, release="0.6.13")
    assert refused.status == "refused" and refused.build is None
    monkeypatch.setattr(judgement, "the_lock", lambda: wheels_lock.Lock(Path("none"), "0.6.13", ()))
    missing = ask(sm=90, release="0.6.13")
    assert missing.status == "missing"
    assert "`pip install --no-deps tokenspeed-kernel`" in missing.reason


def inspected(*arguments: object) -> str:
    result = CliRunner().invoke(main, ["inspect", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def test_inspect(folder, tmp_path, library):
    """A distribution's libraries and a wheel's, and why one cannot be called."""
    lines = inspected("some-kernels").splitlines()
    assert lines[0] == "some-kernels 1.0: 1 library"
    assert lines[2].split()[:2] == ["own", "2"] and lines[2].endswith("yes")
    source = tmp_path / "torch.c"
    source.write_text("int of_torch(void) { return 1; }")
    torch = compiler.library(source, tmp_path / "libtorch.so", "-Wl,-soname,libtorch.so")
    needing = compiler.library(SOURCE, tmp_path / "needing.so", "-Wl,--no-as-needed", str(torch))
    empty = compiler.library(source, tmp_path / "empty.so")
    extension = compiler.library(
        source, tmp_path / "extension.so", "-Wl,--no-as-needed", str(torch)
    )
    members = {f"a/{path.name}": path.read_bytes() for path in (needing, empty, extension)}
    (tmp_path / "a-1-py3-none-any.whl").write_bytes(make_wheel(members, info="a-1.dist-info"))
    found = json.loads(inspected(tmp_path / "a-1-py3-none-any.whl", "--json"))["libraries"]
    assert [*found["needing"]["functions"]] == ["ask", "make"]
    text = inspected(tmp_path / "a-1-py3-none-any.whl")
    assert "no: it links libtorch.so" in text
    why = {line.split()[0]: line.partition("no: ")[2] for line in text.splitlines()}
    assert why["empty"] == "it exports no function of TVM-FFI"
    assert why["extension"] == "it exports no function of TVM-FFI and links libtorch.so"


def test_tokenspeed_kernel(root):
    """From the index, in ranges: its smallest library, whose signature an H100 has told."""
    wheels_lock.the_lock.cache_clear()
    try:
        source, file = published.library_of("tokenspeed-kernel", "silu_fuse_nvfp4_quant")
    except FetchError as error:
        pytest.skip(f"no network, or no such wheel on the index: {error}")
    assert isinstance(source, published.PinnedLibraries)
    assert len(source.modules()) == 19
    for name in source.modules():
        assert files.recorded(source.sha256_of(name))["library"].endswith(f": {name}")
    assert file.path.stat().st_size == 131_168
    fetched = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    assert fetched < 1 << 20
    document = json.loads(inspected(file.path, "--json"))
    assert [*document["functions"]] == ["silu_and_mul_fuse_nvfp4_quant"]
    (signature,) = document["functions"].values()
    assert signature == "(DLTensor*, DLTensor*, DLTensor*, DLTensor*, bool) -> void"
    told = CliRunner().invoke(main, ["fetch", "fused_topk_topp_renorm", "--quiet", "--json"])
    assert told.exit_code == 0, told.output
    (put,) = json.loads(told.output)["modules"]
    assert (put["status"], put["size"]) == ("fetched", 760_728)
    asked = ["doctor", "fused_topk_topp_renorm", "--sm", "90", "--json"]
    (told,) = json.loads(CliRunner().invoke(main, asked).output)
    assert told["works"] and told["is_here"] and "entry attested" in told["reason"]


def test_every_entry_has_a_gpu_test_or_a_reason():
    every = [name for functions in SIGNATURES.values() for name in functions]
    assert sorted(every) == sorted([*CALLED, *NOT_CALLED]) and len(every) == 51
    assert len(CALLED) >= 35
    assert {*CALLED.values()} <= {*vars(test_published), *vars(test_published_comm)}
