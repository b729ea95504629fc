"""Every function of every module of the kernels at hand, asked for its signature and compared.

They are loaded in a process of their own: there are many, and some do things as they load.
"""

from __future__ import annotations

import json

import pytest

from fi_ffi.loader import search
from fi_ffi.loader.fetch.wheels_lock import the_lock
from fi_ffi.module_names import parse
from tools.entries import entries_of

from tests.helpers import kernels
from tests.helpers.children import done

# A line of JSON for each module: what its functions say, and the methods of its objects.
ASK = """
import json, sys

import fi_ffi
from fi_ffi.abi import library
from fi_ffi.abi.tensor import parse_device
from fi_ffi.abi.tensor import parse_dtype
from fi_ffi.abi.function import Entry, module_function, probe
from fi_ffi.abi.objects import Module
from fi_ffi.loader import machine
from fi_ffi.loader.elf import FUNCTION_PREFIX
from tests.helpers import kernels

bf16 = parse_dtype("bfloat16")
makers = {
    "fused_moe_90": (bf16, bf16, bf16, False, False, False, False),
    "fp8_blockscale_gemm_90": (),
}


def methods(path, arguments, names):
    machine.make_current(0)
    handle = library.open_module(str(path))
    made = Entry("init", library.find_symbol(handle, FUNCTION_PREFIX + "init"))(*arguments)
    assert isinstance(made, Module), made
    return {name: str(probe(module_function(made, name))) for name in names}


source = kernels.first_here()
wanted = json.loads(sys.argv[1])
for module in source.modules():
    found = {"module": module}
    try:
        path = source.file(module).path
        found["entries"] = {n: str(s) for n, s in fi_ffi.file_signatures(path).items()}
        if module in makers and module in wanted:
            found["methods"] = methods(path, makers[module], wanted[module])
    except Exception as error:
        found["error"] = repr(error)
    print(json.dumps(found), flush=True)
"""


def release() -> str:
    if kernels.first_here() is None:
        pytest.skip("no kernels are on this machine")
    found = search.release() or the_lock().default_release
    if entries_of(found) is None:
        pytest.skip(f"what the modules of FlashInfer {found} export is not recorded")
    return found


@pytest.fixture(scope="module")
def said() -> dict[str, dict]:
    """What each module says of itself."""
    record = entries_of(release())
    methods = {
        group.families[0]: sorted(n for kind in group.objects.values() for n in kind)
        for group in record
        if group.objects
    }
    wanted = {"fused_moe_90": methods["fused_moe"], **methods}
    status, out, err = done(ASK, json.dumps(wanted), seconds=900)
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert status == 0, err[-2000:]
    return {line["module"]: line for line in lines}


def expected(module: str) -> list[dict[str, str]]:
    """What the record says a module exports: exactly, or for one of its family."""
    record = entries_of(release())
    group, parsed = record.of(module), parse(module)
    groups = [group] if group else record.of_family(parsed.family) if parsed else []
    return [{n: str(e.signature) for n, e in group.entries.items()} for group in groups]


@pytest.mark.timeout(900)
def test_every_module_exports_what_is_recorded(said):
    assert {*said} == {*kernels.first_here().modules()}
    wrong, unknown, entries = [], [], 0
    for module, found in said.items():
        known = expected(module)
        if "error" in found:
            wrong.append(f"{module}: {found['error']}")
        elif not known:
            unknown.append(module)
        elif found["entries"] not in known:
            wrong.append(f"{module}: {found['entries']} is none of {known}")
        entries += len(found.get("entries", ()))
    print(f"{len(said)} modules, {entries} entries; not recorded: {unknown}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", ["fused_moe_90", "fp8_blockscale_gemm_90"])
@pytest.mark.timeout(900)
def test_methods_of_objects_are_what_is_recorded(module, said):
    if module not in said:
        pytest.skip(f"no module {module} in {kernels.first_here().location}")
    (methods,) = entries_of(release()).of(module).objects.values()
    assert "error" not in said[module], said[module]
    # A method is not told its name.
    types = {n: str(e.signature).removeprefix(n) for n, e in methods.items()}
    assert said[module]["methods"] == types
