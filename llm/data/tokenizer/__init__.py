"""Tokenizers: plain bytes, characters, byte-level BPE, sentencepiece and any Hugging Face tokenizer."""

from llm.data.tokenizer.base import Tokenizer
from llm.data.tokenizer.config import TokenizerConfig, build_tokenizer, load_tokenizer

__all__ = ["Tokenizer", "TokenizerConfig", "build_tokenizer", "load_tokenizer"]
