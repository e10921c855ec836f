"""From pieces of output to OpenAI's objects, whole or in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from llm.serve.output import Piece, TokenInfo
from llm.serve.request import GenerationRequest
from llm.serve.service import Service
from llm.serve.worker import Job

_LOWEST_LOGPROB = -9999.0
"""In place of minus infinity, which JSON cannot hold; OpenAI's value."""


class Answer:
    """The answer to one request, as a whole or in chunks. Subclasses know the two endpoints' objects."""

    kind = chunk_kind = prefix = ""

    def __init__(self, service: Service, given: GenerationRequest, jobs: Sequence[Job]) -> None:
        self.service, self.given = service, given
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.n_prompt_tokens = sum(len(job.prompt) for job in jobs[:: given.n])
        self.n_tokens = [0] * len(jobs)
        self.texts = [""] * len(jobs)
        self.infos: list[list[TokenInfo]] = [[] for _ in jobs]
        self.finishes: list[str | None] = [None] * len(jobs)

    def add(self, index: int, piece: Piece) -> None:
        """A piece of an output has come."""
        self.n_tokens[index] = piece.n_tokens
        if not self.given.stream:
            self.texts[index] += piece.text
            self.infos[index] += piece.infos
        self.finishes[index] = finish_reason(piece)

    @property
    def complete(self) -> bool:
        """Whether all outputs have ended."""
        return None not in self.finishes

    def usage(self) -> dict[str, int]:
        """Tokens read and made."""
        made = sum(self.n_tokens)
        return {
            "prompt_tokens": self.n_prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.n_prompt_tokens + made,
        }

    def whole(self) -> dict[str, Any]:
        """The answer in one object."""
        choices = [
            self.choice(index, text, infos, finish)
            for index, (text, infos, finish) in enumerate(zip(self.texts, self.infos, self.finishes, strict=True))
        ]
        return self._object(self.kind, choices) | {"usage": self.usage()}

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """A piece as an object of the stream."""
        return self._chunk([self.delta(index, piece.text, piece.infos, finish_reason(piece))])

    def opening(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return []

    def closing(self) -> list[dict[str, Any]]:
        """What a stream ends with, before [DONE]."""
        return [self._chunk([]) | {"usage": self.usage()}] if self.given.include_usage else []

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage: dict[str, Any] = {"usage": None} if self.given.include_usage else {}
        return self._object(self.chunk_kind, choices) | usage

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.service.name,
            "choices": choices,
        }

    def choice(self, index: int, text: str, infos: Sequence[TokenInfo], finish: str | None) -> dict[str, Any]:
        """One output of the whole answer."""
        raise NotImplementedError

    def delta(self, index: int, text: str, infos: Sequence[TokenInfo], finish: str | None) -> dict[str, Any]:
        """One output's part of a chunk."""
        raise NotImplementedError


class CompletionAnswer(Answer):
    """Answers of /v1/completions."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def choice(self, index: int, text: str, infos: Sequence[TokenInfo], finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self._logprobs(infos), "finish_reason": finish}

    delta = choice

    def _logprobs(self, infos: Sequence[TokenInfo]) -> dict[str, Any] | None:
        if self.given.n_logprobs is None:
            return None
        name = self.service.token_name
        return {
            "tokens": [name(info.token) for info in infos],
            "token_logprobs": [_finite(info.logprob) for info in infos],
            "top_logprobs": [{name(token): _finite(value) for token, value in info.top} for info in infos],
            "text_offset": [info.offset for info in infos],
        }


class ChatAnswer(Answer):
    """Answers of /v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def choice(self, index: int, text: str, infos: Sequence[TokenInfo], finish: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(infos), "finish_reason": finish}

    def delta(self, index: int, text: str, infos: Sequence[TokenInfo], finish: str | None) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": self._logprobs(infos), "finish_reason": finish}

    def opening(self) -> list[dict[str, Any]]:
        first = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": index, "delta": first, "logprobs": None, "finish_reason": None}])
            for index in range(len(self.texts))
        ]

    def _logprobs(self, infos: Sequence[TokenInfo]) -> dict[str, Any] | None:
        if self.given.n_logprobs is None:
            return None
        return {
            "content": [
                self._token(info.token, info.logprob) | {"top_logprobs": [self._token(*one) for one in info.top]}
                for info in infos
            ],
            "refusal": None,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        service = self.service
        return {"token": service.token_name(token), "logprob": _finite(logprob), "bytes": service.token_bytes(token)}


def finish_reason(piece: Piece) -> str | None:
    """OpenAI's word for why an output has ended."""
    if piece.finish is None:
        return None
    return "stop" if piece.finish in ("eos", "stop") else "length"


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)
