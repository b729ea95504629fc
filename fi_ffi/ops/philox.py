"""A counter of random numbers for the sampling ops.

A kernel draws from Philox: the seed selects a sequence, and the offset is the number of words to
skip in it. A kernel keeps no state, so two calls with the same numbers draw the same tokens.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping

from fi_ffi.errors import ArgumentError, ArgumentTypeError
from fi_ffi.ops.call.arguments import INT64_MAX, check_int
from fi_ffi.ops.call.op import Op

# The most words of its sequence that an output of a call reads (include/flashinfer/sampling.cuh).
# The samplers with a filter draw a word in each round, for which FlashInfer reserves 32.
WORDS: Mapping[str, int] = {
    "sampling_from_probs": 1,
    "sampling_from_logits": 4,
    "min_p_sampling_from_probs": 1,
    "top_k_sampling_from_probs": 32,
    "top_p_sampling_from_probs": 32,
    "top_k_top_p_sampling_from_probs": 32,
    # And one for each drafted token.
    "chain_speculative_sampling": 2,
}
_OF_DRAFTS = "chain_speculative_sampling"
_SEEDS, _OFFSETS = ("seed_val", "philox_seed"), ("offset_val", "philox_offset")


class Philox:
    """A seed and an offset that moves on with each call.

        random = fi_ffi.Philox(1)
        numbers = random.draw(fi_ffi.sampling_from_probs)
        fi_ffi.sampling_from_probs(probs, tokens, valid, **numbers, stream=stream)

    Threads may share one: no two calls get the same words.  `Philox(*random.state)` repeats what
    follows, also in another process, and a pickle or a copy starts where the object is.

    Args:
        seed: a signed 64-bit number; None takes one from the operating system.
        offset: the number of random words to skip.

    Raises `ArgumentError` and `ArgumentTypeError`.
    """

    __slots__ = ("_lock", "_offset", "seed")

    def __init__(self, seed: int | None = None, offset: int = 0) -> None:
        if seed is None:
            seed = int.from_bytes(os.urandom(8), "little", signed=True)
        self.seed = check_int("Philox", "seed", seed, -INT64_MAX - 1, INT64_MAX)
        self._offset = check_int("Philox", "offset", offset, 0, INT64_MAX)
        self._lock = threading.Lock()

    @property
    def state(self) -> tuple[int, int]:
        """The seed, and the offset of the next call."""
        return self.seed, self._offset

    def __repr__(self) -> str:
        return f"fi_ffi.Philox({self.seed}, {self._offset})"

    def __reduce__(self) -> tuple[type[Philox], tuple[int, int]]:
        return type(self), self.state

    def take(self, words: int) -> int:
        """Reserve random words and return the offset of the first.

        `draw` does it for a call; use this for what reads its offset from the device
        (`maybe_offset_arr`).  Raises `ArgumentError` after the last of 2^63 words.
        """
        count = check_int("Philox.take", "words", words, 1, INT64_MAX)
        with self._lock:
            first = self._offset
            if first > INT64_MAX - count:
                expected = f"{INT64_MAX - first} or less: the rest of the sequence"
                raise ArgumentError("Philox.take", "words", got=count, expected=expected)
            self._offset = first + count
        return first

    def draw(self, op: object, draft_tokens: int | None = None) -> dict[str, int]:
        """Reserve the words of one call of a sampling op, and return its seed and offset.

        Args:
            op: the op, such as `fi_ffi.top_p_sampling_from_probs`.
            draft_tokens: for `chain_speculative_sampling`, the number of drafted tokens of a row.

        The names are those of the op's arguments.  Raises `ArgumentError` and `ArgumentTypeError`.
        """
        name = "Philox.draw"
        if not isinstance(op, Op) or op.__name__ not in WORDS:
            got = f"fi_ffi.{op.__name__}" if isinstance(op, Op) else type(op).__name__
            expected = f"an op that draws: {', '.join(f'fi_ffi.{one}' for one in WORDS)}"
            raise ArgumentTypeError(name, "op", got=got, expected=expected)
        drafted = 0
        if op.__name__ == _OF_DRAFTS:
            drafted = check_int(name, "draft_tokens", draft_tokens, 1)
        elif draft_tokens is not None:
            expected = f"None, except for {_OF_DRAFTS}"
            raise ArgumentError(name, "draft_tokens", got=draft_tokens, expected=expected)
        offset = self.take(WORDS[op.__name__] + drafted)
        taken = {arg.name for arg in op.row.given}
        numbers = dict.fromkeys(_SEEDS, self.seed) | dict.fromkeys(_OFFSETS, offset)
        return {name: number for name, number in numbers.items() if name in taken}
