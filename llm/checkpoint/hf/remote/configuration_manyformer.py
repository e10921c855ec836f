"""The config of an exported model, as transformers keeps it in config.json."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class ManyformerConfig(PretrainedConfig):
    """manyformer: the model section of Manyformer's config, with every key written out. The other keys only tell
    transformers what it wants to know of a model; they are taken from that section when it was exported."""

    model_type = "manyformer"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, manyformer: dict[str, Any] | None = None, **keys: Any) -> None:
        self.manyformer = manyformer
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"):
            setattr(self, name, keys.pop(name, None))
        super().__init__(**keys)
