"""Where steps are run: by one rank, or by several, each with a part of the model and a GPU.

One scheduler makes the arrays of each step.  Every rank runs the same steps in the same order,
and what they compute goes between them through a `fi_ffi.comm.Group`; rank 0 draws the tokens.
Ranks are threads of this process, processes of this machine, or Ray's actors on any machines.
"""

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

from fi_ffi.loader.machine import device_count

from .device import Cpu, Gpu
from .model import Model
from .split import Split, of_rank
from .steps import SIZES, Runner


@dataclass
class Job:
    """What each rank makes its part of the model from."""

    config: object  # of the whole model
    weights: object  # gives them by name
    device: str  # "cpu", or "cuda:N" of rank 0
    num_pages: int | None  # None: as many as there is memory for
    page_size: int
    max_batch: int
    max_tokens: int
    use_graphs: bool
    gpus: int  # that ranks of this machine take in turn


def runner_of(job, ranks=None, followers=(), index=None):
    """What runs steps on one rank; without an `index` GPUs are a machine's from rank 0's on."""
    config, (rank, size) = job.config, (ranks.rank, ranks.size) if ranks else (0, 1)
    if job.device == "cpu":
        device = Cpu(config.dtype)
    else:
        here = int(job.device[5:] or 0) + rank % job.gpus
        device = Gpu(config.dtype, here if index is None else index)
    with device.scope():
        group = group_of(job, ranks, device) if ranks else None
        weights = Split(job.weights, config, rank, size)
        with device.loading():
            model = Model(device, of_rank(config, size), weights, job, group)
        model.experts.arrange(model.layers)
    if ranks:
        ranks.barrier()  # a kernel waits for the others, but not for as long as they may load
    return Runner(model, replace(job, num_pages=model.num_pages), followers)


def group_of(job, ranks, device):
    """Where ranks reach each other's memory, with sums and norms of decoding in one kernel."""
    from fi_ffi.comm import FusionSize, Group
    from fi_ffi.errors import ArgumentError

    most = min(job.max_tokens, max(SIZES))
    try:
        fusion = FusionSize(most, job.config.hidden, job.config.dtype)
        if fusion.hidden_size * fusion.itemsize < LEAST_ROW:
            fusion = None
        return Group(ranks, device=device.name, fusion=fusion)
    except ArgumentError:  # on all ranks: they are on several machines, or of an odd number
        return Group(ranks, device=device.name)


def follow(job, ranks, orders):
    """Run the steps that rank 0 hands on, until there are no more."""
    runner = runner_of(job, ranks)
    for order in iter(orders.get, None):
        runner.run(pickle.loads(order))
    runner.close()


def follow_alone(job, ranks, orders):
    with alone():
        follow(job, ranks, orders)


