"""PRepBN against torch's batch norm, its schedule, its statistics over ranks, and its merging in whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm.blocks.base import after_step
from llm.blocks.linears.dense import DenseLinearConfig
from llm.blocks.norms import LayerNormConfig, RMSNormConfig
from llm.blocks.progressive_norm import PRepBN, PRepBNConfig, fold_into_next, fold_into_previous
from llm.core.errors import UserError
from llm.core.init import initialise
from llm.core.progress import Progress, before_step
from llm.core.seq import SeqInfo
from llm.models.config import ModelConfig
from llm.models.merge_norms import merge_norms
from llm.parallel.activation_checkpointing import checkpoint_blocks
from tests.unit.blocks.helpers import context, ready

D = 16


def used(config: PRepBNConfig, dim: int = D, seed: int = 0) -> Any:
    """A norm whose parameters and running statistics are those of some training."""
    norm = config.build(dim)
    initialise(norm, seed)
    rng = torch.Generator().manual_seed(seed)
    norm = norm.double()
    with torch.no_grad():
        for p in norm.parameters():
            p.add_(torch.randn(p.shape, generator=rng, dtype=torch.float64), alpha=0.3)
        norm.running_mean.copy_(torch.randn(dim, generator=rng, dtype=torch.float64))
        norm.running_var.copy_(0.5 + torch.rand(dim, generator=rng, dtype=torch.float64))
    return norm


def tokens(*shape: int, seed: int = 3) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.7


def torch_batch_norm(norm: PRepBN) -> nn.BatchNorm1d:
    theirs = nn.BatchNorm1d(norm.weight.shape[0], eps=norm.config.eps, momentum=norm.config.momentum).double()
    theirs.load_state_dict(
        {"weight": norm.weight, "bias": norm.bias, "running_mean": norm.running_mean, "running_var": norm.running_var},
        strict=False,
    )
    return theirs


def test_re_parameterised_batch_norm_is_a_batch_norm() -> None:
    """RepBN(mu, s, gamma, beta) = BN(mu, s, gamma + eta s, beta + eta mu) at inference."""
    norm = used(PRepBNConfig()).eval()
    theirs = torch_batch_norm(norm).eval()
    s = (norm.running_var + norm.config.eps).sqrt()
    with torch.no_grad():
        theirs.weight += norm.eta * s
        theirs.bias += norm.eta * norm.running_mean
    x = tokens(3, 7, D)
    torch.testing.assert_close(norm(x), theirs(x.flatten(0, 1)).view_as(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("eta", [True, False])
def test_training_at_blend_zero_is_torchs_batch_norm(eta: bool) -> None:
    """Outputs, gradients and running statistics after a step, with the branch eta x beside it."""
    norm = used(PRepBNConfig(start=0.0, eta=eta)).train()
    before_step(norm, Progress(5, 10, 0))
    theirs = torch_batch_norm(norm).train()
    before = norm.running_var.clone()
    x = tokens(4, 9, D).requires_grad_()
    found = norm(x)
    wanted = theirs(x.flatten(0, 1)).view_as(x) + (norm.eta.detach() * x if eta else 0.0)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    upstream = torch.randn_like(found)
    grads = [torch.autograd.grad(y, x, upstream)[0] for y in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
    after_step(norm)
    torch.testing.assert_close(norm.running_mean, theirs.running_mean, rtol=0, atol=1e-12)
    # torch's running variance takes that of the batch times n / (n - 1).
    drift = theirs.running_var - 0.9 * before
    torch.testing.assert_close(norm.running_var, 0.9 * before + drift * 35 / 36, rtol=0, atol=1e-12)


@pytest.mark.parametrize("inner", [RMSNormConfig(), LayerNormConfig()])
def test_blend_one_is_the_inner_norm_to_the_bit(inner: Any) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        norm = used(PRepBNConfig(inner=inner)).to(dtype).train()
        x = tokens(2, 5, D).to(dtype)
        assert torch.equal(norm(x), norm.inner(x))


def test_schedule() -> None:
    config = PRepBNConfig(warm_steps=10, decay_steps=40, freeze_steps=20)
    at = {step: config.schedule(Progress(step, 100, 0)) for step in (0, 9, 10, 30, 50, 79, 80, 99)}
    assert at == {
        0: (1.0, False, False), 9: (1.0, False, False), 10: (1.0, True, False), 30: (0.5, True, False),
        50: (0.0, True, False), 79: (0.0, True, False), 80: (0.0, False, True), 99: (0.0, False, True),
    }  # fmt: skip
    assert [PRepBNConfig(start=0.5).schedule(Progress(s, 100, 0))[0] for s in (0, 40, 80, 99)] == [0.5, 0.25, 0.0, 0.0]


def test_frozen_statistics_train_as_inference_does() -> None:
    norm = used(PRepBNConfig(decay_steps=1, freeze_steps=5)).train()
    before_step(norm, Progress(7, 10, 0))
    x = tokens(2, 5, D)
    kept = norm.running_mean.clone()
    torch.testing.assert_close(norm(x), norm.eval()(x), rtol=0, atol=1e-12)
    after_step(norm)
    assert torch.equal(norm.running_mean, kept)


def test_warm_steps_leave_the_statistics_alone() -> None:
    norm = used(PRepBNConfig(warm_steps=2)).train()
    kept = norm.running_mean.clone(), norm.running_var.clone()
    for step in range(3):
        before_step(norm, Progress(step, 10, 0))
        norm(tokens(2, 5, D))
        after_step(norm)
        same = torch.equal(norm.running_mean, kept[0]) and torch.equal(norm.running_var, kept[1])
        assert same == (step < 2)


def run_steps(norm: PRepBN, steps: range, parts: int = 1) -> list[Tensor]:
    outputs = []
    for step in steps:
        before_step(norm, Progress(step, 10, 0))
        outputs += [norm(part).detach() for part in tokens(4, 6, D, seed=step).chunk(parts)]
        after_step(norm)
    return outputs


def test_resume_is_exact() -> None:
    """A new process with the checkpoint's tensors goes on with the same blend and statistics, to the bit."""
    straight = used(PRepBNConfig(decay_steps=6)).train()
    first = run_steps(straight, range(4))
    saved = {name: tensor.clone() for name, tensor in straight.state_dict().items()}
    assert {"running_mean", "running_var", "blend", "frozen"} < set(saved) and "moments" not in saved
    rest = run_steps(straight, range(4, 8))
    other = used(PRepBNConfig(decay_steps=6), seed=9).train()
    other.load_state_dict(saved)
    assert float(other.blend) == float(saved["blend"]) == 0.5
    for a, b in zip(run_steps(other, range(4, 8)), rest, strict=True):
        assert torch.equal(a, b)
    assert len(first) == 4


