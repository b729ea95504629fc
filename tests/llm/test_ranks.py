"""examples/llm split over ranks: the parts of the weights, logits, tokens, and ways to run them."""

from __future__ import annotations

import enum
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine.device
import engine.model
import engine.ranks
import ml_dtypes
import numpy as np
import pytest
import requests
from engine import Config, Sampling, load, watch
from engine.ranks import Actors, Job, group_of, index_of
from engine.split import DIMENSIONS, ONCE, Split, key_of, of_rank
from engine.steps import SIZES as STEPS
from engine.weights import Weights, shapes
from safetensors.numpy import save_file
from tiny import make_tiny

from fi_ffi import comm
from fi_ffi.abi.streams import current_scope
from fi_ffi.errors import ArgumentError, HangError, LoaderError

from tests.llm.forward import Forward
from tests.llm.process import ServerProcess, children
from tests.llm.serving import KINDS, MORE, Serving, check_empty, greedy, texts
from tests.llm.test_processors import EvenThenOdd, adjusted, log_softmax

LENGTHS = (1, 40, 17)
# Sizes of which each of four ranks has some, and in fp8 whole blocks.
SIZES = {
    "qwen3_next": {
        "linear_num_key_heads": 4, "linear_num_value_heads": 8,
        "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256,
    },
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256},
    "mixtral": {"intermediate_size": 256},
    "llama_fp8": {"head_dim": 128, "intermediate_size": 512},
    "qwen3_fp8": {"intermediate_size": 512},
    "qwen3_moe": {"moe_intermediate_size": 256},
    "gpt_oss": {"intermediate_size": 256},
    "gpt_oss_mxfp4": {"intermediate_size": 256},
    "qwen3_moe_fp8": {"moe_intermediate_size": 512, "intermediate_size": 512},
}  # fmt: skip
by_kind = pytest.mark.parametrize("kind", KINDS)
# Each kind with two ranks; with four, where two share a key head, one of each make.
SPLIT = [(kind, 2) for kind in (*KINDS, *MORE)]
SPLIT += [(kind, 4) for kind in ("llama", "qwen3_fp8", "qwen3_next", "gpt_oss")]
by_size = pytest.mark.parametrize("size", [2, 4])


# On a GPU a process each: ranks in one would have allocations wait for each other's kernels.
def way_on(where: str) -> str:
    return "threads" if where == "cpu" else "processes"


@pytest.fixture
def split(serve: Any) -> Any:
    """`split(kind)` makes a checkpoint that four ranks can share."""
    return lambda kind, **changes: serve(kind, **SIZES.get(kind, {}) | changes)


def check_same(serving: Serving, one: Any, other: Any) -> None:
    """The greedy tokens of two requests, as far as rounding does not decide between them."""
    for place, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=True)):
        if a != b:
            row, theirs = (serving.logits[request][place] for request in (one, other))
            assert row[a] - row[b] <= 10 * np.sqrt(np.mean((row - theirs) ** 2))
            return


@pytest.mark.parametrize(("kind", "size"), SPLIT)
def test_logits_and_greedy_tokens(split, kind, size, where):
    """Prompts, whole and in pieces, and decoding: right, and as one rank has it."""
    serving = split(kind)
    prompts = [serving.prompt(n) for n in LENGTHS]
    got, cut = [], {"max_tokens": 33}
    for options in (cut, cut | {"tp": size, "way": way_on(where)}):
        engine = serving.engine(**options)
        requests = [engine.submit(prompt, greedy(5)) for prompt in prompts]
        engine.run()
        assert all(serving.error(request) <= 1 for request in requests)
        check_empty(engine)
        got.append(requests)
    for one, other in zip(*got, strict=True):
        check_same(serving, one, other)


