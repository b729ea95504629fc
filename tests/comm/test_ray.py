"""Ranks that are Ray's actors on this machine, and ranks of MPI."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap

import pytest

from tests.helpers.children import ROOT, done, environment

ACTORS = """
    import re
    import sys
    import time

    import ray

    from fi_ffi import comm
    from tests.helpers import rank_programs

    for attempt in range(4):  # Ray waits 30 s for its own processes, too short on a busy machine
        try:
            ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
            break
        except Exception as error:
            if "timed out during startup" not in str(error) or attempt == 3:
                raise
            ray.shutdown()

    class Rank:
        def __init__(self, rank):
            self.rank = rank

        def run(self, name, seed, made):
            mine = comm.ray(name, self.rank, 2, timeout_s=60.0)
            return rank_programs.calls(self.rank, {self.rank: mine}, 0, OPTIONS, seed, made)

        def lose(self, name):
            from fi_ffi import HangError

            mine = comm.ray(name, self.rank, 2, timeout_s=2.0)
            try:
                mine.barrier()
            except HangError as error:
                return str(error)

        def meet(self, name):
            comm.ray(name, self.rank, 2, timeout_s=30.0).barrier()

        def wait(self, name):
            from fi_ffi import HangError

            mine = comm.ray(name, self.rank, 2, timeout_s=100.0)
            mine.barrier()
            try:
                mine.barrier()
            except HangError as error:
                return str(error)

    OPTIONS = {"max_bytes": 1 << 16, "fusion": comm.FusionSize(16, 1024), "check": True}
    made = [("all_reduce", 1000, 2, True, "auto"), ("all_reduce", 1 << 17, 0, False, "auto"),
            ("all_gather", 77, 1, False, "auto"), ("reduce_scatter", 64, 1, False, "auto")]
    actors = [ray.remote(num_cpus=1)(Rank).remote(rank) for rank in range(2)]
    for seed in (1, 2):  # names are not used again
        found = ray.get([actor.run.remote(f"sums {seed}", seed, made) for actor in actors])
        for number, (op, n, kind, *_) in enumerate(made):
            rank_programs.check(op, seed, number, n, kind, [results[number] for results in found])
    told = ray.get(actors[0].lose.remote("nobody else"))
    assert re.fullmatch(r"Ray: rank 0 waited [2-9]([.][0-9])? s for rank 1", told), told
    for number in range(5):  # the first to leave does not take the meeting with it
        ray.get([actor.meet.remote(f"meeting {number}") for actor in actors])
    made = actors[0].meet.remote("lost")
    time.sleep(2)
    waiting = actors[1].wait.remote("lost")
    ray.get(made)
    ray.kill(actors[0])
    told = ray.get(waiting)
    assert told == "Ray: rank 1 lost the others: the rank that came first has ended", told
    ray.shutdown()
    print("two actors agree")
"""


@pytest.mark.timeout(600)
def test_two_actors():
    pytest.importorskip("ray", reason="needs ray: pip install 'fi-ffi[ray]'")
    status, out, err = done(ACTORS, seconds=500, RAY_USAGE_STATS_ENABLED="0")
    assert status == 0 and "two actors agree" in out, err[-3000:]


MPI = """
    from fi_ffi import comm
    from tests.helpers import rank_programs

    mine = comm.mpi()
    options = {"max_bytes": 1 << 16, "check": True}
    made = [("all_reduce", 1000, 2, True, "auto"), ("all_gather", 77, 1, False, "auto")]
    found = rank_programs.calls(mine.rank, {mine.rank: mine}, 0, options, 5, made)
    for number, (op, n, kind, *_) in enumerate(made):
        everybody = [rank_programs.array_of(data, kind) for data in
                     mine.all_gather(found[number].tobytes())]
        rank_programs.check(op, 5, number, n, kind, everybody)
    assert mine.broadcast(bytes([mine.rank]), root=1) == bytes([1])
    print("rank", mine.rank, "of", mine.size)
"""


def test_two_ranks_of_mpi():
    pytest.importorskip("mpi4py.MPI", reason="needs mpi4py and an MPI", exc_type=Exception)
    run = shutil.which("mpirun")
    if run is None:
        pytest.skip("needs mpirun")
    command = [run, "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-c"]
    made = subprocess.run(
        [*command, textwrap.dedent(MPI)], env=environment(), capture_output=True, text=True,
        timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert made.returncode == 0 and sorted(made.stdout.split("\n"))[-2:] == [
        "rank 0 of 2", "rank 1 of 2",
    ], made.stderr[-3000:]  # fmt: skip
