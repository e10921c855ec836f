"""Small stores and folders of prepared data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.prepare.config import PrepareConfig
from llm.data.prepare.run import prepare
from llm.data.prepare.source import Context, Holdout, Piece, Reject, SourceConfig
from llm.data.store import TokenStore

EOS = 256


def make_context(**changes: Any) -> Context:
    """A context with small limits."""
    values: dict[str, Any] = {
        "holdout": Holdout(),
        "seed": 0,
        "task_bytes": 4096,
        "piece_bytes": 512,
        "max_record_bytes": 4096,
    }
    return Context(**(values | changes))


def read_all(source: SourceConfig, context: Context) -> tuple[list[tuple[str, str]], list[Reject]]:
    """((split, text) of each document, rejects) over all tasks."""
    documents: list[tuple[str, str]] = []
    rejects: list[Reject] = []
    for task in source.plan(context):
        for item in source.read(task, context):
            if isinstance(item, Reject):
                rejects.append(item)
            elif isinstance(item, Piece):
                assert item.n_bytes == len(item.text.encode())
                if item.first:
                    documents.append((item.split, item.text))
                else:
                    split, text = documents.pop()
                    assert split == item.split
                    documents.append((split, text + item.text))
    return documents, rejects


def prepare_files(folder: Path, texts: list[str], **config: Any) -> dict[str, Any]:
    """Prepare texts, a file each, with the bytes tokenizer unless told otherwise; the data are in folder/out."""
    raw = folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (raw / f"{i:05d}.txt").write_text(text, encoding="utf-8", newline="")
    tree = {
        "sources": {"type": "text", "paths": [str(raw)]},
        "tokenizer": {"kind": "bytes"},
        "out": str(folder / "out"),
        "workers": 1,
    }
    return prepare(PrepareConfig.model_validate(tree | config), quiet=True)


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder of prepared data."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def documents_of(store: TokenStore) -> list[bytes]:
    """Documents of a store made with the bytes tokenizer, without their eos."""
    found = []
    for i in range(len(store)):
        tokens = np.asarray(store.document(i))
        assert tokens[-1] == EOS and (tokens[:-1] < EOS).all()
        found.append(tokens[:-1].astype(np.uint8).tobytes())
    return found


def reject_lines(folder: Path) -> list[dict[str, Any]]:
    """The records of rejects.jsonl."""
    return [json.loads(line) for line in (folder / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]
