"""Sampling on a GPU: the tests of tests/ops, and what only a GPU can show."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from cuda.bindings import runtime

import fi_ffi
from fi_ffi.cli.cuda import check
from fi_ffi.loader import search
from fi_ffi.loader.fetch.wheels_lock import the_lock
from fi_ffi.ops.functions import OPS
from fi_ffi.reference import sampling as reference

from tests.helpers import sampling_hang
from tests.helpers.bodies import bodies_of
from tests.helpers.cases import make_case
from tests.helpers.children import environment
from tests.helpers.sampling_calls import SAMPLERS, run
from tests.ops import test_sampling

globals().update(bodies_of(test_sampling))


def test_draws_beyond_what_the_kernel_counts(machine, rng):
    """Random numbers of 2**32 elements, and again the first ones: some of them are judged."""
    count, size = 60_000, 100_000
    assert count * size > 2**32
    logits = rng.standard_normal((3, size), np.float32)
    arrays = {
        "logits": logits, "output": np.full(count, -1, np.int32),
        "maybe_indices": rng.integers(0, 3, count).astype(np.int32),
    }  # fmt: skip
    words = {"seed_val": int(rng.integers(2**62)), "offset_val": int(rng.integers(2**30))}
    tokens = run(machine, "sampling_from_logits", arrays, **words)["output"]
    assert ((tokens >= 0) & (tokens < size)).all()
    first = -(-(2**32) // size)
    chosen = [0, first - 1, first, first + 1, count - 1, *rng.integers(0, count, 60)]
    for i in chosen:
        row = logits[arrays["maybe_indices"][i]].astype(np.float64)
        assert tokens[i] in reference._from_logits(words, row, int(i), 0, 1.0), i


@pytest.mark.parametrize("name", ["sampling_from_logits", *SAMPLERS])
def test_five_million_draws_of_a_row(name, machine, rng):
    """As often as their probability says, and none that is filtered out."""
    count, size = 5_000_000, 32000
    x = rng.standard_normal((1, size), np.float32)
    p = np.exp(x, dtype=np.float32)
    p /= p.sum()
    arrays = {
        "output": np.full(count, -1, np.int32), "maybe_indices": np.zeros(count, np.int32),
        **({"logits": x} if "logits" in name else {"probs": p, "valid": np.zeros(count, bool)}),
    }  # fmt: skip
    wanted, scalars = p[0].astype(np.float64), {"seed_val": int(rng.integers(2**62))}
    order, at_edge = np.sort(wanted)[::-1], np.zeros(size, bool)
    if "top_k" in name:
        scalars["top_k_val"] = 500.0 if "top_p" in name else 500
        wanted = np.where(wanted >= order[499], wanted, 0)
    if "top_p" in name:
        scalars["top_p_val"] = 0.5
        edge = int(np.searchsorted(order.cumsum(), 0.5))
        wanted = np.where(wanted >= order[edge], wanted, 0)
        at_edge = (p[0] <= order[edge - 3]) & (p[0] >= order[edge + 3])
    if "min_p" in name:
        scalars["min_p_val"] = 0.1
        wanted = np.where(p[0] >= np.float32(0.1) * p[0].max(), wanted, 0)
    got = run(machine, name, arrays, **scalars)
    assert "valid" not in got or got["valid"].all()
    counts = np.bincount(got["output"], minlength=size)
    # Where sums in float32 end, a token may be on either side of it.
    assert not counts[(wanted == 0) & ~at_edge].any()
    wanted *= count / wanted.sum()
    # They move some of the probability from token to token, too.
    error = np.abs(counts - wanted) - 8 * np.sqrt(wanted + 1) - 0.02 * wanted - 50
    assert error[~at_edge].max() <= 0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["top_k_renorm_probs", "top_k_mask_logits"])
def test_rows_that_just_fit_a_block(name, dtype, machine, rng, record_property):
    """The kernel of top_k_renorm_probs asks for all of a block's shared memory for rows that need
    nearly all, besides what it has for itself: CUDA refuses, and nothing is written."""
    machine.need("sampling")
    attribute = runtime.cudaDeviceAttr.cudaDevAttrMaxSharedMemoryPerBlockOptin
    room = (check(runtime.cudaDeviceGetAttribute(attribute, 0)) - 2080) // (
        4 if dtype == "float32" else 2
    )
    refused = []
    for size in (room - 1024, room - 512, room - 64, room - 8, room, room + 8):
        size -= size % 8
        sizes = {"n": 2, "h": size, "workspace_size": 2**20}
        case = make_case(OPS[name].row, sizes, {"T": dtype}, rng)
        try:
            got = run(machine, name, case.arrays, **case.scalars)
        except fi_ffi.KernelError as error:
            assert "TopKRenormProb failed" in str(error)
            refused.append(size)
            continue
        assert all(case.error(out, got[out])[1] <= 1 for out in case.expected), size
    record_property("refused", refused)
    assert name == "top_k_renorm_probs" or not refused
    assert all(room - 512 <= size <= room for size in refused)
    # And the next call is fine.
    case = make_case(OPS[name].row, {"n": 2, "h": 1000, "workspace_size": 2**20},
                     {"T": dtype}, rng)  # fmt: skip
    got = run(machine, name, case.arrays, **case.scalars)
    assert all(case.error(out, got[out])[1] <= 1 for out in case.expected)


@pytest.mark.parametrize("which", ["apart", "close"])
def test_a_search_that_does_not_end(which, machine):
    """top_p_renorm_probs of less than 2048 probabilities next to each other, in some releases: a
    watchdog tells of it, and the GPU serves others as before."""
    machine.need("sampling")
    release = tuple(
        int(part) for part in (search.release() or the_lock().default_release).split(".")[:3]
    )
    command = [sys.executable, sampling_hang.__file__, which]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(),
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=sampling_hang.SECONDS + 60)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
    if which == "close" and (0, 6, 8) <= release < (0, 6, 14):
        assert out.split() == ["launching"], err
        assert process.returncode == 124, f"{process.returncode}, not by its watchdog: {err}"
        assert "top_p_renorm_probs has not finished" in err
    else:
        assert (process.returncode, out.split()) == (0, ["launching", "finished"]), err
