"""The bodies of requests as pydantic models, and errors in the interface's own shape.

A field that is wrong, or that there is none of, is named; null stands for a field that is not
given, as in OpenAI's interface.
"""

import contextlib
import json
from typing import Annotated, Any, Literal

from engine import Sampling
from engine.config import LIMITS, TOP, Checked, limited, model_of, words
from engine.sampling import MOST_BIASES
from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import from_json

MOST_CHOICES = 64  # completions of one request: prompts times n
MOST_STOPS = 16
MOST_STOP = 256  # characters of one: with each token its beginnings are compared with the text
MOST_VALUES = 1 << 15  # fields, and elements of lists, of a body
MOST_SCHEMA = 64 << 10  # bytes of a JSON schema, with those of tools
MOST_NAME = 80  # characters of a field's name that an error repeats
INT64 = 2**63
# OpenAI's fields that change nothing here.
IGNORED = dict.fromkeys(("prompt_cache_key", "prompt_cache_retention", "reasoning_effort", "user",
                         "safety_identifier", "service_tier", "verbosity"), str | None)  # fmt: skip
IGNORED |= {"metadata": dict | None, "prompt_cache_options": dict | None, "store": bool | None}
NAME = r"^[a-zA-Z0-9_.-]{1,64}$"  # of a function


class Refused(Exception):
    """What a client is told instead of an answer."""

    def __init__(self, message, status=400, param=None, code=None):
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    @property
    def body(self):
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
                 429: "rate_limit_error"}  # fmt: skip
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kinds.get(self.status, kind),
                          "param": self.param, "code": self.code}}  # fmt: skip


Stop = Annotated[str, Field(min_length=1, max_length=MOST_STOP)]
Token = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Strict(Checked):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, fields):
        """Null is not given, of fields that there are none of as well."""
        is_object = isinstance(fields, dict)
        return {k: v for k, v in fields.items() if v is not None} if is_object else fields


# There is no obfuscation here.
OPTIONS = {"include_usage": bool | None, "include_obfuscation": bool | None}
StreamOptions = model_of("StreamOptions", Strict, **OPTIONS)
Schema = Annotated[dict[str, Any], Field(alias="schema")]
Called, Name = Annotated[str, Field(max_length=64)], Annotated[str, Field(pattern=NAME)]
Described = model_of("Described", Strict, name=Name, description=str | None)  # as prompts have it
JsonSchema = model_of("JsonSchema", Described, name=Called, schema_=Schema, strict=bool | None)
Form = Literal["text", "json_object", "json_schema"]
ResponseFormat = model_of("ResponseFormat", Strict, type=Form, json_schema=JsonSchema | None)
Function = model_of("Function", Described, parameters=dict[str, Any] | None, strict=bool | None)
ChosenFunction = model_of("ChosenFunction", Strict, name=str)
CalledFunction = model_of("CalledFunction", ChosenFunction, arguments=str)
Choice = model_of("Choice", Strict, type=Literal["function"], function=ChosenFunction)
Tool = model_of("Tool", Choice, function=Function)
Call = model_of("Call", Choice, id=str, function=CalledFunction, index=int | None)


class Common(model_of("Ignored", limited(Strict, *LIMITS), **IGNORED)):
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    logit_bias: Annotated[dict[Token, Bias], Field(max_length=MOST_BIASES)] | None = None
    response_format: ResponseFormat | None = None

    @property
    def limit(self):
        """The most tokens of a choice, where that is given."""
        given = getattr(self, "max_completion_tokens", None)
        return self.max_tokens if given is None else given

    @property
    def tops(self):
        """Of how many tokens beside each the log probability is told; None for not even its own."""
        return self.logprobs

    @property
    def ignored(self):
        return sorted({*IGNORED, "modalities"} & self.model_fields_set)

    @field_validator("logit_bias")
    @classmethod
    def _each_once(cls, biases):
        if biases is not None and len({int(token) for token in biases}) < len(biases):
            raise ValueError("a token is in it twice")
        return biases

    @field_validator("stream_options")
    @classmethod
    def _of_a_stream(cls, options, info):
        if options is not None and not info.data.get("stream"):
            raise ValueError("it needs stream to be true")
        return options

    @property
    def stops(self):
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def sampling(self, defaults, max_tokens, choice):
        """Of one of the choices: each has a seed of its own, the first that of the body."""
        every = {name: getattr(self, name) for name in (*LIMITS, "ignore_eos")}
        given = {name: value for name, value in every.items() if value is not None}
        given = defaults | given
        given["top_k"] = max(given.get("top_k", 0), 0)  # -1 leaves out none, as in other servers
        seed = None if self.seed is None else self.seed + (choice << 64)
        bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        given |= {"max_tokens": max_tokens, "logprobs": self.tops}
        echoed = bool(getattr(self, "echo", None)) and self.tops is not None
        return Sampling(seed=seed, logit_bias=bias, prompt_logprobs=echoed, **given)


