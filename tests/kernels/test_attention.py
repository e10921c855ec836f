"""Every implementation of attention against the reference, and the reference against loops from the definition."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch

from kernels import dispatch
from kernels.attention import AttentionForm, AttentionQuery, Layout, attention
from kernels.attention.flash import FLASH
from kernels.attention.spec import check_attention, sample_layout

CPU = torch.device("cpu")
FORMS = {
    "plain": {},
    "scale": {"scale": 0.7},
    "window": {"window": 5},
    "sinks": {"window": 5, "n_sinks": 3},
    "wide_window": {"window": 70, "n_sinks": 1},
    "persistent": {"window": 5, "n_persistent": 3},
    "softcap": {"softcap": 2.0},
    "alibi": {"slopes": (0.5, 0.25, 0.1, 0.05)},
    "all": {"softcap": 2.0, "slopes": (0.5, 0.25, 0.1, 0.05), "window": 7, "n_sinks": 2},
    "all_persistent": {"softcap": 2.0, "slopes": (0.5, 0.25, 0.1, 0.05), "window": 7, "n_sinks": 2, "n_persistent": 2},
}


def form(heads: int = 4, kv_heads: int = 2, **changes: object) -> AttentionForm:
    return AttentionForm(**{"n_heads": heads, "n_kv_heads": kv_heads, "d_head": 16, "scale": 0.25} | changes)  # type: ignore[arg-type]


def implementations() -> list[str]:
    return sorted(set(dispatch.op("attention").impls) - {"reference"})


@pytest.mark.parametrize("mode", ["causal", "packed", "positions"])
@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("kind", FORMS)
def test_implementation_equals_reference(name: str, mode: str, kind: str) -> None:
    impl = dispatch.op("attention").impls[name]
    checked = 0
    for dtype, kv_heads in ((torch.float64, 4), (torch.float64, 1), (torch.float32, 2), (torch.bfloat16, 2)):
        if name == "flex" and dtype == torch.bfloat16:
            continue  # a second of tracing for each
        for grad in (True, False):
            query = AttentionQuery("cpu", dtype, form(4, kv_heads, **FORMS[kind]), mode, grad)  # type: ignore[arg-type]
            if impl.supports(query) is True:
                assert check_attention(impl, query, CPU) is None, (dtype, kv_heads, grad)
                checked += 1
                break
    if not checked:
        query = AttentionQuery("cpu", torch.float32, form(**FORMS[kind]), mode)  # type: ignore[arg-type]
        assert isinstance(impl.supports(query), str)


def test_the_check_notices_a_wrong_gradient() -> None:
    class Wrong:
        def prepare(self, *arguments: object) -> object:
            return dispatch.op("attention").reference.prepare(*arguments)

        def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, f: AttentionForm, p: object) -> torch.Tensor:
            return dispatch.op("attention").reference.run(q, k.detach() + 0 * k, v, f, p)

    query = AttentionQuery("cpu", torch.float32, form(), "causal", True)
    assert "gradient of k" in str(check_attention(Wrong(), query, CPU))


def looped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, f: AttentionForm, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention from its definition, one score at a time."""
    batch, n_queries, n_heads, _ = q.shape
    out = torch.zeros(batch, n_queries, n_heads, v.shape[-1], dtype=torch.float64)
    lse = torch.zeros(batch, n_queries, n_heads, dtype=torch.float64)
    for b in range(batch):
        for i in range(n_queries):
            at = int(layout.positions[b, i])
            for h in range(n_heads):
                group = h // (n_heads // k.shape[2])
                scores, values = [], []
                for key in range(k.shape[1]):
                    j = key - f.n_persistent
                    if j < 0:
                        key_at = at
                    elif layout.k_positions is None:
                        key_at = int(layout.positions[b, j])
                        if j > i or (layout.documents is not None and layout.documents[b, i] != layout.documents[b, j]):
                            continue
                    else:
                        key_at = int(layout.k_positions[b, j])
                        if key_at < 0 or key_at > at:
                            continue
                    if f.window is not None and at - key_at >= f.window and key_at >= f.n_sinks:
                        continue
                    score = f.scale * float(q[b, i, h] @ k[b, key, group])
                    if f.softcap is not None:
                        score = f.softcap * math.tanh(score / f.softcap)
                    if f.slopes is not None:
                        score -= f.slopes[h] * (at - key_at)
                    scores.append(score)
                    values.append(v[b, key, group])
                weights = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0)
                out[b, i, h] = weights @ torch.stack(values)
                lse[b, i, h] = torch.logsumexp(torch.tensor(scores, dtype=torch.float64), 0)
    return out, lse


@pytest.mark.parametrize("mode", ["causal", "packed", "positions", "ring"])
@pytest.mark.parametrize("kind", FORMS)
def test_reference_equals_definition(mode: str, kind: str) -> None:
    length, f = 11, form(**FORMS[kind])
    if mode == "ring":
        slots = torch.tensor([[9, 3, -1, 0, 1, 12, 4, 11], [8, 2, 5, 0, -1, 7, 30, 6]])
        layout = Layout(torch.tensor([[11, 12], [8, 9]]), k_positions=slots)
        length, n_keys = 2, 8
    else:
        layout = sample_layout(mode, length, CPU)  # type: ignore[arg-type]
        n_keys = length if layout.k_positions is None else layout.k_positions.shape[1]
    n_keys += f.n_persistent
    q = torch.randn(2, length, 4, 16, dtype=torch.float64)
    k, v = torch.randn(2, 2, n_keys, 2, 16, dtype=torch.float64)
    found, lse = attention(q, k, v, f, layout, lse=True, backend="reference")
    wanted, wanted_lse = looped(q, k, v, f, layout)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(lse, wanted_lse)
    for name in implementations():
        query = AttentionQuery("cpu", torch.float64, f, layout.mode, False)
        if dispatch.op("attention").impls[name].supports(query) is True:
            torch.testing.assert_close(attention(q, k, v, f, layout, backend=name), wanted)


