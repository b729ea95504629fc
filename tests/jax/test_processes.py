"""Processes that call inside jax.jit: interrupts, forks, imports, and how they end."""

from __future__ import annotations

import re

import pytest

from tests.helpers.children import done

DROPPED = """
import gc, importlib, sys
import numpy as np, jax
import fi_ffi.jax
x, w = np.ones((4, 64), np.float16), np.ones(64, np.float16)
norm = jax.jit(fi_ffi.jax.rmsnorm).lower(x, w).compile()
importlib.reload(fi_ffi.jax)
print((np.asarray(jax.jit(fi_ffi.jax.rmsnorm)(2 * x, w)) == np.asarray(norm(x, w))).all())
for name in [name for name in sys.modules if name.startswith("fi_ffi.jax")]:
    del sys.modules[name]
del fi_ffi.jax
gc.collect()
print((np.asarray(norm(x, w)) == 1).all())
import fi_ffi.jax
try:
    fi_ffi.jax.rmsnorm(x, w)
except fi_ffi.AbiError as error:
    print(error)
"""


def test_a_program_whose_callbacks_nobody_has():
    """It runs on; what is imported a second time is refused, and not taken for the first."""
    code, out, err = done(DROPPED)
    assert code == 0, err
    assert out.split("\n")[:2] == ["True", "True"]
    assert "handlers of an earlier import of fi_ffi.jax" in out


FORKED = """
import os, warnings
import numpy as np, jax
import fi_ffi.jax
warnings.simplefilter("ignore")  # jax's, of forks
x, w = np.ones((4, 64), np.float16), np.ones(64, np.float16)
norm = jax.jit(fi_ffi.jax.rmsnorm)
jax.block_until_ready(norm(x, w))
pid = os.fork()
if not pid:
    print("child", (np.asarray(norm(x, w)) == 1).all(), flush=True)
    try:
        jax.jit(fi_ffi.jax.rmsnorm)(x[:2], w)
    except fi_ffi.LoaderError as error:
        print(error, flush=True)
    fi_ffi.jax.primitive._finish(os.getppid())
    os._exit(0)
print("ended", os.waitpid(pid, 0)[1])
print("parent", (np.asarray(norm(x, w)) == 1).all())
"""


def test_a_forked_child():
    """It runs what is compiled. It cannot compile, as XLA would wait there for ever."""
    code, out, err = done(FORKED, seconds=60)
    assert code == 0, err
    lines = out.split("\n")
    assert lines[0] == "child True" and lines[2:4] == ["ended 0", "parent True"], out
    assert re.match("fi_ffi.jax can compile nothing in this process: .*spawn$", lines[1])


INTERRUPTED = """
import os, signal, sys, threading, time
import numpy as np, jax
import fi_ffi.jax
signal.signal(signal.SIGINT, signal.default_int_handler)
from fi_ffi.ops.functions import OPS

x, w = np.ones((4, 64), np.float16), np.ones(64, np.float16)
norm = jax.jit(fi_ffi.jax.rmsnorm)
jax.block_until_ready(norm(x, w))
find = fi_ffi.jax.primitive.handlers._find
def slow(name):
    print("begun", flush=True)
    time.sleep(3)
    return find(name)
fi_ffi.jax.primitive.handlers._find = slow
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    try:
        jax.block_until_ready(norm(x, w))
    except Exception as error:
        print(type(error).__name__, flush=True)
    time.sleep(5)
except KeyboardInterrupt:
    print("interrupted", flush=True)
fi_ffi.jax.primitive.handlers._find = find
try:
    jax.block_until_ready(norm(x, w))
    print("again", flush=True)
except KeyboardInterrupt:
    print("interrupted late", flush=True)
"""


def test_an_interrupt_is_raised_in_the_end():
    code, out, err = done(INTERRUPTED)
    assert code == 0, err
    assert out.split()[0] == "begun" and "interrupted" in out, out


WHILE_XLA_COMPUTES = """
import signal, threading, time
# A shell has what it runs behind others ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
import numpy as np, jax, jax.numpy as jnp
jax.config.update("jax_cpu_enable_async_dispatch", False)  # XLA computes in the main thread
import fi_ffi.jax

w = jnp.ones(640, jnp.float16)

@jax.jit
def late(x, count):
    x = jax.lax.fori_loop(0, count, lambda i, x: jnp.sqrt(x + 2), x)
    return fi_ffi.jax.rmsnorm((x * 0 + 1).astype(jnp.float16), w)

def run(count):
    return late(jnp.ones((40, 640)), count)

handlers = fi_ffi.jax.primitive.handlers
find, threads = handlers._find, []
handlers._find = lambda name: threads.append(threading.current_thread()) or find(name)
count, took = 1, 0
while took < 0.5:
    count *= 2
    begun = time.perf_counter()
    jax.block_until_ready(run(count))
    took = time.perf_counter() - begun
assert {*threads} == {threading.main_thread()}
signal.signal(signal.SIGALRM, signal.default_int_handler)
try:
    signal.setitimer(signal.ITIMER_REAL, took / 4)
    try:
        kept = run(count)
        print("is right:", (np.asarray(kept) == 1).all(), flush=True)
    except Exception:
        print("failed", flush=True)
    time.sleep(5)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_an_interrupt_while_xla_computes():
    """Python raises it where the handler begins: the call fails, rather than leave its result."""
    code, out, err = done(WHILE_XLA_COMPUTES)
    assert code == 0, err
    assert "is right: False" not in out and out.endswith("interrupted\n"), out + err


def test_another_signal_s_exception_while_xla_computes():
    """Its own handler is called again, also where nobody hears Ctrl-C."""
    hears, ignores = "SIGINT, signal.default_int_handler", "SIGINT, signal.SIG_IGN"
    program = WHILE_XLA_COMPUTES.replace(hears, ignores)
    begin, end = program.split("signal.signal(signal.SIGALRM, signal.default_int_handler)\n")
    handler = """
class Late(BaseException):
    pass

def late_now(*_):
    raise Late

signal.signal(signal.SIGALRM, late_now)
"""
    program = begin + handler + end.replace("KeyboardInterrupt", "Late")
    code, out, err = done(program)
    assert code == 0, err
    assert "is right: False" not in out and out.endswith("interrupted\n"), out + err


LEFT = """
import os, sys
import numpy as np, jax
import fi_ffi.jax
x, w = np.ones((400, 640), np.float16), np.ones(640, np.float16)
norm = jax.jit(fi_ffi.jax.rmsnorm)
for _ in range(20):
    y = norm(x, w)
    if sys.argv[1] == "used":
        x = y
if sys.argv[1] == "late":  # after what takes a second or two, with nothing of ours running
    turns = lambda x: jax.lax.fori_loop(0, 20000, lambda i, x: jax.numpy.sqrt(x + 2), x)
    slow = jax.jit(lambda x: norm(turns(x.astype("float32")).astype("float16"), w)).lower(x)
    slow = slow.compile()
    y = slow(x)
del y
print("queued", flush=True)
"""


@pytest.mark.parametrize("results", ["used", "dropped", "late"])
def test_a_process_that_ends_with_calls_queued(results):
    assert done(LEFT, results, seconds=60) == (0, "queued\n", "")
