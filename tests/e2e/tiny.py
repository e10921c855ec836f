"""The smallest real things that the commands take: a corpus, prepared data, a run config and a trained run."""

from __future__ import annotations

from pathlib import Path

import yaml

SENTENCE = "The quick brown fox number {} jumps over the lazy dog; the dog sleeps on, and the fox runs home.\n"


def write_corpus(folder: Path, n_files: int = 12) -> Path:
    """Small text files in a new folder."""
    folder.mkdir(parents=True)
    for number in range(n_files):
        (folder / f"{number:02}.txt").write_text("".join(SENTENCE.format(number * 10 + i) for i in range(8)))
    return folder


def write_yaml(path: Path, tree: object) -> Path:
    """A config file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def run_tree(data: Path, runs_dir: Path, name: str = "tiny") -> dict:
    """Four steps of a model of about 6,000 parameters, fp32 on the CPU, a checkpoint every second step."""
    return {
        "name": name,
        "runs_dir": str(runs_dir),
        "model": {
            "d_model": 16,
            "max_seq_len": 32,
            "layers": [
                {
                    "pattern": [{"mixer": {"type": "attention", "n_heads": 2}, "channel": {"type": "swiglu"}}],
                    "repeat": 1,
                }
            ],
        },
        "data": {"path": str(data), "seq_len": 32},
        "train": {
            "steps": 4,
            "batch_tokens": 128,
            "micro_batch_size": 2,
            "precision": "fp32",
            "device": "cpu",
            "log_every": 1,
        },
        "optim": {"lr": 0.01},
        "checkpoint": {"every_steps": 2, "asynchronous": False},
        "eval": {"batches": 2},
        "log": {"progress": False, "report": False},
    }


def prepare_tree(corpus: Path, out: Path) -> dict:
    """Bytes as tokens, a quarter of the files held out."""
    return {
        "sources": [{"type": "text", "paths": [str(corpus)]}],
        "tokenizer": {"kind": "bytes"},
        "holdout": {"fraction": 0.25},
        "out": str(out),
        "workers": 1,
    }
