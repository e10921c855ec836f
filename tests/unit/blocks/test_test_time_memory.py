"""The mixer test_time_memory: presets, what is refused, exact decoding with the trained chunk, constant memory."""

from __future__ import annotations

from typing import Any, get_args

import psutil
import pytest
import torch
from torch import Tensor

from llm.blocks.mixers.test_time_memory import PRESETS, MemoryConfig, Preset
from llm.core.errors import UserError
from llm.core.init import initialise
from llm.core.seq import SeqInfo
from tests.unit.blocks.helpers import context, ready

SMALL: dict[str, Any] = {"n_heads": 2, "d_head": 8}


def config(**keys: Any) -> MemoryConfig:
    return MemoryConfig.model_validate(SMALL | keys)


def preset(name: str, **keys: Any) -> MemoryConfig:
    rank = {"phi_rank": 4} if "phi_rank" in PRESETS[name] else {}
    return config(preset=name, **(rank | keys))


def mixer(given: MemoryConfig) -> Any:
    return ready(given.build(context()))


def tokens(n: int, seed: int = 0) -> Tensor:
    return torch.randn(2, n, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decoded(module: Any, x: Tensor, splits: list[int]) -> Tensor:
    """Outputs of a prefill in parts."""
    state = module.new_state(x.shape[0], x.shape[1], dtype=x.dtype, device="cpu")
    parts, start = [], 0
    with torch.no_grad():
        for n in splits:
            parts.append(module.prefill(x[:, start : start + n], SeqInfo.contiguous(x.shape[0], n, start=start), state))
            start += n
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("name", get_args(Preset))
def test_a_preset_decodes_as_it_was_trained(name: str) -> None:
    """Chunks of 16 and more, one of them left unfinished; what each preset is stands in its table."""
    module = mixer(preset(name, **({"chunk": 8} if name in ("atlas", "atlas_pp") else {})))
    x = tokens(37)
    with torch.no_grad():
        whole = module(x, SeqInfo.contiguous(2, 37))
    assert torch.allclose(decoded(module, x, [1, 20, 1, 1, 14]), whole, atol=1e-10)


@pytest.mark.parametrize("name", ["titans", "omeganet"])
def test_a_repeated_token_does_not_overshoot(name: str) -> None:
    """With start values: all gradients of a chunk agree, and none of them sees the steps of the others."""
    given = MemoryConfig.model_validate({"preset": name, "n_heads": 2, "weight_renorm": "none"})
    module = given.build(context(d_model=128))
    initialise(module, 0)
    x = tokens(1, seed=1)[:1].float().repeat(1, 1024, 4)
    with torch.no_grad():
        q, k, v = module._project(x, SeqInfo.contiguous(1, 1024), None)
        y = module.core(q, k, v, module.gates(x), SeqInfo.contiguous(1, 1024))
    assert y.abs().max() < 100


@pytest.mark.parametrize("name", ["titans", "dla", "omeganet"])
def test_steps_of_any_size_leave_the_memory_finite(name: str) -> None:
    module = MemoryConfig.model_validate({"preset": name, "n_heads": 2, "eta_start": 5.0}).build(context(d_model=128))
    initialise(module, 0)
    x = tokens(256, seed=1).float().repeat(1, 1, 4)
    state = module.new_state(2, 2048, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        for start in range(0, 2048, 256):
            assert module.prefill(x, SeqInfo.contiguous(2, 256, start=start), state).isfinite().all()
    for index in (1, 2):
        lengths = torch.linalg.vector_norm(state["memory"].committed[f"anchor{index}"], dim=-1)
        start_lengths = torch.linalg.vector_norm(getattr(module.core, f"w{index}"), dim=-1)
        assert torch.allclose(lengths, start_lengths.expand_as(lengths), rtol=1e-5)


def test_presets_are_what_they_are_called() -> None:
    table = {
        # memory, bias, retention, window, phi, opt, chunk
        "linear_attention": ("matrix", "dot", "none", 1, "id", "gd", 64),
        "delta_net": ("matrix", "l2", "none", 1, "id", "gd", 1),
        "gated_delta_net": ("matrix", "l2", "scalar", 1, "id", "gd", 1),
        "ttt_linear": ("matrix", "l2", "none", 1, "id", "gd", 16),
        "ttt_mlp": ("mlp", "l2", "none", 1, "id", "gd", 16),
        "titans": ("mlp", "l2", "scalar", 1, "id", "momentum", 32),
        "dla": ("mlp", "dot", "scalar", 1, "poly2", "gd", 32),
        "swla": ("mlp", "dot", "scalar", 8, "poly2", "gd", 32),
        "omeganet": ("mlp", "l2", "scalar", 8, "poly2", "gd", 32),
        "atlas": ("mlp", "l2", "scalar", 8, "poly2", "muon", 32),
        "atlas_pp": ("gated_mlp", "l2", "scalar", 8, "poly2", "muon", 32),
    }
    assert set(table) == set(get_args(Preset)) == set(PRESETS)
    for name, wanted in table.items():
        made = preset(name)
        assert (made.memory, made.bias, made.retention, made.window, made.phi, made.opt, made.chunk) == wanted
    assert preset("gated_delta_net").grad_at == "decayed" and preset("ttt_mlp").inner_norm


def test_keys_override_a_preset_and_survive_a_round_trip() -> None:
    changed = preset("atlas", opt="gd", window=3)
    assert (changed.opt, changed.window, changed.gamma) == ("gd", 3, "learned")
    for made in (changed, *(preset(name) for name in PRESETS), config(phi="sketch2", sketch_size=4)):
        assert MemoryConfig.model_validate(made.to_dict()) == made
    assert config(preset="atlas", phi="id").phi_rank is None


@pytest.mark.parametrize("retention", ["scalar", "vector"])
def test_what_is_kept_at_the_start(retention: str) -> None:
    keys = {"memory": "matrix", "retention": retention}
    for more, kept in (({}, (0.99, 0.9)), ({"alpha_start": 0.9999, "theta_start": 0.97}, (0.9999, 0.97))):
        module = config(**keys, **more).build(context())
        initialise(module, 0)
        gates = module.gates(torch.randn(1, 3, 32))
        assert gates.log_alpha.exp().mean().item() == pytest.approx(kept[0], abs=1e-4)
        assert gates.log_theta.exp().mean().item() == pytest.approx(kept[1], abs=1e-3)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"preset": "atlas", "ns_granularity": "chunk", "read": "post"}, "read the memory before their chunk"),
        ({"ns_steps": 3}, "ns_steps have no effect with opt momentum"),
        ({"opt": "muon", "ns_table": "lact", "ns_steps": 6}, "'lact' has 5 steps, not 6"),
        ({"opt": "gd", "eta_inside": True}, "eta_inside have no effect"),
        ({"retention": "vector"}, "retention: vector needs memory: matrix"),
        ({"memory": "matrix", "retention": "vector", "opt": "muon"}, "retention: vector needs"),
        ({"grad_at": "decayed"}, "grad_at: decayed needs memory: matrix"),
        ({"preset": "gated_delta_net", "chunk": 8}, "grad_at: decayed needs .* 8, gd"),
        ({"preset": "gated_delta_net", "retention": "none"}, "no effect with retention: none"),
        ({"phi_rank": 4}, "no effect with phi: id"),
        ({"phi": "sketch2"}, "sketch_size goes with"),
        ({"phi": "poly2", "sketch_size": 4}, "sketch_size goes with"),
        ({"eta": "one", "eta_start": 0.2}, "eta_start has no effect"),
        ({"eta": "sigmoid", "eta_start": 1.0}, "must be below 1"),
        ({"preset": "delta_net", "alpha_start": 0.9}, "alpha_start has no effect with retention: none"),
        ({"preset": "omeganet", "theta_start": 0.9}, "theta_start has no effect with opt: gd"),
        ({"initial": "zero"}, "initial: zero is for memory: matrix"),
        ({"preset": "atlas", "weight_renorm": "rows"}, "weight_renorm: rows needs memory: mlp or gated_mlp"),
        ({"preset": "atlass"}, "atlass"),
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        config(**keys)


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(UserError, match="no token sees its own chunk"):
        preset("atlas", ns_granularity="chunk").build(context())
    with pytest.raises(UserError, match="phi_rank 9 is more than the width of a head, 8"):
        config(phi="poly2", phi_rank=9).build(context())
    with pytest.raises(UserError, match="not divisible by n_heads 3"):
        MemoryConfig(n_heads=3).build(context())


