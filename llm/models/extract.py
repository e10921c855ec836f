"""Cut an ordinary model out of a nested one: plain feed-forward layers with a width each, tensors copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from llm.core.errors import UserError
from llm.models.config import BlockConfig, LayerGroup, ModelConfig
from llm.models.nesting import check_widths, whole_widths
from llm.models.wrappers.nested import NestedTrainingConfig, nested_layers


def extract(
    config: ModelConfig, tensors: Mapping[str, Tensor], widths: Sequence[int] | None = None
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """(config, tensors by dotted name) of the model with so many hidden units in each nested layer; None: all of them.

    What it computes is what the nested model does at these widths, to the last bit. The wrapper that trains nested
    models is left out.
    """
    plain = plain_config(config, widths)
    cut = dict(tensors)
    for layer, n in zip(nested_layers(config), widths or whole_widths(config)):
        prefix = f"layers.{layer}.channel."
        for name, tensor in tensors.items():
            if not name.startswith(prefix):
                continue
            part = name.removeprefix(prefix)
            if part == "down.weight":
                cut[name] = tensor[:, :n].clone()
            elif part != "down.bias":
                cut[name] = tensor[:n].clone()
    return plain, cut


def plain_config(config: ModelConfig, widths: Sequence[int] | None = None) -> ModelConfig:
    """The config of that model."""
    layers = nested_layers(config)
    if not layers:
        raise UserError("only a nested model has slices; this one has no nested layer")
    chosen = list(widths or whole_widths(config))
    check_widths(chosen, whole_widths(config))
    blocks = config.blocks()
    for (layer, nested), n in zip(layers.items(), chosen):
        if not nested.sliceable(config.context(layer, blocks[layer])):
            raise UserError(f"layer {layer} has no dense linears at channel.*, so no slice can be cut out of it")
        blocks[layer] = blocks[layer].replace(channel=nested.plain(n))
    wrappers = [wrapper for wrapper in config.wrappers if not isinstance(wrapper, NestedTrainingConfig)]
    return config.replace(layers=_grouped(config.layers, blocks), wrappers=wrappers, variant=None)


def _grouped(groups: list[LayerGroup], blocks: list[BlockConfig]) -> list[LayerGroup]:
    """The blocks in as few groups: those there were where all repetitions are alike, else runs of equal blocks."""
    found: list[LayerGroup] = []
    start = 0
    for group in groups:
        n = len(group.pattern)
        mine = blocks[start : start + n * group.repeat]
        start += len(mine)
        if mine == mine[:n] * group.repeat:
            found.append(LayerGroup(pattern=mine[:n], repeat=group.repeat))
            continue
        runs: list[list[BlockConfig]] = []
        for block in mine:
            if runs and runs[-1][0] == block:
                runs[-1].append(block)
            else:
                runs.append([block])
        found += [LayerGroup(pattern=run[:1], repeat=len(run)) for run in runs]
    return found
