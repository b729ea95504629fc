"""Two GPUs in one process: tensors of both in a call, calls of each in turns, and from threads."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import numpy as np
import pytest
from cuda.bindings import runtime

import fi_ffi
from fi_ffi.cli.cuda import DeviceArray, check, gpus, on_device
from fi_ffi.loader import machine as of_loader
from fi_ffi.loader import per_device
from fi_ffi.ops.functions import OPS

from tests.helpers import kernels, remains
from tests.helpers.cases import make_case
from tests.helpers.moe_layers import make as make_layer
from tests.helpers.pod_calls import Batch, Spec
from tests.helpers.prepared_calls import or_skip
from tests.helpers.stress_strength import scaled
from tests.ops.test_kda import Call as KdaCall
from tests.ops.test_threads import at_once

F16 = np.dtype(np.float16)
HEADS, KV_HEADS, DIM, PAGE = 8, 2, 128, 16


def current() -> int:
    return int(check(runtime.cudaGetDevice()))


def need(module: str) -> None:
    kernels.need(module, 1)


class Place:
    """A GPU, a stream of it, and memory on it; the current device stays what it is."""

    def __init__(self, index: int) -> None:
        self.index, self.device, self.made = index, f"cuda:{index}", []
        with on_device(index):
            flags = runtime.cudaStreamNonBlocking
            self.stream = int(check(runtime.cudaStreamCreateWithFlags(flags)))

    def __call__(self, host: np.ndarray) -> Any:
        self.made.append(DeviceArray(host, device=self.index))
        return self.made[-1]

    def synchronize(self) -> None:
        with on_device(self.index):
            check(runtime.cudaDeviceSynchronize())

    def poison(self, array: Any) -> None:
        """Make every byte 0xFF, on its own stream: the whole device cannot be waited for while
        another thread captures."""
        with on_device(self.index):
            check(runtime.cudaMemsetAsync(array.ptr, 0xFF, array.nbytes, self.stream))
            check(runtime.cudaStreamSynchronize(self.stream))

    def close(self) -> None:
        self.synchronize()
        for array in self.made:
            array.free()
        with on_device(self.index):
            check(runtime.cudaStreamDestroy(self.stream))


@pytest.fixture
def places():
    if len(gpus()) < 2:
        pytest.skip("needs two GPUs")
    check(runtime.cudaSetDevice(0))
    made = [Place(0), Place(1)]
    yield made
    check(runtime.cudaSetDevice(0))
    for place in made:
        place.close()
    assert current() == 0


@contextlib.contextmanager
def as_current(index: int):
    """The caller's own device, which calls leave as it is."""
    with on_device(index):
        yield
        assert current() == index


# ------------------------------------------------------------- tensors of both in one call


def test_arrays_leave_the_current_device(places):
    for index in (0, 1):
        with as_current(index):
            for place in places:
                array = place(np.arange(8, dtype=np.float32))
                assert (array.get() == np.arange(8)).all() and array.intact()
                assert current() == index


def norm_arguments(place: Place, rng) -> dict[str, Any]:
    case = make_case(OPS["rmsnorm"].row, {"n": 5, "h": 512}, {"T": "float16"}, rng)
    return {"case": case, **{name: place(array) for name, array in case.arrays.items()}}


@pytest.mark.parametrize("odd", ["out", "input", "weight"])
@pytest.mark.parametrize("how", ["typed", "entry", "prepare", "update"])
def test_a_norm_of_both(how, odd, places, rng):
    need("norm")
    mine, theirs = (norm_arguments(place, rng) for place in places)
    names = ("out", "input", "weight")
    right = [mine[name].desc() for name in names]
    mixed = [(theirs if name == odd else mine)[name].desc() for name in names]
    stream = places[0].stream
    prepared = fi_ffi.rmsnorm.prepare(*right, stream=stream)
    entry = fi_ffi.module("norm").rmsnorm
    actions = {
        "typed": lambda: fi_ffi.rmsnorm(*mixed, stream=stream),
        "entry": lambda: entry(*mixed, 1e-6, False, stream=stream),
        "prepare": lambda: fi_ffi.rmsnorm.prepare(*mixed, stream=stream),
        "update": lambda: prepared.update(**{odd: theirs[odd].desc()}),
    }
    with pytest.raises(fi_ffi.ArgumentError, match="cuda:1") as caught:
        actions[how]()
    assert not isinstance(caught.value, fi_ffi.KernelError)
    for place, given in zip(places, (mine, theirs), strict=True):
        place.synchronize()
        assert np.isnan(given["out"].get().astype(np.float32)).all(), "nothing was written"
    prepared()
    places[0].synchronize()
    assert mine["case"].error("out", mine["out"].get())[1] <= 1


