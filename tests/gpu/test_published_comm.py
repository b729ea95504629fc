"""Collectives that others published: tokenspeed-kernel's trtllm_comm, by fi_ffi.module.

Two ranks are two streams of one GPU, and two GPUs where there are so many; there, kernels are
loaded when their library is (CUDA_MODULE_LOADING=EAGER): loading one waits for those that run. The
order of arguments and the workspace are those of the wheel's own Python caller.
"""

from __future__ import annotations

import os

import pytest

import fi_ffi

from tests.gpu.test_published import HALF, library, off, poisoned, torch  # noqa: F401  a fixture

RANKS, HIDDEN, MOST, EPS = 2, 1024, 64, 1e-5
FLAGS = 256 * 4  # bytes of a rank's
PLAIN, NORMED = 0, 1  # patterns
ROUNDS = 4  # the kernels' three buffers take turns


@pytest.fixture(params=["one GPU", "two GPUs"])
def group(request, library):  # noqa: F811
    """A call of an entry by all ranks, and their devices."""
    devices = ["cuda:0"] * RANKS
    if request.param == "two GPUs":
        if torch.cuda.device_count() < RANKS:
            pytest.skip("needs 2 GPUs")
        if os.environ.get("CUDA_MODULE_LOADING") != "EAGER":
            pytest.skip("needs CUDA_MODULE_LOADING=EAGER")
        devices = [f"cuda:{rank}" for rank in range(RANKS)]
        for one, other in (devices, devices[::-1]):  # torch enables access at a copy
            torch.zeros(1, device=one).copy_(torch.ones(1, device=other))
    made, size = library("trtllm_comm"), RANKS * MOST * 2112 * 2
    parts = [
        [torch.zeros(n, dtype=torch.uint8, device=device) for device in devices]
        for n in (size, RANKS * FLAGS, 3 * size)
    ]
    workspaces, counters, streams = [], [], []
    for rank, device in enumerate(devices):
        streams.append(torch.cuda.Stream(device))
        counters.append(torch.tensor([0, 0, 0, size, 0], dtype=torch.int32, device=device))
        words = [buffer.data_ptr() for part in parts for buffer in part]
        words.append(counters[-1].data_ptr())
        workspaces.append(torch.tensor(words, dtype=torch.int64, device=device))
        parts[2][rank].view(torch.int32).fill_(-(1 << 31) + (1 << 15))  # -0.0 of 16-bit floats
    for device in devices:
        torch.cuda.synchronize(device)

    def call(name, arguments):
        """`arguments(rank, workspace)` are those of a rank."""
        for device in devices:  # made on other streams
            torch.cuda.synchronize(device)
        for rank, stream in enumerate(streams):
            with fi_ffi.stream(stream):
                getattr(made, name)(*arguments(rank, workspaces[rank]))
        for device in devices:
            torch.cuda.synchronize(device)

    yield call, devices
    for device in devices:
        torch.cuda.synchronize(device)
    assert parts and counters


@pytest.fixture
def drawn(rng):
    """Normal numbers of each rank."""

    def draw(devices, *shape):
        return [
            torch.tensor(rng.standard_normal(shape), device=device).to(torch.bfloat16)
            for device in devices
        ]

    return draw


def normed(x, weight):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.double()


def close(got, expected, parts=1):
    allowed = HALF["bfloat16"] * parts
    assert off(got, expected.to(got.device), allowed, allowed) <= 1


def fused(drawn, devices, tokens):
    """The weights of each rank's norm, and its outputs: the sum, with the residual, and normed."""
    weight = [drawn(devices[:1], HIDDEN)[0].to(device) for device in devices]
    outs = [
        [poisoned(tokens, HIDDEN, dtype=torch.bfloat16).to(device) for _ in "abc"]
        for device in devices
    ]
    return weight, outs


