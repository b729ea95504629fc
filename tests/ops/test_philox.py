"""`fi_ffi.Philox`: which random words calls get, and that no two get the same."""

from __future__ import annotations

import copy
import pickle
import re
import threading
from pathlib import Path

import numpy as np
import pytest

import fi_ffi
from fi_ffi.errors import ArgumentError, ArgumentTypeError
from fi_ffi.ops.functions import OPS
from fi_ffi.ops.philox import WORDS
from fi_ffi.reference import philox

CHAIN = "chain_speculative_sampling"
PAGE = Path(fi_ffi.__file__).parents[1] / "docs" / "sampling.md"


def sampled(name: str, random: fi_ffi.Philox, given: np.ndarray, more: int = 3) -> np.ndarray:
    """The tokens of one call on these rows of probabilities."""
    op, rows = OPS[name], len(given)
    if name == CHAIN:
        n, width = rows // (2 * more + 1), given.shape[1]
        draft = given[: n * more].reshape(n, more, width)
        target = given[n * more : n * (2 * more + 1)].reshape(n, more + 1, width)
        drafted = draft.argmax(axis=2).astype(np.int32)
        tokens = np.full((n, more + 1), -7, np.int32)
        counts = np.zeros((2, n), np.int32)
        numbers = random.draw(op, draft_tokens=more)
        op(draft, drafted, np.ascontiguousarray(target), tokens, counts[0], counts[1], **numbers)
        return tokens
    tokens, valid = np.full(rows, -7, np.int64), np.zeros(rows, bool)
    outputs = (tokens,) if name == "sampling_from_logits" else (tokens, valid)
    limits = {"top_k_val": 50, "top_p_val": 0.95, "min_p_val": 0.01}
    taken = {arg.name for arg in op.row.given}
    limits = {key: value for key, value in limits.items() if key in taken}
    if "top_k_top_p" in name:
        limits["top_k_val"] = 50.0
    op(given, *outputs, **limits, **random.draw(op))
    assert (tokens >= 0).all()
    return tokens


