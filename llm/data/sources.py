"""Opening the sources of a DataConfig: stores, their tokenizer, and whether all of it belongs together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from llm.core.errors import UserError
from llm.data.config import DataConfig
from llm.data.store import TokenStore, open_split, read_manifest
from llm.data.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class OpenSource:
    """A store with the tokenizer that made it."""

    store: TokenStore
    tokenizer: Tokenizer


def open_sources(config: DataConfig, split: str) -> list[OpenSource]:
    """Open one split of every source; UserError names the first thing that is missing or does not fit."""
    opened: list[OpenSource] = []
    for spec in config.all_sources:
        store = _open_store(spec.path, split)
        if config.verify:
            store.verify()
        tokenizer = _tokenizer_of(config, spec.path)
        if opened and tokenizer.hash != opened[0].tokenizer.hash:
            raise UserError(
                f"{spec.path} was prepared with another tokenizer ({tokenizer.hash[:12]}) than "
                f"{config.all_sources[0].path} ({opened[0].tokenizer.hash[:12]}); "
                "prepare both with the same one (tokenizer.path)"
            )
        opened.append(OpenSource(store, tokenizer))
    return opened


def has_split(config: DataConfig, split: str) -> bool:
    """True when every source has documents in this split."""
    for spec in config.all_sources:
        if _is_prefix(spec.path):
            if split != "train":
                return False
            continue
        manifest = read_manifest(spec.path)
        assert manifest is not None
        if not manifest["splits"].get(split, {}).get("documents"):
            return False
    return True


def _is_prefix(path: str) -> bool:
    return not Path(path).is_dir() and Path(f"{path}.idx").is_file()


def _open_store(path: str, split: str) -> TokenStore:
    if not _is_prefix(path):
        return open_split(path, split)
    if split != "train":
        raise UserError(
            f"{path} is a single store, which has no split {split!r}; only split 'train' can be read from it"
        )
    return TokenStore(path)


def _tokenizer_of(config: DataConfig, path: str) -> Tokenizer:
    if _is_prefix(path):
        if config.tokenizer is None:
            raise UserError(f"{path} is a bare Megatron store: name the folder of its tokenizer with data.tokenizer")
        return _load(config.tokenizer)
    if config.tokenizer is not None:
        raise UserError(
            f"data.tokenizer would be ignored: {path} was prepared with a tokenizer of its own; leave it out"
        )
    tokenizer = _load(path)
    manifest = read_manifest(path)
    assert manifest is not None
    expected = manifest["tokenizer"]["hash"]
    if tokenizer.hash != expected:
        raise UserError(
            f"{path}/tokenizer is not the tokenizer these data were made with (hash {tokenizer.hash[:12]}, "
            f"the manifest says {expected[:12]}); restore it or prepare the data again"
        )
    return tokenizer


def _load(folder: str) -> Tokenizer:
    base = Path(folder).resolve()
    files = [path for path in (*base.glob("*.json"), *(base / "tokenizer").glob("*")) if path.is_file()]
    return _load_once(str(base), max((path.stat().st_mtime_ns for path in files), default=0))


@lru_cache(maxsize=8)
def _load_once(folder: str, changed: int) -> Tokenizer:
    """changed: time of the newest file, so that a folder that was written anew is read anew."""
    return load_tokenizer(folder)
