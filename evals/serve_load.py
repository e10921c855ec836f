"""usage: python -m evals.serve_load [key=value ...]

Many clients ask one server for a while, whole and streamed, greedy and with seeds; some go away in the middle. Every
answer must be what the engine says to that prompt alone, the server's memory must not grow, and requests of clients
that have gone must be freed. Prints one JSON line; exit code 1 when something of that does not hold.

keys: run= (a run folder; default: a random model over bytes), clients=200, seconds=60, n_requests=64 (different ones),
max_tokens=24, max_batch=32, leave=0.1 (share of clients that go away), memory_tolerance=0.05, num_threads=1, seed=0
"""

from __future__ import annotations

import asyncio
import json
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import Field

from evals.command import run_command
from llm.checkpoint import Checkpointer, TrainState
from llm.config.base import Config
from llm.config.load import load_config
from llm.config.yaml_io import dump_yaml
from llm.core.errors import UserError
from llm.core.init import clean_name, initialise
from llm.data.tokenizer.simple import BytesTokenizer
from llm.generate import Engine, Sampling, generate_text, load_model
from llm.models.config import ModelConfig

ROOT = Path(__file__).resolve().parent.parent
PATH = "/v1/completions"
TOO_LONG = 120.0
"""Seconds after which an answer counts as lost."""


class LoadConfig(Config):
    """What the command is told."""

    run: str | None = None
    clients: int = Field(200, ge=1)
    seconds: float = Field(60.0, gt=0)
    n_requests: int = Field(64, ge=1)
    max_tokens: int = Field(24, ge=2)
    max_batch: int = Field(32, ge=1)
    leave: float = Field(0.1, ge=0, le=1)
    memory_tolerance: float = Field(0.05, gt=0)
    num_threads: int = Field(1, ge=1)
    seed: int = 0


def write_tiny_run(folder: Path, *, n_layers: int = 2, d_model: int = 64, max_seq_len: int = 128) -> Path:
    """A run with a random model over bytes, whose words are far enough apart for rounding not to matter."""
    mixer = {"type": "attention", "n_heads": 4, "n_kv_heads": 2}
    config = ModelConfig.model_validate(
        {
            "vocab_size": 257,
            "d_model": d_model,
            "max_seq_len": max_seq_len,
            "layers": [{"pattern": [{"mixer": mixer, "channel": "swiglu"}], "repeat": n_layers}],
            "init": {"std": 0.3},
        }
    )
    model = config.build("cpu")
    initialise(model, 0)
    tree = {"schema_version": 1, "name": folder.name, "model": config.to_dict()}
    tensors = {clean_name(name): p.detach() for name, p in model.named_parameters()}
    checkpointer = Checkpointer(folder / "checkpoints", asynchronous=False, config_yaml=dump_yaml(tree))
    checkpointer.save(TrainState(model=tensors, meta={"tokens": 0}), step=1, tokens=0, kind="final", wait=True)
    BytesTokenizer().save(folder / "tokenizer")
    return folder


def make_requests(config: LoadConfig) -> list[dict[str, Any]]:
    """Bodies of different requests: prompts of many lengths, every other one greedy."""
    rng = random.Random(config.seed)
    requests = []
    for number in range(config.n_requests):
        prompt = "".join(rng.choice("abcdefghij =()\n\u00e9\u20ac") for _ in range(rng.randrange(1, 25)))
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": rng.randrange(2, config.max_tokens + 1)}
        body |= {"temperature": 0} if number % 2 else {"temperature": 0.9, "top_k": 50, "seed": number}
        requests.append(body)
    return requests


def expected_texts(run: Path, requests: list[dict[str, Any]]) -> list[str]:
    """What the engine says to each request alone."""
    model, tokenizer, _ = load_model(run)
    engine = Engine(model, eos_id=tokenizer.eos_id)
    texts = []
    for body in requests:
        settings = {key: value for key, value in body.items() if key not in ("prompt", "max_tokens")}
        sampling = Sampling.model_validate({"max_new_tokens": body["max_tokens"], **settings})
        texts += generate_text(model, tokenizer, [body["prompt"]], sampling, engine=engine)
    return texts


