"""The layers: an import never goes up, lazily or not, and the core stands alone."""

from __future__ import annotations

import ast
import shutil
import textwrap
from pathlib import Path

import pytest

from fi_ffi.ops.functions import OPS
from tools import layers

from tests.helpers.children import ROOT, done


def test_no_import_goes_up() -> None:
    assert not [str(each) for each in layers.upward()]


def test_no_files_import_each_other_in_a_circle() -> None:
    assert not layers.file_circles()


def test_each_exception_is_one_import() -> None:
    """And nothing above the core is imported by it otherwise, not even in a type's name."""
    for (module, function), target in layers.EXCEPTIONS.items():
        found = [
            each
            for each in layers.every()
            if (each.source, each.function) == (module, function) and each.target.startswith(target)
        ]
        assert len(found) == 1, (module, function)


def test_every_module_has_a_layer_of_its_own() -> None:
    for name in layers.modules():
        assert layers.layer_of(name) >= 0
    for layer in layers.LAYERS:
        assert any(layers.LAYERS[layers.layer_of(name)] is layer for name in layers.modules())


@pytest.mark.parametrize(
    "code",
    [
        "import fi_ffi.watch.watchdog",
        "from fi_ffi.watch import watchdog",
        "from fi_ffi.watch.watchdog import watchdog",
        "if TYPE_CHECKING:\n    from fi_ffi.watch.watchdog import watchdog",
        "def f():\n    from fi_ffi.watch import watchdog as w",
        "def f():\n    return importlib.import_module('fi_ffi.watch.watchdog').watchdog",
        "WHERE = {'watchdog': 'fi_ffi.watch.watchdog'}",
        "class A:\n    def f(self):\n        __import__('fi_ffi.watch.watchdog')",
    ],
)
def test_it_sees_an_import(code: str) -> None:
    assert "fi_ffi.watch.watchdog" in _targets(code)


def test_it_sees_a_package_whose_module_is_computed() -> None:
    assert _targets("importlib.import_module(f'fi_ffi.watch.{name}')") == ["fi_ffi.watch"]


def test_it_sees_in_which_function_an_import_stands() -> None:
    tree = ast.parse("def f():\n    def g():\n        import fi_ffi.abi\n    import fi_ffi.loader")
    found = [(target, f) for node, f in layers._nodes(tree, "") for target in layers._targets(node)]
    assert found == [("fi_ffi.abi", "g"), ("fi_ffi.loader", "f")]


def _targets(code: str) -> list[str]:
    nodes = [node for node, _ in layers._nodes(ast.parse(code), "")]
    return [target for node in nodes for target in layers._targets(node)]


def test_it_finds_circles() -> None:
    of = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set[str](), "e": {"f"}, "f": {"e"}}
    assert sorted(layers.circles(of)) == [["b", "c"], ["e", "f"]]


def test_it_counts_lines_of_code(tmp_path: Path) -> None:
    file = tmp_path / "some.py"
    file.write_text(
        '"""Two\nlines."""\n\n# One.\nx = [\n    1,  # of it\n]\n\n\n'
        'def f():\n    """Text."""\n    return x\n'
    )
    assert layers.lines_of_code(file) == 5


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package that has the core alone, and the numpy kernels."""
    return copied(tmp_path_factory.mktemp("core"), "reference", "module names")


def copied(folder: Path, *kept: str) -> Path:
    for name, path in layers.modules().items():
        layer = layers.LAYERS[layers.layer_of(name)]
        if layer.is_core or layer.name in kept or name == "fi_ffi":
            copy = folder / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
            for data in (path.parent / "data").glob("*"):
                (copy.parent / "data").mkdir(exist_ok=True)
                shutil.copy(data, copy.parent / "data")
    shutil.copy(ROOT / "wheels.lock", folder / "fi_ffi")
    return folder


def run_in(folder: Path, code: str, **environment: str) -> tuple[int, str, str]:
    """Run a program with the copy's package first on the path."""
    first = f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    return done(first + textwrap.dedent(code), **environment)


