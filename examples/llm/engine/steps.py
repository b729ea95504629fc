"""One step on the device: its arrays, the plan of its attention, and the graph that repeats it."""

import functools
import itertools
from dataclasses import dataclass

import numpy as np

import fi_ffi

from .device import array, rows
from .model import Batch
from .pages import SCRAP
from .sampling import Sampler, columns_of, keep, uniform

# Query heads a key head for which decode kernels are quicker; from four on those of prefill,
# which use tensor cores.
GROUPS = (1, 2, 3)
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass
class Step:
    """What was queued: the requests that get a token each, and where these arrive."""

    sampled: list
    arriving: object
    mark: object
    filled: list  # (request, tokens that are in its pages when the step is done)


class Steps:
    """Queues steps on the model's device.

    Decoding alone is padded to one of a few sizes of batch; on a GPU each is planned in
    place, recorded once as a graph, and launched as that from then on.
    """

    def __init__(self, model, num_pages, page_size, use_graphs):
        self.model, self.device, self.config = model, model.device, model.config
        self.page_size = page_size
        # Requests may share pages, so that together they can name more than there are.
        longest = -(-self.config.max_positions // page_size)
        self.max_indices = model.slots * min(num_pages, longest)
        self.use_graphs = use_graphs and self.device.is_gpu
        self.sizes = [n for n in SIZES if n < model.slots] + [model.slots]
        self.mixed, self.decodes, self.graphs, self.placed = None, {}, {}, {}
        self.sampler, self.on_logits = Sampler(model), None
        # By slot, the last one for padding: its pages are the scrap page, its length is 1.
        self.table = np.full((model.slots + 1, num_pages), SCRAP, np.int32)
        self.columns = columns_of(model.slots + 1, self.config.vocab)
        # Two of each: the host writes or reads one while the other's copy may still run.
        room = 12 * model.max_tokens + 48 * model.slots + 4 * self.max_indices + 1024
        self.staging = itertools.cycle([self.device.pinned((room,), "uint8") for _ in "ab"])
        self.arriving = itertools.cycle(
            [self.device.pinned((model.slots, 1), "int32") for _ in "ab"]
        )
        self.inputs = self.device.empty((room,), "uint8")

    def admit(self, request):
        """Make its slot ready."""
        self.model.clear(request.slot)
        keep(self.columns, request.slot, request.sampling, self.config.vocab)
        self.place(request)

    def place(self, request, start=0):
        """Its pages, from one on."""
        self.table[request.slot, start : len(request.pages)] = request.pages[start:]

    def queue(self, work):
        """(request, tokens) of each, the tokens of the prompt or the one drawn last."""
        is_decode = all(count == 1 and request.drawn for request, count in work)
        size = next(n for n in self.sizes if n >= len(work)) if is_decode else 0
        sampled = [r for r, count in work if r.computed + count == r.length]
        host = self._host(work, sampled, size)
        given = self._upload(host, size)
        with self.device.scope():
            logits = self._forward(given, host, size)
            arriving = rows(next(self.arriving), 0, len(sampled))
            if sampled:
                self._sample(logits, given, sampled, arriving)
        for request, count in work:
            request.computed += count
        for request in sampled:
            request.drawn += 1
        filled = [(request, request.computed) for request, _ in work]
        return Step(sampled, arriving, self.device.mark(), filled)

    def _sample(self, logits, given, sampled, arriving):
        if self.on_logits:
            self.on_logits(sampled, self.device.get(rows(logits, 0, len(sampled))))
        tokens = self.sampler(logits, given, [r.sampling for r in sampled])
        self.device.download(arriving, rows(tokens, 0, len(sampled)))

    def tokens(self, step):
        """The tokens drawn, when they are there."""
        self.device.wait(step.mark)
        return array(step.arriving)[:, 0].tolist()

    def _host(self, work, sampled, size):
        """The arrays of a step; a decode of `size` is padded with requests on the scrap page."""
        pad = max(size - len(work), 0)
        slots = np.array([r.slot for r, _ in work] + [self.model.slots] * pad)
        counts = np.array([count for _, count in work] + [1] * pad)
        computed = np.array([r.computed for r, _ in work] + [0] * pad)
        is_sampled = np.array([r.computed + c == r.length for r, c in work] + [True] * pad)
        ends = np.cumsum(counts)
        starts = np.concatenate([[0], ends])
        requests, positions = fi_ffi.batch_indices_positions(starts, computed + counts)
        # One that was drawn is on the device, whether or not the host has seen it.
        tokens = np.where(slots < self.model.slots, -1 - slots, 0)
        if not size:
            tokens = np.concatenate([
                r.prompt_ids[r.computed : r.computed + count] if r.computed < len(r.prompt)
                else tokens[i : i + 1]
                for i, (r, count) in enumerate(work)
            ])  # fmt: skip
        pages = -(-(computed + counts) // self.page_size)
        held = np.arange(pages.max()) < pages[:, None]
        host = {
            "tokens": tokens,
            "positions": positions,
            "requests": requests,
            "last": ends[is_sampled] - 1,
            "slots": slots,
            "sampled": slots[is_sampled],
            "kv_indptr": np.concatenate([[0], np.cumsum(pages)]),
            "kv_last_page_len": computed + counts - (pages - 1) * self.page_size,
            "kv_indices": self.table[slots, : pages.max()][held],
        }
        host = {name: np.asarray(values, np.int32) for name, values in host.items()}
        host["starts"] = starts.astype(np.int64)
        host["uniform"] = np.array([uniform(r) for r in sampled] + [-1] * pad, np.float32)
        return host | {name: column[host["sampled"]] for name, column in self.columns.items()}

    def _upload(self, host, size):
        """All arrays in one copy; pages last, so that the others stay where a graph has them."""
        staging, pages = next(self.staging), host.pop("kv_indices")
        placed = self.placed.get(size) or self._place(host)
        if size:  # where all but the pages are as long each time
            self.placed[size] = placed
        starts, given, end = placed
        memory = array(staging)
        for name, values in host.items():
            memory[starts[name] : starts[name] + values.nbytes] = values.view(np.uint8)
        host["kv_indices"] = pages
        memory[end : end + pages.nbytes] = pages.view(np.uint8)
        self.device.upload(
            rows(self.inputs, 0, end + pages.nbytes), rows(staging, 0, end + pages.nbytes)
        )
        return given | {"kv_indices": self._input(end, pages)}

    def _place(self, host):
        """Where each array starts, the tensors there, and where the last one ends."""
        starts, given, at = {}, {}, 0
        for name, values in host.items():
            starts[name], given[name] = at, self._input(at, values)
            at += -(-values.nbytes // 16) * 16
        return starts, given, at

    def _input(self, at, values):
        kind, device = str(values.dtype), self.device.name
        return fi_ffi.TensorDesc(self.inputs.ptr + at, values.shape, kind, device=device)

    def _forward(self, given, host, size):
        batch = Batch(**{name: given[name] for name in Batch.INPUTS})
        if not size:
            batch.attend = self._plan_mixed(host)
            return self.model.forward(batch)
        if self.device.is_gpu:  # whose plans are for graphs, with room for all pages there may be
            batch.kv_indices = fi_ffi.TensorDesc(
                batch.kv_indices.ptr, (self.max_indices,), "int32", device=self.device.name
            )
        batch.attend = functools.partial(
            self._plan_decode(host, size), paged_kv_indices=batch.kv_indices
        )
        if size in self.graphs:
            graph, logits = self.graphs[size]
            graph.launch()
            return logits
        logits = self.model.forward(batch)
        if self.use_graphs:  # recorded after it ran once: nothing is loaded or allocated any more
            with fi_ffi.capture(self.device.stream) as graph:
                self.device.is_frozen = True
                self.graphs[size] = graph, self.model.forward(batch)
            self.device.is_frozen = False
        return logits

    def _options(self):
        config, device = self.config, self.device
        return {
            "num_qo_heads": config.heads, "num_kv_heads": config.kv_heads,
            "page_size": self.page_size, "q_data_type": config.dtype, "device": device.name,
        }  # fmt: skip

    def _plan_mixed(self, host):
        """Prompts, or pieces of them, and single tokens in one batch."""
        arrays = self._prefill_arrays(host, host["starts"].astype(np.int32))
        if self.mixed is None:
            options = self._options() | {"head_dim_qk": self.config.head_dim, "causal": True}
            self.mixed = fi_ffi.BatchPrefillPlan(**arrays, **options, stream=self.device.stream)
        else:
            self.mixed.replan(**arrays, stream=self.device.stream)
        return self.mixed.paged_run

    def _plan_decode(self, host, size):
        """One token a request; the plan of each size stays in its place for the graph.

        Runs are given the pages: a plan for graphs would copy as many as there may ever be.
        """
        arrays, kind = {
            "indptr": host["kv_indptr"], "indices": None,
            "last_page_len": host["kv_last_page_len"],
        }, fi_ffi.BatchDecodePlan  # fmt: skip
        has_kernel = self.config.heads // self.config.kv_heads in GROUPS
        if not has_kernel:
            kind = fi_ffi.BatchPrefillPlan
            arrays = self._prefill_arrays(host, np.arange(size + 1, dtype=np.int32))
            arrays["paged_kv_indices"] = None
        if size not in self.decodes:
            options = self._options() | {
                "head_dim" if has_kernel else "head_dim_qk": self.config.head_dim,
                "enable_cuda_graph": self.device.is_gpu, "max_num_indices": self.max_indices,
            }  # fmt: skip
            options |= {} if has_kernel else {"backend": "fa2"}  # which splits long requests
            self.decodes[size] = kind(**arrays, **options, stream=self.device.stream)
        else:
            self.decodes[size].replan(**arrays, stream=self.device.stream)
        plan = self.decodes[size]
        return plan.run if has_kernel else plan.paged_run

    @staticmethod
    def _prefill_arrays(host, qo_indptr):
        names = ("kv_indptr", "kv_indices", "kv_last_page_len")
        return {"qo_indptr": qo_indptr} | {f"paged_{name}": host[name] for name in names}
