"""Schema versions: an old tree is brought up to date, a newer one is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm.config import migrations
from llm.config.load import dump_config, load_config
from llm.core.errors import UserError
from tests.unit.config.tree import Root

OLD = "schema_version: 1\nmodel: {layers: []}\noptim: {learning_rate: 0.5}\n"


def rename_lr(tree: dict[str, Any]) -> dict[str, Any]:
    optim = dict(tree.get("optim", {}))
    if "learning_rate" in optim:
        optim["lr"] = optim.pop("learning_rate")
    return {**tree, "optim": optim}


@pytest.fixture
def second_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(migrations.MIGRATIONS, "Root", [rename_lr])


@pytest.mark.usefixtures("second_version")
def test_an_old_file_is_brought_up_to_date(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(OLD)
    config = load_config(Root, [str(tmp_path / "old.yaml")])
    assert config.optim.lr == 0.5
    assert config.schema_version == 2
    dump_config(config, tmp_path / "new.yaml")
    assert (tmp_path / "new.yaml").read_text().startswith("schema_version: 2\n")
    assert load_config(Root, [str(tmp_path / "new.yaml")]) == config


@pytest.mark.usefixtures("second_version")
def test_each_composed_file_has_its_own_version(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(OLD)
    (tmp_path / "top.yaml").write_text("compose: [old.yaml]\noptim: {weight_decay: 0.25}\n")
    optim = load_config(Root, [str(tmp_path / "top.yaml")]).optim
    assert (optim.lr, optim.weight_decay) == (0.5, 0.25)


@pytest.mark.usefixtures("second_version")
def test_a_file_without_a_version_is_current(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(OLD.replace("schema_version: 1\n", ""))
    with pytest.raises(UserError, match="optim.learning_rate: unknown key"):
        load_config(Root, [str(tmp_path / "a.yaml")])


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("2", r"a\.yaml: schema_version 2 is newer than this program knows \(1\); install a newer manyformer"),
        ("0", "schema_version must be a whole number from 1 to 1; given 0"),
        ("one", "schema_version must be a whole number from 1 to 1; given 'one'"),
        ("true", "schema_version must be a whole number from 1 to 1; given True"),
    ],
)
def test_bad_versions(tmp_path: Path, version: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(OLD.replace("schema_version: 1", f"schema_version: {version}"))
    with pytest.raises(UserError, match=message):
        load_config(Root, [str(tmp_path / "a.yaml")])
