"""usage: python -m evals.wide_attention [--seeds N] [--widths N ...] [--steps N] [--fast]

What one layer of self-attention and one position-wise ReLU layer can compute (universal approximation, Gumaan 2025).

The statement needs two things, and both are shown: the input must say where a token stands, else the layer commutes
with permutations; and attention must bring the whole sequence to every position, as n heads do that copy one position
each. Such heads are written down, with logits beta, and leak at most 2 max|x| (n - 1) / (exp(beta) + n - 1). On what
they bring, ReLU features approximate any continuous map; "existence", not "learnability".

  1. The largest leakage of the written heads for several beta.
  2. Error of random ReLU features and ridge regression on the copied sequence, by width (convex, no luck), and of a
     control without positions whose attention is the mean (to width 512).
  3. The same layer trained whole with Adam, and the control.

Target: n = 4 tokens of 2 numbers, smooth, with products across tokens and a sign that depends on the position; its
standard deviation is about 0.69. --seeds (3), --widths (32 to 2048), --steps of Adam (1000; 0 leaves it out), --fast:
one seed, widths to 256, 200 steps. Two minutes on one quiet CPU core.

Prints tables and a last line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N, D = 4, 2
"""Tokens of a sequence and numbers of a token."""
BETAS = (5.0, 10.0, 20.0, 40.0)
RIDGE = 1e-4
TRAIN, TEST = 6000, 2000


def attend(z: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor) -> Tensor:
    """Softmax attention of every position to all: z [B, n, D], w_q, w_k [H, D, K], w_v [H, D, V] -> [B, n, H * V]."""
    q, k, v = (torch.einsum("bnd,hdk->bhnk", z, w) for w in (w_q, w_k, w_v))
    return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2)


def with_positions(x: Tensor) -> Tensor:
    """[x_i ; e_i]: x [B, n, d] -> [B, n, d + n]."""
    e = torch.eye(x.shape[1], dtype=x.dtype).expand(len(x), -1, -1)
    return torch.cat([x, e], dim=-1)


def copying_heads(n: int, d: int, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(w_q, w_k, w_v) of n heads on [x_i ; e_i], of which head h copies x_h: query 1, key beta e_j . e_h, value x_j."""
    w_q = torch.zeros(n, d + n, 1, dtype=torch.float64)
    w_k = torch.zeros(n, d + n, 1, dtype=torch.float64)
    w_v = torch.zeros(n, d + n, d, dtype=torch.float64)
    for head in range(n):
        w_q[head, d:] = 1.0
        w_k[head, d + head] = beta
        w_v[head, :d] = torch.eye(d)
    return w_q, w_k, w_v


def leakage(x: Tensor, beta: float) -> float:
    """Largest error of the copies of x [B, n, d] at any position."""
    copied = attend(with_positions(x), *copying_heads(x.shape[1], x.shape[2], beta))
    return float((copied - x.flatten(1)[:, None]).abs().max())


def leakage_bound(n: int, beta: float, largest: float = 1.0) -> float:
    """What it cannot exceed: the weight on other positions times the largest difference of two values."""
    return 2.0 * largest * (n - 1) / (math.exp(beta) + n - 1)


def inputs(n_points: int, seed: int) -> Tensor:
    """[n_points, N, D], uniform on [-1, 1]."""
    rng = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(n_points, N, D, generator=rng, dtype=torch.float64) - 1


def target(x: Tensor) -> Tensor:
    """f(X)_i [B, N, D]: neighbours counted in a circle, products across tokens, and a sign by position."""
    one, two, three = (x.roll(-shift, dims=1) for shift in (1, 2, 3))
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=x.dtype)[:, None]
    return 0.88 * sign * (torch.sin(1.5 * x + 2 * one.flip(-1)) + two * three.flip(-1))


def equivariant_target(x: Tensor) -> Tensor:
    """g(X)_i = sin(2 x_i) + 3 x_i * mean_j x_j: a permutation of the tokens permutes it."""
    return torch.sin(2 * x) + 3 * x * x.mean(1, keepdim=True)


def written(x: Tensor, beta: float = 20.0) -> Tensor:
    """What the FFN reads after the copying heads: [B, n, n d + n], the copies and the position."""
    z = with_positions(x)
    return torch.cat([attend(z, *copying_heads(x.shape[1], x.shape[2], beta)), z[..., x.shape[2] :]], dim=-1)


def averaged(x: Tensor) -> Tensor:
    """The control: no positions, so equal scores and the mean of all tokens, beside the token itself."""
    return torch.cat([x, x.mean(1, keepdim=True).expand_as(x)], dim=-1)


