"""JSON by a schema and tools' arguments from the server, with xgrammar's masks."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from server import grammar
from tiny import byte_tokenizer

from tests.helpers import grammars
from tests.llm.process import ServerProcess, children

PAGE = Path(__file__).parents[2] / "docs" / "llm.md"
SCHEMA = {
    "type": "object",
    "properties": {
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["age", "kind", "tags"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}
TOOLS = [
    {"type": "function", "function": {"name": "keep", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "sleep", "parameters": {
        "type": "object", "properties": {"hours": {"type": "integer", "minimum": 1, "maximum": 12}},
        "required": ["hours"], "additionalProperties": False}}},
]  # fmt: skip
# Schemas compile within less time than is usual.
HASTY = """
import serve
from server.grammar import Grammars
Grammars.__init__.__defaults__ = (1.5,)
if __name__ == "__main__":
    serve.main()
"""
HELLO = [{"role": "user", "content": "A pet?"}]


def check_pet(text: str) -> None:
    pet = json.loads(text)
    assert {*pet} == {*SCHEMA["properties"]}
    assert type(pet["age"]) is int and 0 <= pet["age"] <= 150
    assert pet["kind"] in ("cat", "dog")
    assert len(pet["tags"]) <= 3 and all(type(tag) is bool for tag in pet["tags"])


@pytest.fixture
def structured(servers: Any, where: str) -> ServerProcess:
    """A server that has xgrammar."""
    flags = "--xgrammar", str(grammars.package())
    return servers("of schemas", where, lambda: ServerProcess(where, *flags, program=HASTY))


@pytest.fixture
def asks(structured: ServerProcess) -> Any:
    return openai.OpenAI(base_url=structured.url, api_key="-", max_retries=0, timeout=120)


def test_json_by_a_schema(asks):
    for seed in range(4):
        answer = asks.chat.completions.create(
            model="tiny", messages=HELLO, response_format=FORMAT, seed=seed, max_tokens=200
        )
        assert answer.choices[0].finish_reason == "stop"
        check_pet(answer.choices[0].message.content)
    text = ""
    for chunk in asks.completions.create(
        model="tiny", prompt="A pet", stream=True, max_tokens=200, n=1, seed=2,
        extra_body={"response_format": FORMAT},
    ):  # fmt: skip
        text += chunk.choices[0].text
    check_pet(text)


def test_only_the_engine_opens_the_gpu(asks, structured):
    """Schemas are tried in a process that imports the same file, with bounded addresses."""
    answer = asks.completions.create(
        model="tiny", prompt="A pet", max_tokens=200, extra_body={"response_format": FORMAT}
    )
    check_pet(answer.choices[0].text)
    (process,) = children(structured.child.pid)
    trials = [Path(f"/proc/{trial}/maps") for trial in children(process)]
    assert trials
    end = time.monotonic() + 60
    for maps in trials:
        while "libxgrammar" not in maps.read_text():  # one may be a spare, which begins
            assert time.monotonic() < end
            time.sleep(0.1)
        assert "libcuda.so" not in maps.read_text()


def test_new_schemas_leave_no_memory():
    """Beyond the last ones: xgrammar's own cache had 40 MiB more after these."""
    tokenizer = byte_tokenizer()
    words = grammar.vocabulary(tokenizer, 300)
    made = grammar.compiler(str(grammar.library(grammars.package())), *words, 300, [256])

    def grown(numbers: range) -> int:
        for n in numbers:
            names = {f"{key}{n}": {"type": "string", "maxLength": 20} for key in ("a", "b", "c")}
            schema = {"type": "object", "properties": names, "required": [*names]}
            grammar.compiled(made, json.dumps(schema), True)
        return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) >> 10

    before = grown(range(100))
    assert grown(range(100, 1100)) - before < 10


