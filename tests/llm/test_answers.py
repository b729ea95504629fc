"""Answers of examples/llm's server token by token: stops, tool calls, and what it reads at once."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import requests
from engine import Sampling
from engine.engine import Request
from engine.words import Words
from server import Limits, service
from server.answers import Answer, Chat, Completion
from server.chat import OPEN, SHUT, Template, calls_of
from server.harmony import Harmony
from server.schema import Message, Tool
from server.service import Listener, _deliver
from server.text import Text
from tiny import byte_tokenizer, make_tiny

from tests.llm.test_serve import Served, events

TOKENIZER = byte_tokenizer()
WORDS = Words(TOKENIZER)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text).ids


def told(text: Text, written: str, finished: str | None = "length") -> list[Any]:
    """The pieces of a text whose tokens come one at a time."""
    tokens = ids(written)
    logprobs = [[(-1.0, [token], [-1.0])] for token in tokens] if text.tops is not None else None
    return [
        text.add([token], logprobs and logprobs[i], finished if i == len(tokens) - 1 else None)
        for i, token in enumerate(tokens)
        if text.finished is None
    ]


def test_the_first_of_several_stops_ends_a_text_that_comes_at_once():
    text = Text(WORDS, [";", ","])
    piece = text.add(ids("one, two; three"), None, None)
    assert (piece.text, piece.finished) == ("one", "stop")


@pytest.mark.parametrize(
    ("written", "open_text", "whole"),
    [
        (f"Yes. {OPEN}{{}}{SHUT}", "Yes. ", False), (f"{OPEN}", "", False),
        ("1 < 2, <tool_ and <tool_cal", "1 < 2, <tool_ and <tool_cal", True),
        (f"A {OPEN} tag", f"A {OPEN} tag", True), (f"A {OPEN}{OPEN} {{", f"A {OPEN}", False),
    ],
)  # fmt: skip
def test_nothing_of_a_tool_call_is_told_as_text(written, open_text, whole):
    """Neither of what may be the beginning of one, until it is known to be none."""
    text = Text(WORDS, (), OPEN)
    assert "".join(piece.text for piece in told(text, written)) == open_text
    assert (text.held_from is None) == whole
    assert text.text == written


@pytest.mark.parametrize("at_once", [1, 2, 9])
def test_a_text_ends_at_the_same_place_however_its_tokens_come(at_once):
    """At the first stop string that is whole, and with the tokens that it took."""
    text, tokens, told = Text(WORDS, ["abcd", "c", "bc"]), ids("xabcde"), ""
    for at in range(0, len(tokens), at_once):
        if text.finished is None:
            told += text.add(tokens[at : at + at_once], None, None).text
    assert (told, text.finished, len(text.tokens)) == ("xa", "stop", 4)


def test_log_probabilities_are_of_the_text_that_is_told():
    """Those of a token that may begin a stop string wait, and where it does are not told."""
    text, pieces = Text(WORDS, ["cd"], tops=1, offset=5), []
    for piece in told(text, "abcxcde"):
        assert [x.token for x in piece.logprobs] == ids(piece.text)
        pieces.append(piece)
    assert "".join(piece.text for piece in pieces) == "abcx"
    assert [x.offset for piece in pieces for x in piece.logprobs] == [5, 6, 7, 8]
    assert pieces[-1].finished == "stop"


def test_characters_of_several_tokens():
    """Each is told when it is whole, and what is none at the end as what stands for it."""
    pieces = told(Text(WORDS), "é€")
    assert [piece.text for piece in pieces] == ["", "é", "", "", "€"]
    text = Text(WORDS)
    pieces = [text.add([token], None, None) for token in ids("a€")[:-1]]
    assert "".join(piece.text for piece in pieces) == "a"
    assert text.add([], None, "length").text == "\ufffd"


def test_json_after_half_a_character_can_be_read():
    """What follows in a text without a schema may be the other half."""
    prompt, form = [*ids("é")[:1]], SimpleNamespace(type="json_object")
    whole, _ = answered(Completion, ids("{}"), prompt=prompt, response_format=form)
    assert [choice["text"] for choice in whole["choices"]] == ["{}", "{}"]
    whole, _ = answered(Completion, ids("é{}")[1:], prompt=prompt)
    assert [choice["text"] for choice in whole["choices"]] == ["é{}", "é{}"]


class Written:
    """A grammar of one text, which so is what is drawn."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.tokens = [*tokenizer.encode(text).ids, tokenizer.token_to_id("<|end|>")]

    def fill(self, bits: np.ndarray, row: int) -> None:
        fits = np.arange(bits.shape[1] * 32) == self.tokens[0]
        bits[row] = np.packbits(fits, bitorder="little").view(np.int32)

    def accept(self, token: int) -> bool:
        return token == self.tokens.pop(0)