def decode_plan(place: Place) -> fi_ffi.BatchDecodePlan:
    indptr, indices = np.array([0, 3], np.int32), np.arange(3, dtype=np.int32)
    return or_skip(
        fi_ffi.BatchDecodePlan, indptr, indices, np.array([9], np.int32), num_qo_heads=HEADS,
        num_kv_heads=KV_HEADS, head_dim=DIM, page_size=PAGE, q_data_type="float16",
        device=place.device, stream=place.stream,
    )  # fmt: skip


def cache_of(place: Place, rng) -> tuple[Any, Any, Any, Any]:
    q = rng.standard_normal((1, HEADS, DIM)).astype(F16)
    k, v = rng.standard_normal((2, 3, PAGE, KV_HEADS, DIM)).astype(F16)
    return place(q), place(k), place(v), place(np.full_like(q, np.nan))


def attention(q, k, v, causal: bool) -> np.ndarray:
    """One request in float64."""
    hidden = np.arange(len(k)) > np.arange(len(q))[:, None] + len(k) - len(q)
    out = np.empty(q.shape)
    for head in range(HEADS):
        of = head * KV_HEADS // HEADS
        logits = q[:, head].astype(float) @ k[:, of].astype(float).T * DIM**-0.5
        if causal:
            logits[hidden] = -np.inf
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, of].astype(float)
    return out


def decoded(q, k, v) -> np.ndarray:
    """One request of 41 keys in float64."""
    keys, values = (a.host.reshape(-1, KV_HEADS, DIM)[:41] for a in (k, v))
    return attention(q.host, keys, values, causal=False)


@pytest.mark.parametrize("odd", [0, 1, 2, 3], ids=["q", "k", "v", "out"])
def test_a_run_of_both(odd, places, rng):
    plan = decode_plan(places[0])
    mine, theirs = (cache_of(place, rng) for place in places)
    mixed = [(theirs if i == odd else mine)[i].desc() for i in range(4)]
    with pytest.raises(fi_ffi.ArgumentError, match="cuda:[01]"):
        plan.run(*mixed, stream=places[0].stream)
    with pytest.raises(fi_ffi.ArgumentError, match="cuda:1"):
        plan.run(*(array.desc() for array in theirs), stream=places[0].stream)
    for array in (mine[3], theirs[3]):
        assert np.isnan(array.get().astype(np.float32)).all()
    plan.run(*(array.desc() for array in mine), stream=places[0].stream)
    places[0].synchronize()
    np.testing.assert_allclose(mine[3].get(), decoded(*mine[:3]), atol=4e-3)


def test_a_layer_of_experts_of_both(places, rng):
    need("fused_moe_90")
    made = make_layer(rng, "half", F16, F16, hidden=256, inter=128)
    for odd in range(len(made.tensors)):
        arrays = iter(range(len(made.tensors)))
        with pytest.raises(fi_ffi.ArgumentError, match="cuda:1"):
            made.call(lambda array: places[next(arrays) == odd](array), stream=places[0].stream)  # noqa: B023
    for place in places:
        output = made.call(place, stream=place.stream)
        place.synchronize()
        assert made.worst(output.get()) <= 1


# --------------------------------------------------------------------- calls of each in turns


