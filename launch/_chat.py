"""The conversation of `generate --chat`: a line of stdin, an answer, and so on."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from llm.core.errors import UserError
from llm.data.tokenizer import Tokenizer
from llm.generate.chat import Chat, reply
from llm.generate.engine import Engine
from llm.generate.sampling import Sampling
from llm.generate.scheduler import Scheduler


def converse(engine: Engine, tokenizer: Tokenizer, chat: Chat, sampling: Sampling, system: str | None) -> None:
    """Answer each line until the end of stdin. When the conversation outgrows the context its oldest turns are
    forgotten; the system's message stays."""
    scheduler = Scheduler(engine)
    opening = [] if system is None else [{"role": "system", "content": system}]
    talk: list[dict[str, str]] = []
    for line in _lines():
        talk.append({"role": "user", "content": line})
        n_turns = len(talk)
        while len(talk) > 1 and len(chat.encode([*opening, *talk])) >= engine.context:
            del talk[:2]
        if len(talk) < n_turns:
            print(f"(the oldest {n_turns - len(talk)} messages are forgotten: the context is full)", file=sys.stderr)
        answer = ""
        for text in reply(scheduler, tokenizer, chat, [*opening, *talk], sampling):
            answer += text
            sys.stdout.write(text)
            sys.stdout.flush()
        print(flush=True)
        talk.append({"role": "assistant", "content": answer})


def _lines() -> Iterator[str]:
    """The lines of stdin that are not empty, asked for on a terminal."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            return
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"the message is not valid UTF-8: byte 0x{line[error.start]:02x}") from error
        if text.strip():
            yield text
