"""Contracts of token mixers."""

from __future__ import annotations

import torch

from llm.blocks.base import CHANNELS, MixerConfig
from llm.core.errors import UserError
from llm.core.init import initialise
from llm.core.seq import SeqInfo
from tests.contracts.checks import decoding
from tests.contracts.checks.exemptions import Check
from tests.contracts.checks.harness import (
    D_MODEL,
    assert_near,
    assert_same,
    build_mixer,
    check_init,
    compiled_calls,
    context,
    count_flops,
    gap,
    gradcheck,
    gradients,
    n_parameters,
    random,
    run,
    tiny_model,
    train,
)

PACKED = [[3, 1, 8], [5, 7]]
"""Document lengths of two packed rows: a single token, and boundaries that differ between the rows."""


def check_causality(config: MixerConfig) -> None:
    """Another token t changes no output before t and some output from t on; no gradient flows back from before t."""
    mixer = build_mixer(config)
    x = random(2, 12, D_MODEL).requires_grad_()
    seq = SeqInfo.contiguous(2, 12)
    y = run(mixer, x, seq)
    for t in (1, 5, 11):
        changed = x.detach().clone()
        changed[:, t] = random(2, D_MODEL, seed=t)
        with torch.no_grad():
            other = run(mixer, changed, seq)
        assert_same(other[:, :t], y[:, :t].detach(), f"outputs before a changed token {t}")
        assert gap(other[:, t:], y[:, t:].detach()) > 1e-6, f"token {t} changes no output"
        (grad,) = torch.autograd.grad((y[:, :t] * random(2, t, D_MODEL, seed=7)).sum(), x, retain_graph=True)
        assert_same(
            grad[:, t:], torch.zeros_like(grad[:, t:]), f"gradient of outputs before {t} with respect to later inputs"
        )


def check_packing(config: MixerConfig) -> None:
    """Packed documents have the outputs and the gradients (of inputs and parameters) of the documents alone.

    A mixer that cannot pack declares it, and then refuses a packed batch with a UserError.
    """
    mixer = build_mixer(config)
    length = sum(PACKED[0])
    seq = SeqInfo.from_lengths(PACKED, length)
    x = random(2, length, D_MODEL).requires_grad_()
    if not mixer.caps.packing:
        try:
            run(mixer, x, seq)
        except UserError:
            return
        raise AssertionError("it declares that it cannot pack, and yet takes a packed batch")
    weights = random(2, length, D_MODEL, seed=5)
    packed = run(mixer, x, seq)
    rows = []
    for row, lengths in enumerate(PACKED):
        documents = x[row].split(lengths)
        rows.append(torch.cat([run(mixer, d[None], SeqInfo.contiguous(1, len(d)))[0] for d in documents]))
    alone = torch.stack(rows)
    assert_same(packed, alone, "outputs of packed documents")
    expected = gradients((alone * weights).sum(), x, mixer)
    for name, grad in gradients((packed * weights).sum(), x, mixer).items():
        assert_same(grad, expected[name], f"packed documents: gradient of {name}")


def check_gradients(config: MixerConfig) -> None:
    """Analytic gradients agree with finite differences in float64."""
    seq = SeqInfo.from_lengths([[2, 4]], 6) if config.build(context()).caps.packing else SeqInfo.contiguous(1, 6)
    gradcheck(build_mixer(config), lambda mixer, x: run(mixer, x, seq), random(1, 6, D_MODEL))


def check_params_cost(config: MixerConfig) -> None:
    """cost() counts the parameters of the built module."""
    ctx = context()
    cost = config.cost(ctx.dims(), 32, "train")
    counted = n_parameters(config.build(ctx))
    assert cost.params == counted, f"cost() says {cost.params} parameters, the module has {counted}"
    assert 0 < cost.active_params <= cost.params, f"{cost.active_params} active of {cost.params} parameters"