EACH = ("", "norm", "embed", "q_proj", "down_proj")


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("kind", "name"),
    [("llama", name) for name in (*EACH, "lm_head")]
    + [("gpt_oss", name) for name in (*EACH, "router", "sinks")]
    + [("qwen3_next", name) for name in (*EACH, "A_log", "mlp.gate")]
    + [("qwen3_fp8", name) for name in EACH[:3]],
)
def test_tensors_of_other_dtypes(request, serve, kind, name, tp, where):
    """They become what config.json says: kernels would read their bytes as others."""
    make = serve if tp == 1 else request.getfixturevalue("split")
    serving = make(kind, intermediate_size=512)
    weights, tensors, changed = Weights(serving.path), {}, 0
    other = ml_dtypes.bfloat16 if (kind, name) == ("llama", "") else np.float32
    for each in weights.files:
        tensors[each] = np.array(weights(each))
        if name in each and tensors[each].dtype.itemsize == 2 and "_scale" not in each:
            tensors[each], changed = tensors[each].astype(other), changed + 1
    save_file(tensors, serving.path / "model.safetensors")
    assert changed
    serving.forward = Forward(serving.path)
    engine = serving.engine(tp=tp, way=way_on(where)) if tp > 1 else serving.engine()
    asked = engine.submit(serving.prompt(30), greedy(3))
    engine.run()
    assert serving.error(asked) <= 1


def test_penalties_and_log_probabilities(split, where):
    """Rank 0 has what they need: the tokens drawn, prompts, and all logits."""
    serving = split("llama")
    engine = serving.engine(tp=2, way=way_on(where), max_tokens=33)
    some = {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.4,
            "logit_bias": {40: 2.0}, "temperature": 0, "ignore_eos": True}  # fmt: skip
    requests = [
        engine.submit(serving.prompt(n), Sampling(**some, logprobs=2, max_tokens=12))
        for n in LENGTHS
    ]
    told = engine.submit(serving.prompt(50), Sampling(logprobs=1, prompt_logprobs=True))
    engine.run()
    for request in requests:
        for i, (token, (value, ids, _)) in enumerate(
            zip(request.tokens, request.logprobs, strict=True)
        ):
            row = serving.logits[request][i]
            x = adjusted(row, request.prompt, request.tokens[:i], request.sampling)
            assert x[token] >= x.max() - 1e-5 * np.abs(x).max()
            assert abs(value - log_softmax(row)[token]) < 1e-4
            assert ids[0] == row.argmax()
    assert len(told.prompt_logprobs) == 49
    check_empty(engine)


@by_size
def test_tokens_are_drawn_from_all_logits(split, size, where):
    """Each is where the request's own number falls among the whole row's probabilities."""
    serving = split("llama")
    engine = serving.engine(tp=size, way=way_on(where))
    samplings = [Sampling(temperature=1.3, seed=n, max_tokens=8, ignore_eos=True) for n in range(3)]
    requests = [
        engine.submit(serving.prompt(n), s) for n, s in zip(LENGTHS, samplings, strict=True)
    ]
    engine.run()
    for request in requests:
        assert serving.error(request) <= 1
        numbers = request.sampling.generator()
        for token, row in zip(request.tokens, serving.logits[request], strict=False):
            p = np.exp((row - row.max()).astype(np.float64) / 1.3)
            below = np.cumsum(p) / p.sum()
            u = numbers.random()
            assert below[token] - p[token] / p.sum() - 1e-5 <= u <= below[token] + 1e-5


def test_many_requests_and_prompts_found_again(split, where):
    """Continuous batching, pages and reuse on two ranks."""
    serving = split("qwen3")
    engine = serving.engine(num_pages=24, max_batch=3, max_tokens=40, tp=2, way=way_on(where))
    start = serving.prompt(50)
    first = engine.submit(start, greedy(3))
    engine.run()
    requests = [engine.submit(start + serving.prompt(n), greedy(n)) for n in (1, 20, 9)]
    requests += [engine.submit(serving.prompt(n), greedy(5)) for n in (3, 70, 12, 30)]
    cancelled = engine.submit(serving.prompt(20), greedy(30))
    for _ in range(9):
        engine.step()
    engine.cancel(cancelled)
    engine.run()
    assert [request.reused for request in requests[:3]] == [48, 48, 48]
    assert all(serving.error(request) <= 1 for request in [first, *requests])
    check_empty(engine)