class Work:
    """Calls of one GPU, each of which is checked by itself."""

    def __init__(self, place: Place, rng) -> None:
        self.place = place
        self.norm = norm_arguments(place, rng)
        names = ("out", "input", "weight")
        self.descs = [self.norm[name].desc() for name in names]
        self.prepared = fi_ffi.rmsnorm.prepare(*self.descs, stream=place.stream)
        other = norm_arguments(place, rng)
        self.updated = fi_ffi.rmsnorm.prepare(*(other[name].desc() for name in names))
        self.entry = fi_ffi.module("norm").rmsnorm
        self.plan = decode_plan(place)
        self.cache = cache_of(place, rng)
        self.right = decoded(*self.cache[:3])
        with fi_ffi.capture(place.stream, device=place.device) as self.graph:
            fi_ffi.rmsnorm(*self.descs)

    def make(self, what: int) -> None:
        stream = self.place.stream
        if what == 6:
            self.plan.run(*(array.desc() for array in self.cache), stream=stream)
            self._done()
            np.testing.assert_allclose(self.cache[3].get(), self.right, atol=4e-3)
            return
        if what == 0:
            fi_ffi.rmsnorm(*self.descs, stream=stream)
        elif what == 1:
            self.prepared()
        elif what == 2:
            self.entry(*self.descs, 1e-6, False, stream=stream)
        elif what == 3:
            self.graph.launch(stream)
        elif what == 4:
            self.updated.update(*(desc.ptr for desc in self.descs))
            with fi_ffi.stream(stream):
                self.updated()
        else:
            with fi_ffi.stream(stream):
                fi_ffi.rmsnorm(*self.descs)
        self._done()
        out = self.norm["out"]
        assert self.norm["case"].error("out", out.get())[1] <= 1

    def _done(self) -> None:
        check(runtime.cudaStreamSynchronize(self.place.stream))

    def poison(self) -> None:
        for array in (self.norm["out"], self.cache[3]):
            self.place.poison(array)


def test_in_turns_from_one_thread(places, rng):
    """Whichever device is the caller's, before and after."""
    need("norm")
    works = [Work(place, rng) for place in places]
    for _ in range(scaled(3000, 60)):
        of, mine, what = (int(rng.integers(n)) for n in (2, 2, 7))
        works[of].poison()
        with as_current(mine):
            works[of].make(what)


@pytest.mark.parametrize("mine", [0, 1])
@pytest.mark.parametrize("of", [0, 1])
def test_a_threads_first_calls(of, mine, places, rng):
    """Each way of a call by a thread that has called no CUDA yet, whichever device is current.

    The second call of each finds a thread with the GPU's context.
    """
    need("norm")
    work, failures = Work(places[of], rng), []

    def first(what: int) -> None:
        try:
            if mine:
                check(runtime.cudaSetDevice(mine))
            for _ in range(2):
                work.poison()
                work.make(what)
                assert current() == mine
        except BaseException as error:
            failures.append((what, error))

    for what in range(7):
        thread = threading.Thread(target=first, args=(what,))
        thread.start()
        thread.join()
    assert not failures


class OnPlace:
    """A place as `KdaCall` wants a machine."""

    is_gpu = True

    def __init__(self, place: Place) -> None:
        self.place, self.stream = place, place.stream

    def need(self, module: str) -> None:
        need(module)


@pytest.mark.parametrize("mine", [0, 1])
@pytest.mark.parametrize("of", [0, 1])
def test_a_kernel_of_cute_by_a_new_thread(of, mine, places, rng):
    """A kernel in CuTe DSL has no guard, and finds its GPU by the current device."""
    made, failures = KdaCall(rng), []
    need(made.kernel.names((9, 0))[0])

    def first() -> None:
        try:
            if mine:
                check(runtime.cudaSetDevice(mine))
            for _ in range(2):
                assert made.worst(OnPlace(places[of])) <= 1
                assert current() == mine
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    thread.join()
    assert not failures


def test_a_device_that_changes_within_a_scope(places, rng):
    """The scope's stream stays current on its GPU, and each call finds its device again."""
    need("norm")
    for place in places:
        work, prepared = Work(place, rng), None
        with fi_ffi.stream(place.stream):
            for mine in (0, 1, 1, 0, 1):
                with as_current(mine):
                    prepared = prepared or fi_ffi.rmsnorm.prepare(*work.descs)
                    for call in (prepared, lambda: fi_ffi.rmsnorm(*work.descs)):  # noqa: B023
                        work.poison()
                        call()
                        assert current() == mine
                        work._done()
                        case, out = work.norm["case"], work.norm["out"]
                        assert case.error("out", out.get())[1] <= 1


def test_a_default_stream_of_each(places, rng):
    """Handle 0 is another stream on each GPU."""
    need("norm")
    works = [Work(place, rng) for place in places]
    for handle in (0, 2):
        for of in (0, 1, 0, 1):
            work = works[of]
            work.poison()
            fi_ffi.rmsnorm(*work.descs, stream=handle)
            work.place.synchronize()
            assert work.norm["case"].error("out", work.norm["out"].get())[1] <= 1
            assert current() == 0


