"""The package as users get it: built, installed where nothing else is, typed, and removed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import sampling
from tests.helpers.stress_strength import LONG

# Megabytes; docs/testing.md promises these.
MOST_DOWNLOADED, MOST_INSTALLED = 50, 180

ROOT = Path(__file__).parents[2]
MINORS = (10, 11, 12, 13)
_BUILD = """
import sys, hatchling.build as hook
print(getattr(hook, "build_" + sys.argv[1])(sys.argv[2]))
"""


def run(*command, cwd=None, **environment):
    """What a command prints; with what it said where it fails."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FI_FFI_", "PYTHON"))}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**clean, **environment},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.strip()


def build(kind, source, folder, backend):
    """As a build frontend does it, in a process of its own: "sdist" or "wheel"."""
    name = run(sys.executable, "-c", _BUILD, kind, folder, cwd=source, PYTHONPATH=str(backend))
    return folder / name.splitlines()[-1]


def source_tree(folder):
    """What a checkout has, without what others leave in it."""
    kept = ["fi_ffi", "tests", "examples", "docs", "tools"]
    for name in kept:
        ignore = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE", "SECURITY.md", "wheels.lock"):
        shutil.copy(ROOT / name, folder)
    return folder


def megabytes(size):
    return round(size / 1e6, 1)


@dataclass(frozen=True)
class Bare:
    """A virtual environment with pip in it, and a home of its own."""

    root: Path

    @property
    def python(self):
        return self.root / "venv" / "bin" / "python"

    @property
    def site(self):
        return next((self.root / "venv").glob("lib/python3.*/site-packages"))

    @property
    def command(self):
        return self.python.with_name("fi-ffi")

    @property
    def environment(self):
        return {"HOME": str(self.root / "home"), "XDG_CACHE_HOME": str(self.root / "cache")}

    @classmethod
    def make(cls, root, python):
        sampling.only_in_full("installs from the package index")
        # Not of a virtual environment: the new one would have its packages' parent.
        base = run(python, "-c", "import sys; print(sys._base_executable)")
        run(base, "-m", "venv", root / "venv")
        (root / "home").mkdir()
        return cls(root)

    def __call__(self, *arguments):
        """Run this environment's Python."""
        return run(self.python, *arguments, cwd=self.root / "home", **self.environment)

    def install(self, wheel):
        """Megabytes downloaded for each package; it is installed from these files alone."""
        files = self.root / "files"
        self("-m", "pip", "download", "-q", "--dest", files, wheel)
        offline = ("--no-index", "--find-links", files, "--no-compile")
        self("-m", "pip", "install", "-q", *offline, wheel)
        sizes = {path.name.partition("-")[0]: path.stat().st_size for path in files.iterdir()}
        shutil.rmtree(files)
        return {name: megabytes(sizes[name]) for name in sorted(sizes, key=lambda n: -sizes[n])}

    def files(self):
        """Every file of the environment, without bytecode."""
        return {
            str(path.relative_to(self.root))
            for path in self.root.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }

    def sizes(self):
        """Megabytes that each installed distribution takes, without bytecode."""
        program = (
            "import importlib.metadata as m\n"
            "for d in m.distributions():\n"
            "    files = [d.locate_file(f) for f in d.files or () if f.suffix != '.pyc']\n"
            "    print(d.name, sum(f.stat().st_size for f in files if f.is_file()))\n"
        )
        pairs = [line.split() for line in self("-c", program).splitlines()]
        return {
            name: megabytes(int(size)) for name, size in sorted(pairs, key=lambda p: -int(p[1]))
        }