def test_processes_give_the_tokens_of_threads(split, where):
    serving = split("llama")
    prompts = [serving.prompt(n) for n in (7, 30)]
    some = Sampling(temperature=0.9, top_k=40, top_p=0.9, seed=3, max_tokens=9, ignore_eos=True)
    got = [texts(serving.engine(tp=2, way=way), prompts, some) for way in ("threads", "processes")]
    assert got[0] == got[1]


def test_a_rank_that_is_killed(split, where):
    """The engine ends soon, and says which rank is gone."""
    serving, before = split("llama"), {*multiprocessing.active_children()}
    made = serving.engine(tp=2, way="processes")
    # Of the same length: a product's first call may wait for the GPU with the driver's lock.
    texts(made, [serving.prompt(9)], greedy())
    (rank,) = {*multiprocessing.active_children()} - before
    rank.kill()
    rank.join()
    made.submit(serving.prompt(9), greedy())
    begun = time.monotonic()
    with pytest.raises(HangError, match="the process of rank 1 has ended"):
        made.run()
    made.close()
    assert time.monotonic() - begun < 30
    serving.engines.clear()


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("is_asked", [False, True])
def test_a_server_whose_rank_is_killed(is_asked, where):
    """Its process ends with an error: one that has nothing to do, and one whose step calls kernels
    for the first time, which on a GPU may never return.
    """
    server = ServerProcess(where, "--tp", "2", "--grace", "6")
    try:
        assert server.post(max_tokens=1).status_code == 200
        _, rank = server.ranks()
        os.kill(rank, signal.SIGKILL)
        begun = time.monotonic()
        if is_asked:
            assert server.post(prompt="x" * 40).status_code == 500
        while (status := requests.get(f"{server.address}/health", timeout=20).status_code) == 200:
            assert time.monotonic() - begun < 30
            time.sleep(0.1)
        assert status == 503
    finally:
        ended = server.end()
    assert ended == 1


@pytest.mark.usefixtures("split")
def test_a_server_whose_ranks_ray_places(where):
    """It answers; its process ends with an error once one is killed, and takes Ray's along."""
    pytest.importorskip("ray", reason="ray is not installed")
    server = ServerProcess(where, "--tp", "2", "--ray", "--grace", "6")
    try:
        assert server.post(max_tokens=9).json()["usage"]["completion_tokens"] == 9
        (raylet,) = children(server.ranks()[0], b"raylet/raylet")
        ranks = children(raylet, b"ray::Rank")
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        assert server.post().status_code == 500
    finally:
        ended = server.end(seconds=30)
    assert ended == 1
    wait_until_ended(raylet, ranks[0])


def test_an_engine_that_nobody_asks(split, where, monkeypatch):
    """It is told once that a rank is lost, and not where the engine has ended before."""
    monkeypatch.setattr(engine.ranks, "PATIENCE_S", 0.5)
    serving, before = split("llama"), {*multiprocessing.active_children()}
    made = serving.engine(tp=2, way="processes")
    lost, ended, told = threading.Event(), threading.Event(), []
    ended.set()
    watch(made.runner, ended, lambda: told.append("ended"))
    watch(made.runner, threading.Event(), lost.set)
    (rank,) = {*multiprocessing.active_children()} - before
    assert not lost.wait(2)
    rank.kill()
    assert lost.wait(30)
    assert not told
    made.close()
    serving.engines.clear()


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_ended(*processes: int) -> None:
    until = time.monotonic() + 20
    while any(map(is_running, processes)):
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("which", ["the server", "its engine"])
def test_processes_do_not_outlive_what_started_them(which, where):
    """One that is killed can tell nobody."""
    server = ServerProcess(where, "--tp", "2")
    engine_process, rank = server.ranks()
    os.kill(server.child.pid if which == "the server" else engine_process, signal.SIGKILL)
    wait_until_ended(engine_process, rank)
    server.end()


