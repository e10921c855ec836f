"""Reading a config: composition, overrides, interpolation, YAML details, and writing it back."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.config.base import Config
from llm.config.load import apply_override, config_hash, dump_config, load_config, merge, parse_key, resolve
from llm.config.yaml_io import dump_yaml, read_yaml
from llm.core.errors import UserError
from tests.unit.config.tree import Attention, Conv, Root

RUN = "model:\n  layers:\n  - mixer: {type: attention, n_heads: 4}\n    repeat: 3\n"


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return str(path)


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def test_file_and_overrides(run_file: str) -> None:
    config = load_config(
        Root,
        [run_file, "model.layers.0.mixer.n_heads=8", "model.layers[0].repeat=2", "optim.lr=3e-4", "optim.tokens=10M"],
    )
    assert config.model.layers[0].mixer == Attention(n_heads=8)
    assert config.model.layers[0].repeat == 2
    assert config.optim.lr == 3e-4
    assert config.optim.tokens == 10_000_000


def test_overrides_alone() -> None:
    config = load_config(Root, ["model.layers=[{mixer: conv}]", "optim.note=a=b"])
    assert config.model.layers[0].mixer == Conv()
    assert config.optim.note == "a=b"


def test_override_of_a_bare_name_keeps_the_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "model: {layers: [{mixer: conv}]}")
    assert load_config(Root, [path, "model.layers.0.mixer.width=9"]).model.layers[0].mixer == Conv(width=9)


def test_override_of_a_key_with_a_dot(run_file: str) -> None:
    config = load_config(Root, [run_file, 'model.tied["head.weight"]=embed.weight'])
    assert config.model.tied == {"head.weight": "embed.weight"}


def test_override_replaces_a_mapping_whole(run_file: str) -> None:
    config = load_config(Root, [run_file, "model.layers.0.mixer={type: conv, width: 2}"])
    assert config.model.layers[0].mixer == Conv(width=2)


def test_compose_order_and_relative_paths(tmp_path: Path) -> None:
    write(
        tmp_path / "model" / "base.yaml",
        "model: {layers: [{mixer: conv}]}\noptim: {lr: 1, weight_decay: 1, note: base}",
    )
    write(tmp_path / "model" / "small.yaml", "compose: [base.yaml]\noptim: {weight_decay: 2}")
    write(tmp_path / "optim" / "adam.yaml", "optim: {note: adam}")
    top = write(tmp_path / "run" / "top.yaml", "compose: [../model/small.yaml, ../optim/adam.yaml]\noptim: {stop: 4}\n")
    optim = load_config(Root, [top, "optim.stop=5"]).optim
    assert (optim.lr, optim.weight_decay, optim.note, optim.stop) == (1, 2, "adam", 5)


def test_compose_of_one_file_twice_is_no_cycle(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", RUN)
    write(tmp_path / "a.yaml", "compose: base.yaml")
    write(tmp_path / "b.yaml", "compose: base.yaml")
    load_config(Root, [write(tmp_path / "c.yaml", "compose: [a.yaml, b.yaml]")])


def test_compose_cycle(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "compose: [b.yaml]")
    write(tmp_path / "b.yaml", "compose: [c.yaml]")
    write(tmp_path / "c.yaml", "compose: [b.yaml]")
    with pytest.raises(UserError, match=r"in a circle: b\.yaml -> c\.yaml -> b\.yaml"):
        load_config(Root, [str(tmp_path / "a.yaml")])


def test_compose_of_a_missing_file_names_both(tmp_path: Path) -> None:
    write(tmp_path / "model" / "llama.yaml", RUN)
    top = write(tmp_path / "run" / "top.yaml", "compose: [../model/lama.yaml]")
    with pytest.raises(UserError, match=r"lama\.yaml \(composed by top\.yaml\); did you mean .*llama\.yaml"):
        load_config(Root, [top])


def test_merge_replaces_a_part_of_another_type() -> None:
    below = {"mixer": {"type": "attention", "n_heads": 4}, "x": {"a": 1}}
    assert merge(below, {"mixer": {"type": "conv"}})["mixer"] == {"type": "conv"}
    assert merge(below, {"mixer": {"n_heads": 8}})["mixer"] == {"type": "attention", "n_heads": 8}
    assert merge(below, {"x": {"b": 2}})["x"] == {"a": 1, "b": 2}
    assert below == {"mixer": {"type": "attention", "n_heads": 4}, "x": {"a": 1}}


def test_interpolation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_NOTE", "from outside")
    path = write(
        tmp_path / "a.yaml", RUN + "optim: {lr: 0.25, weight_decay: '${optim.lr}', note: '${oc.env:MY_NOTE} \\${x}'}"
    )
    optim = load_config(Root, [path, "optim.lr=0.5"]).optim
    assert optim.weight_decay == 0.5
    assert optim.note == "from outside ${x}"


@pytest.mark.parametrize(
    ("key", "steps"),
    [
        ("a", ["a"]),
        ("a.b.0.c", ["a", "b", "0", "c"]),
        ("a[0][1].b", ["a", "0", "1", "b"]),
        ('a["x.y"].b', ["a", "x.y", "b"]),
        ("a['x.y']", ["a", "x.y"]),
    ],
)
def test_parse_key(key: str, steps: list[str]) -> None:
    assert parse_key(key) == steps


@pytest.mark.parametrize("key", ["", ".", "a.", ".a", "a..b", "a[", "a[]", "a.[0]", 'a["x]'])
def test_parse_key_refuses(key: str) -> None:
    with pytest.raises(UserError, match="is no key of a config"):
        parse_key(key)


def test_override_does_not_change_shared_parts() -> None:
    shared = {"a": 1}
    tree = {"x": shared, "y": shared}
    apply_override(tree, "x.a=2")
    assert tree == {"x": {"a": 2}, "y": {"a": 1}}


def test_yaml_details() -> None:
    text = "{a: 1e-3, b: yes, c: no, d: 2024-01-01, e: 010, f: 1_000, g: true, h: null, i: 1:30, j: .5, k: '1e-3'}"
    assert read_yaml(text) == {
        "a": 0.001,
        "b": "yes",
        "c": "no",
        "d": "2024-01-01",
        "e": "010",
        "f": 1000,
        "g": True,
        "h": None,
        "i": "1:30",
        "j": 0.5,
        "k": "1e-3",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"line 3, column 1: not valid YAML: the key 'a' is given twice"),
        ("a: [1\n", r"line 2, column 1: not valid YAML"),
        ("- 1\n", "this file holds a list"),
        ("hello\n", "this file holds a single value, 'hello'"),
        ("a: !!python/object:os.system {}\n", "not valid YAML: could not determine a constructor"),
        ("a: \x00\n", "not valid YAML"),
        ("compose: {a: b}\n", "compose must be a list of file names"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config(Root, [write(tmp_path / "a.yaml", text)])
    assert str(tmp_path / "a.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(UserError, match=r"a\.yaml: not UTF-8 text \(byte 3\)"):
        load_config(Root, [str(tmp_path / "a.yaml")])


def test_a_file_that_contains_itself(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains itself"):
        load_config(Root, [write(tmp_path / "a.yaml", "model: &m\n  layers: [*m]\n")])


def test_a_folder_instead_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder; give one of its YAML files"):
        load_config(Root, [str(tmp_path)])


def test_an_empty_file_is_an_empty_mapping(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model: required, but not given"):
        load_config(Root, [write(tmp_path / "a.yaml", "")])


def same(config: Config, path: Path) -> bool:
    dump_config(config, path)
    again = load_config(type(config), [str(path)])
    return again == config and config_hash(again) == config_hash(config)


def test_dump_and_load_again(run_file: str, tmp_path: Path) -> None:
    config = load_config(Root, [run_file, "model.layers.0.mixer={type: conv, inner: {type: conv, inner: attention}}"])
    assert same(config, tmp_path / "out.yaml")
    assert (tmp_path / "out.yaml").read_text().startswith("schema_version: 1\n")
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


@given(
    note=st.text("\\${}a'\" ", max_size=8)
    | st.text(st.characters(blacklist_categories=("Cs",)), max_size=20)
    | st.sampled_from(
        ["1e5", "yes", "null", "${a}", "\\${a}", "\\\\${a}", "$${a}", "${", "~", "", " a ", "0x1", "<<", "12"]
    ),
    lr=st.floats(allow_nan=False, allow_infinity=False),
)
def test_any_value_survives_dump_and_load(tmp_path_factory: pytest.TempPathFactory, note: str, lr: float) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    config = Root.model_validate({"model": {"layers": []}, "optim": {"note": note, "lr": lr}})
    if "???" != note:
        assert same(config, path), path.read_text()


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=3)))
def test_yaml_text_round_trip(value: object) -> None:
    assert read_yaml(dump_yaml({"a": value})) == {"a": value}


def test_hash_follows_the_content(run_file: str) -> None:
    config = load_config(Root, [run_file])
    assert config_hash(config) == config_hash(load_config(Root, [run_file]))
    assert config_hash(config) != config_hash(load_config(Root, [run_file, "optim.lr=2e-3"]))
    assert len(config_hash(config)) == 16


def test_resolve_leaves_a_tree_without_interpolations_alone() -> None:
    tree = {"a": [1, {"b": "c"}]}
    assert resolve(tree) == tree
