"""What samplers and filters refuse, and what scratch they ask for."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import fi_ffi
from fi_ffi.ops.call import memory
from fi_ffi.ops.functions import OPS

from tests.helpers.cases import make_case
from tests.ops.test_sampling_filters import SCRATCH, make


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def test_scratch_that_is_too_small_is_refused(rng):
    for name, words in (
        ("softmax", "1048576 bytes or more"),
        ("top_k_mask_logits", "1048576 bytes or more"),
        ("top_p_renorm_probs", f"{fi_ffi.top_p_renorm_workspace_size(5, 4096)} bytes or more"),
    ):
        case = make(name, rng, 5, 4096)
        (scratch,) = {*SCRATCH} & {*case.arrays}
        small = np.zeros(1024, np.uint8)
        with pytest.raises(fi_ffi.ArgumentError, match=f"`{scratch}`.*{words}"):
            OPS[name](**case.arrays | {scratch: small}, **case.scalars)


def test_what_top_p_renorm_needs():
    size = fi_ffi.top_p_renorm_workspace_size
    assert size(1000, 2047) == 0 == size(0, 4096)
    # A state of 384 bytes, 2048 buckets of 12, and two buffers of 256 floats for 64 or less.
    assert size(2, 2048) == 768 + 2 * 2048 * 12 + 2 * 2 * 1024
    assert size(1, 128256) == 512 + 2048 * 12 + 2 * 4 * 4096
    for wrong in (-1, 1.5, "1", None):
        with pytest.raises(fi_ffi.ArgumentError):
            size(wrong, 4096)
        with pytest.raises(fi_ffi.ArgumentError):
            size(1, wrong)


def test_scratch_grows_with_what_it_is_for(rng):
    """A stream's own: each call has enough, and what is enough is kept."""
    seen = []
    for n, h in ((1, 4096), (20, 4096), (3, 4096), (1, 128), (200, 4096)):
        case = make("top_p_renorm_probs", rng, n, h, without=SCRATCH)
        fi_ffi.top_p_renorm_probs(**case.arrays, **case.scalars)
        assert case.error("renorm_probs", case.arrays["renorm_probs"])[1] <= 1
        (own,) = [
            of for name, of in memory._owned[memory.HOST].items()
            if name[0] == "top_p_renorm_probs"
        ]  # fmt: skip
        have = own.desc.shape[0]
        assert have >= fi_ffi.top_p_renorm_workspace_size(n, h)
        seen.append(have)
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("top_k_mask_logits", "logits"), ("top_k_renorm_probs", "probs"),
        ("radix_topk", "input"), ("radix_topk_ragged_transform", "input"),
    ],
)  # fmt: skip
def test_rows_that_blocks_would_wait_for_without_end(name, argument, gpu, rng):
    """A row shared by more blocks than may run at once: here, on 4 multiprocessors."""
    for size, is_right in ((60000, True), (60001, False)):
        if name.startswith("top_k"):
            case = make(name, rng, 1, size, without=("maybe_top_k_arr",))
        else:
            sizes = {"n": 1, "d": size, "top_k": 4, "workspace_size": 2**20}
            case = make_case(OPS[name].row, sizes, {"T": "float32"}, rng)
        placed = {key: gpu.place(array) for key, array in case.arrays.items()}
        descs = {key: array.desc() for key, array in placed.items()}
        if is_right:
            OPS[name](**descs, **case.scalars, stream=gpu.stream)
        else:
            with pytest.raises(fi_ffi.ArgumentError, match=f"`{argument}`.*multiprocessor"):
                OPS[name](**descs, **case.scalars, stream=gpu.stream)


def test_a_capture_finds_scratch_or_says_what_to_do(gpu, rng):
    """None can be made while a stream records; nor more of it."""
    row = OPS["top_p_renorm_probs"].row
    calls = []
    for n in (1, 30):
        case = make("top_p_renorm_probs", rng, n, 4096, without=SCRATCH)
        placed = {key: gpu.place(array) for key, array in case.arrays.items()}
        calls.append(({key: array.desc() for key, array in placed.items()}, case.scalars, placed))
    stream = gpu.streams(1)[0]
    (small, few, kept), (large, many, _) = calls
    gpu.runtime.capturing.add(stream)
    with pytest.raises(fi_ffi.ArgumentError, match="before the capture"):
        fi_ffi.top_p_renorm_probs(**small, **few, stream=stream)
    gpu.runtime.capturing.clear()
    fi_ffi.top_p_renorm_probs(**small, **few, stream=stream)
    gpu.runtime.capturing.add(stream)
    fi_ffi.top_p_renorm_probs(**small, **few, stream=stream)
    with pytest.raises(fi_ffi.ArgumentError, match=f"{row.name}.*before the capture"):
        fi_ffi.top_p_renorm_probs(**large, **many, stream=stream)
    assert kept


def test_more_outputs_than_rows_need_indices():
    probs, output = np.full((3, 8), 1 / 8, np.float32), np.zeros(5, np.int32)
    valid, indices = np.zeros(5, np.bool_), np.zeros(5, np.int32)
    with pytest.raises(fi_ffi.ArgumentError, match="`output`.*maybe_indices"):
        fi_ffi.sampling_from_probs(probs, output, valid)
    fi_ffi.sampling_from_probs(probs, output, valid, indices)
    assert valid.all()
    fi_ffi.sampling_from_probs(probs, output[:2], valid[:2])
    k = np.ones(3, np.int32)
    with pytest.raises(fi_ffi.ArgumentError, match="`maybe_top_k_arr`.*as long as `output`"):
        fi_ffi.top_k_sampling_from_probs(probs, output, valid, indices, k)
    fi_ffi.top_p_sampling_from_probs(probs, output, valid, indices, np.ones(3, np.float32))


def test_an_array_of_k_is_of_the_outputs_dtype():
    probs, output = np.full((3, 8), 1 / 8, np.float32), np.zeros(3, np.int64)
    valid = np.zeros(3, np.bool_)
    for call in (fi_ffi.top_k_sampling_from_probs, fi_ffi.top_k_top_p_sampling_from_probs):
        with pytest.raises(fi_ffi.ArgumentError, match="maybe_top_k_arr"):
            call(probs, output, valid, maybe_top_k_arr=np.ones(3, np.int32))
        call(probs, output, valid, maybe_top_k_arr=np.ones(3, np.int64))


def test_the_examples_of_the_page(rng):
    page = (Path(__file__).parent.parent.parent / "docs" / "sampling.md").read_text()
    first, second = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    logits = rng.standard_normal((4, 1000)).astype(np.float32)
    known = {
        "logits": logits, "probs": np.empty_like(logits), "tokens": np.full(4, -1, np.int32),
        "valid": np.zeros(4, np.bool_), "seed": 5, "offset": 0, "stream": None,
    }  # fmt: skip
    exec(first, known)
    assert known["valid"].all() and known["offset"] == 32
    ranks = (logits > np.take_along_axis(logits, known["tokens"][:, None], 1)).sum(axis=1)
    assert (ranks < 50).all()
    assert (np.count_nonzero(known["probs"], axis=1) == 50).all()
    x = rng.standard_normal((3, 100)).astype(np.float16)
    more = {"fi_ffi": fi_ffi, "x": x, "stream": None, "values": np.zeros((3, 7), np.float16)}
    exec(second, more | {"indices": (indices := np.zeros((3, 7), np.int32))})
    assert (np.sort(indices) == np.sort(np.argsort(-x, kind="stable")[:, :7])).all()
