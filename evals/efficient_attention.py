"""Efficient attentions of the surveys (SLAB, EcoFormer, Performer, linear transformer, Longformer, Reformer) beside
softmax attention.

--part approximations: how far random features, hashing rounds and binary codes are from what they stand for, and the
energy of attention by operation counts; no training. --part language: small byte-level language models on Python's own
library, the same batches for every mixer of a seed, among them EcoFormer that starts from the trained softmax model
with fitted hash functions. Prints tables and a last line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch
from torch import Tensor

from evals.byte_lm import Corpus, Recipe, decoder, fit, library, score
from llm.blocks.kernel_hashing import fit_hash_functions, rbf_features, sign_codes, similarity_targets
from llm.blocks.mixers.ecoformer import EcoFormer, EcoFormerConfig, normalised
from llm.blocks.mixers.performer import PerformerConfig, orthogonal_directions
from llm.blocks.mixers.reformer import ReformerConfig
from llm.core.init import initialise
from llm.core.seq import SeqInfo
from llm.models.config import ModelConfig
from llm.train.strategies.common import named_tensors

PICOJOULES = {"multiply": 3.7, "add": 0.9}
"""Energy of a 45 nm fp32 operation, without memory traffic."""

MIXERS: dict[str, dict[str, Any]] = {
    "attention": {"type": "attention"},
    "attention, window 32": {"type": "attention", "window": 32},
    "longformer": {"type": "longformer", "window": 16, "dilations": [1, 4], "n_global": 2},
    "reformer": {"type": "reformer", "n_buckets": 8, "n_hashes": 4, "window": 32},
    "performer": {"type": "performer"},
    "linear_transformer": {"type": "linear_transformer"},
    "SLAB": {"type": "simplified_linear_attention"},
    "SLAB without convolution": {"type": "simplified_linear_attention", "conv_width": None},
    "ecoformer": {"type": "ecoformer"},
}
FINE_TUNED = "ecoformer from attention"


def clusters(n_rows: int, n_tokens: int, d: int, rng: torch.Generator, spread: float = 0.4) -> Tensor:
    """[n_rows, n_tokens, d]: tokens around eight centres."""
    centres = torch.randn(8, d, generator=rng)
    chosen = torch.randint(8, (n_rows, n_tokens), generator=rng)
    return centres[chosen] + spread * torch.randn(n_rows, n_tokens, d, generator=rng)


def context(d_model: int) -> Any:
    """What a mixer may know that stands alone, without positions."""
    block = {"mixer": {"type": "attention", "n_heads": 1}}
    fields = {"vocab_size": 2, "d_model": d_model, "layers": [{"pattern": [block]}], "position": "none"}
    return ModelConfig.model_validate(fields | {"init": {"std": None}}).context(0)


@torch.no_grad()
def performer_errors(counts: tuple[int, ...], scale: float, seeds: int = 5) -> dict[int, float]:
    """Relative root mean square error of the heads' outputs against softmax attention, by number of features."""
    d, n = 32, 128
    rng = torch.Generator().manual_seed(0)
    q, k, v = (scale**power * torch.randn(2, n, 4, d, generator=rng) for power in (1, 1, 0))
    mask = torch.ones(n, n).triu(1).bool()
    scores = (torch.einsum("bthd,bshd->bhts", q, k) * d**-0.5).masked_fill(mask, float("-inf"))
    exact = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)
    found = {}
    for m in counts:
        mixer: Any = PerformerConfig(n_heads=4, n_features=m).build(context(4 * d))
        squares = []
        for seed in range(seeds):
            mixer.directions = orthogonal_directions((m, d), torch.Generator().manual_seed(seed))
            log_q, log_k = (mixer.log_features(x * d**-0.25) for x in (q, k))
            factors = {"q": (log_q - log_q.amax(-1, keepdim=True)).exp(), "k": log_k, "v": v}
            seq = SeqInfo.contiguous(2, n)
            y = mixer.finish(mixer.remember(factors, seq, None), factors, seq)
            squares.append(float((y - exact).square().mean() / exact.square().mean()))
        found[m] = statistics.fmean(squares) ** 0.5
    return found


