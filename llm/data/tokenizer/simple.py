"""Tokenizers without training: plain bytes, and characters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from llm.core.errors import UserError
from llm.data.tokenizer.base import END_OF_TEXT, Tokenizer, byte_alphabet, hf_config, kind_file


class BytesTokenizer(Tokenizer):
    """Id = byte; 256 is eos."""

    kind = "bytes"
    vocab_size = 257
    eos_id = 256

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        data = [text.encode() for text in texts]
        lengths = np.fromiter(map(len, data), dtype=np.int64, count=len(data))
        return np.frombuffer(b"".join(data), dtype=np.uint8).astype(np.int32), lengths

    @property
    def special_tokens(self) -> dict[str, int]:
        return {END_OF_TEXT: self.eos_id}

    def _pieces(self) -> list[bytes]:
        return [bytes([byte]) for byte in range(256)] + [b""]

    def files(self) -> dict[str, bytes]:
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Backend

        vocab = {char: byte for byte, char in enumerate(byte_alphabet())}
        backend = Backend(models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
        return {
            "tokenizer.json": backend.to_str(pretty=True).encode(),
            "tokenizer_config.json": hf_config(END_OF_TEXT),
            "kind.json": kind_file(self),
        }


class CharsTokenizer(Tokenizer):
    """Id = place of the character in the sorted alphabet; the last id is eos. A character outside it is an error."""

    kind = "chars"

    def __init__(self, alphabet: Iterable[str]) -> None:
        self.alphabet = sorted(set(alphabet))
        if not self.alphabet:
            raise UserError("tokenizer 'chars' found no characters; give it at least one non-empty document")
        self.vocab_size = len(self.alphabet) + 1
        self.eos_id = len(self.alphabet)
        codes = np.array([ord(char) for char in self.alphabet])
        self._table = np.full(int(codes.max()) + 2, -1, dtype=np.int32)
        self._table[codes] = np.arange(len(codes), dtype=np.int32)

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
        codes = np.frombuffer("".join(texts).encode("utf-32-le"), dtype=np.uint32)
        ids = self._table[np.minimum(codes, len(self._table) - 1)]
        if ids.size and ids.min() < 0:
            char = chr(int(codes[int(ids.argmin())]))
            raise UserError(
                f"character {char!r} is not among the {len(self.alphabet)} characters of this 'chars' tokenizer; "
                "leave it out, or prepare the data with another tokenizer (bytes, bpe)"
            )
        return ids, lengths

    @property
    def special_tokens(self) -> dict[str, int]:
        return {END_OF_TEXT: self.eos_id}

    def _pieces(self) -> list[bytes]:
        return [char.encode() for char in self.alphabet] + [b""]

    def files(self) -> dict[str, bytes]:
        from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Backend

        vocab = {char: i for i, char in enumerate(self.alphabet)} | {END_OF_TEXT: self.eos_id}
        backend = Backend(models.WordLevel(vocab=vocab, unk_token=END_OF_TEXT))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
        return {
            "tokenizer.json": backend.to_str(pretty=True).encode(),
            "tokenizer_config.json": hf_config(END_OF_TEXT),
            "kind.json": kind_file(self),
        }
