"""Speed of generation: plain decoding beside transformers' `generate` on the exported model, and beside drafters.

All implementations of a comparison take turns in one process on the same prompts, greedy, past the end of texts.
Models whose weights are rounded may say other tokens than the plain one.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field

from llm.checkpoint.hf import ExportOptions, export_hf
from llm.config.base import Config
from llm.core.errors import UserError
from llm.generate import Engine, Sampling
from llm.generate.load import DTYPES, Loaded, load_model, pick_device
from llm.generate.quantize import Quantize, parameter_bytes
from llm.generate.speculation import make_draft_length, make_drafter
from llm.train.callbacks.environment import git_revision, versions
from llm.train.hardware import device_name

Prompts = list[list[int]]
Run = Callable[[Prompts], list[list[int]]]


def _as_list(value: object) -> object:
    return value if isinstance(value, list) else [value]


class GenerateBenchConfig(Config):
    """run: a run folder, a checkpoint or a folder of a Hugging Face model. text: UTF-8 files, out of which n_prompts
    pieces of prompt_tokens tokens are cut at even distances. batch: prompts at once. new_tokens: of each prompt.
    rounds: times that all implementations take turns after one that is not counted; the median is told.

    precision: of the weights and of what is computed; "plain" is the first one, which drafters and the peer have too.
    quantize: also with the matrices in eight bits, at each precision. compile: also with the steps compiled, each of
    these, and of the drafters. peer: transformers' `generate` on the exported model. drafters: as `generate
    --speculate` takes them, each with every one of draft_tokens. temperature: of all, with seeds from 0; the peer draws
    other tokens, so there it is 0.
    """

    run: str
    text: Annotated[list[str], BeforeValidator(_as_list)] = Field(min_length=1)
    n_prompts: int = Field(8, ge=1)
    prompt_tokens: int = Field(64, ge=1)
    new_tokens: int = Field(128, ge=2)
    batch: Annotated[list[int], BeforeValidator(_as_list)] = Field([1], min_length=1)
    rounds: int = Field(3, ge=1)
    precision: Annotated[list[Literal["fp32", "bf16"]], BeforeValidator(_as_list)] = Field(["fp32"], min_length=1)
    quantize: Annotated[list[Literal["int8", "fp8"]], BeforeValidator(_as_list)] = []
    compile: bool = False
    peer: Literal["none", "transformers"] = "none"
    drafters: Annotated[list[str], BeforeValidator(_as_list)] = []
    draft_tokens: Annotated[list[str | int], BeforeValidator(_as_list)] = [4]
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False)
    num_threads: int = Field(1, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"


def bench_generate(config: GenerateBenchConfig) -> Iterator[dict[str, Any]]:
    """One record for each batch size and implementation, the plain one first."""
    torch.set_num_threads(config.num_threads)
    device = pick_device(config.device)
    models = dict(_models(config, device))
    loaded = models["plain"]
    context = config.prompt_tokens + config.new_tokens
    if context > loaded.model.config.max_seq_len:
        raise UserError(
            f"prompt_tokens + new_tokens is {context}, the model's context {loaded.model.config.max_seq_len}; lower one"
        )
    prompts = cut_prompts(config, loaded)
    if config.temperature and config.peer != "none":
        raise UserError(
            f"temperature={config.temperature} with peer={config.peer}, which draws other tokens; set temperature=0"
        )
    sampling = Sampling(temperature=config.temperature, max_new_tokens=config.new_tokens, ignore_eos=True)
    with tempfile.TemporaryDirectory(prefix="manyformer-bench-") as folder:
        peer = _peer(loaded, Path(folder), config.new_tokens) if config.peer == "transformers" else None
        for batch in config.batch:
            engines = {name: Engine(each.model, max_batch=batch) for name, each in models.items()}
            if config.compile:
                for name, each in models.items():
                    compiled = "compiled" if name == "plain" else f"{name} compiled"
                    engines[compiled] = Engine(each.model, max_batch=batch, compile=True)
            for name in config.drafters:
                for n, compile in itertools.product(config.draft_tokens, [False, True] if config.compile else [False]):
                    dtype = DTYPES[config.precision[0]]
                    drafter = make_drafter(name, loaded.model, loaded.tokenizer, device=device, dtype=dtype)
                    engines[f"{name} {n} compiled" if compile else f"{name} {n}"] = Engine(
                        loaded.model, max_batch=batch, drafter=drafter, draft_length=make_draft_length(str(n)),
                        compile=compile,
                    )  # fmt: skip
            runs: dict[str, Run] = {name: _own(engine, sampling) for name, engine in engines.items()}
            if peer is not None:
                runs["transformers"] = peer
            found = take_turns(runs, prompts, batch, config.rounds)
            for name, (seconds, outputs) in found.items():
                yield _record(config, batch, name, seconds, outputs, found, engines.get(name), device)


def _models(config: GenerateBenchConfig, device: torch.device) -> Iterator[tuple[str, Loaded]]:
    """The model at each precision and with each kind of eight-bit matrices, the plain one first."""
    for precision in config.precision:
        kinds: list[Quantize] = ["none", *config.quantize]
        for quantize in kinds:
            words = [word for word in (precision, quantize) if word not in (config.precision[0], "none")]
            loaded = load_model(config.run, device=device, dtype=DTYPES[precision], quantize=quantize)
            yield " ".join(words) or "plain", loaded


def cut_prompts(config: GenerateBenchConfig, loaded: Loaded) -> Prompts:
    """n_prompts pieces of the texts, at even distances."""
    ids: list[int] = []
    for name in config.text:
        try:
            ids += loaded.tokenizer.encode(Path(name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {name} as UTF-8 text: {error}") from error
    room = len(ids) - config.prompt_tokens
    if room < config.n_prompts - 1:
        raise UserError(
            f"the texts have {len(ids)} tokens, too few for {config.n_prompts} prompts of {config.prompt_tokens}; give "
            "more text"
        )
    starts = [room * i // max(1, config.n_prompts - 1) for i in range(config.n_prompts)]
    return [ids[start : start + config.prompt_tokens] for start in starts]


def take_turns(
    runs: dict[str, Run], prompts: Prompts, batch: int, rounds: int
) -> dict[str, tuple[list[float], list[list[int]]]]:
    """{name: (seconds of each round for all prompts, outputs)}, `batch` prompts at a time."""
    groups = [prompts[start : start + batch] for start in range(0, len(prompts), batch)]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    outputs: dict[str, list[list[int]]] = {}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            outputs[name] = [tokens for group in groups for tokens in run(group)]
            if turn > 0:
                seconds[name].append(time.perf_counter() - started)
    return {name: (seconds[name], outputs[name]) for name in runs}


def _own(engine: Engine, sampling: Sampling) -> Run:
    def run(prompts: Prompts) -> list[list[int]]:
        samplings = [sampling if sampling.greedy else sampling.replace(seed=seed) for seed in range(len(prompts))]
        return [completion.tokens for completion in engine.generate(prompts, samplings)]

    return run


def _peer(loaded: Loaded, folder: Path, new_tokens: int) -> Run:
    """transformers' `generate` on the exported model. UserError where it has no plain form."""
    from transformers import AutoModelForCausalLM

    tensors = {name: tensor.detach() for name, tensor in loaded.model.state_dict().items()}
    export_hf(
        loaded.model.config, tensors, loaded.tokenizer, folder / "hf", ExportOptions(), facts={}, log=lambda _: None
    )
    weight = next(loaded.model.parameters())
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=weight.dtype).to(weight.device).eval()

    @torch.no_grad()
    def run(prompts: Prompts) -> list[list[int]]:
        tokens = torch.tensor(prompts, device=weight.device)
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[:, tokens.shape[1] :].tolist()

    return run


def _record(
    config: GenerateBenchConfig,
    batch: int,
    name: str,
    seconds: Sequence[float],
    outputs: list[list[int]],
    found: dict[str, tuple[list[float], list[list[int]]]],
    engine: Engine | None,
    device: torch.device,
) -> dict[str, Any]:
    plain = found["plain"]
    n_tokens = sum(len(tokens) for tokens in outputs)
    median = statistics.median(seconds)
    record: dict[str, Any] = {
        "tool": "bench generate",
        "run": config.run,
        "implementation": name,
        "batch": batch,
        "tokens_per_second": round(n_tokens / median, 1),
        "slowest_to_fastest": [round(n_tokens / s, 1) for s in sorted(seconds, reverse=True)],
        "times_plain": round(statistics.median(plain[0]) / median, 3),
        **({} if engine is None else {"parameter_bytes": parameter_bytes(engine.model)}),
        "same_tokens": outputs == plain[1],
        "share_of_same_tokens": round(
            sum(a == b for mine, other in zip(outputs, plain[1]) for a, b in zip(mine, other)) / n_tokens, 4
        ),
    }
    if "transformers" in found:
        record["times_transformers"] = round(statistics.median(found["transformers"][0]) / median, 3)
    if engine is not None and engine.drafter is not None:
        record["acceptance"] = round(engine.speculation.acceptance, 4)
        record["tokens_per_forward"] = round(engine.speculation.tokens_per_forward, 3)
    return record | {
        "prompts": config.n_prompts,
        "prompt_tokens": config.prompt_tokens,
        "new_tokens": config.new_tokens,
        "temperature": config.temperature,
        "rounds": config.rounds,
        "num_threads": config.num_threads,
        "device": device_name(device),
        "git_revision": git_revision(),
        "versions": versions(),
    }
