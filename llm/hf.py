"""`import llm.hf` makes transformers know our exports: no `trust_remote_code`, and this project's code runs them."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from llm.checkpoint.hf.remote.bundle import write_bundle
from llm.checkpoint.hf.remote.configuration_manyformer import ManyformerConfig
from llm.checkpoint.hf.remote.modeling_manyformer import ManyformerForCausalLM

__all__ = ["ManyformerConfig", "ManyformerForCausalLM"]

AutoConfig.register(ManyformerConfig.model_type, ManyformerConfig, exist_ok=True)
AutoModelForCausalLM.register(ManyformerConfig, ManyformerForCausalLM, exist_ok=True)
ManyformerForCausalLM.code_writer = staticmethod(write_bundle)