@contextmanager
def running_server(run: Path, **options: Any) -> Iterator[tuple[str, int]]:
    """(address, process id) of a server in a process of its own."""
    words = [f"{key}={value}" for key, value in {"port": 0, **options}.items()]
    command = [sys.executable, str(ROOT / "launch" / "serve.py"), str(run), *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stderr is not None
    said: list[str] = []
    try:
        for line in process.stderr:
            said.append(line)
            if line.startswith("serving "):
                break
        else:
            raise UserError(f"the server did not start: {''.join(said).strip()}")
        threading.Thread(target=lambda: sys.stderr.writelines(process.stderr or []), daemon=True).start()
        yield next(word for word in line.split() if word.startswith("http://")), process.pid
    finally:
        process.terminate()
        process.wait(60)


class Crowd:
    """Clients that ask until a point in time, and what they saw."""

    def __init__(self, config: LoadConfig, requests: list[dict[str, Any]], texts: list[str]) -> None:
        self.config, self.requests, self.texts = config, requests, texts
        self.seen: Counter[str] = Counter()
        self.wrong: list[dict[str, Any]] = []
        self.seconds: list[float] = []
        self.n_tokens = 0

    async def client(self, number: int, http: Any, end: float) -> None:
        """One client: a request after the other."""
        rng = random.Random(f"{self.config.seed}/{number}")
        while time.perf_counter() < end:
            which = rng.randrange(len(self.requests))
            began = time.perf_counter()
            try:
                if rng.random() < self.config.leave:
                    await self._leave(http, which)
                    continue
                stream = rng.random() < 0.5
                text = await (self._streamed if stream else self._whole)(http, which)
            except Exception as error:
                # Whatever went wrong between client and server is a lost answer, and is told.
                self.seen["lost"] += 1
                self.wrong.append({"request": which, "error": f"{type(error).__name__}: {error}"})
                continue
            self.seconds.append(time.perf_counter() - began)
            self.seen["streamed" if stream else "whole"] += 1
            if text != self.texts[which]:
                self.seen["mixed_up"] += 1
                self.wrong.append({"request": which, "given": text, "expected": self.texts[which]})

    async def _whole(self, http: Any, which: int) -> str:
        response = await http.post(PATH, json=self.requests[which])
        response.raise_for_status()
        answer = response.json()
        self.n_tokens += answer["usage"]["completion_tokens"]
        return answer["choices"][0]["text"]

    async def _streamed(self, http: Any, which: int) -> str:
        body = {**self.requests[which], "stream": True, "stream_options": {"include_usage": True}}
        text, complete = "", False
        async with http.stream("POST", PATH, json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    complete = True
                elif line:
                    chunk = json.loads(line.removeprefix("data: "))
                    text += "".join(choice["text"] for choice in chunk["choices"])
                    self.n_tokens += (chunk["usage"] or {}).get("completion_tokens", 0)
        if not complete:
            raise RuntimeError("the stream ended without [DONE]")
        return text

    async def _leave(self, http: Any, which: int) -> None:
        body = {**self.requests[which], "stream": True, "max_tokens": 60, "ignore_eos": True}
        async with http.stream("POST", PATH, json=body) as response:
            response.raise_for_status()
            async for _ in response.aiter_lines():
                break
        self.seen["left"] += 1


def metric(text: str, name: str) -> float:
    """The value of a metric without labels."""
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))


async def freed_after(http: Any, config: LoadConfig) -> float:
    """Seconds from when a whole batch of clients goes away until nothing of theirs runs or waits."""
    body = {"prompt": "x", "max_tokens": 100, "ignore_eos": True, "stream": True}
    streams = [http.stream("POST", PATH, json=body) for _ in range(config.max_batch)]
    await asyncio.gather(*(stream.__aenter__() for stream in streams))
    began = time.perf_counter()
    await asyncio.gather(*(stream.__aexit__(None, None, None) for stream in streams))
    while time.perf_counter() - began < TOO_LONG:
        text = (await http.get("/metrics")).text
        if metric(text, "manyformer_running") + metric(text, "manyformer_waiting") == 0:
            break
    return time.perf_counter() - began


async def watch_memory(pid: int, seconds: float) -> list[int]:
    """Resident bytes of a process, every tenth of a second or so."""
    process, samples = psutil.Process(pid), []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        samples.append(process.memory_info().rss)
        await asyncio.sleep(min(0.1, seconds / 50))
    return samples


async def crowd(config: LoadConfig, run: Path) -> dict[str, Any]:
    """Let the clients loose on a server, and say what was seen."""
    import httpx2

    requests = make_requests(config)
    many = Crowd(config, requests, expected_texts(run, requests))
    options = {"max_batch": config.max_batch, "max_waiting": 2 * config.clients, "num_threads": config.num_threads}
    with running_server(run, **options) as (url, pid):
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx2.AsyncClient(base_url=url, timeout=TOO_LONG, limits=limits) as http:
            began = time.perf_counter()
            end = began + config.seconds
            clients = [many.client(number, http, end) for number in range(config.clients)]
            memory = asyncio.create_task(watch_memory(pid, config.seconds))
            await asyncio.gather(*clients)
            samples = await memory
            elapsed = time.perf_counter() - began
            freed = await freed_after(http, config)
            last = (await http.get("/metrics")).text
    half = len(samples) // 2
    peaks = [max(samples[:half]), max(samples[half:])]
    growth = peaks[1] / peaks[0] - 1
    n_answers = many.seen["whole"] + many.seen["streamed"]
    ordered = sorted(many.seconds) or [0.0]
    ok = n_answers > 0 and not many.wrong and growth <= config.memory_tolerance and freed < 1.0
    return {
        "tool": "serve_load",
        **{key: getattr(config, key) for key in ("clients", "seconds", "n_requests", "max_tokens", "max_batch")},
        "answers": n_answers,
        "streamed": many.seen["streamed"],
        "left": many.seen["left"],
        "lost": many.seen["lost"],
        "mixed_up": many.seen["mixed_up"],
        "answers_per_second": n_answers / elapsed,
        "tokens_per_second": many.n_tokens / elapsed,
        "seconds_median": ordered[len(ordered) // 2],
        "seconds_p99": ordered[len(ordered) * 99 // 100],
        "cancelled": int(metric(last, "manyformer_cancelled_total")),
        "freed_after_seconds": freed,
        "running_at_end": int(metric(last, "manyformer_running") + metric(last, "manyformer_waiting")),
        "state_bytes_at_end": int(metric(last, "manyformer_state_bytes")),
        "peak_memory_first_half": peaks[0],
        "peak_memory_second_half": peaks[1],
        "memory_growth": growth,
        "first_errors": many.wrong[:3],
        "ok": ok,
        "run": config.run or "a random model over bytes, 2 layers of 64",
        "num_threads": config.num_threads,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def measure(config: LoadConfig) -> dict[str, Any]:
    """The record of one load test."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = write_tiny_run(Path(folder) / "tiny") if config.run is None else Path(config.run)
        return asyncio.run(crowd(config, run))


def main(argv: list[str]) -> int:
    """Run the command."""
    if {"-h", "--help"} & set(argv):
        print(str(__doc__).strip())
        return 0
    record = measure(load_config(LoadConfig, argv))
    print(json.dumps(record))
    return 0 if record["ok"] else 1


if __name__ == "__main__":
    run_command(main, "serve_load")
