"""xgrammar through fi_ffi alone: a library that registers, and exports nothing.

Its tests that take a `machine` run on a GPU too: tests/gpu/test_bodies.py.
"""

from __future__ import annotations

import gc
import json
import re
from pathlib import Path

import numpy as np
import pytest

import fi_ffi
from fi_ffi.modules import ModuleEntry, ReflectedObject

from tests.attention.machines import Cpu
from tests.helpers import grammars
from tests.helpers.children import done
from tests.helpers.grammars import STOP, VOCABULARY, allowed, empty_mask
from tests.stress.gauges import leaves_nothing

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "structured-output.md"


@pytest.fixture
def machine():
    return Cpu()


def generate(matcher, draw, row=0, rows=1, most=300):
    """A text of the grammar, a token drawn from each mask; returns it and the masks."""
    tokens, masks = [], []
    while not matcher.is_terminated() and len(tokens) < most:
        mask = empty_mask(rows)
        others = np.delete(mask, row, 0).copy()
        assert matcher.fill_next_token_bitmask(mask, row, False) in (True, False)
        assert (np.delete(mask, row, 0) == others).all()
        masks.append(mask[row])
        token = int(draw(allowed(mask[row])))
        assert matcher.accept_token(token, False)
        tokens.append(token)
    return tokens, masks


def random_draw(rng):
    """Ends strings and numbers soon: half the time by what is not a letter or a digit."""

    def draw(mask):
        tokens = np.flatnonzero(mask)
        ends = [t for t in tokens if VOCABULARY[t] in ('"', ",", "}", "</s>")]
        return rng.choice(ends if ends and rng.random() < 0.5 else tokens)

    return draw


def text_of(tokens):
    assert tokens[-1] == STOP
    return "".join(VOCABULARY[token] for token in tokens[:-1])


@pytest.mark.parametrize("rows", [1, 3])
def test_generates_what_the_schema_says(rows, rng):
    matcher = grammars.matcher()
    for _ in range(5):
        tokens, _ = generate(matcher, random_draw(rng), rows - 1, rows, most=2000)
        made = json.loads(text_of(tokens))
        kinds = {name: type(value) for name, value in made.items()}
        assert kinds == {"name": str, "age": int, "ok": bool}
        matcher.reset()


def test_a_mask_is_what_is_accepted(rng):
    """Each token by a fork of the matcher, where the mask was of the matcher itself."""
    matcher = grammars.matcher()
    for _ in range(12):
        mask = empty_mask(1)
        matcher.fill_next_token_bitmask(mask, 0, False)
        taken = [matcher.fork().accept_token(token, False) for token in range(len(VOCABULARY))]
        assert taken == allowed(mask)[0].tolist()
        matcher.accept_token(int(rng.choice(np.flatnonzero(taken))), False)


BESIDE = """
import json, sys, types
import tvm_ffi
# The package's own binding; its __init__ would import torch and transformers besides.
package = types.ModuleType("xgrammar")
package.__path__ = [sys.argv[1] + "/xgrammar"]
sys.modules["xgrammar"] = package
import xgrammar.load_binding
from xgrammar import tvm_ffi_binding as binding
import numpy as np

told = json.loads(sys.stdin.read())
vocabulary, tokens = told["vocabulary"], told["tokens"]
info = binding.TokenizerInfo(vocabulary, 0, None, [told["stop"]], False)
compiler = binding.GrammarCompiler(info, 1, True, -1)
grammar = compiler.compile_json_schema(json.dumps(told["schema"]), *told["settings"])
matcher = binding.GrammarMatcher(grammar, None, False, -1, None)
masks = []
for token in tokens:
    mask = np.zeros((1, -(-len(vocabulary) // 32)), np.int32)
    matcher.fill_next_token_bitmask(mask, 0, False)
    masks.append(mask[0].tolist())
    assert matcher.accept_token(token, False)
print(json.dumps([masks, str(grammar.serialize_json()), list(info.stop_token_ids())]))
"""


def test_beside_its_own_package(rng, tmp_path):
    """The same tokens in a process that has tvm_ffi, and xgrammar's own classes over it."""
    from tests.helpers.children import start

    compiled = grammars.compiled()
    matcher = grammars.kind("GrammarMatcher")(compiled, None, False, -1, None)
    tokens, masks = generate(matcher, random_draw(rng), most=2000)
    told = {"vocabulary": VOCABULARY, "tokens": tokens, "stop": STOP,
            "schema": grammars.SCHEMA, "settings": grammars.SETTINGS}  # fmt: skip
    child = start(BESIDE, str(grammars.package()))
    out, err = child.communicate(json.dumps(told), timeout=300)
    assert child.returncode == 0, err
    theirs, serialized, stops = json.loads(out)
    assert len(theirs) == len(masks) == len(tokens)
    vocab = len(VOCABULARY)
    for own, other in zip(masks, theirs, strict=True):
        bits = allowed(np.array([other], np.int32))[0]
        assert (allowed(own) == bits).all() and bits.any() and len(bits) == vocab
    assert json.loads(compiled.serialize_json()) == json.loads(serialized)
    assert [*compiled.tokenizer_info().stop_token_ids()] == stops == [STOP]


