"""What a server may be told."""

from __future__ import annotations

from pydantic import Field

from llm.config.base import Config, Count


class Limits(Config):
    """What a client may ask for, and for how long.

    max_prompt_tokens, max_output_tokens: of one text (None: what the model's context leaves room for).
    max_choices: texts that one request may ask for, prompts times n. max_waiting: texts that may wait for a place in
    the batch; beyond that requests get 429. max_body: bytes of a request. max_connections: open at once.
    body_timeout: seconds in which a request must have arrived. request_timeout: seconds in which it is answered,
    waiting included. shutdown_timeout: seconds that running requests get to end when the server is stopped.
    """

    max_prompt_tokens: Count | None = Field(None, ge=1)
    max_output_tokens: Count | None = Field(None, ge=1)
    max_choices: int = Field(16, ge=1)
    max_waiting: int = Field(256, ge=0)
    max_body: Count = Field(1_000_000, ge=1)
    max_connections: int = Field(1000, ge=1)
    body_timeout: float = Field(10.0, gt=0, allow_inf_nan=False)
    request_timeout: float = Field(600.0, gt=0, allow_inf_nan=False)
    shutdown_timeout: int = Field(10, ge=0)
