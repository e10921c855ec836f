"""usage: python -m evals.babilong.train CONFIG.yaml [key=value ...]

Train a model on one task of BABILong in the fine-tuned form (context, question, GEN, answer, end of text; loss on the
answer and its end alone), through a curriculum of lengths, with facts and text that are new at every step. Writes a run
folder, which `evaluate babilong run=RUNS/NAME form=finetuned` takes. Killed, the same command goes on with the first
stage that was not ended.

  python -m evals.babilong.train configs/babilong/armt-qa1.yaml
  nice python -m evals.babilong.train configs/babilong/attention-qa1.yaml num_threads=1

Each batch has one length, drawn uniformly from the multiples of `segment` tokens up to that of the stage. A stage ends
early when train.stop_at is reached at its full length. With questions=all the earlier questions of a story are asked
too, each with its answer, at a random place between the fact before it and the next one, as the stories of bAbI are
told: several answers a sample to learn from. What is tested has one question, at its end.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator

from evals.babilong.background import Background, BackgroundConfig, open_background, read_documents
from evals.babilong.forms import FinetunedForm
from evals.babilong.sampler import Hidden, Sampler, for_tests
from evals.babilong.story import NAMES, Question
from evals.babilong.worlds import simulate
from evals.command import run_command
from evals.synthetic.base import Examples, TokenTask
from evals.synthetic.train import TrainSettings, fit
from evals.synthetic.train import evaluate as score
from llm.checkpoint import Checkpointer, TrainState, load_model_tensors, resolve_checkpoint
from llm.checkpoint.folders import folder_name
from llm.config.base import Config, Count
from llm.config.load import config_hash, config_text, load_config
from llm.config.yaml_io import dump_yaml
from llm.core.batch import IGNORE
from llm.core.errors import UserError, unknown_name
from llm.core.init import clean_name, initialise
from llm.data.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer, load_tokenizer
from llm.generate.load import pick_device
from llm.models.config import ModelConfig

STAGES = "stages.json"
Questions = Literal["last", "all"]
MONITOR_SEED = 1_000_003
"""Added to the seed for the samples by which a stage is ended: neither trained on nor of the test's fact lists."""


class Stage(Config):
    """length: most tokens of a sample, question and answer included. steps: at most. batch: samples of a step (None:
    train.batch). lr: peak learning rate (None: train.lr). background: False hides the facts in no text; all samples are
    then padded to `length`."""

    length: Count = Field(ge=32)
    steps: Count = Field(ge=1)
    batch: Count | None = Field(None, ge=1)
    lr: float | None = Field(None, gt=0)
    background: bool = True


class BabilongTraining(Config):
    """questions: those of a sample's story that are trained on, the last one (as tested) or all. reserve: tokens of a
    length that are kept for questions and answers. train: its `steps` are those of the stages. tokenizer: where it is
    trained, on the background and on facts of all tasks."""

    name: str
    model: ModelConfig
    task: str = "qa1"
    stages: list[Stage] = Field(min_length=1)
    segment: Count = Field(512, ge=16)
    questions: Questions = "last"
    reserve: Count = Field(20, ge=1)
    tokenizer: TokenizerConfig = TokenizerConfig(vocab_size=4096)
    background: BackgroundConfig = BackgroundConfig()
    train: TrainSettings = TrainSettings(stop_at=0.995, eval_examples=128)
    seed: int = 0
    runs_dir: str = "runs"
    num_threads: int = Field(1, ge=1)

    @field_validator("task")
    @classmethod
    def _known(cls, task: str) -> str:
        if task not in NAMES:
            raise UserError(unknown_name("task", task, NAMES))
        return task

    @model_validator(mode="after")
    def _fits(self) -> BabilongTraining:
        for stage in self.stages:
            if stage.background and stage.length % self.segment:
                raise UserError(f"a stage of {stage.length} tokens is no multiple of segment={self.segment}")
        if self.reserve >= self.segment:
            raise UserError(f"reserve={self.reserve} must be less than segment={self.segment}")
        if self.train.steps != TrainSettings().steps or self.train.lengths:
            raise UserError("train.steps and train.lengths have no effect here; give stages")
        return self