@pytest.mark.parametrize("name", ["sdpa", "blocked", "reference"])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 129])
def test_lengths_and_strides(name: str, length: int) -> None:
    """Block edges, and inputs that are slices of one fused projection."""
    f = form(4, 2, scale=0.25)
    layout = sample_layout("packed", length, CPU) if length > 1 else Layout(torch.zeros(2, 1, dtype=torch.int64))
    fused = torch.randn(2, length, 8, 16, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 16, 4, length, dtype=torch.float64).permute(0, 3, 2, 1)
    results = []
    for backend in (name, "reference"):
        q, k, v = fused.split([4, 2, 2], dim=2)
        out = attention(q, k, v, f, layout, backend=backend)
        results.append((out.detach(), *torch.autograd.grad(out, fused, upstream)))
    for found, wanted in zip(*results):
        torch.testing.assert_close(found, wanted)


def test_flex_log_sum_exp() -> None:
    f = form(**FORMS["softcap"])
    layout = sample_layout("packed", 40, CPU)
    q, k, v = (torch.randn(2, 40, heads, 16) for heads in (4, 2, 2))
    found = attention(q, k, v, f, layout, lse=True, backend="flex")
    wanted = attention(q, k, v, f, layout, lse=True, backend="reference")
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_flash_gets_the_right_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn needs a GPU; a stand-in with its signature shows that ours calls it as documented."""
    reference = dispatch.op("attention").reference

    def flash_attn_func(q, k, v, *, causal, softmax_scale, window_size, softcap, alibi_slopes, return_attn_probs):  # type: ignore[no-untyped-def]
        assert causal and window_size[1] == (0 if window_size[0] >= 0 else -1)
        f = form(
            scale=softmax_scale,
            window=window_size[0] + 1 if window_size[0] >= 0 else None,
            softcap=softcap or None,
            slopes=None if alibi_slopes is None else tuple(alibi_slopes.tolist()),
        )
        layout = Layout(torch.arange(q.shape[1]).expand(q.shape[0], -1))
        out, lse = reference.run(q, k, v, f, reference.prepare(layout, f, q.dtype), lse=True)
        return (out, lse.transpose(1, 2), None) if return_attn_probs else out

    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, longest_q, longest_k, **options):  # type: ignore[no-untyped-def]
        assert torch.equal(cu_q, cu_k) and longest_q == longest_k
        parts = [
            flash_attn_func(q[a:b][None], k[a:b][None], v[a:b][None], **options)
            for a, b in zip(cu_q[:-1].tolist(), cu_q[1:].tolist())
        ]
        assert max(cu_q.diff()) <= longest_q
        if not options["return_attn_probs"]:
            return torch.cat([part[0] for part in parts])
        return torch.cat([part[0][0] for part in parts]), torch.cat([part[1][0] for part in parts], dim=1), None

    module = types.ModuleType("flash_attn")
    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    q, k, v = (torch.randn(2, 21, heads, 16) for heads in (4, 2, 2))
    for mode in ("causal", "packed"):
        layout = sample_layout(mode, 21, CPU)  # type: ignore[arg-type]
        for kind in ("plain", "window", "softcap", "alibi"):
            f = form(**FORMS[kind])
            prepared = FLASH.prepare(layout, f, q.dtype)
            wanted = attention(q, k, v, f, layout, lse=True, backend="reference")
            torch.testing.assert_close(FLASH.run(q, k, v, f, prepared), wanted[0], atol=1e-5, rtol=1e-5)
            for a, b in zip(FLASH.run(q, k, v, f, prepared, lse=True), wanted):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_refusals_name_the_reason() -> None:
    for backend, query, reason in [
        ("flash", AttentionQuery("cuda", torch.bfloat16, form(), "causal"), "flash-attn"),
        ("flex", AttentionQuery("cpu", torch.float32, form(), "causal", grad=True), "no gradients on a CPU"),
        ("flex", AttentionQuery("cuda", torch.bfloat16, form(d_head=48), "causal"), "48"),
        ("sdpa", AttentionQuery("cpu", torch.float32, form(softcap=3.0), "causal"), "soft-cap"),
        ("blocked", AttentionQuery("cuda", torch.bfloat16, form(), "causal"), "CPU"),
    ]:
        with pytest.raises(dispatch.Unsupported, match=reason):
            dispatch.resolve("attention", query, backend=backend)


def test_choice_by_device() -> None:
    def chosen(device: str, mode: str, **changes: object) -> str:
        return dispatch.resolve("attention", AttentionQuery(device, torch.bfloat16, form(**changes), mode)).name  # type: ignore[arg-type]

    assert chosen("cpu", "causal") == "blocked"
    plain = AttentionQuery("cpu", torch.float32, form(), "causal")
    assert dispatch.resolve("attention", plain).name == "sdpa"
    assert chosen("cpu", "positions") == "sdpa"
    assert chosen("cpu", "packed", softcap=2.0) == "blocked"
    assert chosen("cpu", "positions", softcap=2.0) == "reference"
    assert chosen("cuda", "causal") == "sdpa"
    assert chosen("cuda", "packed") == "flex"
    assert chosen("cuda", "causal", window=8, softcap=2.0) == "flex"
    assert chosen("cuda", "positions") == "sdpa"