def check_flops_cost(config: MixerConfig) -> None:
    """cost() agrees with torch's counter within 10%, for training and for decoding.

    The counter's figures at T = 32 and 64 are split into a part linear in T and a quadratic one (it counts the full
    square of scores). What does not depend on the context must lie between 0.9 times the linear part and 1.1 times
    the same with element-wise work; what does, at most 5% above the causal half of the square (`causal_share`), and not
    zero where there is a square. In decoding, a step after 32 tokens must cost what the counter says, element-wise work
    again optional.
    """
    mixer = build_mixer(config, torch.float32)
    dims = context().dims()

    def counted(length: int) -> tuple[float, float]:
        x = random(1, length, D_MODEL, dtype=torch.float32)
        return count_flops(lambda: run(mixer, x, SeqInfo.contiguous(1, length)))

    short, long = counted(32), counted(64)
    linear, linear_elementwise = ((4 * a - b) / 64 for a, b in zip(short, long))
    square = max(0.0, (long[0] - 2 * short[0]) / 2)
    cost = config.cost(dims, 32, "train")
    free = cost.flops_per_token - cost.attention_flops
    low, high = 0.9 * linear, 1.1 * (linear + max(0.0, linear_elementwise)) + 1.0
    assert low <= free <= high, f"context-free FLOPs: cost() says {free:.0f}, counted {low:.0f} to {high:.0f}"
    causal = square / 32 * config.causal_share(32)
    assert cost.attention_flops <= 1.05 * causal + 1.0, (
        f"context FLOPs: cost() says {cost.attention_flops}, counted {causal}"
    )
    assert cost.attention_flops > 0 or square / 32 < 0.05 * linear, "context FLOPs are counted, and cost() says zero"

    state = mixer.new_state(1, 40, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        seq = SeqInfo.contiguous(1, 32)
        mixer.prepare(seq, torch.float32)
        mixer.prefill(random(1, 32, D_MODEL, dtype=torch.float32), seq, state)
        step = SeqInfo.contiguous(1, 1, start=32)
        mixer.prepare(step, torch.float32)
    x = random(1, 1, D_MODEL, dtype=torch.float32)
    contractions, elementwise = count_flops(lambda: mixer.step(x, step, state))
    decode = config.cost(dims, 32, "decode").flops_per_token
    low, high = 0.9 * contractions, 1.1 * (contractions + elementwise) + 1.0
    assert low <= decode <= high, f"FLOPs of a step: cost() says {decode:.0f}, counted {low:.0f} to {high:.0f}"


def check_state_cost(config: MixerConfig) -> None:
    """The state's bytes are those of cost() (a state may round up by 5%), and do not grow with use."""
    mixer = build_mixer(config, torch.bfloat16)
    dims = context().dims(state_dtype_bytes=2)
    for capacity in (48, 512):
        stated = config.cost(dims, capacity, "decode").state_bytes_per_seq
        state = mixer.new_state(3, capacity, dtype=torch.bfloat16, device="cpu")
        held = state.nbytes() / 3
        assert stated <= held <= 1.05 * stated, f"{held} bytes per row for {capacity} tokens, cost() says {stated}"
    state = mixer.new_state(1, 48, dtype=torch.bfloat16, device="cpu")
    before = state.nbytes()
    with torch.no_grad():
        for start in range(0, 48, 16):
            seq = SeqInfo.contiguous(1, 16, start=start)
            mixer.prepare(seq, torch.bfloat16)
            mixer.prefill(random(1, 16, D_MODEL, dtype=torch.bfloat16), seq, state)
    assert state.nbytes() == before, f"the state grew from {before} to {state.nbytes()} bytes in use"


def check_bf16(config: MixerConfig) -> None:
    """bf16 parameters, autocast, and decoding with a bf16 state stay near float32."""
    mixer = build_mixer(config, torch.float32)
    x = random(2, 16, D_MODEL, dtype=torch.float32)
    seq = SeqInfo.contiguous(2, 16)
    with torch.no_grad():
        exact = run(mixer, x, seq)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_near(run(mixer, x, seq), exact, "bf16 autocast against float32")
        low = build_mixer(config, torch.bfloat16)
        y = run(low, x.bfloat16(), seq)
        assert y.dtype == torch.bfloat16, f"bf16 in, {y.dtype} out"
        assert_near(y, exact, "bf16 parameters against float32")
        state = low.new_state(2, 16, dtype=torch.bfloat16, device="cpu")
        parts = []
        for start, length in ((0, 10), (10, 1), (11, 5)):
            part = SeqInfo.contiguous(2, length, start=start)
            low.prepare(part, torch.bfloat16)
            call = low.step if length == 1 else low.prefill
            parts.append(call(x[:, start : start + length].bfloat16(), part, state))
        assert_near(torch.cat(parts, dim=1), exact, "decoding in bf16 against float32")


def check_compile(config: MixerConfig) -> None:
    """No graph break, and one graph for three packings of the same shape."""
    import torch._dynamo  # descriptions made before the compiler is loaded are not marked as of any length

    mixer = build_mixer(config, torch.float32)
    x = random(2, 12, D_MODEL, dtype=torch.float32)
    packings = [[[3, 9], [12]], [[1, 10, 1], [2, 1, 9]], [[9, 1, 1, 1], [10, 2]]]
    inputs, expected = [], []
    for lengths in packings:
        seq = SeqInfo.from_lengths(lengths, 12) if mixer.caps.packing else SeqInfo.contiguous(2, 12)
        expected.append(run(mixer, x, seq))
        mixer.prepare(seq, x.dtype)
        inputs.append((x, seq))
    outputs, graphs = compiled_calls(mixer, inputs)
    assert graphs == 1, f"{graphs} graphs were compiled for {len(packings)} packings of one shape"
    for output, wanted in zip(outputs, expected):
        assert_same(output, wanted, "compiled output", 1e-4)


def check_initial_values(config: MixerConfig) -> None:
    """Init by name covers every parameter and buffer, is finite, and does not depend on how the module was built."""
    check_init(lambda: config.build(context()))


def check_overfits(config: MixerConfig) -> None:
    """A tiny decoder of this mixer learns one batch by heart, which takes looking back; every parameter learns."""
    model = tiny_model(config, CHANNELS.entry("swiglu").tiny()).build("cpu")
    initialise(model, 0)
    start, end = train(model, 80)
    assert end < 0.25 * start, f"the loss on one batch went from {start:.3f} to {end:.3f} only"
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle, f"{idle} got no gradient"


MIXER_CHECKS: dict[str, Check] = {
    "causality": check_causality,
    "packing": check_packing,
    "prefill_and_steps": decoding.check_prefill_and_steps,
    "ragged_prefill": decoding.check_ragged_prefill,
    "commit": decoding.check_commit,
    "abort": decoding.check_abort,
    "reorder": decoding.check_reorder,
    "export_restore": decoding.check_export_restore,
    "gradients": check_gradients,
    "params_cost": check_params_cost,
    "flops_cost": check_flops_cost,
    "state_cost": check_state_cost,
    "bf16": check_bf16,
    "compile": check_compile,
    "init": check_initial_values,
    "overfits": check_overfits,
}
