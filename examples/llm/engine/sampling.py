"""How a request's next token is drawn from its logits: FlashInfer's filters, and one number.

Before that penalties, which count on the device: the host queues a step before it has seen the
token of the one before.  Biases are a few numbers, and a grammar's mask a bit for each token,
from the host.
"""

import random
from dataclasses import dataclass, field
from numbers import Integral, Real

import numpy as np

import fi_ffi

from .config import LIMITS, TOP
from .device import view

MOST_BIASES = 1024  # of a request
IN_PROMPT = 1  # what is counted is twice how often a token was drawn, and this
PARTS = 128  # words that `draw` keeps of a row
ALL = 4.0  # the top_p that keeps a row as it is
COLDEST = 1e-5  # a lower temperature is taken as 0: logits divided by it would be infinite
PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")


@dataclass(frozen=True)
class Sampling:
    """Parameters of a request; the defaults draw from all tokens.

    temperature 0 takes the most probable; top_k 0, top_p 1 and min_p 0 leave out none.
    The same seed draws by the same numbers, whatever else is in the batch.
    Logits are changed in this order: repetition_penalty divides those of tokens that were in the
    prompt or the text (multiplies them below 0), presence_penalty is taken off once of those in
    the text, frequency_penalty as often as they are in it, logit_bias (by token) is added.
    No text ends before min_tokens.  logprobs: of each token, and of that many others, the
    logarithm of its probability by the logits as the model gave them; prompt_logprobs: of the
    prompt's tokens as well.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 64
    ignore_eos: bool = False
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict = field(default_factory=dict, hash=False)
    logprobs: int | None = None
    prompt_logprobs: bool = False

    def __post_init__(self):
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if name == "logprobs" and value is None:
                continue
            whole = type(low) is int
            if not isinstance(value, Integral if whole else Real) or not low <= value <= high:
                kind = " a whole number" if whole else ""
                raise ValueError(f"{name} is {value!r}; it must be{kind} from {low} to {high}")
        if self.temperature < COLDEST:
            object.__setattr__(self, "temperature", 0)

    @property
    def has_penalties(self):
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)

    def generator(self):
        """Of this request's own numbers, one for each token."""
        # `Random` takes a number without its sign, so that 5 and -5 would be the same.
        return random.Random(str(self.seed) if (self.seed or 0) < 0 else self.seed)


def columns_of(slots, vocab):
    """The parameters of each slot's request; the last slot is that of padding."""
    names = ("temperature", "top_k", "top_p", "min_p", *PENALTIES)
    columns = {name: np.zeros(slots, "i4" if name == "top_k" else "f4") for name in names}
    keep(columns, slots - 1, Sampling(temperature=0), vocab)
    return columns


def keep(columns, slot, sampling, vocab):
    columns["temperature"][slot] = sampling.temperature or 1
    columns["top_k"][slot] = min(sampling.top_k or vocab, vocab)
    columns["top_p"][slot] = sampling.top_p if sampling.top_p < 1 else ALL
    for name in ("min_p", *PENALTIES):
        columns[name][slot] = getattr(sampling, name)


def uniform(request):
    """The number that decides about a request's next token; below 0 for the most probable."""
    if request.sampling.temperature == 0:
        return -1
    return min(request.numbers.random(), 1 - 2**-24)  # below 1 in float32 too