CALLS = """
    rng = np.random.default_rng()
    x, weight = (rng.standard_normal(shape).astype(np.float16) for shape in ((5, 128), 128))
    out = put(np.full((5, 128), np.nan, np.float16))
    fi_ffi.rmsnorm(out, put(x), put(weight), eps=1e-6, stream=stream)
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    exact = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight
    assert np.abs(get(out) - exact).max() <= 2**-9 * np.abs(exact).max()

    indptr, last = np.array([0, 2, 3], np.int32), np.array([3, 16], np.int32)
    plan = fi_ffi.BatchDecodePlan(
        indptr, np.arange(3, dtype=np.int32), last, num_qo_heads=4, num_kv_heads=2, head_dim=128,
        page_size=16, device=device, stream=stream,
    )
    q = rng.standard_normal((2, 4, 128)).astype(np.float16)
    k, v = rng.standard_normal((2, 3, 16, 2, 128)).astype(np.float16)
    out = put(np.full(q.shape, np.nan, np.float16))
    plan.run(put(q), put(k), put(v), out, stream=stream)
    out = get(out)
    for request, (pages, count) in enumerate((([0, 1], 19), ([2], 16))):
        keys, values = (
            cache[pages].reshape(-1, 2, 128)[:count].astype(np.float64) for cache in (k, v)
        )
        for head in range(4):
            scores = keys[:, head // 2] @ q[request, head].astype(np.float64) / np.sqrt(128)
            weights = np.exp(scores - scores.max())
            exact = weights / weights.sum() @ values[:, head // 2]
            assert np.abs(out[request, head] - exact).max() < 2e-3

    try:
        fi_ffi.rmsnorm.supports(sm=90)
    except fi_ffi.LoaderError as error:
        print(error)
    print(fi_ffi.rmsnorm.__doc__)
"""
ON_CPU = """
    import numpy as np

    import fi_ffi

    device, stream, put, get = "cpu", None, np.asarray, np.asarray
"""


def calls_in(folder: Path, machine: str, **environment: str) -> None:
    """Call a norm and a decode plan with the copy's package on a machine, beside float64."""
    checked = f"assert fi_ffi.__file__.startswith({str(folder)!r}), fi_ffi.__file__\n"
    code = textwrap.dedent(machine) + checked + textwrap.dedent(CALLS)
    status, out, err = run_in(folder, code, **environment)
    assert status == 0, err
    assert "the judge is missing" in out and "fi_ffi.capability" in out
    assert out.splitlines()[-1] == OPS["rmsnorm"].row.doc


def test_the_core_runs_alone(core: Path) -> None:
    calls_in(core, ON_CPU)


LOADS = """
    import os

    import fi_ffi
    from fi_ffi.abi.signature import Signature
    from fi_ffi.loader import runtime, search

    assert fi_ffi.__file__.startswith({folder!r}), fi_ffi.__file__
    declared = Signature("rmsnorm", ("DLTensor*", "DLTensor*", "DLTensor*", "float", "bool"))
    print(runtime.kernel_entry("norm", declared, "==0.6.13").name)
    try:
        runtime.kernel_entry("no_such_module", declared, "==0.6.13")
    except fi_ffi.KernelNotFoundError as error:
        print("lacks" if "no_such_module" in str(error) else error)
    del os.environ["FI_FFI_KERNELS"]
    search.use_source(None)
    (place,) = (place for place in search.places() if place.kind == "remote")
    print(place.note.partition(":")[0].replace(" ", "_"))
"""


def test_the_core_loads_a_local_kernel(tmp_path: Path, built_wheel: Path) -> None:
    """Without the numpy kernels too, and without what fetches."""
    folder = copied(tmp_path)
    code = LOADS.replace("{folder!r}", repr(str(folder)))
    status, out, err = run_in(folder, code, FI_FFI_KERNELS=str(built_wheel))
    assert status == 0, err
    assert out.split() == ["norm.rmsnorm", "lacks", "nothing_can_be_fetched"]


def test_the_package_needs_no_numpy(core: Path) -> None:
    code = "import sys; sys.modules['numpy'] = None; import fi_ffi; print(fi_ffi.rmsnorm)"
    for folder in (ROOT, core):
        status, out, err = run_in(folder, code)
        assert status == 0 and "op rmsnorm" in out, err