@pytest.fixture
def serve_with(tmp_path: Path, where: str, rng: Any) -> Iterator[Any]:
    """`serve_with(**more)` starts a server; `more` is `application`'s.

    Its tokenizer has some words besides bytes.
    """
    made = []

    def start(**more: Any) -> Served:
        sizes = {"num_hidden_layers": 1, "vocab_size": 257 + len(ADDED)}
        path = make_tiny(tmp_path / "model", "llama", rng, **sizes)
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(ADDED)
        tokenizer.save(str(path / "tokenizer.json"))
        made.append(Served(path, where, **more))
        return made[-1]

    yield start
    for served in made:
        served.end()


class Drawn:
    """A service whose engine has drawn everything at once."""

    def submit(self, listener: Listener) -> None:
        assert listener.note() == len(listener.request.tokens)
        _deliver([listener])

    def cancel(self, listener: Listener, finished: Any = None) -> None:
        assert finished


def answered(
    kind: type[Answer], drawn: list[int], words: Words = WORDS, prompt: Any = (1, 2, 3), **more: Any
) -> tuple[Any, list[Any]]:
    """An answer of two choices: in one, and the events of a stream."""
    body = {
        "stops": (), "logprobs": None, "tops": None, "n": 2, "stream_options": None,
        "forced": None, "tools": None, "tool_choice": None, "echo": False, "prompts": [[1, 2, 3]],
        "max_tokens": 9, "parallel_tool_calls": None, "response_format": None,
    }  # fmt: skip

    def made() -> Answer:
        requests = [Request([*prompt], Sampling()) for _ in range(2)]
        for request in requests:
            request.tokens += drawn
            request.finished, request.reused = "length", 2
        return kind(Drawn(), words, "tiny", SimpleNamespace(**body | more), requests)

    async def told() -> tuple[Any, list[str]]:
        return await made().whole(), [event async for event in made().events()]

    whole, events = asyncio.run(told())
    assert events.pop() == "data: [DONE]\n\n"
    assert all(event.startswith("data: ") and event.endswith("\n\n") for event in events)
    return whole, [json.loads(event.removeprefix("data: ")) for event in events]


THOUGHTS = [
    ("<think>\nHm, 1 < 2.\n</think>\n\nYes.", False, "\nHm, 1 < 2.\n", "Yes."),
    ("Hm.</think>Yes </think>.", True, "Hm.", "Yes </think>."), ("Hm", True, "Hm", ""),
    (" <think>Hm</thi", False, "Hm</thi", ""), ("<thin", False, "", "<thin"),
    ("Yes <think>Hm</think>", False, "", "Yes <think>Hm</think>"), ("</think>", True, "", ""),
    (f"<think>{OPEN}{{}} or</think> {OPEN}{{}}", False, f"{OPEN}{{}} or", ""),
    ("<think>Hm</think>  ", False, "Hm", ""), ("<think></think>", False, "", ""),
    ("Yes", None, "", "Yes"), ("<think>Hm</think>", None, "", "<think>Hm</think>"),
    ("<think>a stop", False, "a ", ""), ("\n<think>Hm</think>Yes", True, "Hm", "Yes"),
    ("<thin", True, "<thin", ""), ("</think> <think>", True, "", "<think>"),
    (f"<think>{OPEN}{{}}</think>Yes", False, f"{OPEN}{{}}", "Yes"),
]  # fmt: skip