def test_gates_start_where_the_config_says() -> None:
    module = config(preset="omeganet", phi_rank=4, opt="momentum", eta_start=0.25, window=4).build(context())
    from llm.core.init import initialise

    initialise(module, 0)
    gates = module.gates(tokens(3).float())
    found = [gates.log_alpha.exp(), gates.log_theta.exp(), gates.eta, 4 * gates.gamma]
    for gate, wanted in zip(found, (0.990, 0.900, 0.25, 0.881)):
        assert torch.allclose(gate, torch.full_like(gate, wanted), atol=1e-3)
    heads = config(retention="const_head", memory="matrix").build(context())
    initialise(heads, 0)
    kept = heads.gates(tokens(3).float()).log_alpha[0, 0].exp()
    assert torch.allclose(kept, torch.tensor([1 - 2.0**-5, 1 - 2.0**-6]))


def test_the_trained_chunk_must_be_kept() -> None:
    """The same weights with another chunk are another model, but for linear attention."""
    x = tokens(24)
    for name, same in (("titans", False), ("linear_attention", True)):
        a, b = (mixer(preset(name, chunk=chunk)) for chunk in (4, 12))
        b.load_state_dict(a.state_dict())
        with torch.no_grad():
            y, z = (m(x, SeqInfo.contiguous(2, 24)) for m in (a, b))
        assert torch.allclose(y, z, atol=1e-10) == same