class FinetunedSamples(TokenTask):
    """Samples of one task as rows of token ids. Those of a training batch have one length, of so many segments at most
    as fit in `length`; those of `valid` are of the full length and ask one question."""

    task: str
    length: int
    segment: int
    reserve: int
    tokenizer: Any
    background: Any
    questions: Questions = "last"

    @property
    def n_ids(self) -> int:
        return int(self.tokenizer.vocab_size)

    @property
    def n_positions(self) -> int:
        return self.length

    def longer(self, n_positions: int) -> FinetunedSamples:
        return self.replace(length=n_positions)

    def at(self, stage: Stage) -> FinetunedSamples:
        """Those of a stage."""
        return self.replace(length=stage.length, background=self.background if stage.background else None)

    def chance(self) -> float:
        return 0.0

    def examples(self, seed: int, split: Literal["train", "valid"], start: int, count: int) -> Examples:
        length = self.length
        if split == "train" and self.background is not None:
            length = self.segment * Random(f"length/{seed}/{start}").randint(1, self.length // self.segment)
        tokenizer: Tokenizer = self.tokenizer
        seed += MONITOR_SEED if split == "valid" else 0
        n_context = 0 if self.background is None else length - self.reserve
        sampler = Sampler(self.task, n_context, tokenizer, self.background, split="train", seed=seed)
        form = FinetunedForm(tokenizer)
        inputs = np.full((count, length), tokenizer.eos_id, dtype=np.int64)
        answers = np.full((count, length), IGNORE, dtype=np.int64)
        earlier = split == "train" and self.questions == "all"
        for row in range(count):
            self._fill(form, sampler[start + row], inputs[row], answers[row], earlier=earlier)
        return Examples(inputs, answers, answers != IGNORE, np.full(inputs.shape, -1))

    def _fill(
        self, form: FinetunedForm, hidden: Hidden, inputs: np.ndarray, answers: np.ndarray, *, earlier: bool = False
    ) -> None:
        """One row; inputs [T] holds end of text behind the sample, where nothing is asked."""
        texts = [ids for ids, _ in hidden.pieces()]
        asked = self._earlier(hidden) if earlier else []
        asked.append((len(texts), Question(hidden.sample.question, hidden.sample.answer, 0, ())))
        begin, at = 0, 0
        for place, question in asked:
            said = form.answer(question.answer)
            ids = np.concatenate([*texts[begin:place], form.question(question.text), said])
            end, begin = at + len(ids), place
            if end > len(inputs) + 1:
                key = "length" if self.background is None else f"reserve than {self.reserve}"
                raise UserError(
                    f"with {question.text!r} and its answer a sample has {end - 1} tokens, more than {len(inputs)}; "
                    f"give a greater {key}"
                )
            inputs[at:end] = ids[: len(inputs) - at]
            answers[end - len(said) - 1 : end - 1] = said
            at = end

    def _earlier(self, hidden: Hidden) -> list[tuple[int, Question]]:
        """(piece of the context that it comes before, question), in order, but for those whose facts are for tests."""
        sample, rng = hidden.sample, Random(f"earlier/{hidden.sample.id}")
        pieces = [fact for _, fact in hidden.pieces()]
        facts = [*(piece for piece, fact in enumerate(pieces) if fact is not None), len(pieces)]
        places = [
            (rng.randint(facts[q.n_facts - 1] + 1, facts[q.n_facts]), q)
            for q in sample.earlier
            if not for_tests(sample.facts[: q.n_facts])
        ]
        return sorted(places, key=lambda found: found[0])


def make_tokenizer(config: BabilongTraining) -> Tokenizer:
    """The tokenizer of a config."""

    def texts() -> Any:
        for task in NAMES:
            for index in range(100):
                story = simulate(task, config.seed, index)
                yield " " + " ".join([*story.facts, *(q.text for q in story.questions)])
                yield from (question.answer for question in story.questions)
        yield from read_documents(config.background)

    return build_tokenizer(config.tokenizer, texts())


def run(config: BabilongTraining) -> dict[str, Any]:
    """Train through the stages that are not done; what is written in stages.json."""
    torch.set_num_threads(config.num_threads)
    folder = Path(config.runs_dir) / config.name
    record = _open(folder, config)
    tokenizer = load_tokenizer(folder / "tokenizer")
    background: Background = open_background(config.background, tokenizer)
    longest = max(stage.length for stage in config.stages)
    model_config = config.model.replace(
        vocab_size=tokenizer.vocab_size, max_seq_len=max(longest, config.model.max_seq_len)
    )
    samples = FinetunedSamples(
        task=config.task, length=longest, segment=config.segment, reserve=config.reserve, tokenizer=tokenizer,
        background=background, questions=config.questions,
    )  # fmt: skip
    device = pick_device(config.train.device)
    model = model_config.build("cpu")
    initialise(model, config.seed)
    if record["stages"]:
        done = folder_name(sum(stage["steps"] for stage in record["stages"]))
        tensors = load_model_tensors(resolve_checkpoint(folder / "checkpoints" / done))
        model.load_state_dict({name: tensors[clean_name(name)] for name, _ in model.named_parameters()}, strict=False)
    model.to(device)
    tree = {
        "schema_version": 1,
        "name": config.name,
        "model": model_config.to_dict(),
        "data": {"seq_len": longest},
        "train": {"precision": config.train.precision},
    }
    checkpointer = Checkpointer(folder / "checkpoints", keep=1000, asynchronous=False, config_yaml=dump_yaml(tree))
    for number, stage in enumerate(config.stages[len(record["stages"]) :], start=len(record["stages"])):
        settings = config.train.replace(
            steps=stage.steps, batch=stage.batch or config.train.batch, lr=stage.lr or config.train.lr
        )
        own = samples.at(stage)
        label = f"{config.name}, {stage.length} tokens,"
        began = time.perf_counter()
        fitted = fit(own, model_config, settings, config.seed + number, label=label, model=model)
        record["stages"].append(
            {
                "length": stage.length,
                "steps": fitted.steps,
                "accuracy": fitted.scores["accuracy"],
                "exact": fitted.scores["exact"],
                "cpu_seconds": round(fitted.cpu_seconds, 1),
                "seconds": round(time.perf_counter() - began, 1),
                "history": [list(point) for point in fitted.history],
            }
        )
        steps = sum(each["steps"] for each in record["stages"])
        state = TrainState(model={clean_name(n): p.detach().cpu() for n, p in model.named_parameters()}, meta={})
        checkpointer.save(state, step=steps, tokens=0, kind="final", wait=True)
        _write(folder / STAGES, json.dumps(record, indent=1) + "\n")
    last = samples.at(config.stages[-1])
    found = score(model, last, config.train, config.seed, device)
    return record | {"parameters": sum(p.numel() for p in model.parameters()), "exact": found["exact"]}


def _open(folder: Path, config: BabilongTraining) -> dict[str, Any]:
    """The record of a run that goes on, or a new one with its tokenizer."""
    name = config_hash(config.replace(num_threads=1))
    if (folder / STAGES).is_file():
        record: dict[str, Any] = json.loads((folder / STAGES).read_text(encoding="utf-8"))
        if record["config"] != name:
            raise UserError(f"{folder} was trained with another config; give another name, or remove the folder")
        return record
    if (folder / "checkpoints").exists():
        raise UserError(f"{folder} holds another run; give another name")
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(config).save(folder / "tokenizer")
    (folder / "babilong.yaml").write_text(config_text(config), encoding="utf-8")
    record = {"config": name, "stages": []}
    _write(folder / STAGES, json.dumps(record) + "\n")
    return record


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def table(record: dict[str, Any]) -> str:
    """The stages as a Markdown table."""
    lines = ["| length | steps | exact | CPU s |", "|---:|---:|---:|---:|"]
    lines += [
        f"| {s['length']:,} | {s['steps']} | {s['exact']:.3f} | {s['cpu_seconds']:.0f} |" for s in record["stages"]
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Run the command."""
    if not argv or {"-h", "--help"} & set(argv):
        print(str(__doc__).strip())
        return 0 if argv else 2
    record = run(load_config(BabilongTraining, argv))
    print(table(record))
    print(json.dumps({key: value for key, value in record.items() if key != "stages"}))
    return 0


if __name__ == "__main__":
    run_command(main, "babilong.train")
