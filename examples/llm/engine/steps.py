"""One step on the device: its arrays, the plan of its attention, and the graph that repeats it."""

import functools
import itertools
import multiprocessing
import pickle
from collections import namedtuple
from dataclasses import dataclass, fields

import numpy as np

import fi_ffi

from .config import LINEAR
from .model import FEW, PIECES, Batch
from .pages import SCRAP
from .sampling import MOST_BIASES, Sampler, adjustments, columns_of, keep, masks, uniform

# Query heads a key head for which decode kernels are quicker; from four on those of prefill,
# which use tensor cores.
GROUPS = (1, 2, 3)
PIECE = 32  # tokens of a piece, or a page
ENDING_S = 30.0  # how long a rank may take to end
ALIGNED = 16  # bytes that a step's arrays begin at multiples of
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass
class Order:
    """A step as every rank runs it: arrays, and what they do not say."""

    host: dict  # of a decode of some size each is as long each time;
    more: dict  # others are not: pages, and what changes logits
    size: int  # of a batch that decodes alone, padded; 0 for any other
    sampled: int  # requests that get a token
    is_filtered: tuple  # whether any of them has a top_k, a top_p
    cleared: list  # slots that other requests had before
    counted: list  # (slot, prompt, tokens so far) of new requests with penalties
    is_penalised: bool
    tops: int | None  # how many of the most probable tokens are told beside each; None: nothing


# What was queued: requests that are `sampled`, and where their tokens arrive; (request, tokens in
# its pages when it is done); (request, tokens of its prompt whose log probabilities are told).
Step = namedtuple("Step", ("sampled", "arriving", "filled", "echoed"))


def echo(request, count):
    """What follows the next `count` tokens of its prompt, if it is told, and from which one on."""
    if not request.sampling.prompt_logprobs:
        return [], 0
    start = max(request.computed, request.echoed)
    return request.prompt[start + 1 : request.computed + count + 1], start - request.computed


@functools.cache
def same_of(size):
    """What is the same in each decode of a size."""
    each, none = np.arange(size, dtype=np.int32), np.empty(0, np.int32)
    return {"requests": each, "following": none, "starts": np.arange(size + 1)}


