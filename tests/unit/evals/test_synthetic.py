"""Synthetic tasks: pure generators, chance levels, oracles, and the common trainer."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from evals.synthetic import run
from evals.synthetic.__main__ import main, usage
from evals.synthetic.base import TASKS, TaskConfig, TokenTask, VectorTask, accuracy, squared_error
from evals.synthetic.induction import Induction
from evals.synthetic.mqar import MQAR
from evals.synthetic.needle import ASK, FACT, Needle
from evals.synthetic.presets import SMALL
from evals.synthetic.regression import Regression
from evals.synthetic.remember import PAIR, Remember
from evals.synthetic.rewrite import Rewrite
from evals.synthetic.selective_copying import SelectiveCopying
from evals.synthetic.train import TrainSettings, fit, model_for
from llm.core.batch import IGNORE
from llm.core.errors import UserError
from llm.models.config import ModelConfig

ALL = {entry.name: entry.tiny for entry in TASKS.entries()}
TOKENS = {name: make for name, make in ALL.items() if issubclass(TASKS.get(name), TokenTask)}
VECTORS = {name: make for name, make in ALL.items() if issubclass(TASKS.get(name), VectorTask)}
# Everything that the tables of tests/unit/evals say is also true of the settings that people use.
HARD = {f"{name}-default": TASKS.get(name) for name in TOKENS} | {
    f"{name}-small": lambda name=name: TASKS.get(name).model_validate(SMALL[name]["task"]) for name in TOKENS
}


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_an_example_is_a_function_of_seed_split_and_index(make: Any) -> None:
    task = make()
    once = task.examples(3, "train", 0, 8)
    torch.manual_seed(99)
    np.random.seed(99)
    task.row(4, "train", 0)
    for start in (5, 2):
        again = task.examples(3, "train", start, 3)
        for name in ("inputs", "answers", "asked", "groups"):
            assert np.array_equal(getattr(again, name), getattr(once, name)[start : start + 3])
    assert not np.array_equal(task.row(4, "train", 0).inputs, once.inputs[0])
    assert not np.array_equal(task.row(3, "valid", 0).inputs, once.inputs[0])
    assert len({row.tobytes() for row in once.inputs}) == 8


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_shapes(make: Any) -> None:
    task = make()
    found = task.examples(0, "train", 0, 6)
    assert found.inputs.shape[:2] == found.asked.shape == found.groups.shape == (6, task.n_positions)
    assert found.asked.any(axis=1).all()
    if isinstance(task, TokenTask):
        assert found.inputs.dtype == found.answers.dtype == np.int64
        assert 0 <= found.inputs.min() and found.inputs.max() < task.n_ids
        assert ((found.answers == IGNORE) == ~found.asked).all()
        assert found.answers[found.asked].min() >= 0 and found.answers.max() < task.n_ids
    else:
        assert found.inputs.shape[2] == task.d_in and found.answers.shape[2] == task.d_out
        assert np.isfinite(found.inputs).all() and np.isfinite(found.answers).all()
    longer = task.longer(2 * task.n_positions)
    assert longer.examples(0, "valid", 0, 2).inputs.shape[1] == 2 * task.n_positions


@pytest.mark.parametrize("make", (TOKENS | HARD).values(), ids=TOKENS | HARD)
def test_the_rule_answers_everything(make: Any) -> None:
    task = make()
    for variant in (task, task.longer(task.n_positions + 10)):
        found = variant.examples(0, "valid", 0, 40)
        answers = np.stack([variant.oracle(tokens) for tokens in found.inputs])
        score = accuracy(answers, found)
        assert score["accuracy"] == score["exact"] == 1.0
        assert all(value == 1.0 for value in score["by_group"].values())


def seen(task: TokenTask, tokens: np.ndarray) -> np.ndarray:
    """The candidates among which the chance of a task guesses, told from the tokens without association."""
    match task:
        case MQAR():
            return tokens[tokens > task.n_keys]
        case Rewrite():
            return tokens[tokens > task.n_key_ids]
        case SelectiveCopying():
            return tokens[tokens > 1]
        case Needle():
            return np.arange(2, 12)
        case Induction():
            return np.unique(tokens)
        case Remember():
            return np.arange(2 + task.n_symbols, 2 + 2 * task.n_symbols)
    raise AssertionError(task)


@pytest.mark.parametrize("make", TOKENS.values(), ids=TOKENS)
def test_chance(make: Any) -> None:
    task = make()
    found = task.examples(0, "valid", 0, 1000)
    rng = np.random.default_rng(0)
    guesses = np.stack([rng.choice(seen(task, tokens), len(tokens)) for tokens in found.inputs])
    assert accuracy(guesses, found)["accuracy"] == pytest.approx(task.chance(), abs=0.03)


@pytest.mark.parametrize("make", TOKENS.values(), ids=TOKENS)
def test_no_answer_stands_where_it_is_asked_for(make: Any) -> None:
    """A model that repeats the current token gets nothing, so labels are not shifted by one."""
    found = make().examples(0, "valid", 0, 200)
    if isinstance(make(), Needle):
        return
    assert accuracy(found.inputs, found)["accuracy"] == 0.0


def test_mqar_asks_every_key_once() -> None:
    task = MQAR()
    for index in range(5):
        row = task.row(0, "train", index)
        n = int(row.groups)
        keys, values = row.inputs[: 2 * n : 2], row.inputs[1 : 2 * n : 2]
        assert len(set(keys)) == n and sorted(row.inputs[row.asked]) == sorted(keys)
        assert dict(zip(keys, values)) == dict(zip(row.inputs[row.asked], row.answers[row.asked]))
        assert not row.asked[: 2 * n].any() and not row.inputs[2 * n :][~row.asked[2 * n :]].any()


def test_rewrite_asks_for_the_latest_value() -> None:
    """Keys that were written once are answered by their first value, the others hardly ever."""
    task = Rewrite()
    found = task.examples(0, "valid", 0, 200)
    guesses = np.zeros_like(found.answers)
    for guess, tokens, asked in zip(guesses, found.inputs, found.asked):
        first: dict[int, int] = {}
        start = len(tokens) - task.n_keys - 2 * task.n_writes
        for key, value in zip(tokens[start : -task.n_keys : 2], tokens[start + 1 : -task.n_keys : 2]):
            first.setdefault(int(key), int(value))
        guess[asked] = [first[int(key)] for key in tokens[asked]]
    score = accuracy(guesses, found)["by_group"]
    assert score["1"] == 1.0
    assert all(score[group] < 0.1 for group in ("2", "3", "4"))


def test_needle_stands_anywhere_once() -> None:
    task = Needle(length=64, n_facts=3)
    found = task.examples(0, "valid", 0, 600)
    assert ((found.inputs == FACT).sum(axis=1) == 3).all() and ((found.inputs == ASK).sum(axis=1) == 1).all()
    tenths = np.bincount(found.groups[:, 0], minlength=10)
    assert len(tenths) == 10 and tenths.min() > 0


def test_remember_has_a_pair_in_each_of_the_first_segments() -> None:
    task = Remember(length=80, n_pairs=5)
    found = task.examples(0, "valid", 0, 400)
    marks = found.inputs == PAIR
    assert (marks[:, :40].reshape(400, 5, 8).sum(axis=2) == 1).all() and not marks[:, 40:].any()
    assert len(np.unique(np.argwhere(marks)[:, 1] % 8)) == 5
    assert np.bincount(found.groups[:, 0]).min() > 50
    longer = task.longer(800).examples(0, "valid", 0, 50)
    assert (longer.inputs[:, 40:-3] >= 2 + 2 * task.n_symbols).all()


@pytest.mark.parametrize("haystack", ["repeat", "random"])
def test_needle_haystacks(haystack: str) -> None:
    text = Needle(length=128, haystack=haystack).row(0, "train", 0).inputs
    words = text[text >= 12 + 16]
    assert (len(set(words[:40])) <= 8) == (haystack == "repeat")


@pytest.mark.parametrize("make", VECTORS.values(), ids=VECTORS)
def test_least_squares_is_exact_without_noise(make: Any) -> None:
    """As soon as there are as many equations as weights, nothing is left of the error."""
    task = make()
    found = task.examples(0, "valid", 0, 50)
    width = 3 if isinstance(task, Regression) else 6
    for name, predictions in task.oracles(found.inputs).items():
        errors = squared_error(predictions, found)["by_group"]
        late = [value for group, value in errors.items() if int(group) > width + 1]
        assert late and max(late) < 1e-9, name
        assert errors[min(errors, key=int)] > 0.2


def test_ridge_is_the_best_under_noise() -> None:
    """No other penalty does better, with Gaussian weights; least squares does worst where equations are few."""
    from evals.synthetic.representation import prefix_ridge

    task = Regression(d=4, n_points=12, noise=0.5)
    found = task.examples(0, "valid", 0, 2000)
    x, y = found.inputs[:, 0::2], found.inputs[:, 1::2, :1]
    right = task.noise**2 * task.d
    errors = {p: float(np.square(prefix_ridge(x, y, p) - y).mean()) for p in (0.0, 0.2 * right, right, 5 * right)}
    assert min(errors, key=lambda penalty: errors[penalty]) == right
    oracle = squared_error(task.oracles(found.inputs)["ridge"], found)["error"]
    assert oracle == pytest.approx(errors[right] / float(np.square(y).mean()), rel=1e-5)


def test_representation_needs_the_right_features() -> None:
    task = Regression(d=3, n_points=24, d_representation=5)
    found = task.examples(0, "valid", 0, 100)
    scores = {name: squared_error(p, found)["by_group"]["23"] for name, p in task.oracles(found.inputs).items()}
    assert scores["least squares"] < 1e-9 < 1e-3 < scores["least squares on raw x"]


def test_vector_answers_have_unit_size() -> None:
    for task in (Regression(d=6), TASKS.get("ar")()):
        found = task.examples(0, "train", 0, 200)
        assert float(np.square(found.answers[found.asked]).mean()) == pytest.approx(1.0, rel=0.1)
        zero = squared_error(np.zeros_like(found.answers), found)
        assert zero["error"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mqar", {"length": 20, "n_pairs": [8]}),
        ("mqar", {"length": 64, "n_pairs": [8], "vocab_size": 9}),
        ("mqar", {"n_pairs": [0, 2]}),
        ("induction", {"segment": [4, 400]}),
        ("induction", {"segment": [9, 4]}),
        ("selective_copying", {"n_data": 200}),
        ("rewrite", {"n_keys": 9, "n_writes": 8}),
        ("rewrite", {"length": 30}),
        ("needle", {"n_facts": 17}),
        ("needle", {"length": 9}),
        ("ar", {"q": 5, "length": 5}),
        ("remember", {"n_pairs": 6}),
        ("remember", {"segment": 3}),
        ("remember", {"n_pairs": 5, "n_symbols": 2}),
    ],
)
def test_what_does_not_fit_is_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=name):
        TASKS.get(name).model_validate(settings)


def model(**changes: Any) -> ModelConfig:
    block = {"mixer": {"type": "attention", "n_heads": 2}, "channel": None}
    tree = {"vocab_size": 2, "d_model": 16, "layers": [{"pattern": [block], "repeat": 1}], "init": {"std": None}}
    return ModelConfig.model_validate(tree | changes)


QUICK = TrainSettings(steps=6, batch=8, eval_every=3, eval_examples=16, lr=1e-2)


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_trains(make: Any) -> None:
    """Each task, with a longer one to try; the same again gives the same."""
    task: TaskConfig = make()
    settings = QUICK.replace(lengths=[task.n_positions + 6])
    fitted = [fit(task, model_for(model(), task, settings), settings, 0) for _ in range(2)]
    assert fitted[0].history == fitted[1].history and len(fitted[0].history) == 2
    assert list(fitted[0].by_length) == [task.n_positions + 6]
    other = fit(task, model_for(model(), task, settings), settings, 1)
    assert other.history != fitted[0].history


def test_learns() -> None:
    """One layer finds the mean of a bag: the last of the data tokens is copied, and the error of one weight falls."""
    task = SelectiveCopying(length=6, n_data=1, vocab_size=4)
    settings = TrainSettings(steps=150, batch=32, eval_every=150, eval_examples=64, lr=1e-2)
    fitted = fit(task, model_for(model(), task, settings), settings, 0)
    assert fitted.scores["accuracy"] > 0.9


def test_stops_when_it_is_good_enough() -> None:
    task = ALL["mqar"]()
    fitted = fit(task, model_for(model(), task, QUICK), QUICK.replace(stop_at=0.0), 0)
    assert fitted.steps == 3


def test_all_hidden_states_are_trained() -> None:
    """What a wrapper puts out beside the last hidden states counts with its weight."""
    from evals.synthetic.train import _loss, build

    task = ALL["mqar"]()
    plain = build(model_for(model(), task, QUICK), task, 0, torch.device("cpu"))
    examples = task.examples(0, "train", 0, 4)
    before = _loss(plain, examples, torch.device("cpu")).detach()

    class Twice(torch.nn.Module):
        def forward(self, tokens: torch.Tensor, seq: Any) -> Any:
            out = plain(tokens, seq)
            out.weight, out.extra = 0.5, ((out.hidden, 2.0),)
            return out

        def cross_entropy(self, hidden: torch.Tensor, labels: torch.Tensor) -> Any:
            return plain.cross_entropy(hidden, labels)

    assert float(_loss(Twice(), examples, torch.device("cpu")).detach()) == pytest.approx(2.5 * float(before), rel=1e-6)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["mqar", "task.length=24", "task.n_pairs=[2,4]", "task.vocab_size=17", "model.d_model=32", "seeds=[0,1]"]
    argv += ["mixer=[attention, {type: attention, n_heads: 2, window: 4}]", "lrs=[0.01, 0.001]"]
    argv += ["train.steps=2", "train.batch=4", "train.eval_examples=8", "train.lengths=[32]"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    record = json.loads(out.splitlines()[-1])
    names = [row["name"] for row in record["rows"]]
    assert names[0] == "attention(n_heads=1)" and "window=4" in names[1]
    for row in record["rows"]:
        assert row["lr"] in (0.01, 0.001) and len(row["accuracy"]["each"]) == 2
        assert set(row["by_group"]) <= {"2", "4"} and row["by_length"]["32"]["std"] is not None
    assert record["rows"][0]["state_bytes"] > record["rows"][1]["state_bytes"] > 0
    assert record["oracle"] == 1.0 and record["conditions"]["num_threads"] == 1
    assert "±" in out and "by rule 1.000" in out and "at 32" in out


def test_command_for_vectors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["regression", "preset=small", "train.steps=2", "train.batch=4", "train.eval_examples=8"]) == 0
    out = capsys.readouterr().out
    assert "ridge" in out and "error" in json.loads(out.splitlines()[-1])["rows"][0]


@pytest.mark.parametrize("name", SMALL)
def test_presets_fit(name: str) -> None:
    config = run.load([name, "--preset", "small"])
    assert config.task.examples(0, "train", 0, 2).asked.any()


def test_a_mixer_with_settings_stays() -> None:
    config = run.load(["mqar", "preset=small", "mixer=retention"])
    assert [block.mixer.type for block in config.with_mixer(config.mixer[0]).blocks()] == ["attention", "retention"]
    assert config.train.optimizer == "muon"


def test_help_names_every_task() -> None:
    assert all(name in usage() for name in TASKS.names())
    assert main(["--help"]) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give a task first"),
        (["mqra"], "did you mean 'mqar'"),
        (["mqar", "preset=big"], "preset is 'big'"),
        (["mqar", "task.lenght=3"], "length"),
        (["mqar", "mixer=atention"], "attention"),
        (["mqar", "windows"], "no key=value"),
        (["mqar", "model.d_model=33"], "even number"),
        (["mqar", "train.adam_lr=0.1"], "no effect with train.optimizer=adamw"),
    ],
)
def test_mistakes(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run.load(argv)