def ridge_error(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], width: int, seed: int) -> float:
    """Test RMSE of `width` random ReLU features of what the FFN reads, the outer layer by ridge regression."""
    (a, y), (b, wanted) = ((u.flatten(0, 1), t.flatten(0, 1)) for u, t in (train, test))
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(a.shape[1], width, generator=rng, dtype=torch.float64)
    bias = 2 * torch.randn(width, generator=rng, dtype=torch.float64)
    features = F.relu(a @ weight + bias)
    gram = features.T @ features / len(a) + RIDGE * torch.eye(width, dtype=torch.float64)
    outer = torch.linalg.solve(gram, features.T @ y / len(a))
    return float((F.relu(b @ weight + bias) @ outer - wanted).square().mean().sqrt())


class OneLayer(nn.Module):
    """One attention layer beside its input, then one ReLU layer: x [B, n, d] -> [B, n, d_out]."""

    def __init__(
        self, d: int, d_out: int, *, width: int, n_heads: int = 4, d_head: int = 8, positions: int = 0, seed: int = 0
    ) -> None:
        """positions: length of the sequences, whose positions the layer then sees; 0 for none."""
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.positions = positions
        inside = d + positions

        def matrix(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=rng) * shape[-2] ** -0.5)

        self.w_q, self.w_k = matrix(n_heads, inside, d_head), matrix(n_heads, inside, d_head)
        self.w_v = matrix(n_heads, inside, d_head)
        self.up, self.bias = matrix(inside + n_heads * d_head, width), nn.Parameter(torch.zeros(width))
        self.down = matrix(width, d_out)

    def forward(self, x: Tensor) -> Tensor:
        z = with_positions(x) if self.positions else x
        read = torch.cat([z, attend(z, self.w_q, self.w_k, self.w_v)], dim=-1)
        return F.relu(read @ self.up + self.bias) @ self.down


def fit(model: OneLayer, f: object, steps: int, seed: int, *, lr: float = 5e-3, batch: int = 256) -> float:
    """Train on fresh inputs with Adam, the rate falling to zero; returns the test RMSE."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x = inputs(batch, 1_000_003 * (seed + 1) + step).float()
        loss = (model(x) - f(x)).square().mean()  # type: ignore[operator]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    x = inputs(TEST, seed + 500).float()
    with torch.no_grad():
        return float((model(x) - f(x)).square().mean().sqrt())  # type: ignore[operator]


def main(argv: list[str]) -> int:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--fast", action="store_true")
    given = parser.parse_args(argv)
    widths = [width for width in given.widths if width <= 256] if given.fast else given.widths
    seeds, steps = (1, min(given.steps, 200)) if given.fast else (given.seeds, given.steps)
    torch.set_num_threads(1)
    began = time.perf_counter()
    x = inputs(TRAIN, 99)
    spread = float(target(x).std())
    print(f"standard deviation of the target: {spread:.3f}\n")
    print(f"{'beta':>6} {'largest leakage':>16} {'bound':>9}")
    leaks = {beta: leakage(x, beta) for beta in BETAS}
    for beta, leak in leaks.items():
        print(f"{beta:6.0f} {leak:16.1e} {leakage_bound(N, beta):9.1e}")
    errors: dict[str, list[float]] = {"copied": [], "mean, no positions": []}
    print(f"\n{'width':>6} {'ridge, copied':>14} {'ridge, control':>15}   (RMSE, mean of {seeds} seeds)")
    for width in widths:
        for name, read in (("copied", written), ("mean, no positions", averaged)):
            if name != "copied" and width > 512:
                continue
            found = []
            for seed in range(seeds):
                a, b = inputs(TRAIN, seed), inputs(TEST, seed + 500)
                found.append(ridge_error((read(a), target(a)), (read(b), target(b)), width, seed))
            errors[name].append(sum(found) / seeds)
        control = f"{errors['mean, no positions'][-1]:15.3f}" if width <= 512 else ""
        print(f"{width:6d} {errors['copied'][-1]:14.3f} {control}", flush=True)
    trained: dict[str, float] = {}
    if steps:
        print(f"\ntrained whole with Adam, width 256, {steps} steps (RMSE, mean of {seeds} seeds)")
        cases = (
            ("with positions", target, N), ("without positions", target, 0),
            ("without positions, equivariant target", equivariant_target, 0),
        )  # fmt: skip
        for name, f, positions in cases:
            found = [
                fit(OneLayer(D, D, width=256, positions=positions, seed=seed), f, steps, seed) for seed in range(seeds)
            ]
            trained[name] = sum(found) / seeds
            print(f"{name:<40} {trained[name]:6.3f}   (standard deviation of the target {float(f(x).std()):.3f})")
    result = {"tool": "wide_attention", "std": spread, "leakage": leaks, "widths": widths, "ridge": errors}
    result |= {"adam": trained, "seeds": seeds, "steps": steps, "seconds": round(time.perf_counter() - began, 1)}
    print(json.dumps(result | {"torch": torch.__version__}))
    return 0


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        sys.exit(0)
    sys.exit(main(sys.argv[1:]))
