"""xgrammar through fi_ffi alone: its library, a vocabulary, matchers, and masks on logits."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fi_ffi

from tests.helpers import sampling

WHEEL = "xgrammar==0.2.8"
MEMBER = "xgrammar/libxgrammar_bindings.so"
_folder = tempfile.TemporaryDirectory(prefix="fi-ffi-xgrammar-")

# Every printable character, and some tokens of several; the last ends a text.
VOCABULARY = [chr(i) for i in range(32, 127)] + [
    '{"',
    '": ',
    "true",
    "false",
    "name",
    "age",
    "</s>",
]
STOP = len(VOCABULARY) - 1
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "ok"],
}  # fmt: skip
SETTINGS = (True, None, None, True, None, False)  # of compile_json_schema


@functools.cache
def package() -> Path:
    """The folder that has the package xgrammar: installed, or from pip's index."""
    try:
        return Path(str(importlib.metadata.distribution("xgrammar").locate_file("")))
    except importlib.metadata.PackageNotFoundError:
        pass
    folder = Path(_folder.name)
    sampling.only_in_full("installs xgrammar from the package index")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    quick = ["--disable-pip-version-check", "--retries", "1", "--timeout", "20"]
    command = [*pip, *quick, "--target", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no {WHEEL} in the index, or no network: {done.stderr.strip()[-200:]}")
    return folder


def kind(name: str) -> Any:
    """A type of xgrammar's, whose library is loaded."""
    fi_ffi.module(package() / MEMBER)
    return fi_ffi.object_type(f"xgrammar.tvm_ffi_binding.{name}")


def compiled(schema: object = SCHEMA) -> Any:
    """A grammar of a JSON schema, over the vocabulary."""
    info = kind("TokenizerInfo")(VOCABULARY, 0, None, [STOP], False)
    return kind("GrammarCompiler")(info, 1, True, -1).compile_json_schema(
        json.dumps(schema), *SETTINGS
    )


def matcher(schema: object = SCHEMA) -> Any:
    return kind("GrammarMatcher")(compiled(schema), None, False, -1, None)


def empty_mask(rows: int) -> np.ndarray:
    """Poison, in which no bit is the mask's but by chance."""
    return np.full((rows, -(-len(VOCABULARY) // 32)), 0x5A5A5A5A, np.int32)


def allowed(mask: np.ndarray) -> np.ndarray:
    """A mask's bits, one for each token."""
    bits = np.unpackbits(mask.view(np.uint8), axis=-1, bitorder="little")
    return bits[..., : len(VOCABULARY)].astype(bool)


# One thread for each logit: what the mask has no bit for becomes -inf.
_PTX = b"""
.version 7.0
.target sm_70
.address_size 64
.visible .entry mask(.param .u64 logits, .param .u64 bits, .param .u32 vocab, .param .u32 words)
{
  .reg .pred %out, %kept;
  .reg .b32 %block, %size, %thread, %token, %vocab, %row, %words, %word, %bit, %at;
  .reg .b64 %bits, %logits, %offset;
  mov.u32 %block, %ctaid.x;
  mov.u32 %size, %ntid.x;
  mov.u32 %thread, %tid.x;
  mad.lo.s32 %token, %block, %size, %thread;
  ld.param.u32 %vocab, [vocab];
  setp.ge.u32 %out, %token, %vocab;
  @%out ret;
  mov.u32 %row, %ctaid.y;
  ld.param.u32 %words, [words];
  shr.u32 %word, %token, 5;
  mad.lo.s32 %at, %row, %words, %word;
  ld.param.u64 %bits, [bits];
  mad.wide.u32 %offset, %at, 4, %bits;
  ld.global.u32 %word, [%offset];
  and.b32 %bit, %token, 31;
  shr.u32 %word, %word, %bit;
  and.b32 %word, %word, 1;
  setp.ne.u32 %kept, %word, 0;
  @%kept ret;
  mad.lo.s32 %at, %row, %vocab, %token;
  ld.param.u64 %logits, [logits];
  mad.wide.u32 %offset, %at, 4, %logits;
  mov.b32 %word, 0fFF800000;
  st.global.b32 [%offset], %word;
}
\0"""


def apply(machine: Any, logits: Any, mask: np.ndarray) -> None:
    """Set a placed array's logits (float32) to -inf where the mask has no bit, on the machine."""
    if not machine.is_gpu:
        logits.array[~allowed(mask)] = -np.inf
        return
    from cuda.bindings import driver

    from fi_ffi.cli.cuda import check

    (rows, vocab), bits = logits.host.shape, machine.place(mask)
    loaded = check(driver.cuModuleLoadData(_PTX))
    function = check(driver.cuModuleGetFunction(loaded, b"mask"))
    values = [np.array([value], np.uint64) for value in (logits.ptr, bits.ptr)]
    values += [np.array([value], np.uint32) for value in (vocab, mask.shape[1])]
    pointers = np.array([value.ctypes.data for value in values], np.uint64)
    check(driver.cuLaunchKernel(
        function, -(-vocab // 128), rows, 1, 128, 1, 1, 0, machine.stream, pointers.ctypes.data, 0
    ))  # fmt: skip
    machine.synchronize()
    check(driver.cuModuleUnload(loaded))
