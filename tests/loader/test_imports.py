"""Libraries that TVM compiled or that have modules inside, called without TVM and tvm_ffi."""

from __future__ import annotations

import itertools
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import fi_ffi
from fi_ffi.abi.function import register
from fi_ffi.abi.signature import parse_signature
from fi_ffi.errors import KernelError, KernelNotFoundError, LoaderError
from fi_ffi.loader import runtime
from fi_ffi.loader.elf import inspect_elf
from fi_ffi.loader.tvm_ffi import PROJECT
from fi_ffi.modules import files

from tests.helpers import compiler
from tests.helpers.children import environment

SOURCE = Path(__file__).with_name("has_imports.cc")
TVM = "apache-tvm==0.27.0.post1"
STORED = b"a module's bytes\0inside"
NUMBERS = itertools.count()


def word(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(content: bytes) -> bytes:
    return word(len(content)) + content


def inside(*modules: bytes) -> bytes:
    """Serialized modules, the first of which imports the others."""
    children = len(modules) - 1
    tree = [0, *[children] * len(modules)]
    body = word(len(tree)) + b"".join(map(word, tree))
    body += word(children) + b"".join(map(word, range(1, len(modules))))
    return text(body + b"".join(modules))


LIBRARY = text(b"_lib")
OTHER = b"a module of the library's own kind"


@pytest.fixture
def library(tmp_path):
    """Compiles a library with these bytes inside; each is a file of its own."""

    def make(*modules: bytes, options: Sequence[str] = (), cut: int | None = None) -> Path:
        folder = tmp_path / str(next(NUMBERS))
        folder.mkdir()
        kind = f"fi_ffi_tests.stored_{next(NUMBERS)}"
        other = text(kind.encode()) + text(STORED)
        content = b""
        if modules:
            content = inside(*(other if module is OTHER else module for module in modules))
        if cut is not None:
            content = word(cut) + content[8:]
        (folder / "inside.h").write_text(",".join(map(str, content)))
        given = [f"-I{folder}", f'-DKIND="{kind}"', *options]
        given += ["-DINSIDE"] if modules else []
        given += ["-DLOADER"] if OTHER in modules else []
        return compiler.library(SOURCE, folder / "has_imports.so", *given)

    return make


def test_a_library_that_imports_a_module(library):
    module = fi_ffi.module(library(LIBRARY, OTHER))
    assert module.call("stored") == STORED
    assert module.entries() == ("call",)
    assert module.entry("stored")() == STORED  # as `tvm_ffi.load_module` finds it in imports
    assert str(module.stored.signature) == "None"
    with pytest.raises(KernelError, match="Cannot find function nothing in the imported modules"):
        module.call("nothing")
    with pytest.raises(KernelNotFoundError, match="exports no 'nothing'"):
        module.entry("nothing")


def test_a_module_that_imports_the_library(library):
    """As what TVM's relax compiles: the root is another module."""
    module = fi_ffi.module(library(OTHER, LIBRARY))
    assert module.stored() == STORED
    assert module.call.signature == parse_signature("call(0: str) -> Any")
    loaded = files.load_file(module.path)
    assert loaded.root is not None
    assert loaded.root.use_count > 1  # nobody gives back the last one


def test_a_library_without_bytes(library):
    """Its functions are found among the global ones."""
    module = fi_ffi.module(library())
    name = f"fi_ffi_tests.global_{next(NUMBERS)}"
    with pytest.raises(KernelError, match=f"Cannot find function {name}"):
        module.call(name)
    register(name, parse_signature("f() -> int"), lambda: 41)
    assert module.call(name) == 41


def test_the_same_file_again(library):
    path = library(LIBRARY, OTHER)
    first = fi_ffi.module(path)
    other = path.with_name("other.so")
    os.link(path, other)
    again = fi_ffi.module(other)
    assert first.call("stored") == again.call("stored") == STORED


def test_a_module_that_nobody_can_read(library):
    path = library(LIBRARY, text(b"fi_ffi_tests.unknown") + text(STORED))
    for _ in range(2):
        with pytest.raises(LoaderError, match=r"tests\.unknown.* Load the runtime") as caught:
            fi_ffi.module(path)
        assert str(path) in str(caught.value)


def test_bytes_that_are_cut_off(library):
    path = library(LIBRARY, OTHER, cut=20)
    with pytest.raises(LoaderError, match="has a module inside that cannot be read"):
        fi_ffi.module(path)


def test_a_runtime_that_is_not_here(library):
    """What nobody fills in would be called all the same, and end the process."""
    path = library(options=["-DBACKEND"])
    assert "__TVMBackendOfNobody" in inspect_elf(path).context
    with pytest.raises(LoaderError, match=r"calls TVMBackendOfNobody, .*libtvm_runtime\.so"):
        fi_ffi.module(path)


def test_what_is_loaded_is_what_was_hashed(library, monkeypatch):
    """A file that is exchanged after it was opened is not the one that libtvm_ffi opens."""
    path = library(LIBRARY, OTHER)
    evil = path.with_name("evil")
    evil.write_bytes(b"no library")
    opened = runtime.library.open_module

    def exchanged(*given):
        handle = opened(*given)
        os.replace(evil, path)
        return handle

    monkeypatch.setattr(runtime.library, "open_module", exchanged)
    assert fi_ffi.module(path).call("stored") == STORED


def test_a_wheel_of_flashinfer_has_none_of_it():
    testing = compiler.headers().parent / "lib" / "libtvm_ffi_testing.so"
    assert inspect_elf(testing).context == ()
    assert files.load_file(testing).root is None


# What apache-tvm compiles


MODELS = """
import sys
import numpy as np
import tvm
from tvm import relax, te
from tvm.script import ir as I, tirx as T

n, k = te.var("n"), te.reduce_axis((0, 8), "k")
a, b = te.placeholder((n, 8), name="A"), te.placeholder((8, 4), name="B")
c = te.compute((n, 4), lambda i, j: te.sum(a[i, k] * b[k, j], axis=k), name="C")
product = te.create_prim_func([a, b, c]).with_attr("global_symbol", "product")
tvm.compile(tvm.IRModule({"product": product}), target="llvm").export_library("product.so")

@I.ir_module
class Calls:
    @T.prim_func
    def run(a: T.handle, b: T.handle):
        A = T.match_buffer(a, (4,), "float32")
        B = T.match_buffer(b, (4,), "float32")
        for i in range(4):
            B[i] = A[i] * T.float32(2)
        T.evaluate(T.call_packed("fi_ffi_tests.told", B[1]))

tvm.compile(Calls, target="llvm").export_library("calls.so")

@I.ir_module
class Threads:
    @T.prim_func
    def run(a: T.handle, b: T.handle):
        A = T.match_buffer(a, (4096,), "float32")
        B = T.match_buffer(b, (4096,), "float32")
        for i in T.parallel(4096):
            B[i] = A[i] + T.float32(1)

tvm.compile(Threads, target="llvm").export_library("threads.so")

builder = relax.BlockBuilder()
rng = np.random.default_rng(7)
weight, bias = (rng.standard_normal(shape, dtype=np.float32) for shape in ((8, 4), (4,)))
np.savez("weights.npz", weight=weight, bias=bias)
x = relax.Var("x", relax.TensorType((3, 8), "float32"))
with builder.function("main", [x]):
    with builder.dataflow():
        y = builder.emit(relax.op.matmul(x, relax.const(weight)))
        y = builder.emit(relax.op.nn.silu(relax.op.add(y, relax.const(bias))))
        y = builder.emit_output(relax.op.nn.softmax(y))
    builder.emit_func_output(y)
tvm.compile(builder.finalize(), target="llvm").export_library("model.so")
"""

# Run in a process without TVM, whose runtime, where it is wanted, is a library as any.
CALLS = """
import sys
import numpy as np
import fi_ffi

rng = np.random.default_rng(11)
folder, runtime = sys.argv[1:3]

def poisoned(*shape):
    return np.full(shape, np.nan, np.float32)

for rows in (1, 5):
    a, b = rng.random((rows, 8), np.float32), rng.random((8, 4), np.float32)
    out = poisoned(rows, 4)
    product = fi_ffi.module(f"{folder}/product.so").product
    product(a, b, out)
    np.testing.assert_allclose(out, a.astype(float) @ b, rtol=1e-5)
try:
    product(a, b)
    raise SystemExit("two arguments were taken")
except fi_ffi.KernelError as error:
    assert error.kind == "TypeError" and "Expected 3 arguments" in error.message, error

a, out, told = rng.random(4, np.float32), poisoned(4), []
calls = fi_ffi.module(f"{folder}/calls.so")
try:
    calls.run(a, out)
    raise SystemExit("a function that is nowhere was called")
except fi_ffi.KernelError as error:
    assert "Cannot find function fi_ffi_tests.told" in error.message, error
from fi_ffi.abi.function import register
from fi_ffi.abi.signature import parse_signature
register("fi_ffi_tests.told", parse_signature("f(0: float) -> void"), told.append)
calls.run(a, out)
assert told == [float(out[1])] and (out == 2 * a).all()

for name, words in (("threads", "calls TVMBackendParallelLaunch"), ("model", "relax.VMExecutable")):
    try:
        fi_ffi.module(f"{folder}/{name}.so")
        raise SystemExit(f"{name} was loaded without its runtime")
    except fi_ffi.LoaderError as error:
        assert words in str(error) and "libtvm_runtime.so" in str(error), error

fi_ffi.module(runtime)
a, out = rng.random(4096, np.float32), poisoned(4096)
fi_ffi.module(f"{folder}/threads.so").run(a, out)
assert (out == a + 1).all()

machine = fi_ffi.module(f"{folder}/model.so").vm_load_executable()
machine.vm_initialization(1, 0, 2)  # kDLCPU, its number, a pooled allocator
weights, x = np.load(f"{folder}/weights.npz"), rng.standard_normal((3, 8)).astype(np.float32)
found = machine.main(x)
y = x.astype(float) @ weights["weight"] + weights["bias"]
y = np.exp(y / (1 + np.exp(-y)))
expected = y / y.sum(-1, keepdims=True)
assert np.ptp(expected) > 0.1
got = np.frombuffer(found.tobytes(), np.float32).reshape(found.shape)
np.testing.assert_allclose(got, expected, rtol=1e-5)
assert not {"tvm", "tvm_ffi"} & {*sys.modules}
print("done")
"""


@pytest.fixture(scope="session")
def tvm(install):
    """The folder that apache-tvm is installed in, which requires a later apache-tvm-ffi."""
    compiler.cxx()
    folder = install(TVM)
    (found,) = distributions(name="apache-tvm", path=[str(folder)])
    wanted = {one.name: one.specifier for one in map(Requirement, found.requires or ())}
    if not wanted[PROJECT].contains(version(PROJECT)):
        pytest.skip(f"{TVM} requires {PROJECT}{wanted[PROJECT]}")
    return folder


@pytest.mark.timeout(600)
def test_models_that_tvm_compiled(tvm, tmp_path, child):
    (tmp_path / "models.py").write_text(MODELS)
    names = environment()
    names["PYTHONPATH"] = os.pathsep.join([str(tvm), names["PYTHONPATH"]])
    command = [sys.executable, "models.py"]
    subprocess.run(command, cwd=tmp_path, env=names, check=True, timeout=300)
    runtime = tvm / "tvm" / "lib" / "libtvm_runtime.so"
    program = f"import sys; sys.argv[1:] = {str(tmp_path)!r}, {str(runtime)!r}\n{CALLS}"
    assert child(program) == "done"
