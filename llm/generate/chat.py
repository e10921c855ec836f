"""Chat: messages in, the token ids that a model continues with the assistant's answer.

The form is the model's own chat template (Jinja, as Hugging Face folders carry it), a template file, or plain text
with a line for each message.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from llm.core.errors import UserError
from llm.data.tokenizer import Tokenizer
from llm.generate.sampling import Sampling
from llm.generate.scheduler import Scheduler
from llm.generate.text import TextStream

Message = Mapping[str, str]
"""{"role": ..., "content": ...}, other keys as the template knows them."""

_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Code points that Unicode never assigns: marks within texts."""


class Chat(Protocol):
    """A form of conversations. name: for the user. stop: texts that end an answer; end_ids: tokens that do so, besides
    the end of text."""

    name: str
    stop: Sequence[str]
    end_ids: frozenset[int]

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the assistant's answer begins. UserError when the form has no place for
        these messages."""
        ...


def load_chat(tokenizer: Tokenizer, file: str | Path | None = None) -> Chat:
    """The form of conversations of a model: the template in `file`, else that of its tokenizer, else plain text."""
    if file is not None:
        try:
            return TemplateChat(tokenizer, Path(file).read_text(encoding="utf-8"), str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the chat template {file}: {error}") from error
    own = own_template(tokenizer)
    return PlainChat(tokenizer) if own is None else TemplateChat(tokenizer, own, "the tokenizer's chat template")


def own_template(tokenizer: Tokenizer) -> str | None:
    """The chat template that a tokenizer came with; of several the one named default."""
    found = _config(tokenizer).get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _config(tokenizer: Tokenizer) -> dict[str, Any]:
    return json.loads(tokenizer.files().get("tokenizer_config.json", b"{}"))


def reply(
    scheduler: Scheduler, tokenizer: Tokenizer, chat: Chat, messages: Sequence[Message], sampling: Sampling
) -> Iterator[str]:
    """The assistant's answer, piece by piece. What the scheduler knows of the conversation is not read again. Errors as
    `Chat.encode` and `Engine.stream`."""
    stream = TextStream(tokenizer.pieces, [*sampling.stop, *chat.stop])
    fresh: deque[str] = deque()

    def stop(request: int, token: int) -> bool:
        if token in chat.end_ids and not sampling.ignore_eos:
            return True
        fresh.append(stream.push(token))
        return stream.stopped

    prompts = [chat.encode(messages)]
    for event in scheduler.engine.stream(prompts, sampling, stop=stop, scheduler=scheduler):
        text = fresh.popleft() if fresh else ""
        if event.finish is not None and not stream.stopped:
            text += stream.close()
        yield text


class PlainChat:
    """`System: ...`, `User: ...` and `Assistant: ...`, each on a new line, as the start of a document; an answer ends
    where the next line of the user or the system would begin. Nothing keeps such a line in a message from being read as
    one of the conversation."""

    name = "plain text"
    stop: Sequence[str] = ("\nUser:", "\nSystem:")
    end_ids: frozenset[int] = frozenset()

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def text(self, messages: Sequence[Message]) -> str:
        """The conversation up to the beginning of the answer."""
        lines = []
        for message in messages:
            role, content = message["role"], message["content"]
            if role not in ("system", "user", "assistant"):
                raise UserError(f"plain chat has no role {role!r}; allowed: system, user, assistant")
            lines.append(f"{role.capitalize()}:{'' if content[:1].isspace() else ' '}{content}\n")
        return "".join(lines) + "Assistant:"

    def encode(self, messages: Sequence[Message]) -> list[int]:
        return [self._tokenizer.start_id, *self._tokenizer.encode(self.text(messages))]


class TemplateChat:
    """A Jinja chat template, run in jinja2's sandbox with the names that transformers gives it.

    Special tokens that the template writes become their ids; those that are spelt out in a message stay plain text. The
    template writes everything, the token that starts a text too (bos_token). An answer ends with the special token that
    the template puts behind the assistant's messages.
    """

    stop: Sequence[str] = ()

    def __init__(self, tokenizer: Tokenizer, source: str, name: str) -> None:
        try:
            import jinja2
            import jinja2.ext
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise UserError("a chat template needs jinja2: pip install 'jinja2>=3.1.6'") from error
        self.name = name
        self._tokenizer = tokenizer
        self._special = tokenizer.special_tokens
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _strftime_now
        for key in ("bos_token", "eos_token"):
            token = _config(tokenizer).get(key)
            environment.globals[key] = (token.get("content") if isinstance(token, dict) else token) or ""
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{name}, line {error.lineno} is not valid Jinja: {error.message}") from error
        self.end_ids = self._find_end()

    def encode(self, messages: Sequence[Message]) -> list[int]:
        mark = _unused_mark("".join(value for message in messages for value in message.values()))
        names = sorted(self._special, key=len, reverse=True)
        spelt = re.compile("|".join(map(re.escape, names)) or r"(?!)")

        def hide(text: str) -> str:
            return spelt.sub(lambda match: f"{mark}{names.index(match[0])}{mark}", text)

        hidden = [{key: hide(value) if key != "role" else value for key, value in m.items()} for m in messages]
        rendered = self._render(hidden, add_generation_prompt=True)
        ids: list[int] = []
        at = 0
        for match in [*spelt.finditer(rendered), None]:
            text = rendered[at : match.start() if match else len(rendered)]
            text = re.sub(f"{mark}([0-9]+){mark}", lambda found: names[int(found[1])], text)
            ids += self._tokenizer.encode(text) if text else []
            if match is not None:
                ids.append(self._special[match[0]])
                at = match.end()
        if not ids:
            raise UserError(f"{self.name} gives nothing for these messages")
        return ids

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt)
        except Exception as error:
            # A template is somebody else's program and may fail in any way on messages that it does not expect.
            raise UserError(f"{self.name} refuses these messages: {error}") from error

    def _find_end(self) -> frozenset[int]:
        answer = "answer-9f2c"
        example = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
        try:
            _, _, rest = self._render(example, add_generation_prompt=False).partition(answer)
        except UserError:
            return frozenset()
        return frozenset(i for token, i in self._special.items() if rest.lstrip().startswith(token))


def _unused_mark(text: str) -> str:
    for mark in _NONCHARACTERS:
        if mark not in text:
            return mark
    raise UserError("the messages hold all noncharacters of Unicode (U+FDD0 to U+FDEF); leave them out")


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(message: str) -> None:
    raise UserError(message)


def _strftime_now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)
