"""How a request's next token is drawn from its logits: FlashInfer's filters, and one number."""

import random
from dataclasses import dataclass

import numpy as np

import fi_ffi

from .device import view

ALL = 4.0  # the top_p that keeps a row as it is


@dataclass(frozen=True)
class Sampling:
    """Parameters of a request; the defaults draw from all tokens.

    temperature 0 takes the most probable; top_k 0, top_p 1 and min_p 0 leave out none.
    The same seed gives the same text, whatever else is in the batch.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 64
    ignore_eos: bool = False

    def __post_init__(self):
        for name, low, high in (
            ("temperature", 0, 100), ("top_k", 0, 2**31 - 1), ("top_p", 1e-6, 1), ("min_p", 0, 1),
            ("max_tokens", 1, 2**31 - 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value!r}; it must be from {low} to {high}")

    def generator(self):
        """Of this request's own numbers, one for each token."""
        return random.Random(self.seed)


def columns_of(slots, vocab):
    """The parameters of each slot's request; the last slot is that of padding."""
    kinds = {"temperature": "f4", "top_k": "i4", "top_p": "f4", "min_p": "f4"}
    columns = {name: np.zeros(slots, kind) for name, kind in kinds.items()}
    keep(columns, slots - 1, Sampling(temperature=0), vocab)
    return columns


def keep(columns, slot, sampling, vocab):
    columns["temperature"][slot] = sampling.temperature or 1
    columns["top_k"][slot] = min(sampling.top_k or vocab, vocab)
    columns["top_p"][slot] = sampling.top_p if sampling.top_p < 1 else ALL
    columns["min_p"][slot] = sampling.min_p


def uniform(request):
    """The number that decides about a request's next token; below 0 for the most probable."""
    if request.sampling.temperature == 0:
        return -1
    return min(request.numbers.random(), 1 - 2**-24)  # below 1 in float32 too


class Sampler:
    """Draws a token for each row of logits, with each row's own parameters."""

    def __init__(self, model):
        self.model = model

    def __call__(self, logits, given, samplings):
        """Tokens, int32 [n, 1]; they are kept as the last ones of their slots.

        `given` has a column of each parameter on the device.  Filters that no row asks for
        are not launched.
        """
        n, vocab, probs, device = *logits.shape, logits, self.model.device
        fi_ffi.softmax(None, logits, probs, given["temperature"], **self.model.pdl)
        if any(s.top_k for s in samplings):
            fi_ffi.top_k_renorm_probs(probs, probs, given["top_k"])
        if any(s.top_p < 1 for s in samplings):
            fi_ffi.top_p_renorm_probs(probs, probs, given["top_p"])
        tokens = self.model.scratch("drawn", n, 1, dtype="int32")
        device.launch("draw", (n, 1), 1024, view(tokens, n), probs, given["uniform"],
                      given["min_p"], vocab)  # fmt: skip
        device.give(self.model.latest, tokens, given["sampled"])
        return tokens