@pytest.mark.parametrize(("written", "thinks", "thought", "answer"), THOUGHTS)
def test_thoughts_are_told_as_such(written, thinks, thought, answer):
    """Token by token and at once; tags in a thought begin no call."""
    for pieces in (
        told(Text(WORDS, ["stop"], OPEN, tops=1, thinks=thinks), written),
        [Text(WORDS, ["stop"], OPEN, thinks=thinks).add(ids(written), None, "length")],
    ):
        assert "".join(piece.thought for piece in pieces) == thought
        assert "".join(piece.text for piece in pieces) == answer


def test_answers_with_thoughts():
    """In a field of their own, with the same text in one answer and in a stream."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    words = Words(tokenizer)
    written = f"<think>I call.</think>\n\nOf course. {call('keep', age=3)}"
    tools = [SimpleNamespace()]
    for begun in (False, True):
        text = written[len("<think>") :] if begun else written
        end = tokenizer.encode("Hi<think>\n" if begun else "Hi").ids
        whole, chunks = answered(Chat, tokenizer.encode(text).ids, words, end, tools=tools)
        for choice in whole["choices"]:
            message = choice["message"]
            assert (message["reasoning_content"], message["content"]) == ("I call.", "Of course.")
            assert functions(message["tool_calls"]) == [("keep", {"age": 3})]
        deltas = [one["choices"][0]["delta"] for one in chunks if one["choices"][0]["index"] == 1]
        assert "".join(one.get("reasoning_content", "") for one in deltas) == "I call."
        assert "".join(one.get("content", "") for one in deltas).strip() == "Of course."
        assert [one for delta in deltas for one in delta.get("tool_calls", ())]
    form = SimpleNamespace(type="json_object")
    whole, _ = answered(Chat, tokenizer.encode("{}").ids, words, end, response_format=form)
    assert whole["choices"][0]["message"]["content"] == "{}"
    assert "reasoning_content" not in whole["choices"][0]["message"]


HARMONY = [
    # What is written, the thought, the content, the calls.
    ("<|channel|>analysis<|message|>User says hi.<|end|><|start|>assistant<|channel|>final"
     "<|message|>Hello!", "User says hi.", "Hello!", []),
    ("<|channel|>analysis<|message|>Two.<|end|><|start|>assistant<|channel|>analysis<|message|> "
     "Then one.<|end|><|start|>assistant<|channel|>commentary to=functions.keep <|constrain|>json"
     '<|message|>{"age": 3}', "Two. Then one.", None, [("keep", {"age": 3})]),
    ('<|channel|>analysis to=functions.keep<|message|>{"age": 3}', "", None,
     [("keep", {"age": 3})]),
    ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I "
     "look.<|end|><|start|>assistant<|channel|>commentary to=functions.keep<|message|>"
     '{"s": "</tool_call> }"}', "Hm.", "I look.", [("keep", {"s": "</tool_call> }"})]),
    ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=functions.keep<|channel|>"
     'commentary<|message|>{"age": 3}', "Hm.", None, [("keep", {"age": 3})]),
    ("<|channel|>final<|message|>One.", "", "One.", []),
    ("<|channel|>analysis<|message|>Hm", "Hm", "", []),
    ("<|channel|>fin", "", "", []),
    ('<|channel|>commentary to=functions.keep<|constrain|>json<|message|>{"age": 3}<|call|>', "",
     None, [("keep", {"age": 3})]),
    ("<|channel|>commentary to=functions.keep to=functions.keep<|message|>{}", "", None,
     [("keep", {})]),
    ("<|channel|>analysis<|message|>Hm. <|end|><|start|>assistant<|channel|>commentary to=python "
     "code<|message|>print(1)<|call|>", "Hm. print(1)", "", []),
    ("<|channel|>analysis <|constrain|>text<|message|>A </think> ends it.<|end|><|start|>assistant"
     '<|channel|>final<|message|><tool_call>{"name": "x"}</tool_call> <think>',
     "A </think> ends it.", '<tool_call>{"name": "x"}</tool_call> <think>', []),
    ("<|channel|>analysis<|message|>One. <|end|><|start|>assistant<|channel|>commentary<|message|>"
     "I look.<|end|><|start|>assistant<|channel|>analysis<|message|>Two.<|end|><|start|>assistant"
     "<|channel|>commentary to=functions.keep<|message|>{}<|channel|>final<|message|> So.",
     "One. Two.", "I look. So.", [("keep", {})]),
    ("<|channel|>analysis<|message|>Hm.<|end|>final<|message|>Hi", "Hm.", "Hi", []),
    ("Hello!", "", "Hello!", []), ("<|channel|>analysis<|message|>Hm.<|end|>Hi", "Hm.", "Hi", []),
    ("<|channel|>final<|message|>Hi<|end|><|start|>assistant", "", "Hi", []),
]  # fmt: skip


@pytest.mark.parametrize(("written", "thought", "content", "calls"), HARMONY)
def test_harmony(written, thought, content, calls):
    """What gpt-oss writes: no head of a message is told, and calls are objects."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(re.findall(r"<\|\w+\|>", " ".join(one[0] for one in HARMONY)))
    words, drawn = Words(tokenizer), tokenizer.encode(written).ids
    end = tokenizer.encode("<|start|>assistant").ids
    whole, chunks = answered(Chat, drawn, words, end, tools=[SimpleNamespace()])
    for choice in whole["choices"]:
        message = choice["message"]
        assert message.get("reasoning_content", "") == thought
        assert message["content"] == content
        assert functions(message.get("tool_calls", [])) == calls
    deltas = [one["choices"][0]["delta"] for one in chunks if one["choices"][0]["index"] == 1]
    assert "".join(one.get("reasoning_content", "") for one in deltas) == thought
    assert "".join(one.get("content", "") for one in deltas) == (content or "")
    told = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert functions(told) == calls
    # Where a schema says what is written, there are no heads.
    form = SimpleNamespace(type="json_object")
    whole, _ = answered(Chat, tokenizer.encode("{}").ids, words, end, response_format=form)
    assert whole["choices"][0]["message"]["content"] == "{}"


