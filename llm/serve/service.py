"""What is served, and from a request to jobs for the worker. No HTTP here."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from llm.core.errors import UserError
from llm.data.tokenizer import Tokenizer
from llm.generate.chat import Chat
from llm.generate.text import encode_prompt
from llm.serve.config import Limits
from llm.serve.errors import ApiError, bad_request
from llm.serve.request import ChatRequest, CompletionRequest, GenerationRequest
from llm.serve.worker import Job, Worker


@dataclass
class Service:
    """A model that is served. name: what clients call it; context: most tokens of prompt and output."""

    worker: Worker
    tokenizer: Tokenizer
    chat: Chat
    name: str
    context: int
    limits: Limits
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encode")
        special = {i: text for text, i in self.tokenizer.special_tokens.items()}
        self._names = [
            special.get(i, "") if not piece else _name(piece) for i, piece in enumerate(self.tokenizer.pieces)
        ]

    @property
    def model_card(self) -> dict[str, Any]:
        """The model as /v1/models lists it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "manyformer",
            "max_model_len": self.context,
        }

    def check_model(self, given: str | None) -> None:
        """ApiError 404 unless a request is for this model."""
        if given is not None and given != self.name:
            raise ApiError(
                404, f"there is no model {given[:200]!r}; allowed: {self.name}", param="model", code="model_not_found"
            )

    async def jobs(self, given: GenerationRequest) -> list[Job]:
        """The outputs that a request asks for, one after another for each prompt, with places reserved for them."""
        self.check_model(given.model)
        n_prompts = len(given.prompts) if isinstance(given, CompletionRequest) else 1
        n = n_prompts * given.n
        if n > self.limits.max_choices:
            raise bad_request(
                f"{n_prompts} prompts with n={given.n} make {n} texts; allowed: {self.limits.max_choices} a request",
                "n",
            )
        self.worker.reserve(n)
        try:
            ids = await asyncio.get_running_loop().run_in_executor(self._encoder, self._encode, given)
            return self._jobs(given, ids)
        except BaseException as error:
            self.worker.release(n)
            if isinstance(error, UserError):
                raise bad_request(str(error)) from error
            raise

    def _encode(self, given: GenerationRequest) -> list[list[int]]:
        if isinstance(given, ChatRequest):
            return [self.chat.encode(given.conversation)]
        assert isinstance(given, CompletionRequest)
        return [encode_prompt(self.tokenizer, one) if isinstance(one, str) else one for one in given.prompts]

    def _jobs(self, given: GenerationRequest, prompts: Sequence[list[int]]) -> list[Job]:
        most_output = self.limits.max_output_tokens or self.context
        most_prompt = min(self.limits.max_prompt_tokens or self.context, self.context - 1)
        wanted = given.output_tokens
        if wanted is not None and wanted > most_output:
            raise bad_request(f"{wanted} new tokens are asked for; allowed: at most {most_output}", "max_tokens")
        is_chat = isinstance(given, ChatRequest)
        stop = [*given.stops, *(self.chat.stop if is_chat else ())]
        end_ids = self.chat.end_ids if is_chat and not given.ignore_eos else frozenset()
        seed = random.getrandbits(62) if given.seed is None else given.seed
        jobs = []
        for prompt in prompts:
            room = self.context - len(prompt)
            if len(prompt) > most_prompt or (wanted or 1) > room:
                raise bad_request(
                    f"the prompt has {len(prompt)} tokens"
                    + (f" and {wanted} new ones are asked for" if wanted is not None else "")
                    + f"; allowed: prompts of at most {most_prompt}, with the output at most {self.context}",
                    "messages" if is_chat else "prompt",
                    "context_length_exceeded",
                )
            most = min(most_output, room) if wanted is None else wanted
            for choice in range(given.n):
                jobs.append(Job(prompt, given.sampling(most, stop, seed + choice), given.n_logprobs, end_ids))
        return jobs

    def token_name(self, token: int) -> str:
        """A token as clients see it: its text, of part of a character its bytes."""
        return self._names[token] if token < len(self._names) else ""

    def token_bytes(self, token: int) -> list[int]:
        """The bytes that a token stands for."""
        return list(self.tokenizer.pieces[token]) if token < len(self.tokenizer.pieces) else []


def _name(piece: bytes) -> str:
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
