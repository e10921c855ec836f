"""usage: python -m evals.prefix_reuse [key=value ...]

What a server gains when all prompts begin with the same system prompt: seconds to the first token, and tokens of
prompts that the model reads, of a server that shares prefixes and of one that does not. Both run at once, and clients
ask them the same requests in turns, so that whatever else the machine does befalls both. Every answer must be the same
from both. Prints one JSON line; exit code 1 when an answer differs.

keys: run= (a run folder; default: a random model over bytes), system=1024, question=64 (bytes of text), answer=16
(tokens), rounds=12, clients=4 (requests that arrive together), prefix_cache=200M, page_size=16, n_layers=6, d_model=256
(of the random model), num_threads=1, seed=0
"""

from __future__ import annotations

import asyncio
import json
import platform
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from evals.command import run_command
from evals.serve_load import PATH, TOO_LONG, metric, running_server, write_tiny_run
from llm.config.base import Config, Count
from llm.config.load import load_config
from llm.core.errors import UserError

LETTERS = "abcdefghij klmno\npqrst (=)"


class ReuseConfig(Config):
    """What the command is told."""

    run: str | None = None
    system: int = Field(1024, ge=1)
    question: int = Field(64, ge=1)
    answer: int = Field(16, ge=1)
    rounds: int = Field(12, ge=1)
    clients: int = Field(4, ge=1)
    prefix_cache: Count = Field(200_000_000, ge=1)
    page_size: int = Field(16, ge=1)
    n_layers: int = Field(6, ge=1)
    d_model: int = Field(256, ge=4)
    num_threads: int = Field(1, ge=1)
    seed: int = 0


async def ask(http: Any, prompt: str, n: int) -> tuple[float, str]:
    """(seconds to the first token, the answer) of a streamed request."""
    body = {"prompt": prompt, "max_tokens": n, "temperature": 0, "ignore_eos": True, "stream": True, "logprobs": 0}
    began, first, text = time.perf_counter(), None, ""
    async with http.stream("POST", PATH, json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line or line == "data: [DONE]":
                continue
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                first = first or time.perf_counter() - began
                text += choice["text"]
    if first is None:
        raise UserError("the server answered without a token")
    return first, text


def prompts(config: ReuseConfig) -> list[list[str]]:
    """By round, what its clients ask: the same system prompt, and a question of their own."""
    rng = random.Random(config.seed)

    def text(n: int) -> str:
        return "".join(rng.choice(LETTERS) for _ in range(n))

    system = text(config.system)
    return [[system + text(config.question) for _ in range(config.clients)] for _ in range(config.rounds)]


async def compare(config: ReuseConfig, run: Path) -> dict[str, Any]:
    """Ask both servers, and say what was seen."""
    import httpx2

    seconds: dict[str, list[float]] = {"shared": [], "whole": []}
    n_different = 0
    plain = {"num_threads": config.num_threads, "max_batch": 2 * config.clients}
    shared = {**plain, "prefix_cache": config.prefix_cache, "page_size": config.page_size}
    with running_server(run, **shared) as (url, _), running_server(run, **plain) as (other, _):
        async with (
            httpx2.AsyncClient(base_url=url, timeout=TOO_LONG) as to_shared,
            httpx2.AsyncClient(base_url=other, timeout=TOO_LONG) as to_whole,
        ):
            servers = {"shared": to_shared, "whole": to_whole}
            for http in servers.values():
                await ask(http, "warm up", 2)
            before = {name: (await http.get("/metrics")).text for name, http in servers.items()}
            for number, asked in enumerate(prompts(config)):
                answers: dict[str, list[str]] = {}
                for name in sorted(servers, reverse=bool(number % 2)):
                    found = await asyncio.gather(*(ask(servers[name], text, config.answer) for text in asked))
                    seconds[name] += [first for first, _ in found]
                    answers[name] = [text for _, text in found]
                n_different += sum(a != b for a, b in zip(answers["shared"], answers["whole"]))
            after = {name: (await http.get("/metrics")).text for name, http in servers.items()}

    def gained(name: str, which: str) -> int:
        key = f"manyformer_{which}_total"
        return int(metric(after[name], key) - metric(before[name], key))

    record: dict[str, Any] = {"tool": "prefix_reuse", **config.to_dict()}
    for name, values in seconds.items():
        ordered = sorted(values)
        # The first round finds nothing in the cache.
        later = sorted(values[config.clients :]) or ordered
        record[name] = {
            "prompt_tokens_read": gained(name, "prompt_tokens_read"),
            "prompt_tokens_reused": gained(name, "prompt_tokens_reused"),
            "first_token_seconds_first_round": max(values[: config.clients]),
            "first_token_seconds_median": later[len(later) // 2],
            "first_token_seconds_p90": later[len(later) * 9 // 10],
            "state_bytes_at_end": int(metric(after[name], "manyformer_state_bytes")),
        }
    medians = [record[name]["first_token_seconds_median"] for name in ("whole", "shared")]
    return record | {
        "first_token_speedup": medians[0] / medians[1],
        "answers": len(seconds["shared"]),
        "answers_that_differ": n_different,
        "ok": n_different == 0,
        "model": config.run or f"a random model over bytes, {config.n_layers} layers of {config.d_model}",
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def measure(config: ReuseConfig) -> dict[str, Any]:
    """The record of one comparison."""
    with tempfile.TemporaryDirectory() as folder:
        longest = config.system + config.question + config.answer + 1
        if config.run is not None:
            return asyncio.run(compare(config, Path(config.run)))
        run = write_tiny_run(
            Path(folder) / "tiny", n_layers=config.n_layers, d_model=config.d_model, max_seq_len=longest
        )
        return asyncio.run(compare(config, run))


def main(argv: list[str]) -> int:
    """Run the command."""
    if {"-h", "--help"} & set(argv):
        print(str(__doc__).strip())
        return 0
    record = measure(load_config(ReuseConfig, argv))
    print(json.dumps(record))
    return 0 if record["ok"] else 1


if __name__ == "__main__":
    run_command(main, "prefix_reuse")
