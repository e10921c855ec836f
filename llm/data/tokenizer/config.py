"""Which tokenizer to use, how to make it, how to open a saved one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from llm.config.base import Config, Count
from llm.core.errors import UserError
from llm.data.tokenizer.base import END_OF_TEXT, KIND_FILE, Tokenizer

TRAINED = ("bpe", "sp_bpe", "sp_unigram")


class TokenizerConfig(Config):
    """bytes: 256 bytes and eos.  chars: every character of the data.  bpe: byte-level BPE, trained.
    sp_bpe, sp_unigram: sentencepiece with byte fallback, trained.  hf: any Hugging Face tokenizer, by `path`.

    path: folder of a saved tokenizer, a sentencepiece .model file, or (hf) a name on the hub; nothing is trained then.
    sample_bytes: how much text the training reads, spread over all sources; held-out documents are never read.
    """

    kind: Literal["bytes", "chars", "bpe", "sp_bpe", "sp_unigram", "hf"] = "bpe"
    vocab_size: Count | None = Field(default=None, ge=1)
    path: str | None = None
    sample_bytes: Count = Field(default=50_000_000, ge=1)

    @model_validator(mode="after")
    def _coherent(self) -> TokenizerConfig:
        if self.kind == "hf" and self.path is None:
            raise ValueError("kind 'hf' needs path: a folder, or a name on the Hugging Face hub")
        if self.kind in ("bytes", "chars") and (self.vocab_size is not None or self.path is not None):
            raise ValueError(f"kind {self.kind!r} takes neither vocab_size nor path: they would be ignored")
        if self.path is not None and self.vocab_size is not None:
            raise ValueError("vocab_size would be ignored, since path names a tokenizer that exists; leave one out")
        if self.kind in TRAINED and self.path is None and self.vocab_size is None:
            raise ValueError(f"kind {self.kind!r} is trained, so it needs vocab_size (or path, to reuse one)")
        return self

    @property
    def trained(self) -> bool:
        """True when making it reads the data."""
        return self.path is None and (self.kind in TRAINED or self.kind == "chars")


def build_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Make the tokenizer of `config`; `texts` is read only by kinds that are trained.

    Raises UserError when the data are too small for vocab_size, or a file cannot be read.
    """
    from llm.data.tokenizer.simple import BytesTokenizer, CharsTokenizer

    if config.path is not None:
        return _open(config)
    if config.kind == "bytes":
        return BytesTokenizer()
    if config.kind == "chars":
        alphabet: set[str] = set()
        for text in texts:
            alphabet.update(text)
        return CharsTokenizer(alphabet)
    assert config.vocab_size is not None
    if config.kind == "bpe":
        from llm.data.tokenizer.backend import train_bpe

        return train_bpe(texts, config.vocab_size)
    from llm.data.tokenizer.sentence import train_sentencepiece

    return train_sentencepiece(texts, config.vocab_size, "bpe" if config.kind == "sp_bpe" else "unigram")


def _open(config: TokenizerConfig) -> Tokenizer:
    assert config.path is not None
    path = Path(config.path)
    if config.kind in ("sp_bpe", "sp_unigram") and path.is_file():
        from llm.data.tokenizer.sentence import SentencePieceTokenizer

        return SentencePieceTokenizer(path.read_bytes(), kind=config.kind)
    if (path / KIND_FILE).exists():
        return load_tokenizer(path)
    if config.kind == "hf":
        from llm.data.tokenizer.backend import fetch_hf

        with tempfile.TemporaryDirectory() as scratch:
            return fetch_hf(config.path, Path(scratch))
    return load_tokenizer(path)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Open a saved tokenizer: a folder that `Tokenizer.save` wrote, or any folder with Hugging Face's tokenizer.json.

    A folder of prepared data is accepted too: its `tokenizer/` is opened. Raises UserError when there is none.
    """
    folder = Path(folder)
    if not (folder / KIND_FILE).exists() and (folder / "tokenizer").is_dir():
        folder = folder / "tokenizer"
    kind_path = folder / KIND_FILE
    if not kind_path.exists() and not (folder / "tokenizer.json").exists():
        raise UserError(f"no tokenizer in {folder}: expected a folder with tokenizer.json or {KIND_FILE}")
    try:
        kind = json.loads(kind_path.read_bytes())["kind"] if kind_path.exists() else "hf"
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {kind_path}: {error}; prepare the data again") from error
    if kind == "bytes":
        from llm.data.tokenizer.simple import BytesTokenizer

        return BytesTokenizer()
    if kind == "chars":
        from llm.data.tokenizer.simple import CharsTokenizer

        vocab = json.loads((folder / "tokenizer.json").read_bytes())["model"]["vocab"]
        return CharsTokenizer(token for token in vocab if token != END_OF_TEXT)
    if kind in ("sp_bpe", "sp_unigram"):
        from llm.data.tokenizer.sentence import SentencePieceTokenizer

        return SentencePieceTokenizer((folder / "tokenizer.model").read_bytes(), kind=kind)
    from llm.data.tokenizer.backend import load_backend

    return load_backend(folder, kind)
