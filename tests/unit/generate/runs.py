"""A tiny run on disk, as a training leaves it behind, and data prepared for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm.checkpoint import Checkpointer, TrainState
from llm.config.yaml_io import dump_yaml
from llm.core.init import clean_name, initialise
from llm.data.tokenizer.simple import BytesTokenizer
from llm.models.config import ModelConfig

BLOCK = {"mixer": {"type": "attention", "n_heads": 4, "n_kv_heads": 2}, "channel": "swiglu"}
MODEL: dict[str, Any] = {
    "vocab_size": 257,
    "d_model": 32,
    "max_seq_len": 48,
    "layers": [{"pattern": [BLOCK], "repeat": 2}],
    "init": {"std": 0.3},
}


def write_run(
    folder: Path, *, model: dict[str, Any] | None = None, data: str | None = None, tokenizer: bool = True
) -> Path:
    """A run folder with one checkpoint of a random model over bytes."""
    config = ModelConfig.model_validate(model or MODEL)
    built = config.build("cpu")
    initialise(built, 0)
    tree: dict[str, Any] = {"schema_version": 1, "name": folder.name, "model": config.to_dict()}
    if data is not None:
        tree["data"] = {"path": data}
    tensors = {clean_name(name): p.detach() for name, p in built.named_parameters()}
    checkpointer = Checkpointer(folder / "checkpoints", asynchronous=False, config_yaml=dump_yaml(tree))
    checkpointer.save(TrainState(model=tensors, meta={"tokens": 12}), step=3, tokens=12, kind="final", wait=True)
    if tokenizer:
        BytesTokenizer().save(folder / "tokenizer")
    return folder


def prepare_data(folder: Path, texts: list[str], kind: str = "bytes") -> Path:
    """A folder of prepared data whose documents are all held out but one."""
    from llm.data.prepare.config import PrepareConfig
    from llm.data.prepare.run import prepare

    sources = folder / "texts"
    sources.mkdir(parents=True)
    for number, text in enumerate(texts):
        (sources / f"{number:03d}.txt").write_bytes(text.encode())
    tokenizer = {"kind": kind} if kind in ("bytes", "chars") else {"kind": kind, "vocab_size": 300}
    config = PrepareConfig.model_validate(
        {
            "sources": [{"type": "text", "paths": [str(sources)]}],
            "tokenizer": tokenizer,
            "holdout": {"fraction": 0.6},
            "out": str(folder / "prepared"),
            "workers": 1,
        }
    )
    prepare(config)
    return folder / "prepared"