@torch.no_grad()
def reformer_errors(rounds: tuple[int, ...], seeds: int = 5) -> dict[int, float]:
    """The same against attention with one bucket, on clustered tokens, by rounds of hashing."""
    d = 128
    x = 3 * clusters(2, 128, d, torch.Generator().manual_seed(0))
    seq = SeqInfo.contiguous(2, 128)
    found = {}
    for n_hashes in rounds:
        squares = []
        for seed in range(seeds):
            mixer: Any = ReformerConfig(n_heads=4, n_buckets=16, n_hashes=n_hashes, window=128).build(context(d))
            initialise(mixer, seed)
            y = mixer(x, seq)
            mixer.rotations.zero_()
            exact = mixer(x, seq)
            squares.append(float((y - exact).square().mean() / exact.square().mean()))
        found[n_hashes] = statistics.fmean(squares) ** 0.5
    return found


@torch.no_grad()
def code_agreement(n_bits: int = 16, seeds: int = 5) -> dict[str, tuple[float, float]]:
    """(share of the pairs that the similarity targets speak of on whose sign the codes' product agrees, mean of
    (n_bits * target - product)^2 over all pairs, which the fit lowers)."""
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(seeds):
        rng = torch.Generator().manual_seed(seed)
        u = normalised(clusters(4, 196, 32, rng)[:, :, None])
        targets = similarity_targets(u, 10)
        anchors = u[0, torch.randperm(196, generator=rng)[:25], 0]
        distances = (u[..., None, :] - anchors).square().sum(-1)
        features = rbf_features(distances, distances.mean((0, 1, 3)))
        features = features - features.mean((0, 1))
        codes = {
            "random hyperplanes": torch.einsum("bnhd,hrd->bnhr", u, torch.randn(1, n_bits, 32, generator=rng)),
            "random functions of features": torch.einsum(
                "bnhm,hrm->bnhr", features, torch.randn(1, n_bits, 25, generator=rng)
            ),
        }
        for name, lr in (("fitted, published rate 5e-4", 5e-4), ("fitted, rate 0.1", 0.1)):
            fitted = fit_hash_functions(features, targets, n_bits, lr=lr, generator=rng)
            codes[name] = torch.einsum("bnhm,hrm->bnhr", features, fitted.functions)
        for name, z in codes.items():
            code = sign_codes(z)
            products = torch.einsum("bnhr,bmhr->bhnm", code, code)
            agree = (products.sign() == targets)[targets != 0]
            square = float((n_bits * targets - products).square().mean())
            found.setdefault(name, []).append((float(agree.double().mean()), square))
    return {
        name: (statistics.fmean(a for a, _ in values), statistics.fmean(b for _, b in values))
        for name, values in found.items()
    }


def energy(n_heads: int, n_tokens: int, d_head: int, config: EcoFormerConfig) -> dict[str, dict[str, float]]:
    """Multiplications, additions and microjoules of one attention layer without its projections (the papers' counts,
    without a mask)."""
    h, n, d, b, m = n_heads, n_tokens, d_head, config.n_bits, config.n_anchors
    counts = {
        "softmax": (2 * n * n * h * d + h * n * n, 2 * n * n * h * d),
        "ecoformer": (
            2 * h * n * m + h * n * m * b + h * n * b + h * n + h * n * d,
            2 * h * n * m * d + h * n * m * b + 2 * h * n * b + 2 * h * n * b * d + h * n * d,
        ),
    }
    return {
        name: {
            "multiplications": float(multiplications),
            "additions": float(additions),
            "microjoules": 1e-6 * (PICOJOULES["multiply"] * multiplications + PICOJOULES["add"] * additions),
        }
        for name, (multiplications, additions) in counts.items()
    }


def approximations() -> dict[str, Any]:
    """All figures that take no training, printed."""
    counts = (16, 64, 256, 1024)
    results: dict[str, Any] = {
        "performer": {str(scale): performer_errors(counts, scale) for scale in (0.5, 1.0, 2.0)},
        "reformer": reformer_errors((1, 2, 4, 8)),
        "agreement": code_agreement(),
        "energy": {n: energy(8, n, 64, EcoFormerConfig(n_heads=8)) for n in (512, 4096, 32768)},
    }
    print(f"| Performer's relative error, features | {' | '.join(map(str, counts))} |\n|---|{'---:|' * len(counts)}")
    for scale, row in results["performer"].items():
        print(f"| entries of q and k with deviation {scale} | {' | '.join(f'{x:.3f}' for x in row.values())} |")
    print("\n| Reformer's relative error, rounds | 1 | 2 | 4 | 8 |\n|---|---:|---:|---:|---:|")
    print(f"| 16 buckets, clustered tokens | {' | '.join(f'{x:.3f}' for x in results['reformer'].values())} |")
    print("\n| EcoFormer's codes, 16 bits | agreement of signs | objective |\n|---|---:|---:|")
    for name, (agreement, objective) in results["agreement"].items():
        print(f"| {name} | {agreement:.3f} | {objective:.1f} |")
    print("\n| context | softmax, microjoules | EcoFormer, microjoules |\n|---:|---:|---:|")
    for n, row in results["energy"].items():
        print(f"| {n:,} | {row['softmax']['microjoules']:,.0f} | {row['ecoformer']['microjoules']:,.0f} |")
    print(flush=True)
    return results


