"""Calls inside jax.jit: errors, donated memory, loops, devices, threads and the process's end."""

from __future__ import annotations

import functools
import gc
import os
import re
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fi_ffi.jax
from fi_ffi.jax import xla

from tests.helpers.stress_strength import scaled

HEADER = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
F16 = np.float16


# What jax raises for a call that fails: at once, or where its result is waited for.
FAILURES = (ValueError, jax.errors.JaxRuntimeError)


@pytest.fixture
def rows(rng):
    x = rng.standard_normal((37, 64)).astype(F16)
    return x, (1 + rng.standard_normal(64) / 10).astype(F16)


def normed(x, weight, eps=1e-6):
    x, weight = x.astype(float), np.asarray(weight, float)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def near(got, wanted):
    return np.abs(np.asarray(got, float) - wanted).max() <= 2e-3 * np.abs(wanted).max()


def test_the_header_that_is_installed():
    """What is read by hand is what the installed jax is compiled from."""
    text = HEADER.read_text()
    version = (re.search(rf"XLA_FFI_API_{part} (\d+)", text)[1] for part in ("MAJOR", "MINOR"))
    assert tuple(map(int, version)) in xla.VERSIONS
    codes = dict(re.findall(r"XLA_FFI_DataType_(\w+) = (\d+)", text))
    short = {"bool": "PRED", "bfloat16": "BF16"}
    for code, name in xla.DTYPES.items():
        kind, bits, more = re.fullmatch(r"([a-z]+)(\d*)_?(\w*)", name).groups()
        of_kind = {"float": "F", "uint": "U", "int": "S"}.get(kind, "")
        theirs = short.get(name) or f"{of_kind}{bits}{more.upper()}"
        assert int(codes[theirs]) == code, name
    errors = dict(re.findall(r"XLA_FFI_Error_Code_(\w+) = (\d+)", text))
    told = ("INVALID_ARGUMENT", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED", "INTERNAL", "CANCELLED")
    assert [code for _, code in xla._CODES] == [int(errors[name]) for name in told]
    functions = re.findall(r"_XLA_FFI_API_STRUCT_FIELD\((XLA_FFI_\w+)\);", text)
    first = xla.ffi.offsetof("Api", "Error_Create")
    for name in ("Error_Create", "Stream_Get", "DeviceOrdinal_Get"):
        at = first + 8 * functions.index(f"XLA_FFI_{name}")
        assert xla.ffi.offsetof("Api", name) == at, name


@pytest.mark.parametrize("what", ["minor version", "frame", "metadata"])
def test_another_interface_is_refused(what, monkeypatch):
    """With both numbers, before anything is called by it."""
    if what == "minor version":
        monkeypatch.setattr(xla, "VERSIONS", ((0, 2),))
    else:
        kind = {"frame": "CallFrame", "metadata": "Metadata"}[what]
        size = xla._size
        monkeypatch.setattr(xla, "_size", lambda name, last: size(name, last) + 8 * (name == kind))
    words = (
        r"of version 0\.\d.*reads 0\.2: use" if what == "minor version" else r"of \d+ bytes, not"
    )
    monkeypatch.setattr(xla, "TARGETS", {False: f"fi_ffi.refused {what}"})
    with pytest.raises(fi_ffi.FiFfiError, match=words):
        xla.Handlers(print).register("cpu")


def test_errors_have_our_words(rows):
    x, weight = rows
    norm = jax.jit(fi_ffi.jax.rmsnorm)
    words = r"ArgumentError: rmsnorm: argument `weight`: got float16\[50\] on cpu, expected h = 64"
    for _ in range(2):
        with pytest.raises(FAILURES, match=words):
            jax.block_until_ready(norm(x, weight[:50]))
    assert near(norm(x, weight), normed(x, weight))


ops = fi_ffi.jax
ONE, ENDS = np.ones(1, np.float32), np.array([0, 9], np.int32)
TRACED = {
    "vmap": (lambda x, w: jax.vmap(ops.rmsnorm, (0, None))(x[None], w), "`input`.*jax.vmap"),
    "vmap of a weight": (lambda x, w: jax.vmap(ops.rmsnorm, (None, 0))(x, w[None]), "`weight`"),
    "grad": (lambda x, w: jax.grad(lambda w: ops.rmsnorm(x, w).sum())(w), "`weight`.*custom_vjp"),
    "jvp": (lambda x, w: jax.jvp(ops.rmsnorm, (x, w), (x, w)), "`input`.*custom_vjp"),
    "a traced scalar": (lambda x, w: jax.jit(ops.rmsnorm)(x, w, 1e-5), "`eps`.*static_argnames"),
    "no dtype": (lambda x, w: ops.rmsnorm_quant(x, w, ONE), "`out`.*out=DTYPE"),
    "no size": (lambda x, w: ops.segment_packbits(np.ones(9, bool), ENDS, ENDS), "`y`.*num_bytes"),
    "an unknown dtype": (lambda x, w: ops.rmsnorm(x, w, out=np.complex64), "`out`.*complex64"),
    "no dtype at all": (lambda x, w: ops.rmsnorm(x, w, out="halves"), "`out`.*halves"),
    "complex": (lambda x, w: ops.rmsnorm(x.astype(np.complex64), w), r"`input`: got complex64\[37"),
    "a name": (
        lambda x, w: ops.rmsnorm(x, w, epsilon=1e-5),
        r"`args`: got .*'epsilon', exp.*, eps",
    ),
    "one too few": (
        lambda x, w: ops.rmsnorm(x),
        r"`args`: got .*'weight', expected .input, weight",
    ),
    "no op": (lambda x, w: ops.call("rmsnorms", x, w), "`op`: got rmsnorms"),
}


@pytest.mark.parametrize("what", TRACED)
def test_what_is_refused_in_a_trace(what, rows):
    call, words = TRACED[what]
    with pytest.raises(fi_ffi.ArgumentError, match=words):
        call(*rows)


def test_a_name_that_is_no_op():
    with pytest.raises(AttributeError, match="no 'rmsnorms'"):
        fi_ffi.jax.rmsnorms  # noqa: B018
    assert {"rmsnorm", "call", "run"} <= {*dir(fi_ffi.jax)}


def test_derivatives_by_a_rule_of_the_caller(rows):
    x, weight = (jnp.asarray(part, jnp.float16) for part in rows)

    @jax.custom_vjp
    def norm(x):
        return fi_ffi.jax.rmsnorm(x, weight)

    norm.defvjp(lambda x: (norm(x), x), lambda x, g: (2 * g,))
    found = jax.jit(jax.grad(lambda x: norm(x).astype(jnp.float32).sum()))(x)
    assert (np.asarray(found) == 2).all()


@pytest.mark.parametrize("is_donated", [False, True])
def test_what_is_read_and_written(is_donated, rows):
    """It is the argument's memory if that was donated, and else a copy: the argument stays."""
    x, weight = rows
    donated = (0, 1) if is_donated else ()
    add = jax.jit(fi_ffi.jax.fused_add_rmsnorm, donate_argnums=donated)
    given = jnp.asarray(x), jnp.asarray(2 * x)
    places = [array.unsafe_buffer_pointer() for array in given]
    found = jax.block_until_ready(add(*given, weight))
    assert ([array.unsafe_buffer_pointer() for array in found] == places) is is_donated
    assert [array.is_deleted() for array in given] == [is_donated] * 2
    total = (x + 2 * x).astype(F16)
    assert near(found[0], normed(total, weight)) and (np.asarray(found[1]) == total).all()
    assert is_donated or (np.asarray(given[0]) == x).all()


def test_a_scanned_loop(rng, rows):
    """32 layers, each with a weight of its own."""
    x, _ = rows
    weights = (1 + rng.standard_normal((32, 64)) / 10).astype(F16)

    @jax.jit
    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (fi_ffi.jax.rmsnorm(x * 2, w), None), x, weights)[0]

    wanted = x
    for weight in weights:
        wanted = normed(np.asarray(wanted * 2, F16), weight).astype(F16)
    assert near(layers(x, weights), wanted.astype(float))