def test_running_statistics_do_not_depend_on_ranks_nor_microbatches() -> None:
    whole, cut = (used(PRepBNConfig()).train() for _ in range(2))
    run_steps(whole, range(3))
    run_steps(cut, range(3), parts=4)
    ranks = [used(PRepBNConfig()).train() for _ in range(2)]
    for step in range(3):
        for norm, part in zip(ranks, tokens(4, 6, D, seed=step).chunk(2)):
            before_step(norm, Progress(step, 10, 0))
            norm(part)
        sums = torch.stack([torch.cat([norm.moments.flatten(), norm.count]) for norm in ranks]).sum(0)
        for norm in ranks:
            after_step(norm, lambda _: sums.clone())  # noqa: B023
    for norm in (cut, *ranks):
        torch.testing.assert_close(norm.running_mean, whole.running_mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(norm.running_var, whole.running_var, rtol=0, atol=1e-12)
    assert torch.equal(ranks[0].running_var, ranks[1].running_var)


def test_a_skipped_step_leaves_no_trace() -> None:
    """A batch with a NaN, whose step is skipped, is forgotten by the next one."""
    norm, clean = (used(PRepBNConfig()).train() for _ in range(2))
    before_step(norm, Progress(0, 10, 0))
    norm(torch.full((1, 3, D), float("nan"), dtype=torch.float64))
    for each in (norm, clean):
        run_steps(each, range(1, 2))
    assert torch.equal(norm.running_mean, clean.running_mean) and torch.equal(norm.running_var, clean.running_var)


def test_padding_is_left_out() -> None:
    norms = [used(PRepBNConfig(start=0.0)).train() for _ in range(2)]
    x = tokens(2, 6, D)
    valid = torch.arange(6) < torch.tensor([[6], [4]])
    padded = torch.where(valid[..., None], x, 1e3)
    for norm, inputs, mask in zip(norms, (padded, x[valid][None]), (valid, None)):
        before_step(norm, Progress(0, 10, 0))
        outputs = norm(inputs, mask)
        after_step(norm)
        if mask is not None:
            kept = outputs[valid]
    torch.testing.assert_close(kept, outputs[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(norms[0].running_mean, norms[1].running_mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(norms[0].running_var, norms[1].running_var, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_folding_into_linears(bias: bool) -> None:
    norm = used(PRepBNConfig()).eval()
    x = tokens(3, D)

    def linear() -> Any:
        built = DenseLinearConfig().build(D, D, bias=bias, std=0.3, init=context().init)
        return ready(built)

    after, before = linear(), linear()
    wanted = after(norm(x)), norm(before(x))
    fold_into_next(after, *norm.affine())
    fold_into_previous(before, *norm.affine())
    for found, expected in zip((after(x), before(x)), wanted):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def model(**changes: Any) -> Any:
    block: dict[str, Any] = {
        "mixer": changes.pop("mixer", {"type": "attention", "n_heads": 4, "n_kv_heads": 2}),
        "channel": {"type": "swiglu", "d_hidden": 24},
        "residual": changes.pop("residual", "pre"),
    }
    if "channel" in changes:
        block["channel"] = changes.pop("channel")
    fields = {
        "vocab_size": 19, "d_model": D, "max_seq_len": 32, "layers": [{"pattern": [block], "repeat": 2}],
        "norm": {"type": "prep_bn"}, "head": {"tied": False}, "init": {"std": None, "scale_residual": False},
    }  # fmt: skip
    built = ModelConfig.model_validate(fields | changes).build("cpu")
    initialise(built, 0)
    built = built.double()
    for index, module in enumerate(m for m in built.modules() if isinstance(m, PRepBN)):
        module.load_state_dict(used(module.config, module.weight.shape[0], seed=index).state_dict())
    return built


@pytest.mark.parametrize(
    ("changes", "affine"),
    [
        ({}, set()),
        ({"residual": {"type": "parallel", "shared_norm": True}}, set()),
        ({"residual": "parallel", "channel": {"type": "mlp", "d_hidden": 24, "bias": True}}, set()),
        ({"mixer": {"type": "simplified_linear_attention", "n_heads": 2}}, set()),
        ({"head": {"tied": True}}, {"final_norm"}),
        ({"channel": {"type": "moe", "n_experts": 2, "top_k": 1, "d_hidden": 8}}, {"channel_norm"}),
        ({"residual": "sandwich"}, {"mixer_post_norm", "channel_post_norm"}),
        ({"embed": {"norm": {"type": "prep_bn"}}}, {"norm"}),
    ],
)
def test_merged_model_has_no_norm_and_the_same_logits(changes: dict[str, Any], affine: set[str]) -> None:
    before = model(**changes).eval()
    ids = torch.randint(0, 19, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = before.head(before(ids, SeqInfo.contiguous(2, 11)).hidden)
        done = merge_norms(before)
        found = before.head(before(ids, SeqInfo.contiguous(2, 11)).hidden)
        state = before.new_state(2, 11, dtype=torch.float64, device="cpu")
        parts = [before(ids[:, t : t + 1], SeqInfo.contiguous(2, 1, start=t), state=state).hidden for t in range(11)]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(before.head(torch.cat(parts, 1)), wanted, rtol=0, atol=1e-12)
    assert not any(isinstance(module, PRepBN) for module in before.modules())
    assert {name.rsplit(".", 1)[-1] for name, where in done.items() if where == "affine"} == affine


def test_merging_refuses_what_is_not_affine() -> None:
    with pytest.raises(UserError, match="call eval"):
        merge_norms(model().train())
    with pytest.raises(UserError, match="still 1 its inner norm"):
        merge_norms(model(norm={"type": "prep_bn", "evaluate": "blended"}).eval())


def test_model_starts_as_the_one_with_the_inner_norm() -> None:
    """With the initial values of the published language model, at blend 1: losses and gradients to the bit."""

    def outcome(norm: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        block = {"mixer": {"type": "attention", "n_heads": 2}, "channel": {"type": "swiglu", "d_hidden": 24}}
        fields = {"vocab_size": 19, "d_model": D, "layers": [{"pattern": [block], "repeat": 2}], "norm": norm}
        built = ModelConfig.model_validate(fields).build("cpu").train()
        initialise(built, 0)
        ids = torch.randint(0, 19, (2, 9), generator=torch.Generator().manual_seed(0))
        loss = built.head(built(ids, SeqInfo.contiguous(2, 9)).hidden).logsumexp(-1).sum()
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in built.named_parameters() if p.grad is not None}

    theirs, their_grads = outcome({"type": "rms_norm", "eps": 1e-6})
    ours, our_grads = outcome({"type": "prep_bn", "inner": {"type": "rms_norm", "eps": 1e-6}})
    assert torch.equal(ours, theirs)
    for name, grad in their_grads.items():
        assert torch.equal(our_grads[name.replace("norm.weight", "norm.inner.weight")], grad), name


@pytest.mark.parametrize("changes", [{"inner": {"type": "prep_bn"}}, {"eta": False, "start_eta": 1.0}])
def test_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="prep_bn"):
        PRepBNConfig.model_validate(changes)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_changes_no_statistics(mode: Any) -> None:
    """The recomputation in the backward pass sees every token a second time."""

    def outcome(used_mode: Any) -> tuple[list[Tensor], list[Tensor]]:
        built = model(norm={"type": "prep_bn", "decay_steps": 4}).train()
        checkpoint_blocks(built, used_mode, frozenset())
        before_step(built, Progress(2, 10, 0))
        for seed in range(2):
            ids = torch.randint(0, 19, (2, 11), generator=torch.Generator().manual_seed(seed))
            built.head(built(ids, SeqInfo.contiguous(2, 11)).hidden).logsumexp(-1).sum().backward()
        after_step(built)
        norms = [m for m in built.modules() if isinstance(m, PRepBN)]
        return [p.grad for p in built.parameters()], [t for m in norms for t in (m.running_mean, m.running_var)]

    for found, wanted in zip(outcome(mode), outcome("none")):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
