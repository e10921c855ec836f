"""Sentencepiece BPE and unigram: no normalisation and byte fallback, so that decoding gives back the text."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from llm.core.errors import UserError
from llm.data.tokenizer.base import END_OF_TEXT, Tokenizer, hf_config, kind_file

_SPACE = "\u2581"
"""How sentencepiece writes a blank; the character itself, where a text has it, is given as its three bytes."""
_MAX_SENTENCE = 1 << 14


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model. The ids of one that was trained elsewhere are as they are there."""

    def __init__(self, model: bytes, *, kind: str) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise UserError("a sentencepiece tokenizer needs the library: pip install sentencepiece") from error
        self.kind = kind
        self._model = model
        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"not a sentencepiece model: {str(error).splitlines()[0]}") from error
        self.vocab_size = self._processor.GetPieceSize()
        eos, bos = self._processor.eos_id(), self._processor.bos_id()
        if eos < 0:
            raise UserError("the sentencepiece model has no eos piece; documents end with it")
        self.eos_id, self.bos_id = eos, (bos if bos >= 0 else None)
        self._space_bytes = [self._processor.PieceToId(f"<0x{byte:02X}>") for byte in _SPACE.encode()]

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = self._processor.Encode(list(texts), num_threads=1) if len(texts) else []
        for i, text in enumerate(texts):
            if _SPACE in text:
                ids[i] = self._around_spaces(text)
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        flat = np.empty(int(lengths.sum()), dtype=np.int32)
        at = 0
        for part in ids:
            flat[at : at + len(part)] = part
            at += len(part)
        return flat, lengths

    def _around_spaces(self, text: str) -> list[int]:
        if not self._processor.IsByte(self._space_bytes[0]):
            return self._processor.Encode(text)
        out: list[int] = []
        for i, part in enumerate(text.split(_SPACE)):
            if i:
                out += self._space_bytes
            out += self._processor.Encode(part)
        return out

    @property
    def special_tokens(self) -> dict[str, int]:
        processor = self._processor
        return {processor.IdToPiece(i): i for i in range(self.vocab_size) if processor.IsControl(i)}

    def _pieces(self) -> list[bytes]:
        processor = self._processor
        pieces: list[bytes] = []
        for i in range(self.vocab_size):
            piece = processor.IdToPiece(i)
            if processor.IsByte(i):
                pieces.append(bytes([int(piece[3:5], 16)]))
            elif processor.IsControl(i) or processor.IsUnknown(i) or processor.IsUnused(i):
                pieces.append(b"")
            else:
                pieces.append(piece.replace(_SPACE, " ").encode())
        return pieces

    def files(self) -> dict[str, bytes]:
        files = {
            "tokenizer.model": self._model,
            "tokenizer_config.json": hf_config(
                self._processor.IdToPiece(self.eos_id),
                None if self.bos_id is None else self._processor.IdToPiece(self.bos_id),
            ),
            "kind.json": kind_file(self),
        }
        converted = self._as_backend()
        if converted is not None:
            files["tokenizer.json"] = converted
        return files

    def _as_backend(self) -> bytes | None:
        """The same model as a tokenizer.json, for transformers; None where it would not give the same ids."""
        if self.kind != "sp_unigram":
            return None
        from tokenizers import AddedToken, decoders, models, normalizers
        from tokenizers import Tokenizer as Backend

        processor = self._processor
        vocab = [(processor.IdToPiece(i), processor.GetScore(i)) for i in range(self.vocab_size)]
        backend = Backend(models.Unigram(vocab, unk_id=processor.unk_id(), byte_fallback=True))
        backend.normalizer = normalizers.Replace(" ", _SPACE)
        backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
        special = [i for i in range(self.vocab_size) if processor.IsControl(i) or processor.IsUnknown(i)]
        backend.add_special_tokens([AddedToken(vocab[i][0], special=True, normalized=False) for i in special])
        probe = "def f(x):\n    return x  # the quick brown fox, 3.14\u00e9\n\n"
        same = backend.encode(probe, add_special_tokens=False).ids == processor.Encode(probe)
        return backend.to_str(pretty=True).encode() if same else None


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, model_type: Literal["bpe", "unigram"]
) -> SentencePieceTokenizer:
    """Train with byte fallback, digits apart, all white space kept and no normalisation.

    Raises UserError when the text is too small for vocab_size.
    """
    try:
        import sentencepiece
    except ImportError as error:
        raise UserError("a sentencepiece tokenizer needs the library: pip install sentencepiece") from error
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=_sentences(texts),
            model_writer=out,
            vocab_size=vocab_size,
            model_type=model_type,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            byte_fallback=True,
            character_coverage=0.9995,
            max_sentence_length=_MAX_SENTENCE,
            num_threads=1,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            unk_piece="<unk>",
            eos_piece=END_OF_TEXT,
            minloglevel=2,
            user_defined_symbols=["\n"],
        )
    except RuntimeError as error:
        raise UserError(f"sentencepiece cannot train vocab_size {vocab_size} on this text: {_reason(error)}") from error
    except StopIteration as error:
        raise UserError("sentencepiece got no text to train on") from error
    return SentencePieceTokenizer(out.getvalue(), kind=f"sp_{model_type}")


def _reason(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[-1].strip() or "unknown reason"


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines, those that are too long in parts; the line end is a symbol of its own."""
    for text in texts:
        for line in text.split("\n"):
            for at in range(0, len(line), _MAX_SENTENCE // 4):
                yield line[at : at + _MAX_SENTENCE // 4]