@pytest.mark.parametrize("tools", [None, [SimpleNamespace()]])
@pytest.mark.parametrize(
    ("written", "told"),
    [("", "{}"), ("foo", "foo"), ('{"place": "To', '{"place": "To'),
     ('{\n"a": "\\u00e9é"}', '{\n"a": "\\u00e9é"}')],
    ids=["nothing", "no object", "cut", "escapes"],
)  # fmt: skip
def test_arguments_of_harmony_are_told_as_written(written, told, tools):
    """No text that the model has not written, also where a stop string is like its heads."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|channel|>", "<|message|>", "<|start|>", "<|call|>"])
    head = "<|channel|>commentary to=functions.keep json<|message|>"
    drawn = tokenizer.encode(f"{head}{written}<|call|>").ids
    more = {"tools": tools, "stops": ["<", '"', "c"]}
    whole, chunks = answered(Chat, drawn, Words(tokenizer), tokenizer.encode("a").ids, **more)
    message = whole["choices"][0]["message"]
    (made,) = message["tool_calls"]
    assert message["content"] is None and message.get("reasoning_content") is None
    assert made["function"] == {"name": "keep", "arguments": told}
    assert re.fullmatch("[a-zA-Z0-9]{9}", made["id"])  # Mistral's template refuses others
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    streamed = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["function"] for call in streamed] == [made["function"]] * 2
    assert not any(delta.get("content") for delta in deltas)


def test_log_probabilities_of_thoughts_come_with_them():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|channel|>", "<|message|>"])
    words, thought = Words(tokenizer), "<|channel|>analysis<|message|>Hm"
    text, pieces = Text(words, tops=0, decoder=Harmony), []
    for token in tokenizer.encode(thought).ids:
        pieces.append(text.add([token], [(-1.0, [], [])], None))
    assert [piece.thought for piece in pieces if piece.logprobs] == ["H", "m"]
    assert sum(len(piece.logprobs) for piece in pieces) == len(pieces)


def test_harmony_token_by_token():
    """Each character as soon as it is there."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|channel|>", "<|message|>", "<|start|>", "<|end|>"])
    text = Text(Words(tokenizer), thinks=False, decoder=Harmony)
    pieces = [text.add([token], None, None) for token in tokenizer.encode(HARMONY[0][0]).ids]
    pieces.append(text.add([], None, "stop"))
    assert "".join(piece.thought for piece in pieces) == "User says hi."
    assert [piece.text for piece in pieces if piece.text] == [*"Hello!"]


