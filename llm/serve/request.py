"""Requests of the two generation endpoints, read from JSON: whatever is wrong is an ApiError 400 that says so."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, NoReturn, Self, TypeVar

from pydantic import ConfigDict, Field, ValidationError, model_validator

from llm.config.base import Config
from llm.config.messages import describe
from llm.core.errors import UserError
from llm.generate.sampling import Sampling
from llm.serve.errors import ApiError, bad_request

C = TypeVar("C", bound=Config)

MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MIN_TEMPERATURE = 0.001
"""Below it, logits divided by it may leave the range of fp32."""

_NOT_THERE: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
}
"""Parameters of OpenAI that nothing here does, with the values that ask for nothing."""


class StreamOptions(Config):
    """include_usage: a last chunk with the counts of tokens."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class GenerationRequest(Config):
    """What both endpoints share. `user` is accepted and not used."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    n: int = Field(1, ge=1)
    stop: str | list[str] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    ignore_eos: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise UserError("stream_options has no effect without stream=true; remove it")
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise UserError(f"temperature must be 0 (greedy) or at least {MIN_TEMPERATURE}; given {self.temperature}")
        if len(self.stops) > MAX_STOPS or "" in self.stops:
            raise UserError(f"stop must hold at most {MAX_STOPS} texts, none of them empty")
        for text in self.stops:
            _check_text(text, "stop")
        return self

    @classmethod
    def read(cls, body: bytes) -> Self:
        """The request of a body of JSON."""
        given = read_json(body)
        fields = cls.model_fields
        given = {key: value for key, value in given.items() if value is not None or key not in {*fields, *_NOT_THERE}}
        for name in [key for key in given if key in _NOT_THERE and key not in fields]:
            if not any(given[name] == value for value in _NOT_THERE[name]):
                raise bad_request(f"{name} is not supported by this server; leave it out", name)
            del given[name]
        return _validated(cls, given)

    @property
    def stops(self) -> list[str]:
        """The texts that end the output."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def output_tokens(self) -> int | None:
        """Most new tokens; None: as many as there is room for."""
        raise NotImplementedError

    @property
    def n_logprobs(self) -> int | None:
        """Likeliest tokens to tell with each token; None: no log-probabilities at all."""
        raise NotImplementedError

    def sampling(self, max_new_tokens: int, stop: Iterable[str], seed: int) -> Sampling:
        """The settings of one output. What has no effect at temperature 0 is left out, as clients often send it."""
        settings: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": self.temperature,
            "repetition_penalty": self.repetition_penalty,
            "stop": [*stop],
            "ignore_eos": self.ignore_eos,
        }
        if self.temperature != 0:
            settings |= {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p, "seed": seed}
        return _validated(Sampling, settings)


class CompletionRequest(GenerationRequest):
    """/v1/completions. prompt: a text, token ids, or a list of either. logprobs: number of likeliest tokens to tell."""

    prompt: Any = None
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @model_validator(mode="after")
    def _check_prompt(self) -> Self:
        if not self.prompts:
            raise UserError("prompt is an empty list; give at least one prompt")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself."""
        given = self.prompt
        if given is None:
            raise UserError("prompt is missing; give a text, a list of texts, or token ids")
        if isinstance(given, str) or _is_ids(given):
            given = [given]
        if not isinstance(given, list) or not all(isinstance(one, str) or _is_ids(one) for one in given):
            raise UserError("prompt must be a text, a list of texts, a list of token ids, or a list of such lists")
        for one in given:
            if isinstance(one, str):
                _check_text(one, "prompt")
        return given

    @property
    def output_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def n_logprobs(self) -> int | None:
        return self.logprobs


class ChatRequest(GenerationRequest):
    """/v1/chat/completions."""

    messages: Any = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise UserError("top_logprobs has no effect without logprobs=true; remove it")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise UserError("max_tokens and max_completion_tokens differ; give one of them")
        if not isinstance(self.messages, list) or not self.messages:
            raise UserError("messages must be a list of at least one message with a role and a content")
        for number, message in enumerate(self.messages):
            _message(message, f"messages[{number}]")
        return self

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages with their contents as one text each."""
        return [_message(message, "messages") for message in self.messages]

    @property
    def output_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def n_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def _validated(kind: type[C], given: dict[str, Any]) -> C:
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        message = describe(kind, error, given).removeprefix("config: ").replace("\n  ", "; ")
        word = re.match(r"\w*", message)
        raise bad_request(message, word[0] if word and word[0] in {*given, *kind.model_fields} else None) from error


def read_json(body: bytes) -> dict[str, Any]:
    """The object of a body."""
    try:
        given = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not valid UTF-8: byte 0x{body[error.start]:02x} at {error.start}") from error
    except json.JSONDecodeError as error:
        raise bad_request(f"the body is no JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise bad_request("the body is nested too deeply") from error
    except ApiError:
        raise
    except ValueError as error:
        raise bad_request(f"the body holds a number that cannot be read: {error}") from error
    if not isinstance(given, dict):
        raise bad_request("the body must be a JSON object, {...}")
    return given


def _no_constant(name: str) -> NoReturn:
    raise bad_request(f"the body holds {name}, which is no JSON")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _check_text(text: str, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{name} holds half of a surrogate pair ({text[error.start]!r}), which is no text") from error


def _message(given: Any, where: str) -> dict[str, str]:
    """A message with texts only; null values are as good as absent."""
    if not isinstance(given, dict):
        raise UserError(f"{where} must be an object with a role and a content")
    given = {key: value for key, value in given.items() if value is not None}
    for key in given:
        if key not in ("role", "content", "name"):
            raise UserError(f"{where} has {key!r}, which is not supported; allowed: role, content, name")
    for key in ("role", "content"):
        if key not in given:
            raise UserError(f"{where} has no {key}")
    if given["role"] == "developer":
        given["role"] = "system"
    if given["role"] not in ("system", "user", "assistant"):
        raise UserError(f"{where}.role must be system, developer, user or assistant; given {given['role']!r}"[:200])
    given["content"] = _content(given["content"], f"{where}.content")
    for key, value in given.items():
        if not isinstance(value, str):
            raise UserError(f"{where}.{key} must be a text")
        _check_text(value, f"{where}.{key}")
    return given


def _content(given: Any, where: str) -> str:
    if isinstance(given, str):
        return given
    if not isinstance(given, list) or not given:
        raise UserError(f"{where} must be a text or a list of parts of text")
    for number, part in enumerate(given):
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise UserError(f'{where}[{number}] must be {{"type": "text", "text": ...}}; other parts are not supported')
    return "".join(part["text"] for part in given)
