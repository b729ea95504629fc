"""What holds for the package as a whole: its size, its names, what it never imports."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import fi_ffi
from fi_ffi import BatchAttentionPlan, BatchDecodePlan, BatchMlaPlan, BatchPrefillPlan

from tests.helpers.children import done

PACKAGE = Path(fi_ffi.__file__).parent
GENERATED = {PACKAGE / "abi" / "_cffi.py"}
MODULES = sorted(
    path
    for package in (PACKAGE, PACKAGE.with_name("fi_ffi_build"))
    for path in package.rglob("*.py")
    if path not in GENERATED
)

# They would bring a second copy of what is loaded here, or seconds of import time.
NEVER = {"torch", "tvm_ffi", "tvm", "flashinfer", "flashinfer_jit_cache", "ctypes", "cupy", "jax"}


def test_imports_what_it_may() -> None:
    """What files of the package import of each other is in tests/test_layers.py."""
    assert len(MODULES) > 30
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: a relative import"
                names = [node.module or ""]
            if path.parent.name == "jax":  # which callers import by its name
                names = [name for name in names if name.split(".")[0] != "jax"]
            for name in names:
                assert name.split(".")[0] not in NEVER, f"{path} imports {name}"


def test_modules_are_short_and_say_what_they_are() -> None:
    for path in MODULES:
        text = path.read_text()
        assert text.count("\n") <= 700, path
        assert ast.get_docstring(ast.parse(text)), path


def test_public_names() -> None:
    for name in fi_ffi.__all__:
        value = getattr(fi_ffi, name)
        if not isinstance(value, (dict, str)):
            assert (value.__doc__ or "").strip(), f"{name} has no docstring"


def test_errors_are_public_and_builtin_exceptions_too() -> None:
    assert len({*fi_ffi.__all__}) == len(fi_ffi.__all__)
    errors = {name: e for name, e in vars(fi_ffi.errors).items() if isinstance(e, type)}
    assert len(errors) >= 10 and errors.keys() <= {*fi_ffi.__all__}
    for error in errors.values():
        assert issubclass(error, fi_ffi.FiFfiError)
        if error is not fi_ffi.FiFfiError:
            assert any(base.__module__ == "builtins" and base is not Exception
                       for base in error.__mro__ if issubclass(base, Exception))  # fmt: skip


RUN = """
    import sys

    import numpy as np

    import fi_ffi

    assert "numpy" in sys.modules  # by this script; fi_ffi itself is checked below
    rng = np.random.default_rng()
    x, residual = (rng.standard_normal((4, 64)).astype(np.float16) for _ in range(2))
    weight, out = np.ones(64, np.float16), np.zeros((4, 64), np.float16)
    fi_ffi.rmsnorm(out, x, weight)
    fi_ffi.fused_add_rmsnorm(x, residual, weight)
    assert out.any()

    from fi_ffi.abi.signature import Signature
    from fi_ffi.loader import runtime

    declared = Signature("rmsnorm", ("DLTensor*", "DLTensor*", "DLTensor*", "float", "bool"))
    runtime.kernel_entry("norm", declared, "==0.6.13")
    print(*sorted({name.split(".")[0] for name in sys.modules} & NEVER - {"ctypes"}))
"""


def child(code: str, **environment: str) -> str:
    status, out, err = done(code, **environment)
    assert status == 0, err
    return out.strip()


def test_what_is_never_imported_is_not(built_wheel: Path) -> None:
    """Neither directly nor through a dependency, by ops, kernels and their attestation."""
    code = f"NEVER = {sorted(NEVER)!r}\nNEVER = set(NEVER)\n" + textwrap.dedent(RUN)
    assert child(code, FI_FFI_KERNELS=str(built_wheel)) == ""


def test_importing_takes_little() -> None:
    """numpy, cuda-python and the network's modules wait until something needs them."""
    late = {"numpy", "ml_dtypes", "cuda", "elftools", "requests", "rich", "click"}
    code = f"import sys, fi_ffi; print(*sorted({sorted(late)!r} & sys.modules.keys()))"
    code = code.replace(str(sorted(late)), f"set({sorted(late)!r})")
    assert child(code) == ""


def test_the_version_is_the_distributions() -> None:
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    assert f'version = "{fi_ffi.__version__}"' in text


# What may be anything: `prepare` packs any call, and so returns what that prepares to.  Options
# of a run are its plan's; those of plans have types, for checkers alone (`PrefillKeywords`).
ANYTHING = {"prepare"}


def public_functions() -> Iterator[tuple[str, object]]:
    for name in fi_ffi.__all__:
        value = getattr(fi_ffi, name)
        if inspect.isclass(value):
            for inner, function in vars(value).items():
                if inspect.isfunction(function) and inner in ("__init__", "__call__", "update"):
                    yield f"{name}.{inner}", function
        elif inspect.isfunction(value):
            yield name, value


def test_public_functions_say_what_they_take() -> None:
    loose = {
        name
        for name, function in public_functions()
        if any(re.search(r"\bAny\b", str(told)) for told in function.__annotations__.values())
    }
    assert loose == ANYTHING
    untyped = {
        f"{name}({parameter})"
        for name, function in public_functions()
        for parameter in inspect.signature(function).parameters
        if parameter != "self" and parameter not in function.__annotations__
    }
    assert not untyped


PLANS = [BatchPrefillPlan, BatchDecodePlan, BatchMlaPlan, BatchAttentionPlan]


@pytest.mark.parametrize("plan", PLANS)
def test_options_of_plans_are_documented_with_their_defaults(plan: type) -> None:
    doc, options = inspect.getdoc(plan) or "", plan._options_class
    for name, option in options.table.items():
        line = re.search(rf"^    {name}( \((.*) by default\))?: ", doc, re.M)
        assert line is not None, name
        has_default = name not in options.required and option.default is not None
        assert line[2] == (repr(option.default) if has_default else None), name


def test_options_that_plans_share_are_described_in_the_same_words() -> None:
    """Docstrings are written out, for editors; what several plans have is one text all the same."""
    words: dict[tuple[str, object], set[str]] = {}
    for plan in PLANS:
        listed = (inspect.getdoc(plan) or "").partition("Args:\n")[2].partition("\n\n")[0]
        parts = re.split(r"^    (\w[\w, ]*?)(?: \(.* by default\))?: ", listed, flags=re.M)
        told = dict(zip(parts[1::2], parts[2::2], strict=True))
        for name, option in plan._options_class.table.items():
            words.setdefault((name, option), set()).add(" ".join(told[name].split()))
    shared = {name for (name, _), texts in words.items() if len(texts) > 1}
    assert shared <= {"page_size"}, "of a plan without pages it says more"
    assert len(words) < sum(len(plan._options_class.table) for plan in PLANS)


def test_a_first_call_imports_its_family_alone() -> None:
    """All families' formulas take longer to import than a call on the CPU does."""
    code = """
        import sys

        import numpy as np

        import fi_ffi

        x = np.ones((2, 64), np.float16)
        fi_ffi.rmsnorm(np.empty_like(x), x, x[0])
        families = {f"fi_ffi.reference.{name}" for name in fi_ffi.families.FAMILIES}
        late = {"email", "numpy.ma", *families}
        print(*sorted(late & sys.modules.keys()))
    """
    assert child(textwrap.dedent(code)) == "fi_ffi.reference.norm"