def test_weights_are_handed_on_by_their_files(split):
    """What a process is started with has none of a file's contents."""
    weights = Weights(split("llama").path)
    whole = weights("model.embed_tokens.weight")
    handed = pickle.dumps(weights)
    assert len(handed) < 1000 < whole.nbytes
    assert np.array_equal(pickle.loads(handed)("model.embed_tokens.weight"), whole)


def by_masks(engine, prompts):
    """Tokens of requests with a grammar each, which takes no token but those that fit."""
    drawn = Sampling(temperature=0, max_tokens=4, ignore_eos=True)
    ruled = [engine.request(prompt, drawn, EvenThenOdd(257)) for prompt in prompts]
    engine.waiting.extend(ruled)
    engine.run()
    for request in ruled:
        tokens = request.tokens
        assert tokens and all(a < b and a % 2 != b % 2 for a, b in itertools.pairwise(tokens))
        assert request.finished == ("length" if len(tokens) == 4 else "error")
    return [request.tokens for request in ruled]


def test_actors_of_ray(split, where):
    """Two ranks that Ray has placed: one rank's tokens; the scheduler is in this process."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    serving = split("llama")
    prompts = [serving.prompt(n) for n in (7, 30)]
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        others, actors = (
            load(serving.path, where, 64, max_batch=8, tp=2, way=way)
            for way in (way_on(where), "ray")
        )
        serving.engines.append(others)
        assert texts(actors, prompts, greedy()) == texts(others, prompts, greedy())
        assert by_masks(actors, prompts) == by_masks(others, prompts)
        check_empty(actors)
        actors.close()
    finally:
        ray.shutdown()


class PlainRay:
    """Ray's calls, each done at once in this process; `asked` has what actors are asked."""

    def __init__(self, is_initialized: bool) -> None:
        self.is_on, self.asked = is_initialized, []
        self.killed: list[int] = []

    def is_initialized(self) -> bool:
        return self.is_on

    def init(self) -> None:
        assert not self.is_on
        self.is_on = True

    def shutdown(self) -> None:
        self.is_on = False

    def remote(self, **options: Any) -> Any:
        self.options = options

        def placed(job: Any, name: str, rank: int, size: int) -> Any:
            self.asked.append(("placed", rank, (job, name, size)))
            return SimpleNamespace(
                rank=rank,
                **{call: SimpleNamespace(remote=partial(self._call, call, rank))
                   for call in ("run", "made", "close")},
            )  # fmt: skip

        return lambda actor: SimpleNamespace(remote=placed)

    def _call(self, name: str, rank: int, *given: Any) -> Any:
        self.asked.append((name, rank, given))
        return lambda: (name, rank, *given)

    def get(self, answers: Any) -> Any:
        return [one() for one in answers] if isinstance(answers, list) else answers()

    def kill(self, actor: Any) -> None:
        self.killed.append(actor.rank)