class Steps:
    """Makes the arrays of steps, which `runner` runs; those of decoding alone in a few sizes."""

    def __init__(self, runner):
        self.runner, job = runner, runner.job
        self.config, self.page_size, self.slots = job.config, job.page_size, job.max_batch
        self.pages_of_piece = max(PIECE // job.page_size, 1)
        self.on_logits, self.cleared, self.counted = None, [], []
        vocab = self.config.vocab
        self.eos = np.array([token for token in self.config.eos if token < vocab], np.int32)
        self.sizes = [n for n in SIZES if n < self.slots] + [self.slots]
        # By slot, the last one for padding: its pages are the scrap page, its length is 1.
        longest = -(-self.config.max_positions // job.page_size)
        self.table = np.full((self.slots + 1, min(job.num_pages, longest)), SCRAP, np.int32)
        self.columns = columns_of(self.slots + 1, vocab)

    def admit(self, request):
        self.cleared.append(request.slot)
        if request.sampling.has_penalties:
            self.counted.append((request.slot, [*request.prompt], [*request.tokens]))
        keep(self.columns, request.slot, request.sampling, self.config.vocab)
        self.place(request)

    def place(self, request, start=0):
        self.table[request.slot, start : len(request.pages)] = request.pages[start:]

    def queue(self, work, arrived):
        """So many tokens of each request; `arrived()` takes in the step before, for masks."""
        is_decode = not any(request.is_new for request, _ in work)
        size = next(n for n in self.sizes if n >= len(work)) if is_decode else 0
        sampled = [r for r, count in work if count == r.left]
        echoed = [(r, echo(r, count)[0]) for r, count in work if r.sampling.prompt_logprobs]
        host, more = self._decode(work, size) if size else self._host(work, sampled)
        more |= adjustments(sampled, self.config.vocab, self.eos)
        given = [r.sampling for r in sampled]
        asked = [s.logprobs for s in given if s.logprobs is not None]
        asked += [r.sampling.logprobs or 0 for r, tokens in echoed if tokens]
        is_filtered = any(s.top_k for s in given), any(s.top_p < 1 for s in given)
        order = Order(
            host, more, size, len(sampled), is_filtered, self.cleared, self.counted,
            any(s.has_penalties for s in given), max(asked, default=None),
        )  # fmt: skip
        self.cleared, self.counted = [], []
        self.runner.on_logits = self.on_logits and functools.partial(self.on_logits, sampled)
        late = functools.partial(masks, sampled, more.get("bits"), arrived)
        is_masked = any(r.grammar for r in sampled)
        arriving = self.runner.queue(order, late if is_masked else None)
        for request, count in work:
            request.computed += count
            request.echoed = max(request.echoed, request.computed)
        for request in sampled:
            request.drawn += 1
        filled = [(request, request.computed) for request, _ in work]
        return Step(sampled, arriving, filled, echoed)

    def tokens(self, step):
        """The tokens drawn, when they are there; and what is told of each, then of those echoed:
        (the logarithm of its probability, the most probable tokens, theirs), or None of all.
        """
        tokens, told = self.runner.tokens(step.arriving)
        if told is None:
            return tokens, itertools.repeat(None)
        return tokens, ((value, ids, rest) for (value, *rest), ids in zip(*told, strict=True))

    def _decode(self, work, size):
        """The arrays of a step that decodes, padded with requests on the scrap page."""
        requests, rest = [request for request, _ in work], size - len(work)
        slots = np.array([r.slot for r in requests] + [self.slots] * rest, np.int32)
        computed = np.array([r.computed for r in requests] + [0] * rest, np.int32)
        full = computed // self.page_size
        most = int(full.max()) + 1
        held = np.arange(most) <= full[:, None]
        host = same_of(size) | {
            # One that was drawn is on the device, whether or not the host has seen it.
            "tokens": np.where(slots < self.slots, ~slots, 0),
            "positions": computed,
            "slots": slots,
            "sampled": slots,
            "kv_indptr": np.concatenate([[0], np.cumsum(full + 1)], dtype=np.int32),
            "kv_last_page_len": computed + 1 - full * self.page_size,
        }
        is_short = most <= PIECES * self.pages_of_piece
        if size <= FEW and is_short and self.runner.has_pieces:
            host |= self._pieces(full + 1, host["kv_indptr"], host.pop("kv_last_page_len"))
        host |= self._draws(requests, slots, rest)
        return host, {"kv_indices": self.table[slots, :most][held]}

    def _pieces(self, pages, indptr, last):
        """Where each request's pieces begin, and what their last pages hold."""
        each = self.pages_of_piece
        starts = np.minimum(np.arange(PIECES) * each, pages[:, None]) + indptr[:-1, None]
        lasts = np.full(starts.shape, self.page_size, np.int32)
        lasts[np.arange(len(pages)), (pages - 1) // each] = last
        starts = np.append(starts, indptr[-1]).astype(np.int32)
        return {"starts_of_pieces": starts, "last_of_pieces": lasts.reshape(-1)}

    def _draws(self, sampled, slots, rest=0):
        """What decides about each draw; nothing does for the last `rest`."""
        numbers = [*map(uniform, sampled)] + [-1] * rest
        columns = {name: column[slots] for name, column in self.columns.items()}
        return {"uniform": np.array(numbers, np.float32), **columns}

    def _host(self, work, sampled):
        slots = np.array([r.slot for r, _ in work])
        counts = np.array([count for _, count in work])
        computed = np.array([r.computed for r, _ in work])
        is_sampled = np.array([count == r.left for r, count in work])
        ends = np.cumsum(counts)
        starts = np.concatenate([[0], ends])
        requests, positions = fi_ffi.batch_indices_positions(starts, computed + counts)
        tokens = np.concatenate([
            r.known[r.computed : r.computed + count] if r.is_new else [~r.slot]
            for r, count in work
        ])  # fmt: skip
        told = [echo(r, count) for r, count in work]  # by other rows of logits than draws
        others = [
            start + first + np.arange(len(tokens))
            for start, (tokens, first) in zip(starts, told, strict=False)
        ]
        pages = -(-(computed + counts) // self.page_size)
        held = np.arange(pages.max()) < pages[:, None]
        host = {
            "tokens": tokens,
            "positions": positions,
            "requests": requests,
            "last": np.concatenate([ends[is_sampled] - 1, *others]),
            "following": [token for tokens, _ in told for token in tokens],
            "slots": slots,
            "sampled": slots[is_sampled],
            "kv_indptr": np.concatenate([[0], np.cumsum(pages)]),
            "kv_last_page_len": computed + counts - (pages - 1) * self.page_size,
        }
        host = {name: np.asarray(values, np.int32) for name, values in host.items()}
        host["starts"] = starts.astype(np.int64)
        host |= self._draws(sampled, host["sampled"])
        return host, {"kv_indices": self.table[slots, : pages.max()][held]}


class Runner:
    """Runs steps on one rank's device.

    On a GPU each size of batch is planned in place, recorded once as a graph, and launched as
    that from then on.  Rank 0 hands each step on to those that follow it.
    """

    def __init__(self, model, job, followers=()):
        self.model, self.device, self.config, self.job = model, model.device, model.config, job
        self.followers, self.before = followers, None
        # Requests may share pages, so that together they can name more than there are.
        longest = -(-self.config.max_positions // job.page_size)
        self.max_indices = model.slots * min(job.num_pages, longest)
        self.use_graphs = job.use_graphs and self.device.is_gpu
        # By size of a decode batch (0: any) and kind of attention; in pieces, by size alone.
        self.plans, self.plans_of_pieces = {}, {}
        # By size, whether it draws, and whether it is in pieces; without drawing.
        self.graphs, self.placed = {}, {}
        self.kinds = [kind for kind in self.config.windows if kind != LINEAR]
        per_key_head = self.config.heads // self.config.kv_heads
        self.is_narrow = per_key_head in GROUPS and not self.config.has_sinks
        self.sizes = {
            "num_qo_heads": self.config.heads, "num_kv_heads": self.config.kv_heads,
            "page_size": job.page_size, "q_data_type": self.config.dtype,
        }  # fmt: skip
        self.of_decode = self.sizes | {"head_dim": self.config.head_dim}
        # Kernels for pieces have no sinks, and a window would be that of each piece.
        has_window = any(self.config.windows[kind] >= 0 for kind in self.kinds)
        is_plain = not self.config.has_sinks and not has_window
        self.has_pieces = is_plain and self.device.is_gpu and bool(
            fi_ffi.BatchDecodePlan.supports(**self.of_decode)
        )  # fmt: skip
        self.sampler, self.on_logits = Sampler(model), None
        room = 12 * model.max_tokens + 72 * model.slots + 4 * self.max_indices
        room += 8 * FEW * PIECES + 1024
        biases, words = MOST_BIASES + len(self.config.eos), -(-self.config.vocab // 32)
        room += model.slots * (8 * biases + 4 * (1 + words))
        staging = itertools.islice(self.device.in_turn((room,), "uint8"), 2)
        self.staging = itertools.cycle([(memory, np.asarray(memory)) for memory in staging])
        self.arriving = self.device.in_turn((model.slots, 1), "int32")
        self.inputs = self.device.empty((room,), "uint8")

    @property
    def is_whole(self):
        return self.model.group is None or self.model.group.is_open

    def queue(self, order, late=None):
        """Launch a step; what `tokens` takes.  The masks that `late()` gives follow the logits."""
        if self.followers:
            packed = pickle.dumps(order)
            for orders, _ in self.followers:
                orders.put(packed)
        with self.device.scope():
            for slot in order.cleared:
                self.model.clear(slot)
            for counted in order.counted if self.model.rank == 0 else ():
                self.sampler.count_anew(*counted)
            given = self._upload(order)
            # A graph draws as well, from logits as they are.
            asks = order.is_penalised or any(order.is_filtered) or order.tops is not None
            is_plain = order.size and not asks and len(order.more) == 1
            draws, told = bool(is_plain and not self.on_logits), None
            logits, tokens = self._forward(given, order, draws)
            if late:
                (staging, memory), bits = self.staged, given["bits"]
                start = bits.ptr - self.inputs.ptr
                end = start + bits.span_bytes
                memory[start:end] = np.frombuffer(late().tobytes(), np.uint8)
                self.device.copy(self.inputs.rows(start, end), staging.rows(start, end))
            if not draws:
                tokens, told = self._sample(logits, given, order)
            arriving = next(self.arriving).rows(0, order.sampled)
            if order.sampled:
                self.device.copy(arriving, tokens.rows(0, order.sampled))
            return arriving, told, self.device.mark()

    def _sample(self, logits, given, order):
        """Queue the draws, and log probabilities where they are asked for."""
        count, tokens = given["following"].shape[0], None
        is_told = order.tops is not None and self.model.rank == 0
        if count:  # rows of logits after those of the draws
            if is_told:
                others = logits.rows(order.sampled, order.sampled + count)
                self.sampler.tell(others, given["following"], order.sampled, order.tops)
            logits = logits.rows(0, order.sampled) if order.sampled else None
        if order.sampled:
            if self.on_logits:
                self.on_logits(self.device.get(logits.rows(0, order.sampled)))
            tokens = self.sampler(logits, given, order)
        return tokens, self.sampler.download(order.sampled + count) if is_told else None

    def tokens(self, queued):
        """The tokens drawn in a step, when they are there, and what is told of them or None."""
        (arriving, told, mark), group = queued, self.model.group
        self.device.wait(mark, (lambda: not self.is_whole) if group else None)
        if not self.is_whole:  # a rank has ended: what was drawn since means nothing
            group.synchronize(self.device.stream)  # which raises
        tokens = np.asarray(arriving)[:, 0].tolist()
        return tokens, told and [np.asarray(part).tolist() for part in told]

    def run(self, order):
        """Queue a step, or none; what `tokens` gives of the one before."""
        before, self.before = self.before, self.queue(order) if order else None
        return self.tokens(before) if before else ([], None)

    def close(self):
        for orders, _ in self.followers:
            orders.put(None)
        self.model.close()
        for _, worker in self.followers:
            worker.join(ENDING_S)
            if worker.is_alive() and isinstance(worker, multiprocessing.process.BaseProcess):
                worker.kill()

    def _upload(self, order):
        """All arrays in one copy; first those that a graph has, which stay where they are."""
        key = order.size, "starts_of_pieces" in order.host
        given, end = self.placed.get(key) or self._place(order.host, 0)
        if order.size:
            self.placed[key] = given, end
        more, end = self._place(order.more, end)
        self.staged = staging, memory = next(self.staging)
        parts = [values.tobytes() for values in (order.host | order.more).values()]
        whole = b"".join(part + bytes(-len(part) % ALIGNED) for part in parts)
        memory[: len(whole)] = np.frombuffer(whole, np.uint8)
        self.device.copy(self.inputs.rows(0, end), staging.rows(0, end))
        return given | more

    def _place(self, arrays, at):
        """The tensors for arrays from there on, and where the last one ends."""
        given, device = {}, self.device.name
        for name, values in arrays.items():
            ptr, kind = self.inputs.ptr + at, str(values.dtype)
            given[name] = fi_ffi.TensorDesc(ptr, values.shape, kind, device=device)
            at += -(-values.nbytes // ALIGNED) * ALIGNED
        return given, at

    def _forward(self, given, order, draws):
        """Logits, and the tokens drawn from them, where the step `draws`."""
        size, host = order.size, order.host | order.more
        key = size, draws, "starts_of_pieces" in host
        if key[2]:
            runs = dict.fromkeys(self.kinds, self._attend_in_pieces(given, size))
        elif size:
            runs = {kind: self._attend(host, size, kind) for kind in self.kinds}
        else:  # when the first layer asks: the GPU has its first product to do by then
            plan = functools.cache(functools.partial(self._attend, host, size))
            runs = {kind: lambda *given, of=kind, **more: plan(of)(*given, **more)
                    for kind in self.kinds}  # fmt: skip
        if key in self.graphs:
            graph, found = self.graphs[key]
            graph.launch()
            return found
        batch = Batch(**{field.name: given.get(field.name) for field in fields(Batch)})
        if size and self.device.is_gpu:  # for graphs: plans have room for all pages there may be
            batch.kv_indices = fi_ffi.TensorDesc(
                batch.kv_indices.ptr, (self.max_indices,), "int32", device=self.device.name
            )
        more = {"paged_kv_indices": batch.kv_indices} if size else {}
        batch.attend = {kind: functools.partial(run, **more) for kind, run in runs.items()}

        def forward():
            logits = self.model.forward(batch)
            return logits, self.sampler(logits, given, order) if draws else None

        found = forward()
        if size and self.use_graphs:  # after it ran once: nothing is loaded or allocated any more
            with fi_ffi.capture(self.device.stream, device=self.device.name) as graph:
                self.device.is_frozen = True
                self.graphs[key] = graph, forward()
            self.device.is_frozen = False
        return found

    def _attend_in_pieces(self, given, size):
        """The run of a plan of any lengths, for which pieces are requests."""
        if size not in self.plans_of_pieces:
            self.plans_of_pieces[size] = fi_ffi.BatchDecodePlan(
                size * PIECES, None, None, **self.of_decode, device=self.device.name,
                stream=self.device.stream,
            )  # fmt: skip
        return functools.partial(
            self.plans_of_pieces[size].run, paged_kv_indptr=given["starts_of_pieces"],
            paged_kv_last_page_len=given["last_of_pieces"],
        )  # fmt: skip

    def _attend(self, host, size, kind):
        """A plan's run: of prompts, pieces of them and single tokens; or of one token a request.

        For the latter, with a size, the plan stays in its place for the graph.  Its runs are given
        the pages: a plan for graphs would copy as many as there may ever be.
        """
        is_narrow, stream = size and self.is_narrow, self.device.stream
        pages = host["kv_indptr"], None if size else host["kv_indices"], host["kv_last_page_len"]
        if is_narrow:
            arrays = dict(zip(("indptr", "indices", "last_page_len"), pages, strict=True))
        else:
            starts = np.arange(size + 1) if size else host["starts"]
            names = ("paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")
            arrays = {"qo_indptr": starts.astype(np.int32), **dict(zip(names, pages, strict=True))}
        if (size, kind) in self.plans:
            plan = self.plans[size, kind]
            plan.replan(**arrays, stream=stream)
        else:
            of = fi_ffi.BatchDecodePlan if is_narrow else fi_ffi.BatchPrefillPlan
            plan = of(**arrays, **self._options(size, kind), stream=stream)
            self.plans[size, kind] = plan
        return plan.run if is_narrow else plan.paged_run

    def _options(self, size, kind):
        config, window = self.config, self.config.windows[kind]
        options = {"window_left": window, "device": self.device.name}
        if size:
            options["enable_cuda_graph"] = self.device.is_gpu
            options["max_num_indices"] = self.max_indices
            if self.is_narrow:
                return self.of_decode | options
            options["backend"] = "fa2"  # splits long requests, with a window where it is causal
        options |= {"head_dim_qk": config.head_dim, "use_attention_sink": config.has_sinks}
        return self.sizes | options | {"causal": not size or window >= 0}
