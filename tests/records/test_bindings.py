"""Bindings read from C++: what is exported, and what TVM-FFI calls its types."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from fi_ffi import file_signatures
from fi_ffi.errors import BuildError
from fi_ffi.loader.fetch.wheels_lock import the_lock
from tools.entries import entries_of
from tools.release import Source, abi_type, read
from tools.release.conditions import truth
from tools.release.modules import Reader, architectures, defines
from tools.release.types import PRINTED

from tests.helpers.compiler import library


def export(text: str, **defines: str):
    return read([Source("x.cu", text, defines)], is_switch=lambda name: name.isupper()).exports


def one(text: str, **defines: str) -> str:
    (function,) = export(text, **defines).values()
    return f"{function.signature} {', '.join(function.names)}"


EXPORT = "TVM_FFI_DLL_EXPORT_TYPED_FUNC(f, f);"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("void f(TensorView x, double eps = 1e-6);", "f(0: DLTensor*, 1: float) -> void x, eps"),
        ("namespace a::b { bool f() { return g(1); } }", "f() -> bool "),
        ("static inline int64_t f(const std::string& s) {}", "f(0: std::string) -> int s"),
        ("Tuple<Array<int64_t>, Tensor> f(Optional<Array<ffi::Tensor>> a);",
         "f(0: Optional<Array<ffi.Tensor>>) -> Tuple<Array<int>, ffi.Tensor> a"),
        ("using Handle = int64_t;\nHandle f(Handle);", "f(0: int) -> int "),
        ("enum class Mode : int { A, B };\nvoid f(Mode m);", "f(0: int) -> void m"),
        ("struct g { void f(int); };\nvoid f(bool b); // void f(int)", "f(0: bool) -> void b"),
        ("void g() { f(1, 2); }\nvoid f(TensorView a,\n  TensorView b /* , int c */);",
         "f(0: DLTensor*, 1: DLTensor*) -> void a, b"),
        ("void f(TensorView);\nvoid f(TensorView named) {}", "f(0: DLTensor*) -> void named"),
        ('const char* s = "{ void f(int); "; void f(bool b);', "f(0: bool) -> void b"),
        ("void f(TensorView x MORE);", "f(0: DLTensor*, 1: int) -> void x, n"),
        ("void f(void);", "f() -> void "),
    ],
)  # fmt: skip
def test_declarations(text, expected):
    assert one(f"{text}\n{EXPORT}", MORE=", int64_t n").strip() == expected.strip()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("void g();", "f is exported and not declared"),
        ("void f(int); void f(bool);", "f is declared in several ways"),
        ("void f(Strange* x);", "the C\\+\\+ type 'Strange\\* x'|the C\\+\\+ type 'Strange\\*'"),
        ("#if other_macro\nvoid f(int);\n#endif", "how f is declared depends on an unknown macro"),
        ("#if other_macro\nint x;\n#else\nvoid f(int);\n#endif", "how f is declared depends"),
        ("#if other_macro\nint x;\n#elif 1\nvoid f(int);\n#endif", "how f is declared depends"),
        (f"void f(); {EXPORT}", "f is exported twice"),
    ],
)
def test_what_cannot_be_told_is_an_error(text, message):
    with pytest.raises(BuildError, match=f"x.cu: .*(?:{message})"):
        export(f"{text}\n{EXPORT}")


def test_an_export_under_an_unknown_condition_is_an_error():
    with pytest.raises(BuildError, match="whether f is exported depends on an unknown macro"):
        export(f"void f();\n#ifdef __some_compiler\n{EXPORT}\n#endif")


def test_an_export_that_is_not_understood_is_an_error():
    text = "void f();\nTVM_FFI_DLL_EXPORT_TYPED_FUNC(f, make<int>(3));"
    with pytest.raises(BuildError, match="1 exports, of which 0 are read"):
        export(text)


def test_conditions_choose_what_is_read():
    text = f"""
