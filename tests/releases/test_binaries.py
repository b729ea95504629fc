"""What the kernels of FI_FFI_KERNELS say of themselves, against their release's sources.

No GPU is needed: a function that is called with no arguments refuses, and says what it takes.
"""

from __future__ import annotations

import json
import os

import pytest

from fi_ffi.abi.signature import parse_signature
from fi_ffi.loader import search

from tests.helpers.children import done

# A line of JSON for each module: they are many, and some do things as they load.  What takes
# nothing is not asked: it would run.
ASK = """
import json, sys

import fi_ffi
from fi_ffi.loader.kernels import open_source

source = open_source(sys.argv[1])
for module in source.modules():
    try:
        functions = fi_ffi.file_signatures(source.file(module).path)
        found = {name: str(of) for name, of in functions.items() if not isinstance(of, str)}
    except fi_ffi.FiFfiError:  # of a library that this machine lacks
        continue
    print(json.dumps([module, found]), flush=True)
"""


def test_functions_take_what_the_sources_declare(interface):
    kernels = os.environ.get("FI_FFI_KERNELS")
    release = search.release() if kernels else None
    if not (kernels and release):
        pytest.skip("FI_FFI_KERNELS names no kernels of a release")
    declared: dict[str, set[tuple[tuple[str, ...], str]]] = {}
    unread = {key.name for key in interface(release).unread}
    for key, functions in interface(release).exports.items():
        known = declared.setdefault(key.name, set())
        known |= {(function.signature.params, function.signature.result) for function in functions}
    status, out, err = done(ASK, kernels, seconds=600)
    assert status == 0, err
    asked = [json.loads(line) for line in out.splitlines()]
    assert asked
    wrong, compared = [], 0
    for module, found in asked:
        for name, text in found.items():
            binary = parse_signature(text)
            if name not in unread:
                compared += 1
                if (binary.params, binary.result) not in declared.get(name, ()):
                    wrong.append(f"{module}: {text}")
    assert not wrong, "\n".join(wrong)
    assert compared, "no module could be asked"
