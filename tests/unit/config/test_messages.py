"""Every mistake in a config is one readable message: the full key, what was given, what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm.config.load import load_config
from llm.core.errors import UserError
from tests.unit.config.tree import Root

CASES = {
    "model.layers.0.mixer.n_head=4": (
        "config: model.layers[0].mixer.n_head: unknown key; given 4; did you mean 'model.layers[0].mixer.n_heads'? "
        "(allowed: backend, n_heads, type)"
    ),
    "model.layers.0.mixer.n_heads=abc": "config: model.layers[0].mixer.n_heads: must be a whole number; given 'abc'",
    "model.layers.0.mixer.n_heads=2.5": "config: model.layers[0].mixer.n_heads: must be a whole number; given 2.5",
    "model.layers.0.mixer.n_heads=-1": "config: model.layers[0].mixer.n_heads: must be greater than 0; given -1",
    "model.layers.0.mixer.n_heads=7": "config: model.layers[0].mixer: n_heads 7 does not divide d_model 64",
    "model.layers.0.mixer.backend=flexx": (
        "config: model.layers[0].mixer.backend: must be 'sdpa' or 'flex'; given 'flexx'; did you mean 'flex'?"
    ),
    "model.layers.0.mixer=attenton": (
        "config: model.layers[0].mixer: unknown mixer 'attenton'; did you mean 'attention'? (allowed: attention, conv)"
    ),
    "model.layers.0.mixer=4": (
        "config: model.layers[0].mixer: expected a mixer: its name, or a mapping with 'type' "
        "(allowed: attention, conv); given 4"
    ),
    "model.layers.0.mixer={type: conv, inner: {type: conv, inner: {type: attention, n_heads: x}}}": (
        "config: model.layers[0].mixer.inner.inner.n_heads: must be a whole number; given 'x'"
    ),
    "model.layers.0={}": (
        "config: model.layers[0].mixer: required, but not given; give it as model.layers[0].mixer=VALUE or in the "
        "YAML file"
    ),
    "optim.learning_rate=3": (
        "config: optim.learning_rate: unknown key; given 3; did you mean 'optim.lr'? "
        "(allowed: betas, fused, lr, note, steps, stop, tokens, weight_decay)"
    ),
    "optim.steps=some": "config: optim.steps: must be a whole number or 'auto'; given 'some'",
    "optim.tokens=1.5": "config: optim.tokens: must be a whole number; given 1.5",
    "optim.tokens=10X": "config: optim.tokens: expected a whole number such as 4096 or '10M'; given '10X'",
    "optim.fused=maybe": "config: optim.fused: must be true or false; given 'maybe'",
    "optim.note=5": "config: optim.note: must be a text; given 5",
    "optim.betas=[0.9, x]": "config: optim.betas[1]: must be a number; given 'x'",
    "model.layers=3": "config: model.layers: must be a list; given 3",
    'model.tied["head.weight"]=4': 'config: model.tied["head.weight"]: must be a text; given 4',
    "model=null": "config: model: must be a mapping; given null",
    "optim.lr=???": "config: optim.lr: a value is required; give it as optim.lr=VALUE",
    "optim.lr=${nothing}": "config: optim.lr: Interpolation key 'nothing' not found; write \\${ for a literal ${",
    "optim.lr.a=3": "config: optim.lr: must be a number; given {'a': 3}",
    "model.layers.1.repeat=2": (
        "override 'model.layers.1.repeat=2': model.layers is a list, '1' is no index of it (allowed: 0 to 0)"
    ),
    "model.layers.0.repeat.x=2": (
        "override 'model.layers.0.repeat.x=2': model.layers[0].repeat is 3, which has no keys; "
        "give model.layers[0].repeat=VALUE instead"
    ),
    "schema_version=2": (
        "schema_version belongs in a YAML file; it cannot be given as an override (given 'schema_version=2')"
    ),
    "--optim.lr=3": ("unknown option '--optim.lr=3'; config values are given as key=value, such as optim.lr=VALUE"),
    "optim.lr": "unexpected argument 'optim.lr'; allowed: one YAML file first, then overrides written key=value",
    "optim.lr={a": "override 'optim.lr={a': not valid YAML: expected ',' or '}', but got '<stream end>'",
}


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text("model:\n  layers:\n  - mixer: {type: attention, n_heads: 4}\n    repeat: 3\n")
    return str(path)


@pytest.mark.parametrize("argument", CASES)
def test_message(run_file: str, argument: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(Root, [run_file, argument])
    assert str(caught.value) == CASES[argument]


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("lr=3", "did you mean 'optim.lr'?"),
        ("optim.n_heads=3", "did you mean 'model.layers.N.mixer.n_heads' or"),
        ("model.layers.0.mixer.repeat=3", "did you mean 'model.layers.N.repeat'?"),
        ("optim.learnin_rate=3", "did you mean 'optim.lr'?"),
        ("optim.layer=3", "did you mean 'model.layers'?"),
        ("optim.mixer=3", "did you mean 'model.layers.N.mixer'?"),
        ("learning_rate=3", "did you mean 'optim.lr'?"),
        ("optm.lr=3", "did you mean 'optim'?"),
        ("optim.wd=3", "did you mean 'optim.weight_decay'?"),
        ("optim.zzzzzz=3", "given 3 (allowed:"),
    ],
)
def test_nearest_full_name(run_file: str, argument: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(Root, [run_file, argument])
    assert hint in str(caught.value)


def test_several_problems_one_line_each(run_file: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(Root, [run_file, "optim={lr: a, steps: [], fused: 5}", "model.layers.0.repeat=b"])
    assert str(caught.value).splitlines() == [
        "config: 4 problems",
        "  model.layers[0].repeat: must be a whole number; given 'b'",
        "  optim.lr: must be a number; given 'a'",
        "  optim.steps: must be a whole number or 'auto'; given []",
        "  optim.fused: must be true or false; given 5",
    ]


def test_many_problems_are_cut(run_file: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(Root, [run_file, f"model.layers=[{', '.join(['{mixer: 1}'] * 20)}]"])
    lines = str(caught.value).splitlines()
    assert (len(lines), lines[0], lines[-1]) == (10, "config: 20 problems", "  ... and 12 more")


def test_a_missing_file_names_its_neighbours(run_file: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no such config file: .*runn\.yaml; did you mean .*run\.yaml\? \(found there:"
    ):
        load_config(Root, [str(tmp_path / "runn.yaml")])
    with pytest.raises(UserError, match="the folder .*nowhere does not exist"):
        load_config(Root, [str(tmp_path / "nowhere" / "run.yaml")])
