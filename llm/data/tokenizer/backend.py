"""Tokenizers that live in a `tokenizer.json`: our byte-level BPE, and any Hugging Face tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm.core.errors import UserError
from llm.data.tokenizer.base import END_OF_TEXT, Tokenizer, byte_alphabet, hf_config, kind_file, to_json
from llm.data.tokenizer.words import PATTERN, WordEncoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


class BackendTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, without its post-processor: no special token is added to a text."""

    def __init__(
        self, backend: Backend, *, kind: str, eos: str, bos: str | None = None, config: bytes | None = None
    ) -> None:
        self.kind = kind
        self._eos, self._bos = eos, bos
        self._backend = backend
        self._config = config or hf_config(eos, bos)
        self._json = backend.to_str(pretty=True).encode()
        self._spec = json.loads(self._json)
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self.eos_id = self._id(vocab, eos, "eos")
        self.bos_id = None if bos is None or bos == eos else self._id(vocab, bos, "bos")
        self._vocab = vocab
        self._words = WordEncoder.of(backend, self._spec)

    @staticmethod
    def _id(vocab: dict[str, int], token: str, name: str) -> int:
        if token not in vocab:
            raise UserError(f"the tokenizer has no token {token!r}, which was given as its {name} token")
        return vocab[token]

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if self._words is not None:
            return self._words.encode_flat(texts)
        ids = [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        flat = np.empty(int(lengths.sum()), dtype=np.int32)
        at = 0
        for part in ids:
            flat[at : at + len(part)] = part
            at += len(part)
        return flat, lengths

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        if self._byte_level:
            return super().decode(ids)
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    @property
    def _byte_level(self) -> bool:
        return _uses(self._spec.get("decoder"), "ByteLevel")

    @property
    def special_tokens(self) -> dict[str, int]:
        added = self._spec.get("added_tokens", [])
        return {token["content"]: token["id"] for token in added if token["special"]}

    def _pieces(self) -> list[bytes]:
        pieces = [b""] * self.vocab_size
        byte_of = {char: byte for byte, char in enumerate(byte_alphabet())}
        added = {token["content"]: token["special"] for token in self._spec.get("added_tokens", [])}
        word_piece = (self._spec["model"].get("type") == "WordPiece") and self._spec["model"].get(
            "continuing_subword_prefix", "##"
        )
        metaspace = _uses(self._spec.get("decoder"), "Metaspace") or "▁" in json.dumps(
            self._spec.get("decoder"), ensure_ascii=False
        )
        for token, i in self._vocab.items():
            if token in added:
                pieces[i] = b"" if added[token] else token.encode()
            elif self._byte_level and all(char in byte_of for char in token):
                pieces[i] = bytes([byte_of[char] for char in token])
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                pieces[i] = bytes([int(token[3:5], 16)])
            elif word_piece:
                pieces[i] = token.removeprefix(word_piece).encode()
            else:
                pieces[i] = (token.replace("▁", " ") if metaspace else token).encode()
        return pieces

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self._json, "tokenizer_config.json": self._config, "kind.json": kind_file(self)}


def _uses(spec: Any, name: str) -> bool:
    """True when a component of a tokenizer.json, or one nested in it, has this type."""
    if isinstance(spec, dict):
        return spec.get("type") == name or any(_uses(value, name) for value in spec.values())
    return isinstance(spec, list) and any(_uses(value, name) for value in spec)


def train_bpe(texts: Iterable[str], vocab_size: int) -> BackendTokenizer:
    """Byte-level BPE without normalisation, so that decoding gives back the text; digits stand alone."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    if vocab_size < 257:
        raise UserError(f"tokenizer.vocab_size is {vocab_size}; byte-level BPE needs at least 257 (256 bytes and eos)")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(byte_alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return BackendTokenizer(backend, kind="bpe", eos=END_OF_TEXT)


def load_backend(folder: Path, kind: str) -> BackendTokenizer:
    """Open a folder in Hugging Face's layout: `tokenizer.json`, and `tokenizer_config.json` for the special tokens."""
    from tokenizers import Tokenizer as Backend

    path = folder / "tokenizer.json"
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:
        raise UserError(f"cannot read the tokenizer {path}: {error}") from error
    config_path = folder / "tokenizer_config.json"
    config = config_path.read_bytes() if config_path.exists() else None
    names: dict[str, Any] = json.loads(config) if config else {}
    template_path = folder / "chat_template.jinja"
    if config is not None and template_path.exists():
        config = to_json(names | {"chat_template": template_path.read_text(encoding="utf-8")})
    special_path = folder / "special_tokens_map.json"
    if special_path.exists():
        names = json.loads(special_path.read_bytes()) | {k: v for k, v in names.items() if v is not None}
    eos, bos = _content(names.get("eos_token")), _content(names.get("bos_token"))
    if eos is None:
        raise UserError(
            f"the tokenizer in {folder} names no eos_token in tokenizer_config.json; add one: documents end with it"
        )
    return BackendTokenizer(backend, kind=kind, eos=eos, bos=bos, config=config)


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def fetch_hf(name: str, scratch: Path) -> BackendTokenizer:
    """Any Hugging Face tokenizer by local folder or hub name; code that a repository may carry is never run."""
    local = Path(name)
    if (local / "tokenizer.json").exists():
        return load_backend(local, "hf")
    if local.exists() or os.sep in name.strip(os.sep).replace("/", "", 1):
        if not local.is_dir():
            raise UserError(
                f"tokenizer.path {name!r} is neither a folder with a tokenizer nor a name on the Hugging Face hub"
            )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UserError(
            f"tokenizer {name!r} needs transformers: pip install transformers, or give a folder with tokenizer.json"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot open the tokenizer {name!r}: {reason}") from error
    tokenizer.save_pretrained(scratch)
    if not (scratch / "tokenizer.json").exists():
        raise UserError(f"the tokenizer {name!r} has no tokenizer.json form, which is the only one that can be used")
    return load_backend(scratch, "hf")
