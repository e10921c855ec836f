"""What a bad input is made of: a case, the good things that it spoils a copy of, and ways to spoil."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml

from launch import cli as program
from tests.e2e.tiny import prepare_tree, write_corpus, write_yaml

Make = Callable[["World", Path], None]


@dataclass(frozen=True)
class World:
    """Good things, made once."""

    text: Path
    data: Path
    base: Path
    run: Path
    prepare: Path


@dataclass(frozen=True)
class Case:
    """says: pieces of the message. make: prepares files below $TMP. stdin: what is piped in. lines: of the message."""

    id: str
    argv: str | list[str]
    says: list[str]
    make: Make | None = None
    env: dict[str, str] = field(default_factory=dict)
    stdin: bytes | None = None
    lines: int = 1
    needs: Callable[[], bool] = lambda: True


def text_file(name: str, content: str | bytes) -> Make:
    def make(world: World, tmp: Path) -> None:
        (tmp / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def spoiled_data(spoil: Callable[[Path], None]) -> Make:
    """A copy of the prepared data at $TMP/data, then spoiled."""

    def make(world: World, tmp: Path) -> None:
        shutil.copytree(world.data, tmp / "data")
        spoil(tmp / "data")

    return make


def spoiled_run(spoil: Callable[[Path], None]) -> Make:
    """A copy of the run at $TMP/runs/tiny, then spoiled."""

    def make(world: World, tmp: Path) -> None:
        shutil.copytree(world.run, tmp / "runs" / "tiny")
        spoil(tmp / "runs" / "tiny")

    return make


def truncate(path: Path, n_bytes: int = 10) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-n_bytes])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def damage_all(run: Path) -> None:
    for path in (run / "checkpoints").glob("step-*/model/*"):
        flip(path)


def other_corpus(world: World, tmp: Path) -> None:
    """The run beside data prepared from another text."""
    shutil.copytree(world.run, tmp / "runs" / "tiny")
    corpus = write_corpus(tmp / "other", n_files=5)
    call("prepare", str(write_yaml(tmp / "p.yaml", prepare_tree(corpus, tmp / "data"))))


def no_holdout(world: World, tmp: Path) -> None:
    tree = prepare_tree(world.text, tmp / "data")
    del tree["holdout"]
    call("prepare", str(write_yaml(tmp / "p.yaml", tree)))


def hf_folder(spoil: Callable[[Path], None]) -> Make:
    """A small Llama of transformers' own making at $TMP/hf, then spoiled."""

    def make(world: World, tmp: Path) -> None:
        folder = tmp / "hf"
        folder.mkdir()
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 16,
            "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": 300,
            "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
            "hidden_act": "silu",
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        spoil(folder)

    return make


def pickled_weights(folder: Path) -> None:
    torch.save({"x": torch.zeros(2)}, folder / "pytorch_model.bin")


def short_safetensors(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({"model.embed_tokens.weight": torch.zeros(300, 8)}, folder / "model.safetensors")
    truncate(folder / "model.safetensors", 100)


def layers(mixer: str, channel: str = "swiglu") -> str:
    return f"model.layers=[{{pattern: [{{mixer: {mixer}, channel: {channel}}}], repeat: 1}}]"


def rewritten(world: World, tmp: Path, change: Callable[[dict], None]) -> None:
    tree = yaml.safe_load(world.base.read_text())
    change(tree)
    write_yaml(tmp / "x.yaml", tree)


def call(*argv: str) -> int:
    """A command in this process; its exit code."""
    with pytest.raises(SystemExit) as ended:
        program.main(argv)
    code = ended.value.code
    return code if isinstance(code, int) else int(code is not None)