@pytest.fixture
def probs() -> np.ndarray:
    drawn = np.random.default_rng().random((70, 500), np.float32) + 0.5
    return (drawn / drawn.sum(axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("name", WORDS)
def test_calls_differ_and_a_state_repeats_them(name: str, probs: np.ndarray) -> None:
    random = fi_ffi.Philox(int(np.random.default_rng().integers(-(2**63), 2**63)))
    sampled(name, random, probs)
    state = random.state
    first, second = sampled(name, random, probs), sampled(name, random, probs)
    assert (first != second).any()
    again = fi_ffi.Philox(*state)
    assert (sampled(name, again, probs) == first).all()
    assert (sampled(name, again, probs) == second).all()
    assert again.state == random.state


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("start", [0, 1, 7])
def test_no_call_reads_the_words_of_another(
    name: str, start: int, probs: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another call's words change nothing; its own, the last of which may matter too, do."""
    real, spoilt = philox.words, np.random.default_rng().integers(0, 2**32, 4096, np.uint32)
    clean = range(2**62)

    def words(seed: object, subsequences: object, offset: object, count: int) -> np.ndarray:
        drawn = real(seed, subsequences, offset, count)  # type: ignore[arg-type]
        first = int(np.max(offset))  # type: ignore[call-overload]
        at = np.arange(first, first + count)
        theirs = (at < clean.start) | (at >= clean.stop)
        drawn[:, theirs] = spoilt[at[theirs] % len(spoilt)]
        return drawn

    random = fi_ffi.Philox(5, start)
    for more in (3, 1, 4):
        before = random.state
        tokens = sampled(name, random, probs, more)
        assert random.state[1] == before[1] + WORDS[name] + (more if name == CHAIN else 0)
        with monkeypatch.context() as patch:
            patch.setattr(philox, "words", words)
            clean = range(before[1], random.state[1])
            assert (sampled(name, fi_ffi.Philox(*before), probs, more) == tokens).all()
            clean = range(0)
            assert (sampled(name, fi_ffi.Philox(*before), probs, more) != tokens).any()


def test_every_op_that_takes_an_offset_is_counted() -> None:
    drawing = {
        name
        for name, op in OPS.items()
        if any(arg.name in ("offset_val", "philox_offset") for row in op.rows for arg in row.given)
    }
    assert drawing == WORDS.keys()
    for name in drawing:
        for row in OPS[name].rows:  # each form has one of the two names, and both parts
            names = {arg.name for arg in row.given}
            assert len(names & {"seed_val", "philox_seed"}) == 1
            assert len(names & {"offset_val", "philox_offset"}) == 1


def test_the_names_are_those_of_the_release() -> None:
    name, old = "sampling_from_probs", "0.6.3"
    op = OPS[name]
    try:
        op.select_release(old)
        assert fi_ffi.Philox(3, 4).draw(op) == {"philox_seed": 3, "philox_offset": 4}
    finally:
        op.forget()
    assert fi_ffi.Philox(3, 4).draw(op) == {"seed_val": 3, "offset_val": 4}


def test_the_page_tells_the_same_words() -> None:
    rows = dict(re.findall(r"^\| (`[^|]+`) \| (\d+)", PAGE.read_text(), re.MULTILINE))
    told = {one: int(words) for ops, words in rows.items() for one in re.findall(r"`(\S+?)`", ops)}
    for name, words in WORDS.items():
        if name == CHAIN:
            continue
        found = told.get(name) or next(
            of for start, of in told.items() if start.endswith("…") and name.startswith(start[:-1])
        )
        assert found == words, name
    assert "| the number of drafted tokens, plus 2 |" in PAGE.read_text()


def test_threads_share_one() -> None:
    random, taken = fi_ffi.Philox(1), [[] for _ in range(8)]

    def body(mine: list[int]) -> None:
        for _ in range(500):
            mine.append(random.draw(fi_ffi.top_p_sampling_from_probs)["offset_val"])

    threads = [threading.Thread(target=body, args=(mine,)) for mine in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    every = sorted(offset for mine in taken for offset in mine)
    assert every == [*range(0, 4000 * 32, 32)] and random.state == (1, 4000 * 32)


def test_copies_start_where_the_object_is() -> None:
    random = fi_ffi.Philox(-(2**63), 2**40)
    assert random.take(5) == 2**40
    for other in (pickle.loads(pickle.dumps(random)), copy.copy(random), eval(repr(random))):
        assert other.state == random.state == (-(2**63), 2**40 + 5)
        other.take(1)
        assert random.state != other.state
    assert fi_ffi.Philox().seed != fi_ffi.Philox().seed


@pytest.mark.parametrize(("call", "kind", "words"), [
    (lambda r: fi_ffi.Philox("1"), ArgumentTypeError, "Philox: argument `seed`: got str"),
    (lambda r: fi_ffi.Philox(2**63), ArgumentError, "Philox: argument `seed`"),
    (lambda r: fi_ffi.Philox(1, -1), ArgumentError, "Philox: argument `offset`: got -1"),
    (lambda r: fi_ffi.Philox(1, True), ArgumentTypeError, "Philox: argument `offset`"),
    (lambda r: r.take(0), ArgumentError, "Philox.take: argument `words`: got 0"),
    (lambda r: r.take(2**63 - 1), ArgumentError, "the rest of the sequence"),
    (lambda r: r.draw("softmax"), ArgumentTypeError, "got str, expected an op that draws"),
    (lambda r: r.draw(fi_ffi.softmax), ArgumentTypeError, "got fi_ffi.softmax, expected an op"),
    (lambda r: r.draw(OPS[CHAIN]), ArgumentTypeError, "argument `draft_tokens`: got NoneType"),
    (lambda r: r.draw(OPS[CHAIN], 0), ArgumentError, "argument `draft_tokens`: got 0"),
    (lambda r: r.draw(fi_ffi.sampling_from_probs, 3), ArgumentError, "got 3, expected None"),
])  # fmt: skip
def test_what_is_refused(call, kind, words) -> None:
    random = fi_ffi.Philox(1, 10)
    with pytest.raises(kind) as caught:
        call(random)
    assert words in str(caught.value)
    assert random.state == (1, 10)