class CompletionBody(Common):
    prompt: Any = ""
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=TOP)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    suffix: None = None

    @field_validator("prompt")
    @classmethod
    def _one_kind(cls, prompt):
        """Of millions of tokens, with one error."""

        def is_tokens(part):
            some = isinstance(part, list) and part
            return some and all(type(token) is int and 0 <= token < 2**31 for token in part)

        parts = prompt if isinstance(prompt, list) else [prompt]
        is_text = parts and all(isinstance(part, str) for part in parts)
        if is_text or is_tokens(prompt) or (parts and all(map(is_tokens, parts))):
            return prompt
        raise ValueError("a string, a list of strings, a list of tokens, or a list of such lists")

    @field_validator("best_of")
    @classmethod
    def _is_n(cls, best_of, info):
        if best_of is not None and best_of != (info.data.get("n") or 1):
            raise ValueError("has to equal n: this server ranks no choices")
        return best_of

    @property
    def prompts(self):
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_one else self.prompt


class Part(Strict):
    type: Literal["text"]
    text: str
    cache_control: Any = None  # prefixes are shared without it

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, part):
        """One sentence of another kind of part, and not one for each of its fields."""
        if isinstance(part, dict) and part.get("type") not in (None, "text"):
            raise ValueError("parts of a message are text here: its type must be 'text'")
        return part


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None

    def for_template(self):
        """As templates of checkpoints read it: text, and arguments as objects."""
        given = self.model_dump(exclude_none=True).items()
        message = {"content": ""} | {name: value for name, value in given if value != []}
        if isinstance(self.content, list):
            message["content"] = "".join(part.text for part in self.content)
        if self.role == "developer":  # which many leave out
            message["role"] = "system"
        # As gpt-oss' template has it, which refuses both beside calls.
        if self.reasoning_content and not (self.tool_calls and message["content"]):
            message["thinking"] = self.reasoning_content
        for call in message.get("tool_calls", ()):
            with contextlib.suppress(ValueError, RecursionError):  # else a text
                said = call["function"]["arguments"].strip() or "{}"
                call["function"]["arguments"] = json.loads(said) or {}
        return message


class ChatBody(Common):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Choice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = None

    @property
    def tops(self):
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def forced(self):
        """The tools one of which must be called; none where text may be written."""
        choice, tools = self.tool_choice, self.tools or []
        if isinstance(choice, Choice):
            return [tool for tool in tools if tool.function.name == choice.function.name]
        return tools if choice == "required" else []


# Steps of an error's place that are kinds of a union, and no field.
_KINDS = {"str", "Choice", "[key]"}


def _values(raw):
    """What JSON says; Refused where its values are so many that all their errors take minutes."""
    try:
        given = from_json(raw, allow_inf_nan=False)
    except ValueError as wrong:
        raise Refused(f"Invalid JSON: {wrong}") from None
    # Tokens of a prompt are many, and have a check of their own.
    counted = {**given, "prompt": None} if isinstance(given, dict) else given
    left, count = [counted], 0
    while left:
        value = left.pop()
        if isinstance(value, dict | list):
            count += len(value)
            if count > MOST_VALUES:
                raise Refused(f"a body has {MOST_VALUES} values at most, tokens of a prompt aside")
            left += value.values() if isinstance(value, dict) else value
    return given


def parsed(kind, raw):
    """The body of a request; Refused with the field that is wrong."""
    given = _values(raw)
    try:
        return kind.model_validate(given)
    except ValidationError as wrong:
        errors = wrong.errors(include_url=False, include_input=False)
        # Of a union each kind has an error: those count that came furthest into the field.
        same = [e for e in errors if e["loc"][:1] == errors[0]["loc"][:1]]
        furthest = max(len(_steps(e["loc"])) for e in same)
        same = [e for e in same if len(_steps(e["loc"])) == furthest]
        param = _place(same[0]["loc"])
        told = ", or ".join(dict.fromkeys(words(e) for e in same))
        raise Refused(f"{param}: {told}" if param else told, param=param) from None


def _steps(loc):
    """The fields and places among an error's steps."""
    kinds = ("list[", "constrained-", "literal[", "nullable[", "function-")
    return [x for x in loc if isinstance(x, int) or not (x in _KINDS or x.startswith(kinds))]


def _place(loc):
    """`messages[0].content` of the steps that lead there."""
    text = ""
    for step in _steps(loc):
        step = step[:MOST_NAME] if isinstance(step, str) else step
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text or None