def check_fused(pattern, outs, summed, residual, weight):
    plain, added, norm = outs
    if pattern == PLAIN:
        close(plain, summed, 2)
    else:
        total = summed + residual.double().to("cuda:0")
        close(added, total, 2)
        close(norm, normed(total, weight.to("cuda:0")), 3)


def on_first(tensors):
    return [tensor.double().to("cuda:0") for tensor in tensors]


@pytest.mark.parametrize("one_shot", [True, False])
@pytest.mark.parametrize("tokens", [4, 33])
@pytest.mark.parametrize("pattern", [PLAIN, NORMED])
def test_all_reduce(group, drawn, tokens, one_shot, pattern):
    call, devices = group
    for _ in range(ROUNDS):
        x, residual = (drawn(devices, tokens, HIDDEN) for _ in "ab")
        residual = [residual[0].to(device) for device in devices]
        weight, outs = fused(drawn, devices, tokens)

        def arguments(rank, workspace):
            plain, added, norm = outs[rank]  # noqa: B023
            of_norm = residual[rank], added, norm  # noqa: B023
            return (
                x[rank], RANKS, rank, tokens, HIDDEN, workspace, False, one_shot, True, True,  # noqa: B023
                False, pattern, plain if pattern == PLAIN else None,
                *(of_norm if pattern == NORMED else (None,) * 3), None, None, None,
                weight[rank] if pattern == NORMED else None, EPS, *(None,) * 9,  # noqa: B023
            )  # fmt: skip

        call("trtllm_allreduce_fusion", arguments)
        whole = sum(on_first(x))
        for rank, of_rank in enumerate(outs):
            check_fused(pattern, of_rank, whole, residual[rank], weight[rank])


@pytest.mark.parametrize("tokens", [2, 24])
def test_all_gather(group, drawn, tokens):
    """Of queries, latents and positions of DeepSeek's attention."""
    call, devices = group
    parts = 1536, 512, 64
    for _ in range(ROUNDS):
        x = drawn(devices, tokens, sum(parts))
        outs = [
            poisoned(RANKS * tokens, sum(parts), dtype=torch.bfloat16).to(device)
            for device in devices
        ]

        def arguments(rank, workspace):
            return (
                x[rank], RANKS, rank, sum(parts), workspace, False, True, True, False, PLAIN,  # noqa: B023
                tokens, RANKS * tokens, outs[rank], *(None,) * 6, EPS, EPS, *parts,  # noqa: B023
            )  # fmt: skip

        call("trtllm_allgather_fusion", arguments)
        for out in outs:
            assert torch.equal(out.to("cuda:0"), torch.cat([part.to("cuda:0") for part in x]))


@pytest.mark.parametrize("one_shot", [True, False])
@pytest.mark.parametrize("tokens", [3, 16])
@pytest.mark.parametrize("pattern", [PLAIN, NORMED])
def test_reduce_scatter(group, drawn, tokens, one_shot, pattern):
    """Each rank gets its tokens' sums."""
    call, devices = group
    for _ in range(ROUNDS):
        x, residual = drawn(devices, RANKS * tokens, HIDDEN), drawn(devices, tokens, HIDDEN)
        weight, outs = fused(drawn, devices, tokens)

        def arguments(rank, workspace):
            plain, added, norm = outs[rank]  # noqa: B023
            of_norm = residual[rank], added, norm  # noqa: B023
            return (
                x[rank], RANKS, rank, RANKS * tokens, HIDDEN, workspace, False, one_shot, True,  # noqa: B023
                True, pattern, tokens, plain if pattern == PLAIN else None, None,
                *(of_norm if pattern == NORMED else (None,) * 3), None, None,
                weight[rank] if pattern == NORMED else None, EPS, None, None,  # noqa: B023
            )  # fmt: skip

        call("trtllm_reducescatter_fusion", arguments)
        whole = sum(on_first(x))
        for rank, of_rank in enumerate(outs):
            mine = whole[rank * tokens : (rank + 1) * tokens]
            check_fused(pattern, of_rank, mine, residual[rank], weight[rank])