WHOLE = {"type": "integer"}
OF_A = {"type": "object", "properties": {"a": WHOLE}, "additionalProperties": False}
PASSED_OVER = {
    "uniqueItems": ({"type": "array", "items": WHOLE, "uniqueItems": True}, "[1, 1]"),
    "not": (WHOLE | {"not": {"const": 1}}, "1"),
    "contains": ({"type": "array", "items": WHOLE, "contains": {"const": 2}}, "[1]"),
    "if": (OF_A | {"if": {"required": []}, "then": {"required": ["a"]}}, "{}"),
    "dependentRequired": (OF_A | {"dependentRequired": {"a": ["b"]}}, '{"a": 1}'),
    "allOf": ({"allOf": [{"minimum": 2} | WHOLE, {"maximum": 3} | WHOLE]}, "1"),
    "anyOf": (OF_A | {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, "1"),
    "pattern": ({"type": "string", "pattern": "^a+$", "minLength": 3}, '"a"'),
}


@pytest.mark.parametrize("name", PASSED_OVER)
def test_what_xgrammar_passes_over_is_told(name):
    """The page names what a text by a schema may break; it is shorter once xgrammar does more."""
    schema, written = PASSED_OVER[name]
    tokenizer = byte_tokenizer()
    words = grammar.vocabulary(tokenizer, 257)
    made = grammar.compiler(str(grammar.library(grammars.package())), *words, 257, [256])
    state = grammar._type("GrammarMatcher")(
        grammar.compiled(made, json.dumps(schema), True), None, False, -1, None
    )
    assert all(state.accept_token(token, False) for token in tokenizer.encode(written).ids)
    assert state.accept_token(256, False)
    (row,) = re.findall(r"^\| schemas .*", PAGE.read_text(), re.MULTILINE)
    assert f"`{name}`" in row.rsplit("|", 2)[1]


def test_several_choices_have_a_state_each(asks):
    answer = asks.chat.completions.create(
        model="tiny", messages=HELLO, response_format=FORMAT, n=5, seed=1, max_tokens=200,
        temperature=2.0, presence_penalty=1.0, logprobs=True, top_logprobs=1,
    )  # fmt: skip
    texts = [choice.message.content for choice in answer.choices]
    for text in texts:
        check_pet(text)
    assert len(set(texts)) > 1


@pytest.mark.parametrize("choice", ["required", "sleep"])
def test_tools_that_must_be_called(asks, choice):
    named = {"type": "function", "function": {"name": choice}}
    ask = {
        "model": "tiny", "messages": HELLO, "tools": TOOLS, "max_tokens": 300, "seed": 3,
        "tool_choice": choice if choice == "required" else named,
    }  # fmt: skip
    answer = asks.chat.completions.create(**ask).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    (call,) = answer.message.tool_calls
    if call.function.name == "keep":
        assert choice == "required"
        check_pet(call.function.arguments)
    else:
        assert 1 <= json.loads(call.function.arguments)["hours"] <= 12
    deltas, reasons = [], []
    for chunk in asks.chat.completions.create(**ask, stream=True):
        deltas += chunk.choices[0].delta.tool_calls or []
        assert not chunk.choices[0].delta.content
        reasons.append(chunk.choices[0].finish_reason)
    assert [d.function.arguments for d in deltas] == [call.function.arguments]
    assert deltas[0].function.name == call.function.name
    assert reasons[-1] == "tool_calls"
    # The answer of the tool goes back into the chat.
    more = [
        *HELLO, answer.message.model_dump(exclude_none=True, exclude={"refusal"}),
        {"role": "tool", "tool_call_id": call.id, "content": "done"},
    ]  # fmt: skip
    again = asks.chat.completions.create(model="tiny", messages=more, max_tokens=3)
    assert again.usage.completion_tokens <= 3


def test_references_within_the_parameters_of_tools(asks):
    """As pydantic writes them: they are of each tool's own definitions, and may go to the whole."""
    tools = []
    for name, value in (("one", {"const": 1}), ("two", {"const": 2})):
        parameters = {
            "$defs": {"Item": value},
            "type": "object",
            "properties": {"of": {"$ref": "#/$defs/Item"}, "more": {"anyOf": [{"$ref": "#"}]}},
            "required": ["of"],
            "additionalProperties": False,
        }
        tools.append({"type": "function", "function": {"name": name, "parameters": parameters}})
    seen = set()
    for seed in range(30):
        answer = asks.chat.completions.create(
            model="tiny", messages=HELLO, tools=tools, tool_choice="required", seed=seed,
            max_tokens=200, temperature=5.0,
        ).choices[0]  # fmt: skip
        if answer.finish_reason != "tool_calls":
            continue  # it went deeper than it had tokens for
        (call,) = answer.message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert arguments["of"] == ("one", "two").index(call.function.name) + 1
        seen.add(call.function.name)
    assert seen == {"one", "two"}


def test_any_object(asks):
    answer = asks.chat.completions.create(
        model="tiny", messages=HELLO, response_format={"type": "json_object"}, max_tokens=30
    ).choices[0]
    text = answer.message.content
    assert text.startswith("{")
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("schema", "words"),
    [({"type": "nothing"}, "not a JSON schema"), ({"$ref": "#/nowhere"}, "not a JSON schema"),
     ({"enum": ["x" * 70_000]}, "bytes at most"), ({"$ref": "#"}, "no text fits"),
     ({"allOf": [{"$ref": "#"}]}, "no text fits")],
    ids=["type", "ref", "long", "itself", "all of itself"],
)  # fmt: skip
def test_schemas_that_are_none(asks, schema, words):
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        asks.chat.completions.create(model="tiny", messages=HELLO, response_format=form)
    assert refused.value.param == "response_format"
    with pytest.raises(openai.BadRequestError, match="ignore_eos"):
        asks.chat.completions.create(
            model="tiny", messages=HELLO, response_format=FORMAT, extra_body={"ignore_eos": True}
        )


def test_a_schema_that_compiles_for_minutes(asks):
    """It is refused in time, others are answered meanwhile, and the next schema is served."""

    def ask(schema):
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        more = {"response_format": form}
        answer = asks.completions.create(model="tiny", prompt="a", max_tokens=8, extra_body=more)
        return answer.choices[0].text

    def refuse():
        with pytest.raises(openai.BadRequestError, match="has to compile within 1.5 s"):
            ask({"type": "string", "pattern": "a?" * 20_000})

    assert ask({"const": True}) == "true"  # the process that tries schemas has started
    start = time.monotonic()
    with ThreadPoolExecutor(1) as other:
        refused = other.submit(refuse)
        time.sleep(0.5)
        for _ in range(3):
            assert asks.completions.create(model="tiny", prompt="a", max_tokens=2).choices
        assert not refused.done(), "texts waited for the schema"
        refused.result()
    assert time.monotonic() - start < 60
    start = time.monotonic()
    refuse()  # it is known
    assert time.monotonic() - start < 1
    assert ask({"const": False}) == "false"