def test_drafts_across_the_end_of_a_chunk() -> None:
    """Rejected tokens that had completed a chunk leave its anchor where it was."""
    module = mixer(preset("titans", chunk=4, window=3))
    x, draft = tokens(12), tokens(6, seed=1)
    state = module.new_state(2, 12, n_tentative=6, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        whole = module(x, SeqInfo.contiguous(2, 12))
        first = module.prefill(x[:, :6], SeqInfo.contiguous(2, 6), state)
        state.begin(6)
        mixed = torch.cat([x[:, 6:7], draft[:, :5]], dim=1)
        module.prefill(mixed, SeqInfo.contiguous(2, 6, start=6), state)
        state.commit(torch.tensor([1, 1]))
        rest = module.prefill(x[:, 7:], SeqInfo.contiguous(2, 5, start=7), state)
    assert torch.allclose(torch.cat([first, rest], dim=1), torch.cat([whole[:, :6], whole[:, 7:]], dim=1), atol=1e-10)


def test_streaming_takes_constant_memory() -> None:
    module = ready(preset("omeganet", chunk=16, conv=4).build(context()), torch.float32)
    process, sizes, resident = psutil.Process(), set(), []
    with torch.no_grad():
        state = module.new_state(1, 10_000, dtype=torch.float32, device="cpu")
        for start in range(0, 10_000, 500):
            x = torch.randn(1, 500, 32, generator=torch.Generator().manual_seed(start))
            y = module.prefill(x, SeqInfo.contiguous(1, 500, start=start), state)
            assert bool(torch.isfinite(y).all())
            sizes.add(state.nbytes())
            resident.append(process.memory_info().rss)
    assert len(sizes) == 1
    assert max(resident[10:]) < max(resident[:10]) + 8 * 2**20


def test_the_step_size_that_diverges_is_held_by_the_mean_over_the_window() -> None:
    """Steps of eta near 1 over 16 overlapping lifted keys blow up, divided by their number they do not."""
    outputs = []
    for norm in ("none", "mean"):
        keys = {"memory": "matrix", "retention": "none", "opt": "gd", "window": 16, "chunk": 1, "gamma_norm": norm}
        module = mixer(config(phi="poly2", phi_rank=8, eta_start=0.6, initial="zero", **keys))
        with torch.no_grad():
            x = tokens(128)
            q, k, v = module._project(x, SeqInfo.contiguous(2, 128), None)
            outputs.append(module.core(q, k, v, module.gates(x), SeqInfo.contiguous(2, 128)).abs().max())
    assert float(outputs[1]) < 10 < 1e3 < float(outputs[0])