def from_attention(trained: Any, config: ModelConfig, corpus: Corpus, seq_len: int) -> Any:
    """EcoFormer with the weights of a softmax model (its query projection for queries and keys), hash functions fitted
    layer by layer to some of the text."""
    model = config.build("cpu")
    initialise(model, 0)
    theirs = trained.state_dict()
    own = model.state_dict()
    own.update({name.replace("mixer.q.", "mixer.qk."): t for name, t in theirs.items() if "mixer.k." not in name})
    model.load_state_dict(own)
    tokens = corpus.train[: 4 * seq_len].long().view(4, seq_len)

    def fit_first(mixer: EcoFormer, args: tuple[Any, ...]) -> None:
        mixer.fit_hashing(args[0])

    hooks = [m.register_forward_pre_hook(fit_first) for m in model.modules() if isinstance(m, EcoFormer)]
    with torch.no_grad():
        model(tokens, SeqInfo.contiguous(4, seq_len))
    for hook in hooks:
        hook.remove()
    return model


def language(args: argparse.Namespace) -> dict[str, Any]:
    """Held-out nats per byte of every mixer."""
    corpus = library()
    recipe = Recipe(args.steps, args.batch, args.seq_len, args.lr, warmup=max(1, args.steps // 10))
    half = Recipe(args.steps // 2, args.batch, args.seq_len, args.lr / 4, warmup=max(1, args.steps // 20))
    print(
        f"| mixer | parameters | nats per byte | at 4 x {args.seq_len} | state, {4 * args.seq_len} bytes | ms a step |"
    )
    print("|---|---:|---:|---:|---:|---:|", flush=True)
    results: dict[str, list[dict[str, float]]] = {}
    trained: dict[int, Any] = {}
    for name in args.only:
        base = MIXERS["ecoformer" if name == FINE_TUNED else name]
        mixer = base | {"n_heads": args.heads} | ({"bias": False} if base["type"] == "ecoformer" else {})
        config = decoder(mixer, d_model=args.d_model, n_layers=args.layers, max_seq_len=4 * args.seq_len)
        for seed in range(args.seeds):
            if name == FINE_TUNED:
                start = from_attention(trained[seed], config, corpus, args.seq_len)
                before = float(score(start, corpus, args.seq_len).mean())
                fitted = fit(config, corpus, half, seed, start=named_tensors(start))
            else:
                fitted = fit(config, corpus, recipe, seed)
            if name == "attention":
                trained[seed] = fitted.model
            row = {
                "held_out": float(score(fitted.model, corpus, args.seq_len).mean()),
                "longer": float(score(fitted.model, corpus, 4 * args.seq_len).mean()),
                "params": sum(p.numel() for p in fitted.model.parameters()),
                "state": config.cost(4 * args.seq_len, "decode").total.state_bytes_per_seq,
                "ms": 1000 * fitted.seconds / len(fitted.losses),
            }
            results.setdefault(name, []).append(row | ({"before": before} if name == FINE_TUNED else {}))
        mean = {key: statistics.fmean(row[key] for row in results[name]) for key in results[name][0]}
        note = f" (before tuning {mean['before']:.4f})" if "before" in mean else ""
        print(
            f"| {name} | {mean['params']:,.0f} | {mean['held_out']:.4f}{note} | {mean['longer']:.4f} | "
            f"{mean['state']:,.0f} | {mean['ms']:.0f} |",
            flush=True,
        )
    return results


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser("python -m evals.efficient_attention", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--part", choices=("approximations", "language", "all"), default="all")
    for name, default in (("steps", 150), ("seeds", 1), ("d-model", 64), ("layers", 2), ("heads", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    names = [*MIXERS, FINE_TUNED]
    parser.add_argument("--only", nargs="*", choices=names, default=names, help=f"{FINE_TUNED} needs attention, too")
    args = parser.parse_args()
    if FINE_TUNED in args.only and "attention" not in args.only:
        parser.error(f"{FINE_TUNED!r} starts from the trained 'attention': add it to --only")
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {}
    if args.part != "language":
        results["approximations"] = approximations()
    if args.part != "approximations":
        results["language"] = language(args)
    print(json.dumps({"settings": vars(args), "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
