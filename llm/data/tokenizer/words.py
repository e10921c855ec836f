"""Fast exact encoding for our byte-level BPE: words are split by Python's `re` and looked up in a bounded table.

A word's tokens never depend on its neighbours, so each distinct word is encoded once by the `tokenizers` model and
then found in a dictionary; the ids of a text are gathered by numpy. Parts with a character whose class is not known
here go the library's own way, with the same ids (tests compare the two).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from llm.data.tokenizer.base import byte_alphabet

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?|[\r\n]+[ \t]*|\s+(?!\S)|\s+"
"""Pre-tokenizer: a word with one sign or space before it; one digit; signs with the line end and indentation that
follow; line ends with the indentation that follows; other white space."""

_RANGES = ((0, 0x530), (0x1E00, 0x20C0), (0x2100, 0x2800))
_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_CUT = re.compile(r"(?<=[A-Za-z0-9])(?=[\n ])")
_MAX_WORDS = 1 << 18
_MAX_CHARS = 1 << 24


def _char_class(first: str) -> str:
    """Inside of a regex class: the characters of `_RANGES` whose Unicode category begins with `first`."""
    parts = []
    for low, high in _RANGES:
        code = low
        while code < high:
            if unicodedata.category(chr(code))[0] != first:
                code += 1
                continue
            start = code
            while code < high and unicodedata.category(chr(code))[0] == first:
                code += 1
            parts.append(f"\\u{start:04x}-\\u{code - 1:04x}")
    return "".join(parts)


def _compile(letters: str, digits: str, space: str) -> re.Pattern[str]:
    return re.compile(
        rf"[^\r\n{letters}{digits}]?[{letters}]+|[{digits}]| ?[^{space}{letters}{digits}]+(?:[\r\n]+[ \t]*)?"
        rf"|[\r\n]+[ \t]*|[{space}]+(?![^{space}])|[{space}]+"
    )


def _unknown() -> re.Pattern[str]:
    """Matches a character whose class is not known for sure: outside `_RANGES`, or not assigned."""
    known = "".join(f"\\u{low:04x}-\\u{high - 1:04x}" for low, high in _RANGES)
    return re.compile(rf"[^{known}]|[{_char_class('C')}]")


class _Table(dict[str, int]):
    """word -> its row; a word that is missing is encoded and given the next row."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model
        self._alphabet = dict(enumerate(byte_alphabet()))
        self.ids: list[int] = []
        self.ends: list[int] = [0]
        self.chars = 0
        self._arrays: tuple[np.ndarray, np.ndarray] | None = None

    def __missing__(self, word: str) -> int:
        row = len(self)
        spelled = word.encode().decode("latin-1").translate(self._alphabet)
        self.ids.extend([token.id for token in self._model.tokenize(spelled)])
        self.ends.append(len(self.ids))
        self.chars += len(word)
        self[word] = row
        self._arrays = None
        return row

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all words one after another [n] int32, offsets of the words [words + 1] int64)."""
        if self._arrays is None:
            self._arrays = np.array(self.ids, dtype=np.int32), np.array(self.ends, dtype=np.int64)
        return self._arrays


class WordEncoder:
    """Encodes texts for a backend whose pre-tokenizer is `PATTERN` and byte-level; the table of words is bounded."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._ascii = _compile("A-Za-z", "0-9", "\t\n\v\f\r ")
        self._full: tuple[re.Pattern[str], re.Pattern[str]] | None = None
        self._table = _Table(backend.model)

    @staticmethod
    def of(backend: Backend, spec: dict[str, Any]) -> WordEncoder | None:
        """An encoder when the tokenizer.json `spec` has exactly the parts that it stands for, else None."""
        model, pre = spec["model"], spec.get("pre_tokenizer") or {}
        parts = pre.get("pretokenizers") or []
        plain_model = model.get("type") == "BPE" and not any(
            model.get(key)
            for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        )
        ours = (
            len(parts) == 2
            and parts[0].get("type") == "Split"
            and parts[0].get("pattern") == {"Regex": PATTERN}
            and parts[0].get("behavior") == "Isolated"
            and not parts[0].get("invert")
            and parts[1].get("type") == "ByteLevel"
            and not parts[1].get("use_regex")
            and not parts[1].get("add_prefix_space")
        )
        special_only = all(token["special"] for token in spec.get("added_tokens", []))
        if plain_model and ours and special_only and spec.get("normalizer") is None:
            return WordEncoder(backend)
        return None

    def _compile_full(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        if self._full is None:
            self._full = _compile(_char_class("L"), _char_class("N"), _SPACE), _unknown()
        return self._full

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all texts one after another [n] int32, number of ids of each text [n_texts] int64)."""
        if len(self._table) > _MAX_WORDS or self._table.chars > _MAX_CHARS:
            self._table = _Table(self._backend.model)
        rows: list[tuple[int, np.ndarray | str]] = []
        for i, text in enumerate(texts):
            if text.isascii():
                rows.append((i, self._look_up(self._ascii, text)))
                continue
            full, unknown = self._compile_full()
            rows += [(i, part if strange else self._look_up(full, part)) for part, strange in _divide(text, unknown)]
        ids, offsets = self._table.arrays()
        lengths = np.zeros(len(texts), dtype=np.int64)
        parts: list[np.ndarray] = []
        for i, row in rows:
            if isinstance(row, str):
                part = np.array(self._backend.encode(row, add_special_tokens=False).ids, dtype=np.int32)
            else:
                part = _gather(ids, offsets, row)
            parts.append(part)
            lengths[i] += len(part)
        return (np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)), lengths

    def _look_up(self, pattern: re.Pattern[str], text: str) -> np.ndarray:
        """Rows of the table for the words of a text."""
        words = pattern.findall(text)
        return np.fromiter(map(self._table.__getitem__, words), dtype=np.int64, count=len(words))


def _divide(text: str, unknown: re.Pattern[str]) -> Iterator[tuple[str, bool]]:
    """Parts of a text, and whether each holds an unknown character; cut where `PATTERN` always cuts."""
    if unknown.search(text) is None:
        yield text, False
        return
    for strange, group in groupby(_CUT.split(text), key=lambda part: unknown.search(part) is not None):
        yield "".join(group), strange


def _gather(ids: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The ids of the words `rows` [n], one word after another."""
    starts = offsets[rows]
    sizes = offsets[rows + 1] - starts
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    return ids[np.repeat(starts - ends + sizes, sizes) + np.arange(total)]