def test_thoughts_go_to_the_template():
    message = Message(role="assistant", content="Yes.", reasoning_content="Hm.")
    assert message.for_template()["reasoning_content"] == "Hm."
    assert message.for_template()["thinking"] == "Hm."
    # gpt-oss' template refuses content and thinking beside calls.
    made = {"id": "1", "type": "function", "function": {"name": "keep", "arguments": "{}"}}
    for content, keys in (("I look.", {"content", "reasoning_content"}),
                          (None, {"content", "reasoning_content", "thinking"})):  # fmt: skip
        message = Message(
            role="assistant", content=content, reasoning_content="Hm.", tool_calls=[made]
        )
        assert {*message.for_template()} - {"role", "tool_calls"} == keys


@pytest.mark.parametrize(
    ("written", "told"),
    [("", {}), (" \n", {}), ("null", {}), ('{"a": null}', {"a": None}), ('{"a": "To', '{"a": "To')],
)
def test_arguments_go_to_the_template_as_objects(written, told):
    """Also where a model wrote none; what is no JSON stays text."""
    made = {"id": "1", "type": "function", "function": {"name": "keep", "arguments": written}}
    (call,) = Message(role="assistant", tool_calls=[made]).for_template()["tool_calls"]
    assert call["function"] == {"name": "keep", "arguments": told}


def test_messages_for_templates_that_know_less(tmp_path):
    """Llama's asks for one call where there are calls at all; Qwen's drops a developer's words."""
    written = [
        Message(role="developer", content="Be brief."),
        Message(role="assistant", content="Yes.", tool_calls=[]),
    ]
    messages = [message.for_template() for message in written]
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if 'tool_calls' in m %}{{ raise_exception('calls') }}{% elif "
        "m.role in ['system', 'assistant'] %}{{ m.role }}: {{ m.content }} {% endif %}{% endfor %}"
    )
    text = Template(tmp_path)(messages, None, {})
    assert text == "system: Be brief. assistant: Yes. "


def test_tools_are_in_a_prompt_as_models_have_seen_them():
    """The name first, then what it is for, and then the parameters, nulls of which stay."""
    function = {
        "name": "keep", "description": "Keeps.",
        "parameters": {"type": "object", "properties": {"age": {"default": None}}}, "strict": True,
    }  # fmt: skip
    made = Tool.model_validate(
        {"function": {**dict(reversed(function.items()))}, "type": "function"}
    )
    told = made.model_dump(exclude_none=True)
    assert json.dumps(told) == json.dumps({"type": "function", "function": function})


@pytest.mark.parametrize("content", [None, "", [], [{"type": "text", "text": ""}]], ids=str)
def test_messages_without_calls_have_none(content):
    """Templates ask whether there is `tool_calls`, and the content of each message is a text."""
    message = Message(role="assistant", content=content, tool_calls=[])
    assert message.for_template() == {"role": "assistant", "content": ""}