@pytest.mark.parametrize("is_initialized", [False, True])
@pytest.mark.parametrize(("device", "gpus"), [("cpu", 0), ("cuda:0", 1)])
def test_what_ray_is_asked(device, gpus, is_initialized, monkeypatch):
    """A GPU for each rank that has one, which all see, and packages at the same places; each step
    of every rank, packed once; and what was started here is ended."""
    ray = PlainRay(is_initialized)
    monkeypatch.setitem(sys.modules, "ray", ray)
    job = Job(*[None] * 2, device, None, 16, 8, 64, False, 1)
    made = Actors(job, 3)
    settings = ray.options.pop("runtime_env")["env_vars"]
    assert ray.options == {"num_gpus": gpus}
    assert settings["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] == "1"
    first, *rest = settings["PYTHONPATH"].split(os.pathsep)
    assert first == str(Path(engine.ranks.__file__).parents[1]) and rest == [
        *filter(None, sys.path)
    ]
    (name,) = {name for what, _, (_, name, _) in ray.asked[:3] if what == "placed"}
    assert name.startswith("llm-") and Actors(job, 1).ranks and ray.asked[-3][2][1] != name
    placed = [("placed", rank, (job, name, 3)) for rank in range(3)]
    loaded = [("run", rank, (None,)) for rank in range(3)]
    assert ray.asked[:7] == [*placed, *loaded, ("made", 0, ())]
    assert (made.has_pieces, made.job) == ("made", replace(job, num_pages=0))
    ray.asked.clear()

    assert [made.queue(["one"]), made.queue({"two": 2})] == [1, 2]
    packed = [given for _, _, (given,) in ray.asked]
    assert [*map(pickle.loads, packed)] == [["one"]] * 3 + [{"two": 2}] * 3
    assert made.tokens(1) == ("run", 0, packed[3])  # with the tokens of the step before
    assert len(ray.asked) == 6
    assert made.tokens(2) == ("run", 0, None)  # there is no step that would bring them
    assert ray.asked[6:] == loaded
    ray.asked.clear()

    made.close()
    assert ray.asked == [("close", rank, ()) for rank in range(3)]
    assert ray.killed == [0, 1, 2] and ray.is_on == is_initialized


def test_a_thread_has_its_rank_s_gpu_and_stream():
    """Each thread of a rank uses the GPU of that rank, and what it calls comes on its stream."""
    asked: list[int] = []
    made = object.__new__(engine.device.Gpu)
    made.cuda = SimpleNamespace(cudaSetDevice=lambda index: (asked.append(index) or 0,))
    made.index, made.stream = 3, 0x51
    with made.scope():
        scope = current_scope()
        assert asked == [3] and scope is not None and scope.handle == 0x51
    assert current_scope() is None
    made.cuda.cudaSetDevice = lambda index: (Refusal.wrong,)
    with pytest.raises(RuntimeError, match="wrong"):
        made.scope()


class Refusal(enum.IntEnum):
    """cuda-python's errors."""

    wrong = 1


def test_the_gpu_that_ray_gives(monkeypatch):
    """By CUDA's number, or by its place in what the machine's Ray was started to see."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert index_of("3") == 3
    for visible, given in (("5,3", "3"), ("GPU-12ab,GPU-34cd", "GPU-34cd")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert index_of(given) == 1


@pytest.mark.parametrize("kind", [*KINDS, *MORE])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_parts_make_up_the_whole(kind, size, tmp_path, rng):
    """Side by side, each rank's part is the weight, and they are as long as each other."""
    heads = {"num_attention_heads": 2 * size, "num_key_value_heads": size,
             "intermediate_size": 128 * size, "moe_intermediate_size": 128 * size}  # fmt: skip
    linear = dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2 * size)
    heads |= linear | {"head_dim": 128}
    if kind == "qwen3_next":
        heads["shared_expert_intermediate_size"] = 128 * size
    config = Config.read(make_tiny(tmp_path, kind, rng, **heads))
    weights, split_over = Weights(tmp_path), 0
    parts = [Split(weights, config, rank, size) for rank in range(size)]
    for name in weights.files:
        whole, key = weights(name), key_of(name)
        got = [part(name) for part in parts]
        assert len({part.shape for part in got}) == 1
        if key in ONCE:
            assert np.array_equal(got[0], whole) and not np.any(got[1:])
            continue
        if key not in DIMENSIONS or whole.size == 1:
            assert all(np.array_equal(part, whole) for part in got)
            continue
        split_over += 1
        axis = DIMENSIONS[key]
        if key == "conv1d":  # whose q, k and v are split each
            by_rank = [np.split(part, 3) for part in got]
            got = [part for parts in zip(*by_rank, strict=True) for part in parts]
        together = np.concatenate(got, axis)
        assert np.array_equal(together[: len(whole)], whole)
        assert not together[len(whole) :].astype(np.float32).any()  # the vocabulary, filled up
    assert split_over >= 2 * len(config.layers)