def adjustments(requests, vocab, eos):
    """What is done to the logits of a step's requests, in the order of their rows, as arrays.

    `places` (row * vocabulary + token) of logits to which `values` are added; `masked` rows, of
    which only the tokens in `bits` are left: all, until `masks` fills them.  `eos` ends a text.
    Empty where no request asks.
    """
    those = [
        (row, r) for row, r in enumerate(requests)
        if r.grammar or r.sampling.has_penalties or r.sampling.logit_bias or r.sampling.min_tokens
    ]  # fmt: skip
    if not those:
        return {}
    places, values = [], []
    for row, request in those:
        tokens, more = request.bias
        if request.drawn < request.sampling.min_tokens:
            tokens = np.concatenate([tokens, eos])
            more = np.concatenate([more, np.full(len(eos), -np.inf, np.float32)])
        places.append(tokens + np.int32(row * vocab))
        values.append(more)
    masked = [row for row, request in those if request.grammar]
    return {
        "places": np.concatenate(places), "values": np.concatenate(values),
        "masked": np.array(masked, np.int32),
        "bits": np.full((len(masked), -(-vocab // 32)), -1, np.int32),
    }  # fmt: skip


def masks(requests, bits, arrived):
    """The rows of those with a grammar, once `arrived()` has told it the tokens before."""
    arrived()
    those = (request for request in requests if request.grammar)
    for row, request in enumerate(those):
        if request.finished is None:  # else its token is not taken
            request.grammar.fill(bits, row)
    return bits


class Sampler:
    """Draws a token for each row of logits, with each row's own parameters."""

    def __init__(self, model):
        self.model, self.device, self.vocab = model, model.device, model.config.vocab
        self.counts, self.told = None, None  # of each slot's tokens; what `tell` keeps
        self.parts = self.device.zeros((model.slots, PARTS), "int32")

    def __call__(self, logits, given, order):
        """Tokens, int32 [n, 1]; they are kept as the last ones of their slots.

        `given` has a column of each parameter on the device.  What no row asks for is not
        launched: `order` says it.  Rank 0 draws, and keeps what is told of its logits.
        """
        n, probs, raw, model = logits.shape[0], logits, logits, self.model
        launch, vocab = self.device.launch, self.vocab
        tokens = model.scratch("drawn", n, 1, dtype="int32")
        if model.rank == 0:
            if order.tops is not None:  # what follows works in the logits' place
                raw = model.scratch("raw", n, vocab, dtype="float32", most=model.slots)
                self.device.copy(raw, logits)
            if order.is_penalised:
                launch("penalise", (vocab, n), logits, self.counts, given["sampled"],
                       *(given[name] for name in PENALTIES), vocab)  # fmt: skip
            if "places" in given and (count := given["places"].shape[0]):
                launch("add", (count, 1), logits, given["places"], given["values"], count)
            if "masked" in given and (count := given["masked"].shape[0]):
                launch("allow", (vocab, count), logits, given["bits"], given["masked"], vocab)
            if any(order.is_filtered):
                probs = model.scratch("probs", n, vocab, dtype="float32", most=model.slots)
                fi_ffi.softmax(None, logits, probs, given["temperature"], **model.pdl)
            if order.is_filtered[0]:
                fi_ffi.top_k_renorm_probs(probs, probs, given["top_k"])
            if order.is_filtered[1]:
                fi_ffi.top_p_renorm_probs(probs, probs, given["top_p"])
            names = ("temperature", "top_k", "top_p", "uniform", "min_p")
            drawn = view(tokens, n)
            launch("draw", (32 * 1024, n), drawn, self.parts, logits, probs,
                   *map(given.get, names), vocab, block=1024)  # fmt: skip
            if order.is_penalised:
                launch("count", (n, 1), self.counts, drawn, given["sampled"], n, vocab)
            if order.tops is not None:
                self.tell(raw, drawn, 0, order.tops)
        tokens = model.of_first(tokens)
        self.device.give(model.latest, tokens, given["sampled"])
        return tokens

    def count_anew(self, slot, prompt, drawn):
        if self.counts is None:
            self.counts = self.device.zeros((self.model.slots + 1, self.vocab), "int32")
        row = np.zeros((1, self.vocab), np.int32)
        row[0, prompt] = IN_PROMPT
        np.add.at(row[0], drawn, 2)
        self.device.write(self.counts.rows(slot, slot + 1), row)

    def tell(self, logits, tokens, start, top):
        """Keep log probabilities of a token of each row, and of the `top`, from row `start` on."""
        slots, device, vocab = self.model.slots, self.device, self.vocab
        if self.told is None:
            kinds = ((slots, TOP + 1), "float32"), ((slots, TOP), "int32")
            self.told = [(device.empty(*kind), device.in_turn(*kind)) for kind in kinds]
        n = min(logits.shape[0], slots - start)
        values, ids = (there.rows(start, start + n) for there, _ in self.told)
        device.launch("logprobs", (1024, n), values, ids, logits, tokens, vocab, top, block=1024)

    def download(self, count):
        """Host arrays in which that many rows of `tell` arrive with the step's tokens."""
        arriving = [next(pinned).rows(0, count) for _, pinned in self.told]
        for (there, _), here in zip(self.told, arriving, strict=True):
            self.device.copy(here, there.rows(0, count))
        return arriving