ALONE = """
import sys
from tests.helpers import grammars
matcher = grammars.matcher()
assert matcher.accept_token(grammars.VOCABULARY.index("{"), False)
print(sorted({"torch", "tvm_ffi", "xgrammar", "transformers"} & {*sys.modules}))
print(matcher.is_completed())
"""


def test_nothing_else_is_imported():
    grammars.package()
    assert done(ALONE) == (0, "[]\nFalse\n", "")


def test_what_it_registers():
    compiled = grammars.compiled()
    names = fi_ffi.functions("xgrammar.")
    assert "xgrammar.tvm_ffi_binding.kernels.apply_token_bitmask_inplace_cpu" in names
    assert not fi_ffi.module(grammars.package() / grammars.MEMBER).entries()
    assert isinstance(compiled, ReflectedObject)
    assert compiled.type_key == "xgrammar.tvm_ffi_binding.CompiledGrammar"
    assert {"grammar", "memory_size_bytes", "serialize_json"} <= {*dir(compiled)}
    again = grammars.kind("CompiledGrammar").deserialize_json(
        compiled.serialize_json(), compiled.tokenizer_info()
    )
    assert again.memory_size_bytes() > 0 and "root ::=" in again.grammar().to_string()
    accept = grammars.kind("GrammarMatcher")(again, None, False, -1, None).accept_token
    assert isinstance(accept, ModuleEntry)
    assert accept.signature.params == ("int", "bool")
    assert accept(VOCABULARY.index("{"), False)  # which keeps its matcher
    with pytest.raises(fi_ffi.ArgumentTypeError, match="argument `0: int`"):
        accept("{", False)
    with pytest.raises(fi_ffi.KernelError):
        grammars.kind("Grammar").from_ebnf("root ::= (", "root")
    recursion = fi_ffi.function("xgrammar.tvm_ffi_binding.config.get_max_recursion_depth")
    assert recursion() > 0


def test_many_matchers_leave_nothing():
    compiled, mask = grammars.compiled(), empty_mask(1)
    kind, before = grammars.kind("GrammarMatcher"), compiled.use_count

    def calls():
        with kind(compiled, None, False, -1, None) as matcher:
            matcher.fill_next_token_bitmask(mask, 0, False)
            fork = matcher.fork()
            assert fork.accept_token(VOCABULARY.index("{"), False)
            assert [*fork.stop_token_ids()] == [STOP]
        with pytest.raises(fi_ffi.ArgumentError, match="released"):
            matcher.reset()

    leaves_nothing(calls, 600)
    gc.collect()
    assert compiled.use_count == before


def test_masked_logits_are_sampled(machine, rng):
    """A sampler after the mask draws what the grammar takes alone, and all of it in the end."""
    machine.need("sampling")
    rows = 64
    matchers = [grammars.matcher() for _ in range(2)]
    matchers[1].accept_token(VOCABULARY.index("{"), False)
    mask = empty_mask(rows)
    for row in range(rows):
        matchers[row % 2].fill_next_token_bitmask(mask, row, False)
    logits = rng.standard_normal((rows, len(VOCABULARY)), np.float32)
    expected = np.where(allowed(mask), logits, -np.inf)
    placed = machine.place(logits.copy())
    grammars.apply(machine, placed, mask)
    assert (placed.get() == expected).all() and placed.intact()
    drawn = [set(), set()]
    for seed in range(40):
        tokens = machine.place(np.full(rows, -1, np.int32))
        fi_ffi.sampling_from_logits(
            placed.desc(), tokens.desc(), seed_val=seed, offset_val=0, stream=machine.stream
        )
        machine.synchronize()
        found = tokens.get()
        assert allowed(mask)[np.arange(rows), found].all()
        for row, token in enumerate(found):
            drawn[row % 2].add(int(token))
    for row in range(2):
        assert drawn[row] == {*np.flatnonzero(allowed(mask)[row])}


def test_the_kernel_that_it_registers(rng):
    """Masks logits on the host, beside numpy."""
    logits = rng.standard_normal((4, len(VOCABULARY)), np.float32)
    mask = rng.integers(-(2**31), 2**31, (4, empty_mask(1).shape[1]), np.int64).astype(np.int32)
    expected = np.where(allowed(mask), logits, -np.inf)
    grammars.package()
    grammars.kind("Grammar")
    apply = fi_ffi.function("xgrammar.tvm_ffi_binding.kernels.apply_token_bitmask_inplace_cpu")
    apply(
        logits.ctypes.data, logits.shape, (logits.shape[1], 1),
        mask.ctypes.data, mask.shape, (mask.shape[1], 1), logits.shape[1], None, "float32",
    )  # fmt: skip
    assert (logits == expected).all()


def test_the_page(capsys):
    """The page's program, with the folder of the wheel in its place."""
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert block.count('"xgrammar/libxgrammar_bindings.so"') == 1
    path = str(grammars.package() / grammars.MEMBER)
    exec(block.replace('"xgrammar/libxgrammar_bindings.so"', repr(path)), {})
    made = json.loads(capsys.readouterr().out)
    assert type(made["age"]) is int and {*made} == {"age"}