def test_key_heads_that_ranks_share(tmp_path, rng):
    config = Config.read(make_tiny(tmp_path, "llama", rng, num_key_value_heads=2))
    name, weights = "model.layers.0.self_attn.k_proj.weight", Weights(tmp_path)
    got = [Split(weights, config, rank, 4)(name) for rank in range(4)]
    assert of_rank(config, 4).kv_heads == 1
    assert np.array_equal(np.concatenate([got[0], got[2]]), weights(name))
    assert np.array_equal(got[0], got[1]) and np.array_equal(got[2], got[3])


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_rank_reads_its_share_of_bytes(kind, tmp_path, rng):
    """What numpy is given of the files, and what of them is in memory afterwards."""
    config = Config.read(make_tiny(tmp_path, kind, rng))
    read = [0] * 4
    for rank in range(4):
        weights = Split(Weights(tmp_path), config, rank, 4)
        for name in Weights(tmp_path).files:
            read[rank] += weights(name).nbytes
    sizes = {name: 2 * int(np.prod(shape)) for name, shape in shapes(config)}
    norms = sum(size for name, size in sizes.items() if "norm" in name)
    shared = sum(size for name, size in sizes.items() if "k_proj" in name or "v_proj" in name)
    padding = 2 * 2 * 128 * 2  # of embedding and logits, to 260 tokens
    assert max(read) <= (sum(sizes.values()) - norms) / 4 + norms + shared / 4 + padding


def test_a_rank_reads_its_rows_of_the_file(tmp_path, rng):
    """What Linux has mapped of 16 MiB: a quarter, and what it reads around that."""
    name = "model.layers.0.mlp.up_proj.weight"
    weight = rng.standard_normal((8192, 1024), np.float32).astype(ml_dtypes.bfloat16)
    save_file({name: weight}, tmp_path / "model.safetensors")
    config = Config.read(make_tiny(tmp_path / "tiny", "llama", rng, torch_dtype="bfloat16"))
    part = Split(Weights(tmp_path), config, 2, 4)(name)
    assert np.array_equal(part, weight[4096:6144])
    mapped, is_file = 0, False
    for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
        if line.split()[0].endswith(":"):
            mapped += int(line.split()[1]) * 1024 if is_file and line.startswith("Rss:") else 0
        else:
            is_file = line.endswith(str(tmp_path / "model.safetensors"))
    assert part.nbytes <= mapped <= 2 * part.nbytes


@pytest.mark.parametrize(
    ("kind", "changes", "size", "words"),
    [("llama", {"num_attention_heads": 6, "num_key_value_heads": 2}, 4, "num_attention_heads is 6"),
     ("llama", {"num_key_value_heads": 4}, 3, "num_attention_heads is 4"),
     ("llama", {"num_attention_heads": 12, "num_key_value_heads": 3}, 4,
      "num_key_value_heads is 3"),
     ("llama", {"intermediate_size": 254}, 4, "intermediate_size is 254, not a multiple of 4"),
     ("qwen3_moe", {"moe_intermediate_size": 98}, 4, "moe_intermediate_size is 98, not a"),
     ("qwen3_next", {}, 4, "linear_num_key_heads is 2")],
)  # fmt: skip
def test_what_does_not_divide(kind, changes, size, words, tmp_path, rng):
    """Refused by the checkpoint's own name, before any rank is started."""
    path = make_tiny(tmp_path, kind, rng, **changes)
    threads = threading.active_count()
    with pytest.raises(ValueError, match=words):
        load(path, "cpu", 8, tp=size, way="threads")
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    ("device", "options", "needed"),
    [("cuda:0", {"tp": 2}, 1), ("cuda:1", {}, 1), ("cuda:0", {"tp": 4, "gpus": 3}, 2)],
)
def test_more_ranks_than_gpus(device, options, needed, tmp_path, rng, monkeypatch):
    monkeypatch.setattr(engine.ranks, "device_count", lambda: needed)
    words = f"{options.get('tp', 1)} ranks from {device} on need cuda:{needed}, and this machine"
    with pytest.raises(ValueError, match=f"{words} has {needed} GPUs"):
        load(make_tiny(tmp_path, "llama", rng), device, 8, **options)


