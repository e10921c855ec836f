"""FLOPs of one block and elements of a state, from the shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.test_time_memory.features import FeatureMap, n_features
from kernels.test_time_memory.network import Form
from kernels.test_time_memory.newton_schulz import newton_schulz_flops


@dataclass(frozen=True)
class Sizes:
    """Of one head. d: keys, queries and values; hidden: of an MLP memory; rank: what is lifted (d where nothing
    projects); sketch: features of a sketch; vector: a gate per key channel."""

    d: int
    hidden: int
    phi: FeatureMap = "id"
    rank: int | None = None
    sketch: int = 0
    vector: bool = False

    @property
    def lifted(self) -> int:
        """D, the width of lifted keys."""
        return n_features(self.phi, self.rank or self.d, self.sketch)

    def weights(self, form: Form) -> list[tuple[int, int]]:
        """[m, n] of every weight matrix."""
        if form.network == "matrix":
            return [(self.d, self.lifted)]
        return [(self.d, self.hidden)] + [(self.hidden, self.lifted)] * (form.n_weights - 1)

    def lift_flops(self) -> float:
        """Contractions of lifting one vector."""
        width = self.rank or self.d
        flops = 0.0 if self.rank is None else 2.0 * self.d * self.rank
        if self.phi == "sketch2":
            flops += 4.0 * width * self.sketch
        if self.phi == "sketch4":
            flops += 4.0 * (width + self.sketch) * self.sketch
        return flops


def block_flops(form: Form, sizes: Sizes, n: int, *, ends: bool = True) -> float:
    """Of one head and one block of n tokens, its window included. ends: the block is complete after these."""
    rows = n + form.window - 1
    weights = sizes.weights(form)
    areas = [m * k for m, k in weights]
    channels = sizes.lifted if sizes.vector else 1
    flops = (n + rows) * sizes.lift_flops()
    if form.exact:
        flops += 2.0 * rows * areas[0] * (1 + form.momentum) + 2.0 * rows * rows * sizes.lifted
    else:
        needs_output = form.bias == "l2" or form.normed
        flops += 2.0 * rows * sum(areas[1:])
        flops += 2.0 * rows * areas[0] * (needs_output + (form.network != "matrix"))
    if form.momentum and form.window > 1:
        flops += 2.0 * n * n * rows
    if form.muon_block:
        flops += sum(2.0 * n * area + 2.0 * rows * area for area in areas)
        return flops + (sum(newton_schulz_flops(m, k, form.ns_steps) for m, k in weights) if ends else 0.0)
    if form.optimizer == "muon":
        for m, k in weights:
            flops += n * (2.0 * rows * m * k + newton_schulz_flops(m, k, form.ns_steps) + 2.0 * n * m * k + 2.0 * m * k)
        return flops
    if form.momentum:
        flops += 2.0 * n * n * (rows + 1) * channels
    elif form.window > 1:
        flops += 2.0 * n * n * rows * channels
    for m, k in weights:
        flops += 2.0 * (1 + form.momentum) * (n + rows) * m * k + 2.0 * n * rows * (m + k)
    return flops


def state_elements(form: Form, sizes: Sizes) -> int:
    """Numbers that one head keeps while decoding."""
    area = sum(m * k for m, k in sizes.weights(form))
    copies = 1 + form.momentum + (form.aligned and not form.muon_block)
    running = 2 if form.aligned and form.muon_block else 0
    return copies * area + 2 * (form.window - 1) * sizes.d + running