def test_from_several_threads(places):
    """Two threads of each GPU, each with work, a stream and a current device of its own."""
    need("norm")
    captured = threading.Barrier(4)

    def run(index: int) -> None:
        rng, place = np.random.default_rng(), None
        try:
            place = Place(index % 2)
            mine = int(rng.integers(2))
            check(runtime.cudaSetDevice(mine))
            work = Work(place, rng)
            # Each captures a graph: nobody may wait for a whole device until all have.
            captured.wait(60)
            for _ in range(scaled(3000, 60)):
                work.poison()
                work.make(int(rng.integers(7)))
                assert current() == mine
        except BaseException:
            captured.abort()
            raise
        finally:
            if place is not None:
                place.close()

    at_once(run, 4)


@pytest.mark.parametrize("index", [0, 1])
def test_an_append_and_prefills(index, places, rng):
    """While the other GPU is the caller's."""
    place, keys, queries = places[index], 200, 50
    q = rng.standard_normal((queries, HEADS, DIM)).astype(F16)
    k, v = rng.standard_normal((2, keys, KV_HEADS, DIM)).astype(F16)
    pages = -(-keys // PAGE)
    indices = rng.permutation(pages + 3)[:pages].astype(np.int32)
    indptr, last = np.array([0, pages], np.int32), np.array([(keys - 1) % PAGE + 1], np.int32)
    with as_current(1 - index):
        cache = place(np.full((pages + 3, 2, PAGE, KV_HEADS, DIM), np.nan, F16)).desc()
        caches = fi_ffi.split_paged_kv_cache(cache)
        tokens = [k, v, *fi_ffi.batch_indices_positions([0, keys], [keys])]
        given = [place(array).desc() for array in (*tokens, indices, indptr, last)]
        query, out = place(q).desc(), place(np.full_like(q, np.nan))
        place.synchronize()
        fi_ffi.append_paged_kv_cache(*given[:4], *caches, *given[4:], stream=place.stream)
        for backend in ("auto", "fa2"):
            place.poison(out)
            plan = or_skip(
                fi_ffi.BatchPrefillPlan, np.array([0, queries], np.int32), paged_kv_indptr=indptr,
                paged_kv_indices=indices, paged_kv_last_page_len=last, page_size=PAGE,
                num_qo_heads=HEADS, num_kv_heads=KV_HEADS, head_dim_qk=DIM, causal=True,
                backend=backend, device=place.device, stream=place.stream,
            )  # fmt: skip
            plan.paged_run(query, *caches, out.desc(), stream=place.stream)
            place.synchronize()
            np.testing.assert_allclose(out.get(), attention(q, k, v, causal=True), atol=2e-3)


def test_a_stream_of_the_other_gpu_is_refused(places, rng):
    """By every way of a call; a kernel launched there would be the end of the process."""
    need("norm")
    mine, theirs = places[1], places[0].stream
    case, *arrays = norm_arguments(mine, rng).values()
    descs = [array.desc() for array in arrays]
    prepared = fi_ffi.rmsnorm.prepare(*descs)
    entry = fi_ffi.module("norm").rmsnorm
    plan, cache = decode_plan(mine), [array.desc() for array in cache_of(mine, rng)]
    fi_ffi.rmsnorm(*descs, stream=mine.stream)  # kernels are loaded before they are recorded
    with fi_ffi.capture(mine.stream, device=mine.device) as graph:
        fi_ffi.rmsnorm(*descs)
    mine.synchronize()
    mine.poison(arrays[0])
    ways = {
        "graph": graph.launch,
        "typed": lambda stream: fi_ffi.rmsnorm(*descs, stream=stream),
        "prepared": lambda stream: fi_ffi.rmsnorm.prepare(*descs, stream=stream)(),
        "entry": lambda stream: entry(*descs, 1e-6, False, stream=stream),
        "run": lambda stream: plan.run(*cache, stream=stream),
    }
    for _ in range(2):
        for name, call in ways.items():
            refused = pytest.raises(fi_ffi.ArgumentError, match=r"`stream`.*of cuda:0.*of cuda:1")
            with remains.allowed("free frames"), refused:  # `prepare` has taken one for its call
                call(theirs)
            with fi_ffi.stream(theirs), pytest.raises(fi_ffi.ArgumentError, match="of cuda:0"):
                (prepared if name == "prepared" else lambda call=call: call(None))()
            mine.synchronize()
            assert np.isnan(arrays[0].get().astype(np.float32)).all(), name
        for call in ways.values():
            call(mine.stream)
        mine.synchronize()
        assert case.error("out", arrays[0].get())[1] <= 1
        mine.poison(arrays[0])


def test_a_stream_first_seen_while_it_records(places, rng):
    """By somebody else: asking for its GPU would spoil the graph."""
    need("norm")
    for place in places:
        case, *arrays = norm_arguments(place, rng).values()
        descs = [array.desc() for array in arrays]
        fi_ffi.rmsnorm(*descs, stream=place.stream)  # kernels are loaded before they are recorded
        place.synchronize()
        place.poison(arrays[0])
        with as_current(place.index):
            stream = int(check(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)))
            mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
            check(runtime.cudaStreamBeginCapture(stream, mode))
            for _ in range(3):
                fi_ffi.rmsnorm(*descs, stream=stream)
            graph = check(runtime.cudaStreamEndCapture(stream))
            executable = check(runtime.cudaGraphInstantiate(graph, 0))
            assert np.isnan(arrays[0].get().astype(np.float32)).all(), "recorded, and not made"
            check(runtime.cudaGraphLaunch(executable, stream))
            check(runtime.cudaStreamSynchronize(stream))
            check(runtime.cudaGraphExecDestroy(executable))
            check(runtime.cudaGraphDestroy(graph))
            check(runtime.cudaStreamDestroy(stream))
        assert case.error("out", arrays[0].get())[1] <= 1
    with pytest.raises(fi_ffi.ArgumentError, match=r"capture.*`stream`.*of cuda:1.*of cuda:0"):
        fi_ffi.capture(places[1].stream, device="cuda:0")


