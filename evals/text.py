"""The documents of an evaluation: a folder of prepared data, or raw text files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from evals.perplexity import Document
from llm.core.errors import UserError
from llm.data.store import TokenStore, open_split
from llm.data.tokenizer import Tokenizer, load_tokenizer


@dataclass
class TextSet:
    """documents: tokens of the model's tokenizer. name: what to call it. n_bytes: raw UTF-8 bytes of all documents."""

    name: str
    documents: list[Document]
    n_bytes: int
    source: Path
    texts: list[bytes] | None = None

    @cached_property
    def raw(self) -> bytes:
        """All documents' bytes one after another."""
        if self.texts is not None:
            return b"".join(self.texts)
        return self.source.read_bytes()


def open_text(
    paths: Sequence[str | Path], tokenizer: Tokenizer, *, split: str = "valid", max_documents: int | None = None
) -> TextSet:
    """A split of one folder of prepared data, or text files (each is a document), in the model's tokens.

    UserError when a path is missing, is not UTF-8, or holds nothing.
    """
    if not paths:
        raise UserError("nothing to evaluate: give a folder of prepared data or text files")
    for path in map(Path, paths):
        if not path.exists() and not Path(f"{path}.idx").is_file():
            raise UserError(f"no such file or folder: {path}; give a folder of prepared data or UTF-8 text files")
    folders = [Path(path) for path in paths if Path(path).is_dir()]
    if folders and len(paths) > 1:
        raise UserError(
            f"give one folder of prepared data, or text files; given {len(paths)} paths, "
            f"among them the folder {folders[0]}"
        )
    found = (
        _prepared(folders[0], tokenizer, split, max_documents)
        if folders
        else _files([Path(p) for p in paths], tokenizer)
    )
    if not found.n_bytes:
        raise UserError(f"nothing to evaluate in {found.name}: it holds no text")
    return found


def _files(paths: list[Path], tokenizer: Tokenizer) -> TextSet:
    texts: list[bytes] = []
    documents: list[Document] = []
    for path in paths:
        try:
            data = path.read_bytes()
            text = data.decode("utf-8")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not valid UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}"
            ) from error
        texts.append(data)
        documents.append(_document(text, len(data), tokenizer))
    name = str(paths[0]) if len(paths) == 1 else f"{len(paths)} files"
    return TextSet(name, documents, sum(map(len, texts)), paths[0], texts)


def _document(text: str, n_bytes: int, tokenizer: Tokenizer) -> Document:
    return Document(np.array([*tokenizer.encode(text), tokenizer.eos_id], dtype=np.int64), n_bytes)


def _prepared(folder: Path, tokenizer: Tokenizer, split: str, max_documents: int | None) -> TextSet:
    store = open_split(folder, split)
    made_with = load_tokenizer(folder)
    count = len(store) if max_documents is None else min(max_documents, len(store))
    name = f"{folder} ({split})"
    if made_with.hash == tokenizer.hash:
        sizes = tokenizer.token_bytes()
        documents = [_stored(store, i, sizes) for i in range(count)]
    else:
        texts = [made_with.decode(store.document(i).tolist()) for i in range(count)]
        documents = [_document(text, len(text.encode()), tokenizer) for text in texts]
    raw = folder / f"{split}.raw"
    if count == len(store) and raw.is_file():
        return TextSet(name, documents, raw.stat().st_size, raw)
    pieces = [made_with.decode_bytes(store.document(i).tolist()) for i in range(count)]
    return TextSet(name, documents, sum(doc.n_bytes for doc in documents), folder, pieces)


def _stored(store: TokenStore, i: int, sizes: np.ndarray) -> Document:
    ids = np.asarray(store.document(i), dtype=np.int64)
    return Document(ids, int(sizes[ids].sum()))