@contextlib.contextmanager
def alone():
    """In a process that another has started: it does not outlive that one, and ends at once if it
    fails, since others look for that and what an interpreter frees as it ends may wait for them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: that one decides
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), end_process()), daemon=True).start()
    try:
        yield
    except BaseException:
        traceback.print_exc()
        end_process()


def watch(runner, ended, on_lost):
    """Call `on_lost` if a rank is lost and `ended`, an event, does not come: perhaps no step is run
    that would tell, or one does not end, since a call of CUDA's waits for the rank with a lock that
    whatever could release it needs.  Ray tells of its actors by itself.
    """

    def look():
        while not ended.wait(LOOKS_S):
            if not runner.is_whole:
                if not ended.wait(PATIENCE_S):
                    on_lost()
                return

    threading.Thread(target=look, daemon=True).start()


LEAST_ROW = 512  # bytes of a row that FlashInfer's kernel of sums and norms takes before 0.6.15
LOADING_S = 600.0  # how long a rank waits for others that load
LOOKS_S = 1.0  # between looks at the ranks
PATIENCE_S = 10.0  # for a step that tells of a lost rank
_spawn = multiprocessing.get_context("spawn")  # a fork would have this process's threads and CUDA
# What brings the orders to ranks of this machine, what runs them, and as what.
WAYS = {
    "threads": (queue.SimpleQueue, threading.Thread, follow),
    "processes": (_spawn.SimpleQueue, _spawn.Process, follow_alone),
}


def spawned(target, *args, **more):
    """A pipe to a process, which runs `target` with its other end, and the process."""
    pipe, there = _spawn.Pipe()
    child = _spawn.Process(target=target, args=(there, *args), **more)
    child.start()
    there.close()
    return pipe, child


def start(job, size, way):
    """A runner for `size` ranks, `way` of them: "threads", "processes" or "ray"."""
    of_rank(job.config, size)  # refused before anything is started
    if job.device != "cpu" and way != "ray":  # which has other machines
        last, there = int(job.device[5:] or 0) + min(job.gpus, size) - 1, device_count()
        if last >= there:
            raise ValueError(f"{size} ranks from {job.device} on need cuda:{last}, and this machine"
                             f" has {there} GPUs")  # fmt: skip
    if size == 1:
        return runner_of(job)
    if way == "ray":
        return Actors(job, size)
    from fi_ffi import comm

    line, worker, target = WAYS[way]
    ranks, followers = getattr(comm, way)(size, timeout_s=LOADING_S), []
    for rank in ranks[1:]:
        orders = line()
        followers.append((orders, worker(target=target, args=(job, rank, orders), daemon=True)))
        followers[-1][1].start()
    return runner_of(job, ranks[0], followers)


def end_process():
    """At once, with an error; ranks that are processes as well."""
    for rank in multiprocessing.active_children():
        rank.kill()
    os._exit(1)


def index_of(given):
    """The index that CUDA has here for a GPU as Ray names it: by number, or as it is listed."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",").index(given) if visible else int(given)


class Rank:
    """A rank that is an actor of Ray, which has given it a GPU."""

    def __init__(self, job, name, rank, size):
        import ray

        from fi_ffi import comm

        ranks = comm.ray(name, rank, size, timeout_s=LOADING_S)
        given = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        self.runner = runner_of(job, ranks, index=index_of(given[0]) if given else None)

    def made(self):
        return self.runner.has_pieces, self.runner.job.num_pages

    def run(self, packed):
        return self.runner.run(packed and pickle.loads(packed))

    def close(self):
        self.runner.close()


class Actors:
    """Ranks that Ray has placed: a runner whose steps and tokens go through its calls."""

    model = on_logits = None
    is_whole = True  # as far as is known before a call

    def __init__(self, job, size):
        import ray

        self.has_started_ray = not ray.is_initialized()
        if self.has_started_ray:
            ray.init()
        self.ray, self.job, self.queued = ray, job, 0
        path = [str(Path(__file__).parents[1]), *filter(None, sys.path)]
        settings = {
            # Packages are at the same places on every machine, as the checkpoint is.
            "PYTHONPATH": os.pathsep.join(path),
            # Ranks reach each other's memory only where they see each other's GPUs.
            "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
        }
        actor = ray.remote(
            num_gpus=0 if job.device == "cpu" else 1, runtime_env={"env_vars": settings}
        )(Rank)
        name = f"llm-{uuid.uuid4().hex}"
        self.ranks = [actor.remote(job, name, rank, size) for rank in range(size)]
        self._run(None)
        ray.get(self.answers)  # all have loaded, or one says why not
        self.has_pieces, num_pages = ray.get(self.ranks[0].made.remote())
        self.job = replace(job, num_pages=num_pages)

    def _run(self, packed):
        self.answers = [rank.run.remote(packed) for rank in self.ranks]

    def queue(self, order, late=None):
        if late:  # from here, masks cannot follow
            order.more["bits"] = late()
        self._run(pickle.dumps(order))  # once, and in the call: an object of its store takes longer
        self.queued += 1
        return self.queued

    def tokens(self, queued):
        """A rank answers with the tokens of the step before."""
        if queued == self.queued:
            self._run(None)
        return self.ray.get(self.answers)[0]

    def close(self):
        self.ray.get([rank.close.remote() for rank in self.ranks])
        for rank in self.ranks:
            self.ray.kill(rank)
        if self.has_started_ray:
            self.ray.shutdown()