def test_ids_of_calls_are_such_as_all_templates_take():
    """Mistral's refuse all but nine letters and digits."""
    _, calls = calls_of("".join(call("keep", age=n) for n in range(9)), False)
    assert len({one["id"] for one in calls}) == 9
    assert all(re.fullmatch("[a-z0-9]{9}", one["id"]) for one in calls)


@pytest.mark.parametrize("with_usage", [False, True])
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Chat, ("chat.completion", "chat.completion.chunk", "chatcmpl-")),
        (Completion, ("text_completion", "text_completion", "cmpl-")),
    ],
)
def test_what_answers_are_called(kind, names, with_usage):
    """As OpenAI's clients expect: the kind and id of each object, and the tokens that were used."""
    now, options = int(time.time()), SimpleNamespace(include_usage=with_usage)
    whole, chunks = answered(kind, ids("Hi"), stream_options=options)
    usage = {
        "prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 2},
    }  # fmt: skip
    assert whole["usage"] == usage
    if with_usage:
        assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], usage)
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
        chunks.pop()
    for name, told in zip(names, ([whole], chunks), strict=False):
        assert len({one["id"] for one in told}) == 1 and told[0]["id"].startswith(names[2])
        for one in told:
            assert (one["object"], one["model"]) == (name, "tiny")
            assert 0 <= one["created"] - now <= 60
    finished = [
        choice for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]
    ]
    for choices in (whole["choices"], finished):
        assert [(one["index"], one["finish_reason"]) for one in choices] == [
            (0, "length"), (1, "length"),
        ]  # fmt: skip
    is_chat = kind is Chat
    for choice in whole["choices"]:
        assert (choice["message"]["content"] if is_chat else choice["text"]) == "Hi"
        assert not is_chat or choice["message"]["role"] == "assistant"
    streamed = {0: "", 1: ""}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        part = choice["delta"].get("content", "") if is_chat else choice["text"]
        streamed[choice["index"]] += part
    assert streamed == {0: "Hi", 1: "Hi"}
    if is_chat:
        roles = [chunk["choices"][0]["delta"].get("role") for chunk in chunks]
        assert roles[:2] == ["assistant"] * 2 and not any(roles[2:])


ADDED = [OPEN, SHUT, '{"name": "', '", "arguments": {', "keep"]


def call(name: str, **arguments: Any) -> str:
    return f'{OPEN}{{"name": "{name}", "arguments": {json.dumps(arguments)}}}{SHUT}'


CALLS = [
    (f"Yes. {call('keep', age=3)}\n{call('sleep')}", "Yes.", [("keep", {"age": 3}), ("sleep", {})]),
    (call("keep", age=1), None, [("keep", {"age": 1})]),
    (f"No {OPEN} is none", f"No {OPEN} is none", []),
    (f'{OPEN}{{"name": "keep"}}{SHUT}', None, [("keep", {})]),
    (call("keep", x=f"a {SHUT} b {OPEN}"), None, [("keep", {"x": f"a {SHUT} b {OPEN}"})]),
    (f"So {OPEN} is a tag. {call('keep')}", f"So {OPEN} is a tag.", [("keep", {})]),
    (f'{OPEN}{{"name": {SHUT}\n{call("keep")}', f'{OPEN}{{"name": {SHUT}', [("keep", {})]),
    (f'{OPEN}{{"age": 3}}{SHUT} or {call("keep")}', f'{OPEN}{{"age": 3}}{SHUT} or',
     [("keep", {})]),
    (f"One {call('keep')} and {call('sleep')} done", "One  and  done",
     [("keep", {}), ("sleep", {})]),
    (f'{OPEN}\n{{"name": "keep", "arguments": null}}', None, [("keep", {})]),
    (f'{OPEN}{{"name": null}}{SHUT}', f'{OPEN}{{"name": null}}{SHUT}', []),
    (f'{OPEN}{{"name": "keep", "arguments": {{"age": NaN}}}}',
     f'{OPEN}{{"name": "keep", "arguments": {{"age": NaN}}}}', []),
    (f'{OPEN}{{"name": "keep", "arguments": {{"x": "a\n\tb"}}}}{SHUT}', None,
     [("keep", {"x": "a\n\tb"})]),
    ("a < b", "a < b", []),
    ("a  ", "a  ", []),
]  # fmt: skip


