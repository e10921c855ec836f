"""Words and background for the prompts, from texts that every machine has: the docstrings of the standard library."""

from __future__ import annotations

import ast
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from llm.core.errors import UserError

MIN_SENTENCES = 20
MIN_WORDS = 200
LONGEST = 30
"""Words of a sentence."""
MAX_WORDS = 6000
"""More are not looked at: finding those that contain one another takes quadratic time."""


@dataclass(frozen=True)
class Background:
    """sentences: of the essays, in order. words: lower-case words, no one part of another, the frequent ones first."""

    sentences: tuple[str, ...]
    words: tuple[str, ...]


@lru_cache(maxsize=4)
def read_background(paths: tuple[str, ...] = ()) -> Background:
    """From UTF-8 files, or from the standard library where none is given. UserError for files that cannot be read or
    hold too little."""
    texts = list(_files(paths) if paths else _docstrings())
    sentences = [sentence for text in texts for sentence in split_sentences(text)]
    counts = Counter(word for text in texts for word in re.findall(r"(?<![\\\w.])[a-z]{4,9}\b", text))
    frequent = sorted((word for word in counts if counts[word] > 1), key=lambda word: (-counts[word], word))
    words = _separate(frequent[:MAX_WORDS])
    if len(sentences) < MIN_SENTENCES or len(words) < MIN_WORDS:
        raise UserError(
            f"essays hold {len(sentences)} sentences and {len(words)} usable words; give texts with at least "
            f"{MIN_SENTENCES} and {MIN_WORDS}, or none for the standard library's docstrings"
        )
    return Background(tuple(sentences), tuple(words))


def split_sentences(text: str) -> list[str]:
    """Sentences, each on one line, long ones cut; pieces of fewer than three words are left out."""
    flat = re.sub(r"\s+", " ", text)
    sentences = [piece.split() for piece in re.split(r"(?<=[.!?]) ", flat)]
    pieces = [words[i : i + LONGEST] for words in sentences for i in range(0, len(words), LONGEST)]
    return [" ".join(words) for words in pieces if len(words) >= 3]


def _files(paths: Sequence[str]) -> Iterator[str]:
    for path in paths:
        try:
            yield Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the essay {path}: {error}") from error


def _docstrings() -> Iterator[str]:
    """All docstrings of each module of the standard library; modules are parsed, not run."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        yield ". ".join(text.rstrip(" .\n") for text in found if text) + "."


def _separate(words: Sequence[str]) -> list[str]:
    """Those that neither contain an earlier one nor stand in one."""
    kept: list[str] = []
    joined = "\n"
    parts: set[str] = set()
    for word in words:
        pieces = {word[i:j] for i in range(len(word)) for j in range(i + 4, len(word) + 1)}
        if word in joined or pieces & parts:
            continue
        kept.append(word)
        parts.add(word)
        joined += word + "\n"
    return kept