def members(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


FIRST_CALLS = """
import sys
import fi_ffi
assert "numpy" not in sys.modules
import numpy as np
x = np.random.default_rng().standard_normal((4, 64)).astype(np.float16)
weight, out = np.ones(64, np.float16), np.full_like(x, np.nan)
fi_ffi.rmsnorm(out, x, weight)
wide = x.astype(np.float64)
expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
assert np.abs(out - expected).max() < 5e-3
try:
    fi_ffi.rmsnorm(out, x, weight[:3])
except fi_ffi.ArgumentError as error:
    print(error.op, fi_ffi.__version__, fi_ffi.__file__)
"""


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    """hatchling in a folder of its own."""
    folder = tmp_path_factory.mktemp("hatchling")
    pip = (sys.executable, "-m", "pip", "install", "-q", "--target", folder)
    run(*pip, "hatchling>=1.26")
    return folder


@pytest.fixture(scope="module")
def sdist(backend, tmp_path_factory):
    tree = source_tree(tmp_path_factory.mktemp("tree"))
    return build("sdist", tree, tmp_path_factory.mktemp("sdist"), backend)


@pytest.fixture(scope="module")
def wheel(sdist, backend, tmp_path_factory):
    """The wheel that the sdist makes, as pip would have it."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    return build("wheel", folder / sdist.name.removesuffix(".tar.gz"), folder, backend)


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """This Python with fi_ffi and what pip brings for it; what that downloaded."""
    made = Bare.make(tmp_path_factory.mktemp("bare"), Path(sys.executable))
    yield made, made.install(wheel)
    shutil.rmtree(made.root)


def test_the_sdist_has_what_it_takes(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "wheels.lock", "LICENSE", "README.md", "fi_ffi/py.typed"} <= names
    assert {"tests/stress/test_packaging.py", "docs/threat-model.md", "SECURITY.md"} <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith((".so", ".whl"))]


def test_the_wheel_is_the_same_from_the_sdist(wheel, backend, tmp_path, tmp_path_factory):
    direct = build("wheel", source_tree(tmp_path_factory.mktemp("again")), tmp_path, backend)
    assert members(direct) == members(wheel)
    assert direct.name == wheel.name == "fi_ffi-0.1.0-py3-none-any.whl"


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(members(wheel))
    kinds = {name.rpartition(".")[2] for name in names if name.startswith("fi_ffi/")}
    assert kinds == {"py", "pyi", "typed", "h", "json", "lock", "toml"}
    needed = ("py.typed", "wheels.lock", "ops/functions.pyi", "abi/declarations.h")
    assert {f"fi_ffi/{name}" for name in needed} <= names
    assert {name.partition("/")[0] for name in names} == {"fi_ffi", "fi_ffi-0.1.0.dist-info"}
    assert not [name for name in names if "test" in name or "__pycache__" in name]
    assert wheel.stat().st_size < 1.5e6


def test_what_pip_brings(bare):
    made, downloaded = bare
    installed = made.sizes()
    for what, sizes in (("downloaded", downloaded), ("installed", installed)):
        print(f"{what}, MB:", sizes, round(sum(sizes.values()), 1))
    assert sum(downloaded.values()) < MOST_DOWNLOADED
    installed.pop("pip", None), installed.pop("setuptools", None)
    assert sum(installed.values()) < MOST_INSTALLED
    heavy = {*["torch", "tvm", "flashinfer-python", "cupy", "jax", "triton", "scipy"]}
    assert not heavy & {name.lower() for name in installed}
    assert not [n for n in installed if n.startswith("nvidia") and n != "nvidia-cuda-runtime"]


def test_first_calls(bare):
    made, _ = bare
    said = made("-c", FIRST_CALLS).split()
    assert said[:2] == ["rmsnorm", "0.1.0"]
    assert Path(said[2]).is_relative_to(made.root)
    made("-m", "pip", "check")
    assert "fi-ffi" in run(made.command, "--help", **made.environment)


USER = """\
import fi_ffi
from fi_ffi import TensorDesc


def normalise(out: int, x: int, weight: int, stream: int) -> None:
    rows = TensorDesc(x, (32, 4096), "float16", device="cuda:0")
    result = TensorDesc(out, (32, 4096), "float16", device="cuda:0")
    scale = TensorDesc(weight, (4096,), "float16", device="cuda:0")
    fi_ffi.rmsnorm(result, rows, scale, eps=1e-6, stream=stream)
    with fi_ffi.stream(stream):
        fi_ffi.silu_and_mul(result, rows)
    prepared = fi_ffi.rmsnorm.prepare(result, rows, scale)
    with fi_ffi.stream(stream):
        prepared()
    plan = fi_ffi.BatchDecodePlan(
        rows, rows, rows, num_qo_heads=8, num_kv_heads=1, head_dim=128, page_size=16,
        q_data_type="float16", workspace=None,
    )
    plan.run(rows, rows, rows, result)
    try:
        fi_ffi.use_kernels("/kernels")
    except fi_ffi.KernelNotFoundError as error:
        words: str = str(error)
        print(words)


desc = TensorDesc(0, (1,), "float16")
"""
WRONG = {
    'fi_ffi.rmsnorm(1, 2, "3", epsilon=1e-6)': "call-arg",
    'fi_ffi.rmsnorm(TensorDesc(0, (1,), "float16"))': "call-arg",
    'fi_ffi.rmsnorm(desc, desc, desc, eps="small")': "arg-type",
    'TensorDesc("address", (1,), "float16")': "arg-type",
    "fi_ffi.BatchDecodePlan(desc, desc, desc, num_qo_heads=8, num_kv_heads=1, head_dim=1, "
    "page_size=16, windw_left=3)": "call-arg",
    "fi_ffi.BatchMlaPlan(desc, desc, desc, desc, num_heads=8)": "call-arg",
    "fi_ffi.single_prefill(desc, desc, desc, desc, k_scale='2')": "arg-type",
    "fi_ffi.rmsnrm": "attr-defined",
    "fi_ffi.use_kernels(3)": "arg-type",
    "x: int = fi_ffi.rmsnorm(desc, desc, desc)": "func-returns-value",
    'fi_ffi.single_decode_workspace_size("many", 8, 1, 128)': "arg-type",
    "fi_ffi.parse_device(0).indx": "attr-defined",
}


def checked(made, text):
    """What `mypy --strict` says of a program against the installed package."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed: pip install '.[lint]'")
    program = made.root / "program.py"
    program.write_text(text)
    command = [sys.executable, "-m", "mypy", "--strict", "--show-error-codes", "--no-incremental"]
    done = subprocess.run(
        [*command, "--cache-dir", made.root / "mypy", "--python-executable", made.python, program],
        cwd=made.root, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_a_users_program_is_checked(bare):
    """Of the right calls nothing is said, and each wrong one is found, at its line."""
    made, _ = bare
    said = checked(made, USER + "\n".join(WRONG))
    start = USER.count("\n") + 1
    for number, (call, code) in enumerate(WRONG.items(), start):
        found = [line for line in said.splitlines() if f"program.py:{number}:" in line]
        assert found, f"{call} is not found wrong:\n{said}"
        assert code in " ".join(found)
    right = [line for line in said.splitlines() if "error" in line and "program.py" in line]
    lines = {int(line.split(":")[1]) for line in right}
    assert lines == {*range(start, start + len(WRONG))}, said
    assert "installed, but missing library stubs" not in said


STORES = """
import hashlib
from fi_ffi.loader import cache
cache.store([b"x"], hashlib.sha256(b"x").hexdigest(), "stored.so", "a test")
"""


def test_uninstalling_leaves_the_cache_alone(bare):
    """All that is left is where `fi-ffi cache` says.  It runs last of those that use `bare`."""
    made, _ = bare
    shutil.rmtree(made.root / "cache", ignore_errors=True)
    before = made.files()
    made("-c", FIRST_CALLS)
    made("-c", STORES)
    told = json.loads(run(made.command, "cache", "list", "--json", **made.environment))
    cache = Path(told["root"])
    assert cache == made.root / "cache" / "fi-ffi"
    made("-m", "pip", "uninstall", "-q", "-y", "fi-ffi")
    after = made.files()
    left = after - before
    assert any("stored.so" in name for name in left)
    assert all((made.root / name).is_relative_to(cache) for name in left), left
    removed = before - after
    assert {name for name in before if "fi_ffi" in name or "fi-ffi" in name} == removed
    assert not [path for path in made.site.glob("fi_ffi/**/*") if path.suffix != ".pyc"]


@pytest.mark.skipif(not LONG, reason="FI_FFI_STRESS=long: one environment for each Python")
@pytest.mark.parametrize("minor", MINORS)
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_every_python(kind, minor, wheel, sdist, tmp_path):
    python = shutil.which(f"python3.{minor}")
    if python is None:
        pytest.skip(f"there is no Python 3.{minor} here")
    made = Bare.make(tmp_path, python)
    if kind == "wheel":
        assert sum(made.install(wheel).values()) < MOST_DOWNLOADED
    else:
        made("-m", "pip", "install", "-q", sdist)
    assert made("-c", FIRST_CALLS).startswith("rmsnorm 0.1.0")
    made("-m", "pip", "check")
