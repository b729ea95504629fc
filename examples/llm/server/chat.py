"""Chats as prompts, by the checkpoint's template in jinja2's sandbox; tool calls out of texts."""

import datetime
import json
import re
import sys
import time
import uuid
from pathlib import Path

import jinja2
from engine.config import given, read_object
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .schema import Refused

OPEN, SHUT = "<tool_call>", "</tool_call>"
SECONDS = 5  # in which a template has to be rendered
MOST_POWER = 64  # of `**`, which no time limit stops
OPENING, SHUT_AFTER = re.compile(rf"{OPEN}\s*"), re.compile(rf"(?:\s*{SHUT})?")


class Template:
    """`chat_template.jinja` and those beside it, or `chat_template` of tokenizer_config.json."""

    def __init__(self, path):
        path, config = Path(path), {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (path / name).exists():
                config |= given(read_object(path / name))
        files = [*path.glob("chat_template.jinja"), *path.glob("additional_chat_templates/*.jinja")]
        read = [{"name": file.stem, "template": file.read_text()} for file in files]
        source, self.template = read or config.get("chat_template") or [], None
        try:
            if not isinstance(source, list):
                source = [{"name": "default", "template": source}]
            if named := {one["name"]: one["template"] for one in source}:
                plain = named.get("default") or next(iter(named.values()))
                both = plain, named.get("tool_use", plain)
                self.template, self.for_tools = map(Sandbox().from_string, map(str, both))
        except (jinja2.TemplateError, LookupError, TypeError, RecursionError) as bad:
            raise ValueError(f"{path}: the chat template: {bad}") from None
        self.words = {
            name: value.get("content") if isinstance(value, dict) else value
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if (value := config.get(name)) is not None
        }

    def __call__(self, messages, tools, more):
        """The prompt; `more` are variables of the template."""
        if self.template is None:
            raise Refused("the checkpoint has no chat template", param="messages")
        template = self.for_tools if tools else self.template
        always = {"messages": messages, "tools": tools, "documents": None}
        try:
            given = self.words | more | always | {"add_generation_prompt": True}
            text = _in_time(template.render, given)
            text.encode()  # half a character of a call's arguments cannot be
            return text
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError,
                RecursionError, TypeError, ValueError) as bad:  # fmt: skip
            # Only the template's own words, by `raise_exception`, are meant for clients.
            words = bad.message if type(bad) is jinja2.TemplateError else "it cannot be rendered"
            raise Refused(f"the checkpoint's chat template: {words}", param="messages") from None


def _in_time(render, given):
    """What a template makes of these; an error where it goes on for too long.

    Python looks at the time with each call, and each iteration of a loop has one: sandboxed loops
    over numbers have 100,000 at most.
    """
    until = time.monotonic() + SECONDS

    def look(*_):
        if time.monotonic() > until:
            sys.setprofile(None)
            raise jinja2.TemplateError(f"it has to be rendered within {SECONDS} s")

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        return render(given)
    finally:
        sys.setprofile(before)


class Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["**"])

    def __init__(self):
        more = ["jinja2.ext.loopcontrols", Generation]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=more)
        self.filters["tojson"] = tojson
        self.globals["raise_exception"] = refuse
        self.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)

    def call_binop(self, context, operator, left, right):
        if abs(right) > MOST_POWER:
            raise jinja2.TemplateError(f"a power is {MOST_POWER} at most")
        return super().call_binop(context, operator, left, right)


class Generation(Extension):
    """What a template marks for training as the model's, as transformers has it: its text."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(["name:endgeneration"], True), lineno=line)


def refuse(message):
    raise jinja2.TemplateError(str(message))


def tojson(value, indent=None, **more):
    return json.dumps(value, indent=indent, **{"ensure_ascii": False} | more)


def calls_of(text, is_forced):
    """The text around tool calls, and these; what is no call stays text.

    A call is a JSON object with a name: the whole text where one is forced, and else after
    <tool_call>, as Qwen3's and Hermes' templates have it. What JSON reads decides where it ends,
    for arguments may have tags in them.
    """
    if is_forced:
        call, end = _read(text, len(text) - len(text.lstrip()))
        return ("", [call]) if call and not text[end:].strip() else (text, [])
    kept, calls, begin, found = [], [], 0, OPENING.search(text)
    while found:
        call, end = _read(text, found.end())
        if call:
            kept.append(text[begin : found.start()])
            calls.append(call)
            begin = SHUT_AFTER.match(text, end).end()
        found = OPENING.search(text, begin if call else found.end())
    return "".join([*kept, text[begin:]]), calls


def _read(text, at):
    """A call that begins there, or None, and where it ends."""
    try:
        said, end = json.JSONDecoder(strict=False).raw_decode(text, at)
        return call_of(said), end
    except (AttributeError, ValueError, KeyError, TypeError, RecursionError):
        return None, at


def call_of(said):
    """A call as clients have it; templates of Mistral want nine letters and digits of an id."""
    name, arguments = said["name"], said.get("arguments", said.get("parameters")) or {}
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    # Half a character stays the escape that the model wrote.
    name, arguments = (x.encode(errors="backslashreplace").decode() for x in (name, arguments))
    return {"id": uuid.uuid4().hex[:9], "type": "function",
            "function": {"name": name, "arguments": arguments}}  # fmt: skip


def schema_of(tools):
    """The JSON schema of a call of one of the tools, whose references stay within its own."""
    of, each = {}, []
    for n, tool in enumerate(tools):
        text, at = json.dumps(tool.function.parameters or {"type": "object"}), f"#/$defs/{n}"
        of[f"{n}"] = json.loads(text.replace('"$ref": "#', f'"$ref": "{at}'))
        named = {"name": {"const": tool.function.name}, "arguments": {"$ref": at}}
        each.append({"type": "object", "properties": named, "required": [*named],
                     "additionalProperties": False})  # fmt: skip
    return {"$defs": of, "anyOf": each}
