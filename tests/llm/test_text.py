"""Texts of tokens as tokenizers' own decoders have them: SentencePiece's, and byte-level ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from engine import Sampling
from engine.engine import Request
from engine.words import Decoder, Words
from server.answers import Completion
from server.text import Text
from tiny import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPACE = "\u2581"
PIECES = [SPACE, f"{SPACE}time", f"{SPACE}there", f"{SPACE}was", "!", f"{SPACE}true", "on", "ce",
          f"{SPACE}a", "é", *"abcdehimnorstuw"]  # fmt: skip
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# As Llama 2's file has it, and as newer ones do.
STRIPPED = decoders.Sequence(
    [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
     decoders.Strip(" ", 1, 0)]
)  # fmt: skip
METASPACE = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(SPACE, "first")])


def finished(model: Any, decoder: Any) -> Tokenizer:
    made = Tokenizer(model)
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    made.decoder = decoder
    made.add_special_tokens(SPECIAL)
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return made


def unigram(decoder: Any) -> Tokenizer:
    words = [*SPECIAL, *BYTES, *PIECES]
    scores = [(word, -20.0 if word in BYTES else -2.0 / len(word)) for word in words]
    return finished(models.Unigram(scores, unk_id=0, byte_fallback=True), decoder)


def bpe(decoder: Any) -> Tokenizer:
    words = [*SPECIAL, *BYTES, SPACE, *"abcdehimnorstuw!é", "th", "he"]
    vocab = {word: i for i, word in enumerate(words)}
    merges = [("t", "h"), ("h", "e")]
    return finished(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True), decoder
    )


def byte_level() -> Tokenizer:
    made = byte_tokenizer()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return made


KINDS = {
    "unigram": lambda: unigram(STRIPPED), "bpe": lambda: bpe(STRIPPED),
    "metaspace": lambda: unigram(METASPACE), "byte-level": byte_level,
}  # fmt: skip
by_kind = pytest.mark.parametrize("kind", KINDS)
LETTERS = ["time", "there was", " a", " ", "é", "日本", "😀", "!", "once", "true"]


@by_kind
def test_texts_are_those_of_the_decoder(kind, rng):
    """A completion follows its prompt as the whole's decoding does, cut anywhere between tokens."""
    tokenizer = KINDS[kind]()
    words = Words(tokenizer)
    for _ in range(30):
        written = "".join(rng.choice(LETTERS, rng.integers(1, 9)))
        ids = tokenizer.encode(written).ids
        whole = tokenizer.decode(ids)
        for cut in range(len(ids) + 1):
            before = Decoder(words)
            prompt = "".join(map(before.step, ids[:cut]))
            text, told = Text(words, prompt=ids[:cut]), ""
            for token in ids[cut:]:
                told += text.add([token], None, None).text
            told += text.add([], None, "length").text
            assert prompt + told == whole, (written, cut)
        joined = b"".join(words.bytes(token) for token in ids if token not in words.special)
        assert joined.decode() in (whole, f" {whole}")


@by_kind
def test_bytes_that_are_no_characters(kind, rng):
    """Each run of them is told, as UTF-8's decoders do, and nothing after them is lost."""
    tokenizer = KINDS[kind]()
    words = Words(tokenizer)
    by_byte = {}
    for token in range(tokenizer.get_vocab_size()):
        if len(told := words.bytes(token)) == 1 and token not in words.special:
            by_byte.setdefault(told[0], token)
    assert len(by_byte) == 256
    for _ in range(200):
        written = bytes(rng.choice([0x41, 0x80, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xFF], 12).tolist())
        text = Text(words, prompt=[by_byte[0x41]])
        told = text.add([by_byte[byte] for byte in written], None, "length").text
        assert told == written.decode(errors="replace")


@pytest.mark.parametrize("kind", ["unigram", "bpe", "metaspace"])
def test_pieces_of_sentencepiece(kind):
    """By name, what each adds to a text."""
    tokenizer = KINDS[kind]()
    words = Words(tokenizer)
    wanted = {"<0x0A>": b"\n", "<0xC3>": b"\xc3", f"{SPACE}true": b" true", "é": b"\xc3\xa9",
              SPACE: b" ", "!": b"!"}  # fmt: skip
    for name, told in wanted.items():
        if (token := tokenizer.token_to_id(name)) is not None:
            assert words.bytes(token) == told, name
    assert words.name(tokenizer.token_to_id("<0xC3>")) == r"bytes:\xc3"
    assert words.bytes(10**6) == b""


