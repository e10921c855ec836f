"""Put a model to BABILong: every cell of tasks, lengths and windows, in batches, with what was done kept."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from evals.babilong import report
from evals.babilong.background import Background, open_background
from evals.babilong.forms import AnyForm, FinetunedForm, PromptForm
from evals.babilong.options import BabilongOptions
from evals.babilong.results import Folder, Row, cell, summarise
from evals.babilong.sampler import Hidden, Sampler
from llm.core.errors import UserError
from llm.data.tokenizer import Tokenizer
from llm.generate.engine import Engine
from llm.generate.load import DTYPES, load_model, pick_device
from llm.generate.prefix import fingerprint
from llm.generate.quantize import quantize_model
from llm.generate.sampling import Sampling
from llm.models.decoder import DecoderLike
from llm.train.hardware import peak_memory


class Evaluation:
    """A model, and how samples are put to it."""

    def __init__(self, options: BabilongOptions, model: DecoderLike, tokenizer: Tokenizer) -> None:
        self.options, self.model, self.tokenizer = options, model, tokenizer
        self.form: AnyForm = (
            PromptForm(tokenizer, options.prompts) if options.form == "prompt" else FinetunedForm(tokenizer)
        )
        self.token_bytes = tokenizer.token_bytes()
        self.background: Background | None = None
        if any(options.lengths):
            self.background = open_background(options.background, tokenizer)

    def sampler(self, task: str, length: int, window: int) -> Sampler:
        """The samples of a cell."""
        n_context = length - self.options.reserved if length else 0
        return Sampler(
            task,
            n_context,
            self.tokenizer,
            self.background,
            seed=self.options.seed,
            window=self.options.window(window),
            facts=self.options.facts,
        )

    def check(self) -> None:
        """UserError for a length that the model cannot read, before anything is run."""
        most = self.model.config.max_context
        for length in self.options.lengths:
            for task in self.options.tasks:
                n = len(self.form.stream(self.sampler(task, length, 0)[0])) + self.form.max_new_tokens
                if most is not None and n > most:
                    raise UserError(
                        f"{task} at {report.short(length)} needs about {n} tokens and the model's position table has "
                        f"{most}; leave out the length (nothing is ever cut off)"
                    )

    def answer(self, hidden: list[Hidden]) -> list[Row]:
        """Read and answer samples together."""
        streams = [self.form.stream(each) for each in hidden]
        engine = Engine(
            self.model,
            eos_id=self.tokenizer.eos_id,
            max_batch=len(hidden),
            prefill_chunk=self.options.chunk,
            context=max(map(len, streams)) + self.form.max_new_tokens + 1,
        )
        made = engine.generate(streams, Sampling(temperature=0, max_new_tokens=self.form.max_new_tokens))
        return [
            {
                "id": each.sample.id,
                "question": each.sample.question,
                "answer": each.sample.answer,
                **self.form.judge(each, completion),
                "finish": completion.finish,
                "depths": [round(depth, 4) for depth in each.depths],
                "n_facts": len(each.sample.facts),
                "n_context": each.n_tokens,
                "n_bytes": int(sum(self.token_bytes[ids].sum() for ids, _ in each.pieces())),
                "n_read": len(stream),
            }
            for each, completion, stream in zip(hidden, made, streams, strict=True)
        ]


def run(options: BabilongOptions) -> dict[str, Any]:
    """Evaluate, print a line per cell on stderr, write the folder; returns the summary."""
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    path, device = Path(options.run), pick_device(options.device)
    if not path.exists():
        raise UserError(f"no such run: {path}; run= takes a run folder, a checkpoint or a Hugging Face folder")
    out = _out(path, options)
    model, tokenizer, tree = load_model(path, device=device, tokenizer=options.tokenizer)
    precision = options.precision or tree.get("train", {}).get("precision") or "fp32"
    model.to(DTYPES[precision])
    if options.quantize != "none":
        print(quantize_model(model, options.quantize), file=sys.stderr)
    evaluation = Evaluation(options, model, tokenizer)
    evaluation.check()
    background = evaluation.background
    words = options.prompts.label if options.form == "prompt" else "fine-tuned form"
    facts = "simulated facts" if options.facts is None else "real facts"
    conditions = {
        "label": f"{facts}, own background, {words}",
        **options.conditions(),
        "background_hash": None if background is None else background.hash,
        "background_tokens": None if background is None else len(background.ids),
        "background_sentences_filtered": None if background is None else background.n_filtered,
        "tokenizer": f"{tokenizer.kind}, {tokenizer.vocab_size} ids, {tokenizer.hash[:12]}",
        "model": fingerprint(model)[:16],
        "trained_length": tree.get("data", {}).get("seq_len") or model.config.max_seq_len,
        "precision": precision,
        **({"quantize": options.quantize} if options.quantize != "none" else {}),
        "device": str(device),
    }
    folder = Folder.open(out, conditions)
    started, known = time.perf_counter(), set(folder.rows)
    _cells(evaluation, folder)
    n_read = sum(row["n_read"] for key, row in folder.rows.items() if key not in known)
    seconds = time.perf_counter() - started
    summary = summarise(folder)
    for file in report.write(summary, out, path.resolve().name):
        print(f"wrote {file}", file=sys.stderr)
    print(report.table(summary), file=sys.stderr)
    print(f"read {n_read:,} tokens in {seconds:,.0f} s, {n_read / seconds:,.0f} tokens/s", file=sys.stderr)
    print(f"peak memory {peak_memory(device) / 2**20:,.0f} MiB", file=sys.stderr)
    return summary


def _out(path: Path, options: BabilongOptions) -> Path:
    if options.out is not None:
        return Path(options.out)
    if path.parent.name == "checkpoints":
        return path.parent.parent / "babilong"
    if (path / "checkpoints").is_dir():
        return path / "babilong"
    raise UserError(f"{path} is no run folder; name a folder for the results with out=")


def _cells(evaluation: Evaluation, folder: Folder) -> None:
    options = evaluation.options
    wanted = {
        (task, length, window): [i for i in range(options.samples) if (task, length, window, i) not in folder.rows]
        for length in options.lengths
        for task in options.tasks
        for window in range(options.windows if length else 1)
    }
    with _progress(sum(map(len, wanted.values()))) as advance:
        for (task, length, window), missing in wanted.items():
            sampler = evaluation.sampler(task, length, window)
            for first in range(0, len(missing), options.batch):
                indices = missing[first : first + options.batch]
                rows = evaluation.answer([sampler[index] for index in indices])
                place = {"task": task, "length": length, "window": window}
                folder.add({**place, "index": index, **row} for index, row in zip(indices, rows, strict=True))
                advance(len(indices))
            own = [row for (t, n, w, _), row in folder.rows.items() if (t, n, w) == (task, length, window)]
            found = cell(own, "right")
            shown = f"{100 * found['share']:.1f}% ({100 * found['low']:.0f}-{100 * found['high']:.0f}) of {found['n']}"
            deep = f", facts in {options.window(window)}" if options.windows > 1 and length else ""
            print(f"{task} at {report.short(length)}{deep}: {shown}", file=sys.stderr)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("babilong", total=total)
        yield lambda n: bar.advance(task, n)
