"""Cases with a plan, and prepared runs of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import fi_ffi
from fi_ffi.reference.arrays import as_array

from tests.attention.batches import bytes_of, draw
from tests.attention.cases import Case, Service, graph_options
from tests.attention.machines import Cpu
from tests.attention.pretend import Pretend, on_host
from tests.attention.tables import SERVED, Spec

_RAGGED = Spec(heads=2, kv_heads=1, dim=64, batch=4, queries=5, keys=60, causal=True)
FAMILIES = {**SERVED, "ragged": _RAGGED}
EVERY_FAMILY = pytest.mark.parametrize("spec", FAMILIES.values(), ids=FAMILIES)
SERVICES = pytest.mark.parametrize("spec", SERVED.values(), ids=SERVED)
MACHINES = ["cpu", "pretended gpu"]
# Bytes of both workspaces, without and with a GPU.
ROOM = [(1 << 24, 1 << 23), (1 << 27, 1 << 23)]


def on_each(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cpu]:
    """For a fixture: the machine of this name, for the time of a test."""
    if name == "cpu":
        yield Cpu()
        return
    made = Pretend(monkeypatch)
    yield made
    monkeypatch.undo()
    made.forget()


class Ragged(Service):
    """Batches of ragged keys."""

    def __init__(self, spec, machine, rng):
        self.spec, self.rng = spec, rng
        self.most_keys = min(spec.keys, machine.most_keys)
        self.rows = spec.batch * spec.queries
        self.case = Case(spec, machine, rng, self.rows, spec.batch * self.most_keys)

    def batch(self):
        spec = self.spec
        return self.case.batch(*draw(spec.batch, spec.queries, self.most_keys, 1, self.rng))


def service_of(spec, machine, rng):
    return (Service if spec.page_size else Ragged)(spec, machine, rng)


def run_of(plan):
    """What runs a plan."""
    if hasattr(plan, "run"):
        return plan.run
    return plan.ragged_run if plan.options.page_size is None else plan.paged_run


def names_of(plan):
    """The tensors of a run, as it names them."""
    if isinstance(plan, fi_ffi.BatchMlaPlan):
        return ["q_nope", "q_pe", "ckv_cache", "kpe_cache", "o", "lse"]
    if plan.options.page_size is None:
        return ["q", "k", "v", "o", "lse"]
    if isinstance(plan, fi_ffi.BatchAttentionPlan):
        return ["q", "k_cache", "v_cache", "o", "lse"]
    return ["q", "paged_k_cache", "paged_v_cache", "o", "lse"]


def same(one, other):
    pairs = ((one.o, other.o), (one.lse, other.lse))
    return all(bytes_of(a.get()) == bytes_of(b.get()) for a, b in pairs if a is not None)


class Runs:
    """A case with a plan, and prepared runs of it."""

    def __init__(self, spec, machine, rng, **more):
        self.service = service_of(spec, machine, rng)
        self.case, self.machine = self.service.case, machine
        self.batch = self.service.batch()
        if "enable_cuda_graph" in more:
            if isinstance(machine, Pretend) and spec.family == "batch_decode":
                pytest.skip("decode's plan reads what only the kernel's planner writes")
            more = graph_options(self.service)
        workspace = fi_ffi.Workspace.allocate(machine.device, *ROOM[machine.is_gpu])
        more = {"workspace": workspace} | more
        self.plan = self.case.plan(self.batch, **more)
        self.rows = self.case.rows if "enable_cuda_graph" in more else self.batch.rows
        self.out = self.case.outputs(self.rows)

    def tensors(self, out=None):
        out = out or self.out
        given = [*self.case.inputs(self.rows), out.o.desc(), out.lse.desc()]
        return dict(zip(names_of(self.plan), given, strict=True))

    def prepare(self, out=None, *, stream=0, **more):
        run, options = run_of(self.plan), self.case.run_options(self.batch) | more
        stream = self.machine.stream if stream == 0 else stream
        return fi_ffi.prepare(run, **self.tensors(out), stream=stream, **options)

    def run(self, out=None, **more):
        """The run itself, of these tensors."""
        options = self.case.run_options(self.batch) | {"stream": self.machine.stream} | more
        run_of(self.plan)(**self.tensors(out) | options)

    def replan(self):
        self.case.replan(self.plan, self.batch)

    def check(self, *ways, out=None):
        """Each of these ways of a run gives what the batch says; without any, the last has."""
        for go in ways or [lambda: None]:
            if ways:
                self.clear(out)
            go()
            self.case.check(self.batch, out or self.out)

    def full(self):
        """A run in full, of a plan of its own."""
        plan = self.case.plan(self.batch)
        out = self.case.outputs(self.batch.rows)
        return self.case.run(plan, self.batch, out)

    def clear(self, out=None):
        out = out or self.out
        for placed in (out.o, out.lse):
            self.machine.poison(placed, self.machine.stream)


def array_of(desc):
    return as_array(on_host(desc) if desc.device.is_cuda else desc)
