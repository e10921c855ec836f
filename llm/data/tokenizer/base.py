"""What every tokenizer can do, and the files it is saved in."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

END_OF_TEXT = "<|endoftext|>"
KIND_FILE = "kind.json"
_HASHED = ("tokenizer.json", "tokenizer.model", KIND_FILE)


class Tokenizer(ABC):
    """Text <-> token ids. `eos_id` ends every document; `start_id` is what a document's first token is predicted from.

    kind: name under which it is saved.  vocab_size: ids are below it.  bos_id: None where there is no token of its own.
    """

    kind: str
    vocab_size: int
    eos_id: int
    bos_id: int | None = None

    @property
    def start_id(self) -> int:
        """Id that stands before the first token of a document: bos where there is one, else eos."""
        return self.eos_id if self.bos_id is None else self.bos_id

    @abstractmethod
    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all texts one after another [n_ids] int32, lengths [n_texts] int64), without special tokens."""

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without special tokens; special tokens that are spelt out in the text are plain text."""
        return self.encode_flat([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts."""
        flat, lengths = self.encode_flat(texts)
        return [part.tolist() for part in np.split(flat, np.cumsum(lengths)[:-1])] if len(texts) else []

    @property
    @abstractmethod
    def special_tokens(self) -> dict[str, int]:
        """Ids of the special tokens by their spelling; `encode` gives none of them."""

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes that each token stands for [vocab_size]; b"" for special tokens."""
        return self._pieces()

    @abstractmethod
    def _pieces(self) -> list[bytes]: ...

    def token_bytes(self) -> np.ndarray:
        """Number of UTF-8 bytes that each token stands for, [vocab_size] int32; 0 for special tokens."""
        return np.fromiter(map(len, self.pieces), dtype=np.int32, count=self.vocab_size)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes that the ids stand for; special tokens give nothing."""
        pieces = self.pieces
        return b"".join([pieces[i] for i in (ids.tolist() if isinstance(ids, np.ndarray) else ids)])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids, special tokens left out; bytes that are not valid UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """The files it is saved in, by name: Hugging Face's layout and `kind.json`."""

    @cached_property
    def hash(self) -> str:
        """sha256 of the files that determine the ids."""
        digest = hashlib.sha256()
        files = self.files()
        for name in _HASHED:
            if name in files:
                digest.update(name.encode() + b"\0" + hashlib.sha256(files[name]).digest())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write the files into `folder`, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (folder / name).write_bytes(content)


def to_json(value: Any) -> bytes:
    """JSON text, always the same for the same value."""
    return (json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()


def kind_file(tokenizer: Tokenizer) -> bytes:
    """Content of `kind.json`."""
    return to_json(
        {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "bos_id": tokenizer.bos_id,
        }
    )


def hf_config(eos: str, bos: str | None = None) -> bytes:
    """Content of `tokenizer_config.json`, by which transformers' AutoTokenizer finds the special tokens."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    if bos is not None:
        config["bos_token"] = bos
    return to_json(config)


def byte_alphabet() -> list[str]:
    """The printable character that byte-level BPE writes for each of the 256 bytes (Radford et al. 2019, GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    return [table[byte] for byte in range(256)]