def test_tool_calls_that_a_model_writes(serve_with):
    """In one answer and in a stream; the first alone where there may be no others beside it."""
    tools = [{"type": "function", "function": {"name": name}} for name in ("keep", "sleep")]
    form = {"type": "json_object"}  # by which the server asks for a grammar
    ask = {"messages": [{"role": "user", "content": "Hi"}], "tools": tools, "response_format": form}
    texts: list[str] = []
    served = serve_with(grammars=lambda *_: Written(served.tokenizer, texts[-1]))

    def post(**more: Any) -> requests.Response:
        body = ask | {"max_tokens": 200} | more
        return requests.post(f"{served.url}/chat/completions", json=body, timeout=60)

    for text, content, calls in CALLS:
        texts.append(text)
        cases: list[tuple[dict[str, Any], Any]] = [({}, calls)]
        if len(calls) > 1:
            cases.append(({"parallel_tool_calls": False}, calls[:1]))
        for more, expected in cases:
            (choice,) = post(**more).json()["choices"]
            assert choice["message"]["content"] == content
            assert choice["finish_reason"] == ("tool_calls" if calls else "stop")
            assert functions(choice["message"].get("tool_calls", ())) == expected
        found = [event["choices"][0]["delta"] for event in events(post(stream=True))]
        streamed = "".join(delta.get("content") or "" for delta in found)
        assert streamed.rstrip() == (content or "").rstrip()
        assert functions([one for delta in found for one in delta.get("tool_calls", ())]) == calls