def test_a_stop_string_that_is_the_first_word():
    tokenizer = unigram(STRIPPED)
    ids = tokenizer.encode("once a time there was!").ids
    begin = ids.index(tokenizer.token_to_id(f"{SPACE}time"))
    for stop, told in ((" time", ""), (" there", " time")):
        text = Text(Words(tokenizer), [stop], prompt=ids[:begin])
        piece = text.add(ids[begin:], None, None)
        assert (piece.text, piece.finished) == (told, "stop")


def completion(tokenizer: Tokenizer, prompt: Any, ids: list[int]) -> Completion:
    """An answer that echoes a prompt with log probabilities."""
    body = SimpleNamespace(
        stops=(), logprobs=2, tops=2, echo=True, n=1, prompts=[prompt], max_tokens=9,
        response_format=None,
    )  # fmt: skip
    request = Request(ids, Sampling())
    request.prompt_logprobs = [(-1.0, [], []) for _ in ids[1:]]
    return Completion(None, Words(tokenizer), "tiny", body, [request])


PLACES = {
    # Of é, 日, 本, a space and a; SentencePiece's begin with a space that the text has not, and
    # the space before "a" is a part of it.
    "unigram": [0, 0, 1, 1, 1, 2, 2, 2, 3],
    "bpe": [0, 0, 1, 1, 1, 2, 2, 2, 3, 4],
    "metaspace": [0, 0, 1, 1, 1, 2, 2, 2, 3],
    "byte-level": [0, 0, 1, 1, 1, 2, 2, 2, 3, 4],
}


@pytest.mark.parametrize("is_text", [True, False])
@by_kind
def test_places_in_an_echoed_text_are_characters(kind, is_text):
    """A token's is that of the character which it is of."""
    tokenizer, written = KINDS[kind](), "é日本 a"
    ids = tokenizer.encode(written, add_special_tokens=is_text).ids
    answer = completion(tokenizer, written if is_text else ids, ids)
    told = [logprob.offset for logprob in answer.echoed_logprobs(0)]
    if is_text and kind != "byte-level":
        assert told.pop(0) == 0  # <s>
    assert told == PLACES[kind]
    assert answer.echo(0) == written


def test_special_tokens_that_a_text_has_are_in_its_echo():
    """As in a chat that a client has put into a prompt; the tokenizer's own before it are not."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<s>", "<|turn|>"])
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", begin)]
    )
    for written in ("<|turn|>é<|turn|>b", "<s>a"):
        for is_text in (True, False):
            ids = tokenizer.encode(written, add_special_tokens=is_text).ids
            answer = completion(tokenizer, written if is_text else ids, ids)
            told = [logprob.offset for logprob in answer.echoed_logprobs(0)]
            assert not is_text or (ids[0], told[:1]) == (begin, [0])
            assert told[is_text:] == ([0, 8, 8, 9, 17] if "b" in written else [0, 3])
            assert answer.echo(0) == written


def test_all_of_a_prompt_is_read(tmp_path):
    """Whatever a file says about the lengths that its maker trained with."""
    made = byte_level()
    made.enable_truncation(4)
    made.enable_padding(length=16)
    made.save(str(tmp_path / "tokenizer.json"))
    words = Words(Tokenizer.from_file(str(tmp_path / "tokenizer.json")))
    written = "once a time there was!"
    for prompt in (written, "a"):
        (encoded,) = words.tokenizer.encode_batch([prompt])
        assert encoded.ids == byte_level().encode(prompt).ids
        assert words.tokenizer.decode(encoded.ids) == prompt


def test_tokens_with_the_same_text_have_a_name_each():
    """No log probability is lost."""
    tokenizer = unigram(STRIPPED)
    one, same, half, other = (
        tokenizer.token_to_id(name) for name in ("a", "<0x61>", "<0xC3>", "<0xE2>")
    )
    answer = completion(tokenizer, [one], [one])
    values = [-1.0, -2.0, -3.0, -4.0]
    told = SimpleNamespace(token=same, value=-2.0, tokens=[one, same, half, other], values=values)
    assert answer._tops(told) == {
        "a": -2.0, f"token_id:{one}": -1.0, r"bytes:\xc3": -3.0, r"bytes:\xe2": -4.0,
    }  # fmt: skip
    told = SimpleNamespace(token=half, value=-9.0, tokens=[one], values=[-1.0])
    assert answer._tops(told) == {r"bytes:\xc3": -9.0, "a": -1.0}