#if VERSION >= 12080 && defined(FAST)
void f(int a);
#elif !defined(FAST)
void f(bool b);
#else
void f(double c);
#endif
{EXPORT}"""
    assert one(text, VERSION="13000", FAST="1") == "f(0: int) -> void a"
    assert one(text, VERSION="12000", FAST="1") == "f(0: float) -> void c"
    assert one(text, VERSION="12000") == "f(0: bool) -> void b"


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("1", True), ("A == 3", True), ("A > 3 || B", False), ("!(A < 3)", True),
        ("defined(A) && !defined B", True), ("x_unknown", None), ("x_unknown && B", False),
        ("x_unknown || A", True), ("A * 10 + 2 >= 32", True), ("0x10 == 16", True),
        ("!x_unknown", None), ("x_unknown == 1", None), ("ALIAS > 2", True),
    ],
)  # fmt: skip
def test_conditions_are_c_s(expression, expected):
    macros = {"A": "3", "ALIAS": "A"}
    assert truth(expression, macros, lambda name: name == "B") is expected


OBJECT = """
class Runner : public tvm::ffi::ModuleObj {
  Optional<Function> GetFunction(const String& name) final {
    if (name == "run") {
      return Function::FromTyped([this](TensorView x, Optional<Array<int64_t>> ids) { go(x); });
    } else if (name == "count") {
      return Function::FromTyped([this]() -> int64_t { return n_; });
    }
    return Function(nullptr);
  }
};
tvm::ffi::Module init(DLDataType dtype) {}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(init, init);
"""


def test_methods_of_objects():
    found = read([Source("x.cu", OBJECT)])
    assert str(found.exports["init"].signature) == "init(0: DataType) -> ffi.Module"
    methods = found.objects["Runner"]
    run = "run(0: DLTensor*, 1: Optional<Array<int>>) -> void"
    assert str(methods["run"].signature) == run
    assert methods["run"].names == ("x", "ids")
    assert str(methods["count"].signature) == "count() -> int"


def test_a_method_whose_result_is_not_said_is_an_error():
    text = OBJECT.replace("{ go(x); }", "{ return go(x); }")
    with pytest.raises(BuildError, match="the result of the method run"):
        read([Source("x.cu", text)])


def test_macros_and_declarations_of_headers_are_found():
    files = {"a.h": "#define A_MACRO , bool b\n", "b.h": "void f(TensorView x A_MACRO);"}
    text = f'#include "a.h"\n#include <b.h>\n{EXPORT}'
    found = read([Source("x.cu", text)], lambda path, name: files.get(name))
    assert found.exports["f"].names == ("x", "b")


def test_what_is_generated_beside_a_source_is_part_of_it():
    files = {"config.inc": "#pragma once\n#define ADDITIONAL_FUNC_PARAMS , double scale\n"}
    text = f'#include "config.inc"\nvoid f(TensorView x ADDITIONAL_FUNC_PARAMS);\n{EXPORT}'
    found = read([Source("x.cu", text)], lambda path, name: files.get(name))
    assert found.exports["f"].signature.params == ("DLTensor*", "float")


def test_flags():
    assert defines(["-O3", "-DA", "-DB=2", "-gencode=x"]) == {"A": "1", "B": "2"}
    flags = ["-gencode=arch=compute_90a,code=sm_90a", "-DA"]
    assert architectures({"cuda_cflags": flags}, ["sm75"]) == ("sm_90a",)
    assert architectures({"cuda_cflags": ["-DA"]}, ["sm75"]) == ("sm75",)


def test_a_macro_that_a_header_defines_is_no_switch(tmp_path):
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "a.h").write_text("#  define DEFINED 1\n")
    reader = Reader(tmp_path)
    assert not reader.is_switch("DEFINED")
    assert reader.is_switch("NOWHERE")
    assert not reader.is_switch("__CUDA_ARCH__")


# A C++ type for each that occurs in a record and has parameters of its own.
_COMPOSED = {
    "Optional<DLTensor*>": "Optional<TensorView>",
    "Optional<ffi.Tensor>": "Optional<Tensor>",
    "Optional<float>": "Optional<double>",
    "Optional<int>": "Optional<int64_t>",
    "Optional<bool>": "Optional<bool>",
    "Optional<Array<ffi.Tensor>>": "Optional<Array<Tensor>>",
    "Optional<Array<int>>": "Optional<Array<int64_t>>",
    "Array<int>": "Array<int64_t>",
    "Array<str>": "Array<String>",
    "Array<ffi.Tensor>": "Array<Tensor>",
    "Array<Array<int>>": "Array<Array<int64_t>>",
    "Map<int, int>": "Map<int, int>",
    "Variant<float, ffi.Tensor>": "Variant<double, Tensor>",
    "Tuple<Array<int>, Array<int>, int>": "Tuple<Array<int64_t>, Array<int64_t>, int64_t>",
    "Tuple<Array<int>, Array<int>>": "Tuple<Array<int64_t>, Array<int64_t>>",
    "Tuple<Array<str>, Array<int>>": "Tuple<Array<String>, Array<int64_t>>",
    "Tuple<ffi.Tensor, ffi.Tensor>": "Tuple<Tensor, Tensor>",
}


def recorded_types() -> set[str]:
    record = entries_of(the_lock().default_release)
    functions = [
        entry
        for group in record
        for entry in itertools.chain(
            group.entries.values(), *(kind.values() for kind in group.objects.values())
        )
    ]
    return {t for f in functions for t in (*f.signature.params, f.signature.result)}


def test_types_are_what_a_binary_prints(tvm_ffi_loaded, tmp_path):
    """A function of every type that the record has, compiled and asked."""
    cpp = [kind for kind in PRINTED if kind != "void"] + [*_COMPOSED.values(), "Kind"]
    results = [kind for kind in cpp if "TensorView" not in kind]  # a view cannot be returned
    headers = (
        "tvm_ffi.h",
        "container/map.h",
        "container/tuple.h",
        "container/variant.h",
        "extra/module.h",
    )
    source = tmp_path / "types.cc"
    source.write_text(
        "".join(f"#include <tvm/ffi/{header}>\n" for header in headers)
        + "#include <string>\nusing namespace tvm::ffi;\nenum class Kind : int { A };\n"
        + f"void types({', '.join(cpp)}) {{}}\n"
        + "".join(f"{kind} result_{i}() {{ throw 1; }}\n" for i, kind in enumerate(results))
        + "TVM_FFI_DLL_EXPORT_TYPED_FUNC(types, types);\n"
        + "".join(
            f"TVM_FFI_DLL_EXPORT_TYPED_FUNC(result_{i}, result_{i});\n" for i in range(len(results))
        )
    )
    found = file_signatures(library(source, tmp_path / "types.so"))
    expected = tuple(abi_type(kind, {"Kind": "int"}) for kind in cpp)
    assert found["types"].params == expected
    for i, kind in enumerate(results):
        assert found[f"result_{i}"].result == abi_type(kind, {"Kind": "int"})
    assert {abi_type(kind) for kind in _COMPOSED.values()} == set(_COMPOSED)
    # Nothing in the record is left that no binary was asked for.
    assert recorded_types() - {*expected, "void"} == set()


def test_the_reader_agrees_with_binaries(built_wheel):
    from fi_ffi.loader.kernels import open_source

    record = entries_of(the_lock().default_release)
    source = open_source(built_wheel)
    assert len(source.modules()) >= 3
    for module in source.modules():
        expected = {n: e.signature for n, e in record.of(module).entries.items()}
        assert file_signatures(Path(source.file(module).path)) == expected, module