# ------------------------------- kernels with static variables that hold for one GPU


def gdn_call(place: Place, rng, dtype: str):
    sizes = {"total_seq_len": 200, "num_seqs": 3, "num_q_heads": 2, "num_v_heads": 4,
             "head_size": 128, "workspace_size": 1 << 16}  # fmt: skip
    without = ("state_checkpoints", "checkpoint_cu_starts")
    op = OPS["gdn_prefill"]
    case = make_case(op.row, sizes, {"T": dtype}, rng, without=without)
    arrays = {name: place(array) for name, array in case.arrays.items()}
    values = {name: array.desc() for name, array in arrays.items()} | case.scalars

    def launch(stream: int | None) -> None:
        op(**values, stream=stream)

    def judge() -> None:
        place.synchronize()
        for name in case.expected:
            assert case.error(name, arrays[name].get())[1] <= 1, (place.device, dtype, name)

    return launch, judge


@pytest.mark.parametrize("recorded", [False, True], ids=["called", "recorded"])
@pytest.mark.parametrize("order", [(0, 1, 0, 1), (1, 0, 1, 0)], ids=["0 first", "1 first"])
def test_gdn_prefill_on_both(order, recorded, places, rng):
    """Up to 0.6.13 its launcher allows a kernel its shared memory once in a process."""
    need("gdn_prefill_sm90")
    assert of_loader.device_count() > 1
    for dtype in ("float16", "bfloat16"):
        for index in order:
            place = places[index]
            launch, judge = gdn_call(place, rng, dtype)
            with fi_ffi.watchdog(10):
                if recorded:
                    with fi_ffi.capture(place.stream, device=place.device) as graph:
                        launch(None)
                    graph.launch(place.stream)
                else:
                    launch(place.stream)
                place.synchronize()
            judge()
            assert current() == 0
    assert any(copies and len(copies._by_device) == 2 for copies in per_device._copies.values())


def test_gdn_prefill_from_threads(places):
    need("gdn_prefill_sm90")

    def run(index: int) -> None:
        rng, place = np.random.default_rng(), Place(index % 2)
        try:
            for dtype in ("float16", "bfloat16") * scaled(50, 3):
                launch, judge = gdn_call(place, rng, dtype)
                launch(place.stream)
                judge()
        finally:
            place.close()

    at_once(run, 4)


def test_pod_on_both(places, rng):
    """Its launcher keeps its counters in memory of the GPU that was used first."""
    spec = Spec()
    heads = spec.kv_heads * spec.group, spec.kv_heads
    tmp = fi_ffi.single_prefill_workspace_size(spec.qo_len, spec.kv_len, *heads, spec.head_dim)
    for index in (0, 1, 0, 1):
        place, batch = places[index], Batch(spec, rng)
        with on_device(index):
            waiting = int(check(runtime.cudaStreamCreate()))  # POD needs one that waits
        try:
            plan = batch.plan(stream=waiting, device=place.device)
            assert batch.run(plan, place, waiting, tmp) <= 1
        finally:
            place.synchronize()
            check(runtime.cudaStreamDestroy(waiting))
        assert current() == 0