# What proxies and SDKs add to a message of an answer that they send back.
DUMPED = {"annotations": None, "audio": None, "function_call": None}


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_with_a_tool_as_proxies_hold_it(serve_with, stream):
    """A model's name is looked up, its call goes back with the tool's result, nulls and all, and
    what was said before is found in the cache.
    """
    texts = [f"So. {call('keep', age=3)}", "Kept."]
    served = serve_with(grammars=lambda *_: Written(served.tokenizer, texts.pop(0)))
    (model,) = requests.get(f"{served.url}/models", timeout=20).json()["data"]
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Keep 3"}]
    tool = {"type": "function", "function": {"name": "keep", "parameters": {"type": "object"}}}
    ask = {
        "model": model["id"], "tools": [tool], "tool_choice": "auto", "max_tokens": 200,
        "response_format": {"type": "json_object"}, "stream": stream, "user": "one",
        "metadata": {"trace": "2"}, "service_tier": None, "n": 1, "top_p": 1.0,
        "stream_options": {"include_usage": True} if stream else None,
    }  # fmt: skip

    def answered_with() -> tuple[dict[str, Any], dict[str, Any]]:
        body = ask | {"messages": messages}
        answer = requests.post(f"{served.url}/chat/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.headers["X-Ignored"] == "metadata, user"
        if not stream:
            whole = answer.json()
            return whole["choices"][0]["message"], whole["usage"]
        *chunks, last = events(answer)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        calls = [one for delta in deltas for one in delta.get("tool_calls", ())]
        content = "".join(delta.get("content") or "" for delta in deltas)
        message = {"role": "assistant", "content": content or None, "tool_calls": calls or None}
        return message, last["usage"]

    message, before = answered_with()
    (made,) = message["tool_calls"]
    assert functions([made]) == [("keep", {"age": 3})]
    assert message["content"].strip() == "So."
    done = {"role": "tool", "tool_call_id": made["id"], "content": "3 is kept", "name": "keep"}
    messages += [message | DUMPED, done]
    message, after = answered_with()
    assert (message["content"], message.get("tool_calls")) == ("Kept.", None)
    assert after["prompt_tokens"] > before["prompt_tokens"] + len("3 is kept")
    cached = after["prompt_tokens_details"]["cached_tokens"]
    assert cached >= (before["prompt_tokens"] - 1) // 16 * 16 > 0
    messages.append({"role": "user", "content": "And 4?", "audio": {}})
    wrong = requests.post(
        f"{served.url}/chat/completions", json=ask | {"messages": messages}, timeout=60
    )
    assert wrong.status_code == 400
    assert wrong.json()["error"]["param"] == "messages[3].audio"


def functions(calls: Any) -> list[Any]:
    each = [one["function"] for one in calls]
    return [(one["name"], json.loads(one["arguments"])) for one in each]


def test_bodies_are_read_no_more_than_fit_at_once(serve_with):
    """Each gives its bytes back, whether it is answered, wrong, too large or never whole."""
    served = serve_with(limits=Limits(max_body=2000, max_held=3000))
    url = f"{served.url}/completions"
    good = json.dumps({"prompt": "a", "max_tokens": 1, "user": "x" * 900}).encode()
    for body, status in ((good, 200), (b"x" * 900, 400), ([b"x" * 900] * 4, 413)):
        for _ in range(5):
            data = iter(body) if isinstance(body, list) else body
            assert requests.post(url, data=data, timeout=20).status_code == status
    with socket.create_connection(("127.0.0.1", int(served.address.rpartition(":")[2]))) as held:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1999\r\n\r\n"
        held.sendall(head + b"x" * 1900)
        wait_for(url, b"x" * 1900, 429)
    wait_for(url, b"x" * 1900, 400)


def wait_for(url: str, data: bytes, status: int) -> None:
    """Ask until the answer is that, as it is once the server has seen what others did."""
    end = time.monotonic() + 20
    while requests.post(url, data=data, timeout=20).status_code != status:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_no_more_schemas_wait_than_may(serve_with, monkeypatch):
    """429 for the next, and room again when they are done."""
    monkeypatch.setattr(service, "MOST_SCHEMAS", 2)
    may_go = threading.Event()

    def slow(*given: Any) -> Written:
        assert may_go.wait(30)
        return Written(served.tokenizer, "{}")

    served = serve_with(grammars=slow)
    body = {"prompt": "a", "max_tokens": 8, "response_format": {"type": "json_object"}}
    url = f"{served.url}/completions"

    def ask(_: Any = None) -> int:
        return requests.post(url, json=body, timeout=60).status_code

    with ThreadPoolExecutor(4) as pool:
        # Of four at once two wait, and two are refused.
        asked = [pool.submit(ask) for _ in range(4)]
        end = time.monotonic() + 20
        while sum(one.done() for one in asked) < 2:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert [one.result() for one in asked if one.done()] == [429, 429]
        may_go.set()
        assert sorted(one.result() for one in asked) == [200, 200, 429, 429]
    assert [ask() for _ in range(3)] == [200] * 3


def test_a_loop_that_falls_behind_takes_all_at_once():
    """One place in the queue for all news of a request, and nothing that was not yet noted."""

    async def told():
        queue = asyncio.Queue()
        request = Request([1], Sampling(logprobs=0))
        listener = Listener(request, 0, queue)
        for token in range(5):
            request.tokens.append(token)
            request.logprobs.append((-1.0 * token, [], []))
            assert listener.note() == 1
            _deliver([listener])
        request.tokens.append(9)  # whose logprob the engine has not yet kept
        assert queue.qsize() == 1
        assert queue.get_nowait() is listener
        tokens, logprobs, finished = listener.take()
        assert tokens == [0, 1, 2, 3, 4] and finished is None
        assert [value for value, *_ in logprobs] == [0.0, -1.0, -2.0, -3.0, -4.0]
        request.logprobs.append((-9.0, [], []))
        request.finished = "length"
        assert listener.note() == 1
        _deliver([listener])
        assert queue.qsize() == 1
        assert listener.take() == ([9], [(-9.0, [], [])], "length")

    asyncio.run(told())
