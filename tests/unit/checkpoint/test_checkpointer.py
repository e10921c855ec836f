"""Saving, loading, asynchrony and retention in one process."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

import llm.checkpoint.checkpointer as module
from llm.checkpoint import (
    Checkpointer,
    TrainState,
    load_config_yaml,
    load_meta,
    load_model_tensors,
    resolve_checkpoint,
)
from llm.checkpoint.sharded import SafetensorsReader
from llm.core.errors import UserError
from tests.unit.checkpoint.helpers import assert_same, make_state, save_steps, steps_of


@pytest.mark.parametrize("asynchronous", [False, True])
def test_round_trip(tmp_path: Path, asynchronous: bool) -> None:
    checkpointer = Checkpointer(tmp_path / "checkpoints", asynchronous=asynchronous, config_yaml="name: x\n")
    checkpointer.save(make_state(5), step=5, tokens=500, kind="regular")
    checkpointer.wait()
    (info,) = checkpointer.poll()
    assert (info.step, info.tokens, info.kind, info.complete) == (5, 500, "regular", True)
    assert info.path == tmp_path / "checkpoints" / "step-000000005"
    assert checkpointer.poll() == []
    other = make_state(6)
    assert Checkpointer(tmp_path / "checkpoints").load(info, other) == make_state(5).meta
    assert_same(other, make_state(5))
    assert load_meta(info.path) == make_state(5).meta
    assert load_config_yaml(info.path) == "name: x\n"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000000005\n"


def test_load_fills_live_parameters(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    saved = {name: p.detach().clone() for name, p in layer.named_parameters()}
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(TrainState(dict(layer.named_parameters())), step=1, tokens=1, kind="regular", wait=True)
    with torch.no_grad():
        layer.weight.zero_()
    checkpointer.load(checkpointer.poll()[0], TrainState(dict(layer.named_parameters())))
    assert torch.equal(layer.weight, saved["weight"]) and layer.weight.requires_grad


def test_training_may_go_on_while_files_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    write = module.write_tensors
    monkeypatch.setattr(module, "write_tensors", lambda *a: gate.wait(10) and write(*a))
    checkpointer = Checkpointer(tmp_path)
    state = make_state(1)
    checkpointer.save(state, step=1, tokens=1, kind="regular")
    assert checkpointer.poll() == []
    for tensor in [*state.model.values(), *(t for slots in state.optim.values() for t in slots.values())]:
        tensor.zero_()
    for tensor in state.rng.values():
        tensor.zero_()
    state.meta["loader"]["index"] = -1
    gate.set()
    checkpointer.wait()
    other = make_state(2)
    assert checkpointer.load(checkpointer.poll()[0], other) == make_state(1).meta
    assert_same(other, make_state(1))


def test_second_save_waits_for_the_first(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    for step in (1, 2, 3):
        checkpointer.save(make_state(step), step=step, tokens=step, kind="keep")
    checkpointer.wait()
    assert [info.step for info in checkpointer.poll()] == [1, 2, 3]
    for info in checkpointer.list():
        other = make_state(9)
        checkpointer.load(info, other)
        assert_same(other, make_state(info.step))


def test_retention_keeps_the_newest_and_the_marked(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2, asynchronous=False)
    seen = []
    for step, kind in enumerate(["regular", "keep", "regular", "preempt", "final", "regular"], start=1):
        checkpointer.save(make_state(step), step=step, tokens=step, kind=kind)  # type: ignore[arg-type]
        seen.append(steps_of(checkpointer))
    assert seen == [[1], [1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4, 5], [2, 4, 5, 6]]
    assert not [path for path in tmp_path.iterdir() if ".tmp-" in path.name or ".old-" in path.name]


def test_damaged_ones_do_not_count_for_retention(tmp_path: Path) -> None:
    checkpointer = save_steps(tmp_path, 1, 2)
    (tmp_path / "step-000000002" / "meta.json").unlink()
    checkpointer.save(make_state(3), step=3, tokens=3, kind="regular")
    assert steps_of(checkpointer) == [1, 3]
    file = tmp_path / "step-000000003" / "model" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    assert checkpointer.latest_good().step == 1  # type: ignore[union-attr]
    checkpointer.save(make_state(4), step=4, tokens=4, kind="regular")
    assert (tmp_path / "step-000000001").exists()


def test_fewer_than_two_kept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="keep is 1; at least 2"):
        Checkpointer(tmp_path, keep=1)


def test_same_step_again_replaces(tmp_path: Path) -> None:
    checkpointer = save_steps(tmp_path, 3)
    checkpointer.save(make_state(8), step=3, tokens=1, kind="final")
    other = make_state(1)
    checkpointer.load(tmp_path / "step-000000003", other)
    assert_same(other, make_state(8))
    assert [(i.step, i.kind) for i in checkpointer.list()] == [(3, "final")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000000003"]


def test_later_steps_of_an_earlier_attempt_are_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_steps(tmp_path, 10, 20, 30)
    checkpointer = Checkpointer(tmp_path, asynchronous=False)
    checkpointer.save(make_state(1), step=21, tokens=1, kind="regular")
    assert steps_of(checkpointer) == [20, 21]
    assert checkpointer.latest_good().step == 21  # type: ignore[union-attr]
    (aside,) = [path for path in tmp_path.iterdir() if path.name.startswith("step-000000030.abandoned-")]
    assert aside.name in caplog.text
    checkpointer.save(make_state(2), step=22, tokens=1, kind="regular")
    assert aside.exists() and Checkpointer(tmp_path).latest_good().step == 22  # type: ignore[union-attr]


def test_parts(tmp_path: Path) -> None:
    checkpointer = save_steps(tmp_path, 1)
    other = make_state(2)
    checkpointer.load(tmp_path / "step-000000001", other, parts=frozenset({"model"}))
    assert torch.equal(other.model["embed.weight"], make_state(1).model["embed.weight"])
    expected = TrainState(make_state(1).model, make_state(2).optim, {}, make_state(2).rng)
    assert_same(other, expected)


def test_mismatch_is_named(tmp_path: Path) -> None:
    checkpointer = save_steps(tmp_path, 1)
    path = tmp_path / "step-000000001"
    other = make_state(2)
    other.model["layers.1.w"] = torch.zeros(2)
    with pytest.raises(UserError, match=r"it lacks 1 tensors \(model/layers\.1\.w\)"):
        checkpointer.load(path, other)
    assert torch.equal(other.model["embed.weight"], make_state(2).model["embed.weight"]), "filled before the check"
    checkpointer.load(path, other, strict=False)
    assert torch.equal(other.model["embed.weight"], make_state(1).model["embed.weight"])
    other = make_state(2)
    del other.optim["head.scale"]
    with pytest.raises(UserError, match=r"no place for its 2 tensors \(optim/head\.scale/exp_avg"):
        checkpointer.load(path, other)
    other = make_state(2)
    other.model["embed.weight"] = torch.zeros(9, 4)
    with pytest.raises(UserError, match=r"model/embed\.weight has shape \[7, 4\] in it and \[9, 4\] here"):
        checkpointer.load(path, other, strict=False)


def test_conversion_between_float_types_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpointer = save_steps(tmp_path, 1)
    other = make_state(2)
    other.model["embed.weight"] = other.model["embed.weight"].bfloat16()
    with caplog.at_level(logging.WARNING):
        checkpointer.load(tmp_path / "step-000000001", other)
    assert "model/embed.weight is converted from torch.float32 to torch.bfloat16" in caplog.text
    other.model["layers.0.mask"] = other.model["layers.0.mask"].int()
    with pytest.raises(UserError, match=r"layers\.0\.mask is torch\.bool in it and torch\.int32 here"):
        checkpointer.load(tmp_path / "step-000000001", other)


def test_model_tensors_without_a_run(tmp_path: Path) -> None:
    save_steps(tmp_path / "checkpoints", 1, 2)
    for given in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "step-000000002"):
        tensors = load_model_tensors(resolve_checkpoint(given))
        assert tensors.keys() == make_state(2).model.keys()
        for name, tensor in make_state(2).model.items():
            assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name


def test_resolve_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "quickstart").mkdir()
    with pytest.raises(UserError, match=r"does not exist; did you mean .*quickstart\?"):
        resolve_checkpoint(tmp_path / "quickstrat")
    with pytest.raises(UserError, match="no checkpoint in .*quickstart; give a run folder"):
        resolve_checkpoint(tmp_path / "quickstart")


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path / "new")
    assert checkpointer.list() == [] and checkpointer.latest_good() is None


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_stock_dcp_reads_our_files(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    want = make_state(1).model
    given = {f"model/{name}": torch.zeros_like(tensor) for name, tensor in want.items()}
    dcp.load(given, storage_reader=SafetensorsReader(tmp_path / "step-000000001"), no_dist=True)
    assert all(torch.equal(given[f"model/{name}"], tensor) for name, tensor in want.items())


def test_unwritable_root_is_a_readable_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="checkpoint folder .*file"):
        Checkpointer(tmp_path / "file" / "checkpoints")
