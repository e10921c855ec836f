"""A text that has been read once: what the model remembers of it, for any number of prompts that go on from there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.blocks.linears.dense import is_quantized
from llm.core.errors import UserError
from llm.core.state import DecodeState
from llm.generate.prefill import prefill
from llm.models.decoder import DecoderLike
from llm.models.nesting import nested_channels

FORMAT = "manyformer-prefix-1"
N_SAMPLED = 4096
"""Values of each weight that tell one model from another."""


@dataclass(frozen=True)
class Prefix:
    """tokens: of the text. tensors: the exported decode state of one row after all of them but the last, which is read
    with what follows, so that a prompt may add nothing. capacity: of the state. model: `fingerprint` of its model."""

    tokens: tuple[int, ...]
    tensors: dict[str, Tensor]
    capacity: int
    model: str

    @staticmethod
    @torch.no_grad()
    def read(model: DecoderLike, tokens: Sequence[int], *, capacity: int, chunk: int | None = 1024) -> Prefix:
        """Read tokens [T >= 2] into a state for `capacity` tokens, `chunk` at once."""
        if len(tokens) < 2:
            raise UserError("the text to be saved has no tokens; give at least one")
        if len(tokens) >= capacity:
            raise UserError(
                f"the text to be saved has {len(tokens)} tokens and the context is {capacity}, which leaves no room to "
                f"go on; shorten it to at most {capacity - 1} tokens"
            )
        weight = next(model.parameters())  # type: ignore[attr-defined]
        state = model.new_state(1, capacity, dtype=weight.dtype, device=weight.device)
        prefill(model, [tokens[:-1]], state, chunk)
        tensors = {name: tensor.cpu() for name, tensor in state.export().items()}
        return Prefix(tuple(tokens), tensors, capacity, fingerprint(model))

    @property
    def n_read(self) -> int:
        """Tokens that the state holds."""
        return len(self.tokens) - 1

    def restore(self, state: DecodeState) -> None:
        """Make every row of an empty state, made with this capacity, one that has read the text."""
        batch = state.batch
        state.reorder(torch.zeros(1, dtype=torch.int64, device=state.length.device))
        state.restore(self.tensors)
        state.reorder(torch.zeros(batch, dtype=torch.int64, device=state.length.device))

    def check(self, prompt: Sequence[int], name: str) -> None:
        """UserError, in which the prompt has this name, when it does not go on from the text."""
        differing = next((i for i, (a, b) in enumerate(zip(self.tokens, prompt)) if a != b), None)
        if differing is None and len(prompt) >= len(self.tokens):
            return
        where = f"differs from it at token {differing}" if differing is not None else f"has only {len(prompt)}"
        raise UserError(
            f"{name} does not begin with the {len(self.tokens)} tokens of the saved text: it {where}; give "
            "prompts that go on from it"
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; it is there whole or not at all."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = Path(path)
        about = {"format": FORMAT, "capacity": str(self.capacity), "model": self.model}
        unfinished = path.with_name(path.name + ".unfinished")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            contents = {f"state/{name}": tensor for name, tensor in self.tensors.items()}
            save_file(contents | {"tokens": torch.tensor(self.tokens)}, unfinished, metadata=about)
            os.replace(unfinished, path)
        except (OSError, SafetensorError) as error:
            if unfinished.is_file():
                unfinished.unlink()
            raise UserError(f"cannot write the state to {path}: {error}") from error

    @staticmethod
    def load(path: str | Path) -> Prefix:
        """What `save` has written. UserError for anything else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read the saved state {path}: {error}") from error
        if about.get("format") != FORMAT or not {"capacity", "model"} <= about.keys() or "tokens" not in tensors:
            raise UserError(f"{path} is no saved state of a prompt; make one with generate --save-state")
        tokens = tuple(tensors.pop("tokens").tolist())
        state = {name.removeprefix("state/"): tensor for name, tensor in tensors.items()}
        return Prefix(tokens, state, int(about["capacity"]), about["model"])


def fingerprint(model: Any) -> str:
    """Hex digest of a model's config, of the widths at which it runs, and of values taken from all its weights."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    digest.update(json.dumps([channel.width for channel in nested_channels(model)]).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = (tensor.dequantize() if is_quantized(tensor) else tensor.detach()).flatten()
        sample = flat[:: max(1, flat.numel() // N_SAMPLED)]
        digest.update(sample.to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()
