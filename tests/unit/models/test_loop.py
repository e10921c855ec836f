"""Loop: stacked copies, gradient windows, losses, sampled and free numbers of loops, halting, constructions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm.blocks.base import BuildCtx, MixerConfig, NormConfig, TokenMixer
from llm.core.batch import Microbatch
from llm.core.cost import Cost, Dims, Mode
from llm.core.errors import UserError
from llm.core.progress import Progress, before_step
from llm.core.seq import SeqInfo
from llm.models.config import ModelConfig
from llm.models.wrappers.loop import Loop, LoopConfig
from llm.train.loss import LanguageModelLoss
from tests.contracts.checks import decoding
from tests.contracts.checks.harness import D_MODEL, assert_same, fill, n_parameters, random, tiny_model
from tests.contracts.checks.wrappers import AsMixer

ATTENTION = {"type": "attention", "n_heads": 2}
GPT: dict[str, Any] = {"position": {"type": "learned"}, "norm": {"type": "layer_norm"}}


def _config(n_layers: int = 3, **loop: Any) -> ModelConfig:
    wrappers = [LoopConfig(**loop)] if loop else []
    return tiny_model(ATTENTION, "swiglu", n_layers=n_layers, wrappers=wrappers)


def _model(n_layers: int = 3, **loop: Any) -> Any:
    return fill(_config(n_layers, **loop).build("cpu"))


def _seq(length: int = 7) -> SeqInfo:
    return SeqInfo.contiguous(2, length)


def _gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    names = {name.replace("_wrapped_model.", ""): p for name, p in model.named_parameters()}
    found = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(names.items(), found)}


def test_loops_equal_stacked_layers_with_copied_weights() -> None:
    looped = _model(3, n_pre=1, n_loop=1, n_loops=4)
    stacked = _model(6)
    origin = [0, 1, 1, 1, 1, 2]
    weights = {name.replace("_wrapped_model.", ""): p for name, p in looped.state_dict().items()}
    for index, source in enumerate(origin):
        for name, p in stacked.layers[index].named_parameters():
            p.data.copy_(weights[f"layers.{source}.{name}"])
    stacked.embed.weight.data.copy_(weights["embed.weight"])
    stacked.final_norm.weight.data.copy_(weights["final_norm.weight"])
    x, w = random(2, 7, D_MODEL), random(2, 7, D_MODEL, seed=1)
    ours, theirs = looped(x, _seq()).hidden, stacked(x, _seq()).hidden
    assert_same(ours, theirs, "outputs")
    grads, copies = _gradients((ours * w).sum(), looped), _gradients((theirs * w).sum(), stacked)
    for name, grad in grads.items():
        if not name.startswith("layers."):
            assert_same(grad, copies[name], name)
            continue
        _, layer, rest = name.split(".", 2)
        total = sum(copies[f"layers.{i}.{rest}"] for i, source in enumerate(origin) if source == int(layer))
        assert isinstance(total, Tensor)
        assert_same(grad, total, name)


def test_one_loop_without_injection_is_the_plain_decoder() -> None:
    x = random(2, 7, D_MODEL)
    plain = _model(3)(x, _seq()).hidden
    assert torch.equal(_model(3, n_pre=1, n_loop=1, n_loops=1)(x, _seq()).hidden, plain)
    for inject in ("add", "mul"):
        assert_same(_model(3, n_pre=1, n_loop=1, n_loops=1, inject=inject)(x, _seq()).hidden, plain, inject)


@pytest.mark.parametrize("inject", ["add", "mul"])
def test_the_gradient_window_equals_autograd_from_a_detached_iterate(inject: str) -> None:
    model = _model(3, n_pre=1, n_loop=1, n_loops=5, inject=inject, gradient_window=2)
    whole = _model(3, n_pre=1, n_loop=1, n_loops=5, inject=inject)
    x, w = random(2, 7, D_MODEL), random(2, 7, D_MODEL, seed=1)
    inner, seq = whole.inner, _seq()
    e = inner.run(inner.enter(x, seq), seq, layers=range(1))
    z = torch.zeros_like(e) if inject == "add" else torch.ones_like(e)
    for index in range(5):
        z = z.detach() if index == 3 else z
        z = inner.run(z + e if inject == "add" else z * e, seq, layers=range(1, 2))
    hidden = inner.final_norm(inner.run(z, seq, layers=range(2, 3)))
    ours = model(x, seq).hidden
    assert_same(ours, hidden, "outputs")
    grads, expected = _gradients((ours * w).sum(), model), _gradients((hidden * w).sum(), whole)
    full = _gradients((whole(x, seq).hidden * w).sum(), whole)
    for name, grad in grads.items():
        assert_same(grad, expected[name], name)
    assert any(float((full[name] - grad).abs().max()) > 1e-3 for name, grad in grads.items())
    assert torch.equal(model.eval()(x, seq).hidden, ours)


def test_losses_are_the_mean_over_the_last_iterates() -> None:
    model = _model(3, n_pre=1, n_loop=1, n_loops=5, loss_window=3)
    tokens = torch.randint(0, 16, (2, 7), generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1, dims=1)
    loss = LanguageModelLoss()(model, Microbatch(tokens, labels, _seq()))
    expected = []
    model.eval()
    for n_loops in (3, 4, 5):
        with model.loops(n_loops):
            logits = model.head(model(tokens, _seq()).hidden)
        expected.append(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
    assert_same(loss.sum, torch.stack(expected).mean(), "the loss", 1e-5)
    assert_same(loss.metrics["loss"], expected[-1], "the metric", 1e-5)
    assert model(tokens, _seq()).extra == ()


def test_parameters_do_not_depend_on_the_number_of_loops() -> None:
    assert len({n_parameters(_model(3, n_pre=1, n_loop=1, n_loops=n)) for n in (1, 2, 7)}) == 1
    d = 256
    block = {
        "mixer": {"type": "attention", "n_heads": 8, "bias": True},
        "channel": {"type": "mlp", "bias": True},
    }
    fields = {"vocab_size": 2, "d_model": d, "max_seq_len": 202, "layers": [{"pattern": [block], "repeat": 3}], **GPT}
    config = ModelConfig.model_validate(fields | {"wrappers": [LoopConfig(n_pre=1, n_loop=1, n_loops=20)]})
    assert config.cost().blocks.params == 3 * (12 * d * d + 13 * d) == 3 * 789_760


@pytest.mark.parametrize("inject", ["none", "add"])
def test_decoding_is_exact_for_any_number_of_loops(inject: str) -> None:
    model = _model(3, n_pre=1, n_loop=1, n_loops=3, inject=inject, n_loop_embeddings=2).eval()
    x = random(2, 9, D_MODEL)
    seen = []
    for n_loops in (1, 2, 3, 6):
        with model.loops(n_loops), torch.no_grad():
            whole = model(x, SeqInfo.contiguous(2, 9)).hidden
            state = model.new_state(2, 9, dtype=torch.float64, device="cpu")
        parts = []
        for start, length in ((0, 4), (4, 1), (5, 4)):
            seq = SeqInfo.contiguous(2, length, start=start)
            parts.append(model(x[:, start : start + length], seq, state=state).hidden)
        assert_same(torch.cat(parts, dim=1), whole, f"{n_loops} loops")
        seen.append(whole)
    assert model.n_loops == 3
    assert min(float((a - b).abs().max()) for a, b in zip(seen, seen[1:])) > 1e-3


def test_the_number_of_loops_is_a_pure_function_of_seed_and_step() -> None:
    model = _model(3, n_pre=1, n_loop=1, n_loops=6, min_loops=2)

    def drawn(seed: int) -> list[int]:
        found = []
        for step in range(40):
            before_step(model, Progress(step, 40, seed))
            found.append(model.n_training_loops)
        return found

    assert drawn(0) == drawn(0) != drawn(1)
    assert set(drawn(0)) == {2, 3, 4, 5, 6}
    before_step(model, Progress(3, 40, 0))
    x = random(2, 7, D_MODEL)
    trained = model(x, _seq()).hidden
    with model.eval().loops(drawn(0)[3]):
        assert torch.equal(model(x, _seq()).hidden, trained)


HALTING = {"n_pre": 1, "n_loop": 1, "n_loops": 8, "inject": "add", "loop_norm": "layer_norm"}


class _Evaluated(AsMixer):
    """A wrapped decoder in evaluation mode, whose loops contract so that tokens halt at different times."""

    def build(self, ctx: BuildCtx) -> TokenMixer:
        return super().build(ctx).eval()


def _halting(tolerance: float) -> _Evaluated:
    return _Evaluated(LoopConfig(n_pre=1, n_loop=1, n_loops=8, loop_norm="layer_norm", tolerance=tolerance))


def test_halted_tokens_differ_and_freeze() -> None:
    x = random(2, 9, D_MODEL)
    model = _model(3, **HALTING, tolerance=0.05).eval()
    used = model.loops_used(x, SeqInfo.contiguous(2, 9))
    assert 1 < int(used.min()) < int(used.max()) <= 8
    exact = _model(3, **HALTING).eval()
    n_first = int(used[0, 0])
    with exact.loops(n_first):
        alone = exact(x[:1, :1], SeqInfo.contiguous(1, 1)).hidden
    assert_same(model(x, SeqInfo.contiguous(2, 9)).hidden[:1, :1], alone, "a token that halts")
    assert torch.equal(_model(3, **HALTING, tolerance=0.05)(x, _seq(9)).hidden, exact(x, _seq(9)).hidden), "in training"


def test_loops_are_left_out_once_all_tokens_have_halted() -> None:
    model = _model(3, **HALTING, tolerance=0.3).eval()
    x = random(2, 9, D_MODEL)
    most = int(model.loops_used(x, _seq(9)).max())
    assert most < 8
    calls = []
    model.inner.layers[1].register_forward_hook(lambda *_: calls.append(1))
    model(x, SeqInfo.contiguous(2, 9))
    assert len(calls) == most


@pytest.mark.parametrize(
    "check",
    [
        decoding.check_prefill_and_steps,
        decoding.check_ragged_prefill,
        decoding.check_commit,
        decoding.check_reorder,
    ],
)
def test_halting_does_not_depend_on_how_tokens_are_split_into_calls(check: Any) -> None:
    config = _halting(0.2)
    model = fill(config.build(tiny_model(ATTENTION).context(0)))
    used = model.model.loops_used(random(2, 17, D_MODEL, seed=1001), SeqInfo.contiguous(2, 17))
    assert int(used.min()) < int(used.max()), "tokens should halt at different loops here"
    check(config)


def test_positions_in_each_loop() -> None:
    x = random(2, 7, D_MODEL)
    config = tiny_model(ATTENTION, "swiglu", **GPT, wrappers=[LoopConfig(n_loop=1, n_loops=3, positions="each")])
    model = fill(config.build("cpu"))
    inner, seq, z = model.inner, _seq(), x
    z = inner.enter(z, seq)
    for _ in range(3):
        z = inner.run(z + inner.position.weight[:7], seq, layers=range(1))
    expected = inner.final_norm(inner.run(z, seq, layers=range(1, 2)))
    assert_same(model(x, seq).hidden, expected, "positions in each loop")
    with pytest.raises(UserError, match="adds none; set positions: once"):
        _model(2, n_loops=2, positions="each")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_loops": 3, "gradient_window": 2}, "before the loop without gradients; set inject"),
        ({"n_loops": 3, "gradient_window": 1, "loss_window": 2, "inject": "add"}, "lower loss_window"),
        ({"n_loops": 3, "min_loops": 4}, "larger than n_loops 3"),
        ({"n_loops": 3, "n_pre": 2, "n_loop": 2}, "do not fit the model's 3 layers"),
        ({"n_loops": 3, "n_pre": 3}, "do not fit the model's 3 layers"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _config(3, **fields).build("meta")


def test_loop_stands_next_to_the_decoder() -> None:
    wrappers = [{"type": "loop", "n_loops": 2}, {"type": "loop", "n_loops": 2}]
    with pytest.raises(UserError, match="list loop first in model.wrappers"):
        _config(3).replace(wrappers=wrappers).build("meta")
    with pytest.raises(UserError, match="the least is 1"), _model(2, n_loops=2).loops(0):
        pass


class _Plain(NormConfig):
    """No norm: exact gradient descent cannot pass one."""

    def build(self, dim: int) -> nn.Module:
        return nn.Identity()

    def cost(self, dim: int) -> Cost:
        return Cost()


class _LinearAttentionConfig(MixerConfig):
    """y_j = out(sum over i < n of v_i <k_i, q_j>): linear attention over the first n tokens, without a norm."""

    n: int
    d: int

    def build(self, ctx: BuildCtx) -> TokenMixer:
        return _LinearAttention(self, ctx)

    def cost(self, dims: Dims, seq_len: int, mode: Mode) -> Cost:
        return Cost()


class _LinearAttention(TokenMixer):
    def __init__(self, config: Any, ctx: BuildCtx) -> None:
        super().__init__()
        self.n = config.n
        self.q, self.k = (ctx.linear(ctx.d_model, config.d, role=f"mixer.{name}") for name in "qk")
        self.v, self.out = ctx.linear(ctx.d_model, 1, role="mixer.v"), ctx.linear(1, ctx.d_model, role="mixer.out")

    def forward(self, x: Tensor, seq: SeqInfo) -> Tensor:
        keys, values = self.k(x[:, : self.n]), self.v(x[:, : self.n])
        return self.out(self.q(x) @ (keys.transpose(1, 2) @ values))


@torch.no_grad()
def test_looped_linear_attention_is_gradient_descent() -> None:
    """Tokens (x_i, r_i), r_i = y_i for the examples and 0 for the query; after T loops -r of the query is <w_T, x>."""
    n, d, eta, n_loops = 40, 5, 0.5, 25
    block = {"mixer": _LinearAttentionConfig(n=n, d=d)}
    config = ModelConfig.model_validate(
        {
            "vocab_size": 2,
            "d_model": d + 1,
            "layers": [{"pattern": [block]}],
            "norm": _Plain(),
            "position": {"type": "none"},
            "wrappers": [LoopConfig(n_loops=n_loops)],
        }
    )
    model = config.build("cpu").double().eval()
    assert isinstance(model, Loop)
    mixer = model.inner.layers[0].mixer
    select_x, select_r = torch.eye(d, d + 1).double(), torch.eye(d + 1).double()[d:]
    mixer.q.weight.copy_(select_x)
    mixer.k.weight.copy_(select_x)
    mixer.v.weight.copy_(select_r)
    mixer.out.weight.copy_(-eta / n * select_r.T)
    x, query, w_true = random(n, d), random(7, d, seed=1), random(d, seed=2)
    y = x @ w_true
    tokens = torch.cat([torch.cat([x, y[:, None]], dim=1), torch.cat([query, torch.zeros(7, 1)], dim=1)])[None]
    seq = SeqInfo.contiguous(1, n + 7)
    hessian = x.T @ x / n
    w, errors = torch.zeros(d).double(), []
    for step in range(1, n_loops + 1):
        w = w - eta * x.T @ (x @ w - y) / n
        with model.loops(step):
            predicted = -model(tokens, seq).hidden[0, n:, -1]
        torch.testing.assert_close(predicted, query @ w, rtol=0, atol=1e-12)
        errors.append(float((w - w_true).norm()))
    assert errors[-1] < 0.01
    contraction = float((1 - eta * torch.linalg.eigvalsh(hessian)).abs().max())
    assert contraction < 1 and all(b <= contraction * a + 1e-12 for a, b in zip(errors, errors[1:]))
