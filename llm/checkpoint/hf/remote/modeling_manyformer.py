"""A Manyformer model of any blocks as a causal language model of transformers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

import llm.models.wrappers  # noqa: F401  (registers the wrappers that the config looks up)
from llm.checkpoint.hf.remote.cache_manyformer import ManyformerCache
from llm.checkpoint.hf.remote.configuration_manyformer import ManyformerConfig
from llm.core.seq import SeqInfo
from llm.models.config import ModelConfig
from llm.models.decoder import Decoder


class ManyformerForCausalLM(PreTrainedModel, GenerationMixin):
    """Logits of the next token, with `generate` on a cache that holds the model's own decode state.

    An attention mask [B, T] marks padding by 0, on any side: the real tokens of a row are read as if they stood
    together, and outputs at padding mean nothing. Assisted generation is refused by transformers for such a model.
    """

    config_class = ManyformerConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _is_stateful = True
    _supports_sdpa = True
    _no_split_modules = ["Block"]
    code_writer: ClassVar[Any] = None
    """(model config, folder) -> None: writes this code beside saved weights where transformers does not do it."""

    def __init__(self, config: ManyformerConfig) -> None:
        super().__init__(config)
        if config.manyformer is None:
            raise ValueError("config.json has no section 'manyformer'; this is no export of a Manyformer model")
        self.model = ModelConfig.model_validate(config.manyformer).build(torch.get_default_device().type)
        self.model.to(torch.get_default_dtype())
        self.model.tie()
        self.loss_type = "ForCausalLM"
        inner = next(name for name, module in self.named_modules() if isinstance(module, Decoder))
        tied = {f"{inner}.unembed.weight": f"{inner}.embed.weight"}
        self._tied_weights_keys = tied if self.model.config.head.tied else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Parameters that were not loaded start as in training; buffers are computed."""
        if not hasattr(module, "init_spec"):
            return
        rng = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        with torch.device("cpu"):
            for name, init in module.init_spec().items():  # type: ignore[operator]
                tensor = getattr(module, name, None)
                if isinstance(tensor, Tensor) and not getattr(tensor, "_is_hf_initialized", False):
                    tensor.copy_(init(tuple(tensor.shape), rng))

    def _decoder(self) -> Any:
        return next(module for module in self.modules() if isinstance(module, Decoder))

    def get_input_embeddings(self) -> nn.Module:
        return self._decoder().embed

    def get_output_embeddings(self) -> nn.Module:
        return self._decoder().unembed

    def set_input_embeddings(self, value: Any) -> None:
        raise NotImplementedError("the embedding of this model cannot be exchanged")

    def resize_token_embeddings(self, *arguments: Any, **keys: Any) -> Any:
        raise NotImplementedError("the vocabulary of this model cannot be resized; train it with the size wanted")

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def new_cache(self) -> ManyformerCache:
        """An empty cache, to be given as past_key_values."""
        return ManyformerCache(self.model, self.model.config.max_context, self.dtype, self.device)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **keys: Any,
    ) -> dict[str, Any]:
        read = 0 if past_key_values is None else past_key_values.get_seq_length()
        inputs: dict[str, Any] = {"input_ids": input_ids[:, read:]}
        if inputs_embeds is not None and read == 0:
            inputs = {"inputs_embeds": inputs_embeds}
        return inputs | {
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": keys.get("use_cache", True),
            "logits_to_keep": keys.get("logits_to_keep", 0),
        }

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: ManyformerCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **keys: Any,
    ) -> Any:
        """Logits [B, T, V] of input_ids [B, T] or inputs_embeds [B, T, D]; labels as transformers shifts them.

        ValueError for what this model does not do: positions of one's own, masks of more than padding, attention maps.
        """
        given = self._inputs(input_ids, inputs_embeds)
        self._refuse(attention_mask, past_key_values, keys)
        if use_cache is None:
            use_cache = bool(getattr(self.config, "use_cache", True)) and not self.training and labels is None
        cache = past_key_values if past_key_values is not None or not use_cache else self.new_cache()
        batch, n_new = given.shape[:2]
        mask = None if attention_mask is None else attention_mask[:, -n_new:].bool()
        order = (
            None if mask is None or bool(mask.all()) else mask.logical_not().to(torch.int8).argsort(dim=1, stable=True)
        )
        valid = None
        if order is not None:
            assert mask is not None
            given = given[torch.arange(batch, device=given.device)[:, None], order]
            valid = torch.arange(n_new, device=given.device) < mask.sum(1, keepdim=True)
        if cache is None:
            hidden = self.model(given, SeqInfo.contiguous(batch, n_new, device=given.device)).hidden
        else:
            state = cache.reserve(batch, n_new)
            start = state.end()[:, None]
            seq = SeqInfo(positions=start + torch.arange(n_new, device=start.device), valid=valid)
            hidden = self.model(given, seq, state=state).hidden
            cache.n_columns += n_new
        if order is not None:
            hidden = torch.zeros_like(hidden).scatter(1, order[..., None].expand_as(hidden), hidden)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **keys)
        if return_dict is False:
            return tuple(part for part in (loss, logits, cache) if part is not None)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def _inputs(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if input_ids is not None:
            return input_ids
        assert inputs_embeds is not None
        if not isinstance(self.model, Decoder):
            raise ValueError("inputs_embeds do not go into a model with wrappers; give input_ids")
        return inputs_embeds

    def _refuse(self, attention_mask: Tensor | None, cache: Any, keys: dict[str, Any]) -> None:
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask must be [batch, length] with 0 at padding; given {attention_mask.dim()} dimensions"
            )
        if cache is not None and not isinstance(cache, ManyformerCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}; this model needs its own: model.new_cache(), or None"
            )
        if keys.pop("position_ids", None) is not None:
            raise ValueError("position_ids are counted by the model itself; mark padding in attention_mask instead")
        for name in ("output_attentions", "output_hidden_states"):
            if keys.pop(name, None):
                raise ValueError(f"{name} is not offered by this model")

    def save_pretrained(self, save_directory: Any, *arguments: Any, **keys: Any) -> Any:
        """As transformers does it, the code included."""
        result = super().save_pretrained(save_directory, *arguments, **keys)
        if type(self).code_writer is not None and self._auto_class is None:
            type(self).code_writer(self.model.config, save_directory)
        return result
