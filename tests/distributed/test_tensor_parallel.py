"""Processes that share a model say what one process says; what cannot be split refuses."""

from __future__ import annotations

import atexit
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from llm.blocks.base import CHANNELS, MIXERS
from llm.checkpoint.hf.build import build_model
from llm.core.errors import UserError
from llm.core.init import clean_name
from llm.core.seq import SeqInfo
from llm.generate.drafters import LookupDrafter
from llm.generate.engine import Engine
from llm.generate.sampling import Sampling
from llm.models.config import ModelConfig
from llm.parallel.plan import plan_of
from llm.parallel.tensor import Ranks, Shares, join_ranks, same_for_all, share_config, sum_over_ranks
from tests.contracts.checks.harness import VOCAB, fill, tiny_model
from tests.distributed.harness import run_ranks
from tests.unit.generate.runs import write_run

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11, 4, 5], [3]]


def models() -> dict[str, ModelConfig]:
    """A tiny model for every variant of a mixer or channel that is split, and some with more around them."""
    attention, swiglu = MIXERS.entry("attention").tiny(), CHANNELS.entry("swiglu").tiny()
    found = {}
    for registry in (MIXERS, CHANNELS):
        for entry in registry.entries():
            for label, make in entry.variants().items():
                part = make()
                plan = plan_of(part)
                if plan.tp is None or any((getattr(part, name) or 2) % 2 for name in plan.divides):
                    continue
                found[label] = tiny_model(part, swiglu) if registry is MIXERS else tiny_model(attention, part)
    plain = tiny_model(attention, swiglu)
    for wrapper in ({"type": "loop", "n_loops": 2}, {"type": "rmt", "segment": 8, "n_memory": 2}):
        found[wrapper["type"]] = ModelConfig.model_validate(plain.to_dict() | {"wrappers": [wrapper]})
    found["untied"] = ModelConfig.model_validate(plain.to_dict() | {"head": {"tied": False}})
    return found


def compare(rank: int, size: int) -> dict[str, tuple[float, bool, bool, float]]:
    """(largest difference of logits, same tokens drawn, same with drafts, this rank's share of the decode state)."""
    torch.set_num_threads(1)
    found = {}
    for label, config in models().items():
        model = fill(config.build("cpu")).eval()
        tensors = {clean_name(name): tensor.detach() for name, tensor in model.state_dict().items()}
        share = build_model(share_config(config, size), Shares(config, tensors, Ranks(rank, size)))
        sum_over_ranks(share, config, Ranks(rank, size))
        tokens, seq = torch.arange(20)[None] % VOCAB, SeqInfo.contiguous(1, 20)
        with torch.no_grad():
            logits = [each.head(each(tokens, seq).hidden) for each in (model, share)]  # type: ignore[operator]
        sampling = Sampling(temperature=0.7, seed=1, max_new_tokens=12)
        plain, shared = (Engine(each).generate(PROMPTS, sampling) for each in (model, share))
        drafted = Engine(share, drafter=LookupDrafter(n_branches=2)).generate(PROMPTS, sampling)
        bytes_held = []
        for each in (model, share):
            state = each.new_state(2, 30, dtype=torch.float32, device="cpu")
            with torch.no_grad():
                each(tokens.expand(2, -1), SeqInfo.contiguous(2, 20), state=state)
            bytes_held.append(state.held_bytes())
        difference = float((logits[0] - logits[1]).abs().max())
        found[label] = (difference, plain == shared, plain == drafted, bytes_held[1] / bytes_held[0])
    return found


def test_two_processes_say_what_one_says() -> None:
    first, second = run_ranks(compare, 2, 2, timeout=300)
    assert len(first) > 20
    for label, (difference, same, drafted, share) in first.items():
        assert difference < 2e-5, label
        assert same and drafted, label
        assert second[label][:3] == (difference, same, drafted)
        if label == "attention":
            assert share < 0.6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mixer": {"type": "retention", "n_heads": 2}},
            "layers.0.mixer .retention. is not split over processes; .* A head's decay",
        ),
        ({"channel": {"type": "nested_mlp"}}, "layers.0.channel .nested_mlp. is not split"),
        ({"mixer": {"type": "attention", "n_heads": 4, "n_kv_heads": 1}}, "n_kv_heads 1 cannot be divided among 2"),
        ({"position": {"type": "alibi"}}, "positions alibi, which go by a head's number"),
    ],
)
def test_what_is_not_split(changes: dict[str, Any], message: str) -> None:
    block = {"mixer": {"type": "attention", "n_heads": 2}, "channel": {"type": "swiglu"}} | changes
    config = ModelConfig.model_validate({"vocab_size": 8, "d_model": 16, "layers": [{"pattern": [block]}]})
    with pytest.raises(UserError, match=message):
        share_config(config, 2)


def _told(rank: int) -> Any:
    return same_for_all(Ranks(rank, 2), {"prompts": ["ä", "b"]} if rank == 0 else None, torch.device("cpu"))


def test_all_ranks_know_what_the_first_was_told() -> None:
    assert run_ranks(_told, 2) == [{"prompts": ["ä", "b"]}] * 2


def _join_and_end(rank: int, store: str) -> tuple[Ranks | None, bool, bool]:
    dist.destroy_process_group()
    atexit._clear()
    meet = partial(dist.init_process_group, init_method=store, rank=rank, world_size=2)
    with mock.patch.object(dist, "init_process_group", meet):
        ranks = join_ranks(torch.device("cpu"))
    dist.barrier()
    joined = dist.is_initialized()
    atexit._run_exitfuncs()
    return ranks, joined, dist.is_initialized()


def test_a_process_leaves_its_group_when_it_ends(tmp_path: Path) -> None:
    found = run_ranks(_join_and_end, 2, f"file://{tmp_path / 'store'}")
    assert found == [(Ranks(rank, 2), True, False) for rank in range(2)]


def test_the_command_under_torchrun(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    words = ["launch/generate.py", str(run), "--prompt", "for x", "max_new_tokens=12", "seed=3", "ignore_eos=true"]
    alone = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    shared = subprocess.run([*torchrun, *words], cwd=ROOT, capture_output=True, check=True)
    assert shared.stdout == alone.stdout and alone.stdout
    refused = subprocess.run([*torchrun, *words, "compile=true"], cwd=ROOT, capture_output=True)
    assert refused.returncode != 0 and b"compile is for one process, torchrun started several" in refused.stderr