def test_other_shapes_and_empty_ones(rows):
    x, weight = rows
    norm = jax.jit(fi_ffi.jax.rmsnorm)
    for count in (0, 1, 37):
        assert norm(x[:count], weight).shape == (count, 64)
        assert count == 0 or near(norm(x[:count], weight), normed(x[:count], weight))


def test_threads(rows):
    x, weight = rows
    norm = jax.jit(fi_ffi.jax.rmsnorm)
    found = {}

    def work(number):
        found[number] = [norm(x + F16(number), weight) for _ in range(20)][-1]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, got in found.items():
        assert near(got, normed(x + F16(number), weight))
    assert len(found) == 8


def test_a_program_that_outlives_the_choice_of_kernels(rows):
    x, weight = rows
    norm = jax.jit(fi_ffi.jax.rmsnorm).lower(x, weight).compile()
    before = np.asarray(norm(x, weight))
    fi_ffi.use_kernels(None)
    assert (np.asarray(norm(x, weight)) == before).all()


def resident():
    """Bytes of memory that the process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_many_programs_leave_little(rows):
    """Compilations whose caches are cleared: fi_ffi keeps nothing of them but their texts."""
    x, weight = rows
    shape = jnp.asarray(x[:1])

    def compiled(number):
        norm = functools.partial(fi_ffi.jax.rmsnorm, eps=1e-6 * (number + 1))
        jax.block_until_ready(jax.jit(norm)(shape, weight))
        if number % 50 == 19:
            jax.clear_caches()
            gc.collect()

    for number in range(20):
        compiled(number)
    before = len(gc.get_objects()), resident()
    for number in range(20, scaled(1020, 70)):
        compiled(number)
    assert len(gc.get_objects()) - before[0] < 5000
    assert resident() - before[1] < 12 << 20
