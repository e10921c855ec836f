"""Training in the fine-tuned form: rows, stages, going on, and the same answers as the evaluation gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evals.babilong.background import open_background
from evals.babilong.forms import FinetunedForm
from evals.babilong.sampler import Sampler, for_tests
from evals.babilong.train import MONITOR_SEED, BabilongTraining, FinetunedSamples, Stage, main, make_tokenizer, run
from evals.synthetic.train import predict
from llm.config.load import load_config
from llm.core.batch import IGNORE
from llm.core.errors import UserError
from llm.generate.engine import Engine
from llm.generate.load import load_model
from llm.generate.sampling import Sampling
from tests.unit.babilong.test_sampler import prose

ROOT = Path(__file__).resolve().parents[3]
MODELS: dict[str, dict[str, Any]] = {
    "attention": {},
    "armt": {"wrappers": [{"type": "armt", "segment": 64, "n_memory": 4, "d_memory": 8}]},
    "rmt": {"wrappers": [{"type": "rmt", "segment": 64, "n_memory": 4}]},
}


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("books")
    (folder / "a.txt").write_text(prose(300))
    return folder


def config_for(books: Path, runs: Path, **changes: Any) -> BabilongTraining:
    block = {"mixer": {"type": "attention", "n_heads": 2}, "channel": "swiglu"}
    tree: dict[str, Any] = {
        "name": "tiny",
        "model": {"d_model": 32, "max_seq_len": 64, "layers": [{"pattern": [block]}]},
        "task": "qa1",
        "stages": [{"length": 64, "steps": 2}, {"length": 192, "steps": 2}],
        "segment": 64,
        "tokenizer": {"kind": "bpe", "vocab_size": 500},
        "background": {"source": {"type": "text", "paths": [str(books)]}},
        "train": {"batch": 2, "eval_every": 2, "eval_examples": 8, "lr": 1e-3},
        "runs_dir": str(runs),
    }
    return BabilongTraining.model_validate(tree | changes)


def samples_for(books: Path, tmp_path: Path, length: int = 192) -> FinetunedSamples:
    config = config_for(books, tmp_path)
    tokenizer = make_tokenizer(config)
    background = open_background(config.background, tokenizer)
    return FinetunedSamples(
        task="qa2", length=length, segment=64, reserve=20, tokenizer=tokenizer, background=background
    )


def test_rows_are_the_samples_of_the_fine_tuned_form(books: Path, tmp_path: Path) -> None:
    samples = samples_for(books, tmp_path)
    tokenizer, form = samples.tokenizer, FinetunedForm(samples.tokenizer)
    lengths = {samples.examples(0, "train", start, 2).inputs.shape[1] for start in range(0, 60, 2)}
    assert lengths == {64, 128, 192}
    found = samples.examples(3, "train", 10, 4)
    sampler = Sampler("qa2", found.inputs.shape[1] - 20, tokenizer, samples.background, split="train", seed=3)
    for row in range(4):
        hidden = sampler[10 + row]
        assert not for_tests(hidden.sample.facts)
        answer = form.answer(hidden.sample.answer)
        places = np.flatnonzero(found.answers[row] != IGNORE)
        assert found.answers[row][places].tolist() == answer
        whole = [i for part in form.stream(hidden).parts() for i in np.asarray(part).tolist()]
        assert found.inputs[row][: len(whole)].tolist() == whole
        assert places.tolist() == list(range(len(whole) - 1, len(whole) - 1 + len(answer)))
        assert found.inputs[row][places[1:]].tolist() == answer[:-1]
        assert (found.inputs[row][len(whole) + len(answer) - 1 :] == tokenizer.eos_id).all()
    again = samples.examples(3, "train", 10, 4)
    np.testing.assert_array_equal(again.inputs, found.inputs)
    with pytest.raises(UserError, match="give a greater reserve than 1"):
        samples.replace(reserve=1).examples(0, "valid", 0, 1)


def test_facts_alone_are_padded_to_the_length(books: Path, tmp_path: Path) -> None:
    samples = samples_for(books, tmp_path).at(Stage(length=400, steps=1, background=False))
    tokenizer, form = samples.tokenizer, FinetunedForm(samples.tokenizer)
    found = samples.examples(0, "train", 5, 6)
    assert found.inputs.shape == (6, 400)
    sampler = Sampler("qa2", 0, tokenizer, None, split="train", seed=0)
    for row in range(6):
        whole = [i for part in form.stream(sampler[5 + row]).parts() for i in np.asarray(part).tolist()]
        assert found.inputs[row][: len(whole)].tolist() == whole
    with pytest.raises(UserError, match="tokens, more than 32; give a greater length"):
        samples.replace(length=32).examples(0, "train", 0, 20)


def test_earlier_questions_are_asked_among_the_facts(books: Path, tmp_path: Path) -> None:
    samples = samples_for(books, tmp_path).replace(task="qa1", questions="all", reserve=80)
    tokenizer, form = samples.tokenizer, FinetunedForm(samples.tokenizer)
    found, n_asked, n_left_out = samples.examples(3, "train", 10, 30), 0, 0
    gen = tokenizer.decode([form.gen])
    length = found.inputs.shape[1]
    sampler = Sampler("qa1", length - 80, tokenizer, samples.background, split="train", seed=3)
    for row in range(30):
        hidden = sampler[10 + row]
        sample = hidden.sample
        kept = [q for q in sample.earlier if not for_tests(sample.facts[: q.n_facts])]
        n_asked, n_left_out = n_asked + len(kept), n_left_out + len(sample.earlier) - len(kept)
        wanted = [form.answer(q.answer) for q in kept] + [form.answer(sample.answer)]
        places = np.flatnonzero(found.answers[row] != IGNORE)
        assert found.answers[row][places].tolist() == [i for answer in wanted for i in answer]
        followed = np.append(found.inputs[row], tokenizer.eos_id)[places + 1]
        np.testing.assert_array_equal(followed, found.answers[row][places])
        text, at = tokenizer.decode(found.inputs[row].tolist()), 0
        for number, fact in enumerate(sample.facts):
            for question in (q for q in kept if q.n_facts == number):
                at = text.index(f" {question.text}{gen}{question.answer}", at) + 1
            at = text.index(f" {fact}", at) + 1
        assert text.index(f" {sample.question}{gen}{sample.answer}", at)
    assert n_asked > 30 and n_left_out > 0
    tested, sampler = (
        samples.examples(3, "valid", 0, 4),
        Sampler("qa1", 112, tokenizer, samples.background, split="train", seed=3 + MONITOR_SEED),
    )
    for row in range(4):
        said = tested.answers[row][tested.answers[row] != IGNORE]
        assert said.tolist() == form.answer(sampler[row].sample.answer)


def test_what_ends_a_stage_is_not_trained_on(books: Path, tmp_path: Path) -> None:
    samples = samples_for(books, tmp_path, length=64)
    held = samples.examples(0, "valid", 0, 20).inputs
    seen = samples.examples(0, "train", 0, 20).inputs
    assert held.shape == seen.shape and not (held[:, None] == seen[None]).all(axis=2).any()


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_training_writes_a_run_that_evaluation_takes(
    kind: str, books: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    base = config_for(books, tmp_path)
    config = base.replace(model=base.model.to_dict() | MODELS[kind], name=kind)
    record = run(config)
    assert [stage["steps"] for stage in record["stages"]] == [2, 2]
    folder = tmp_path / kind
    words = ["tasks=qa1", "lengths=[1k]", "samples=2", "form=finetuned", "background.source.type=text"]
    done = cli("evaluate", "babilong", f"run={folder}", *words, f"background.source.paths=[{books}]")
    assert done.code == 0, done.err
    assert json.loads(done.out)["conditions"]["trained_length"] == 192

    model, tokenizer, _ = load_model(folder)
    background = open_background(config.background, tokenizer)
    form, sampler = FinetunedForm(tokenizer), Sampler("qa1", 172, tokenizer, background)
    samples = FinetunedSamples(
        task="qa1", length=192, segment=64, reserve=20, tokenizer=tokenizer, background=background
    )
    inputs, answers = np.full((6, 192), tokenizer.eos_id), np.full((6, 192), IGNORE)
    for row in range(6):
        samples._fill(form, sampler[row], inputs[row], answers[row])
    with torch.no_grad():
        said = predict(model, torch.from_numpy(inputs)).numpy()
    engine = Engine(model, eos_id=tokenizer.eos_id, context=256, prefill_chunk=50)
    made = engine.generate([form.stream(sampler[row]) for row in range(6)], Sampling(temperature=0, max_new_tokens=8))
    for row in range(6):
        first = np.flatnonzero(answers[row] != IGNORE)[0]
        token = made[row].tokens[0] if made[row].tokens else tokenizer.eos_id
        assert said[row, first] == token, "training and evaluation ask at the same place"


def test_a_killed_training_goes_on_with_the_stage_that_was_not_ended(books: Path, tmp_path: Path) -> None:
    short = config_for(books, tmp_path / "a", stages=[{"length": 64, "steps": 2}])
    whole = config_for(books, tmp_path / "b")
    first = run(whole)
    again = run(whole)
    assert again["stages"] == first["stages"], "nothing is left to do"
    weights = load_model(tmp_path / "b" / "tiny").model.state_dict()
    stages = tmp_path / "b" / "tiny" / "stages.json"
    record = json.loads(stages.read_text())
    record["stages"].pop()
    stages.write_text(json.dumps(record))
    third = run(whole)
    assert len(third["stages"]) == 2 and third["stages"][0] == json.loads(json.dumps(first["stages"][0]))
    for name, tensor in load_model(tmp_path / "b" / "tiny").model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    with pytest.raises(UserError, match="another config"):
        run(whole.replace(seed=5))
    assert len(run(short)["stages"]) == 1


def test_the_loss_falls(books: Path, tmp_path: Path) -> None:
    stages = [{"length": 64, "steps": 30}]
    train = {"batch": 8, "eval_every": 1, "eval_examples": 4, "lr": 5e-3}
    history = run(config_for(books, tmp_path, stages=stages, train=train))["stages"][0]["history"]
    losses = [loss for _, loss, _ in history]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:3])


CONFIGS = sorted((ROOT / "configs" / "babilong").glob("*.yaml"))


@pytest.mark.parametrize("path", [path for path in CONFIGS if "study" not in path.stem], ids=lambda p: p.stem)
def test_configs_are_sound(path: Path) -> None:
    config = load_config(BabilongTraining, [str(path)])
    config.model.replace(vocab_size=config.tokenizer.vocab_size, max_seq_len=1024).build("meta")
    assert path.stem == f"{config.name.split('-')[-1]}-{config.task}"


def test_mistakes_are_named(books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(ROOT / "configs" / "babilong" / "attention-qa1.yaml")
    for word, what in (
        ("task=qa99", "unknown task"),
        ("stages=[{length: 100, steps: 1}]", "no multiple of segment"),
        ("reserve=128", "must be less than segment"),
        ("train.steps=5", "give stages"),
    ):
        with pytest.raises(UserError, match=what):
            main([path, word])
    assert main([]) == 2 and "CONFIG.yaml" in capsys.readouterr().out