class Made:
    """A `Group` that tells what it is made of, and may raise first."""

    def __init__(self, *errors: Exception) -> None:
        self.asked: list[Any] = []
        self.errors = [*errors]

    def __call__(self, ranks: Any, **options: Any) -> Any:
        self.asked.append((ranks, options))
        if self.errors:
            raise self.errors.pop(0)
        return self


def grouped(made: Made, dtype: str, hidden: int, max_tokens: int, monkeypatch: Any) -> Any:
    """The sizes that the first group is made for."""
    monkeypatch.setattr(comm, "Group", made)
    config = SimpleNamespace(hidden=hidden, dtype=dtype)
    job, device = SimpleNamespace(config=config, max_tokens=max_tokens), SimpleNamespace(name="cpu")
    assert group_of(job, "ranks", device) is made
    assert all(ranks == "ranks" for ranks, _ in made.asked)
    assert all(options["device"] == "cpu" for _, options in made.asked)
    return made.asked[0][1]["fusion"]


@pytest.mark.parametrize(
    ("dtype", "hidden", "is_fused"),
    [("bfloat16", 256, True), ("bfloat16", 248, False), ("float16", 256, True),
     ("float32", 128, True), ("float32", 124, False), ("float32", 4096, True)],
)  # fmt: skip
@pytest.mark.parametrize("max_tokens", [1, max(STEPS) - 1, max(STEPS), max(STEPS) + 1])
def test_what_a_group_is_made_for(dtype, hidden, is_fused, max_tokens, monkeypatch):
    """Rows of 512 bytes or more, and as many tokens as a step of decoding has at most."""
    made = Made()
    size = grouped(made, dtype, hidden, max_tokens, monkeypatch)
    wanted = comm.FusionSize(min(max_tokens, max(STEPS)), hidden, dtype) if is_fused else None
    assert size == wanted and len(made.asked) == 1


def test_ranks_that_cannot_fuse(monkeypatch):
    """They are refused by an argument, and make a group without; what else fails is told."""
    refusal = ArgumentError("Group", "fusion", got="3 ranks", expected="2, 4, 8 or 16")
    made = Made(refusal)
    grouped(made, "float16", 512, 8, monkeypatch)
    assert made.asked[1:] == [("ranks", {"device": "cpu"})]
    other = ArgumentError("Group", "device", got="cpu", expected="a GPU")
    for errors in ([OSError("no memory")], [LoaderError("no kernels")], [refusal, other]):
        last = errors[-1]
        with pytest.raises(type(last)) as raised:
            grouped(Made(*errors), "float16", 512, 8, monkeypatch)
        assert raised.value is last


def without_sums(real: Any) -> Any:
    """`Model.join` on one rank's addend."""

    def join(self: Any, x: Any, residual: Any, weight: Any, *more: Any) -> Any:
        if x is None:
            return real(self, x, residual, weight, *more)
        self.add_norm(x, residual, weight, self.config.eps)
        return x

    return join


FAULTS = {
    # Nothing is added up; all ranks have the first part; an embedding is looked up elsewhere.
    "sums": (engine.model.Model, "join", without_sums),
    "parts": (
        Split, "__init__", lambda real: lambda self, weights, config, rank, size: real(
            self, weights, config, 0, size
        ),
    ),
    "embedding": (
        engine.device.Device, "take",
        lambda real: lambda self, out, table, index, start=0, *last: real(
            self, out, table, index, start + bool(last), *last
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_rank_is_seen(split, fault, monkeypatch):
    owner, name, wrong = FAULTS[fault]
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    serving = split("llama")
    made = serving.engine(tp=2, way="threads")
    request = made.submit(serving.prompt(40), greedy())
    made.run()
    assert serving.error(request) > 1
