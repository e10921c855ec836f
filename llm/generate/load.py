"""Open a trained model: a run, one of its checkpoints, or a folder in Hugging Face's layout."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llm.blocks.linears.dense import let_join
from llm.blocks.linears.packed import let_pack
from llm.checkpoint import StoredTensors, load_model_tensors, resolve_checkpoint
from llm.checkpoint.hf import is_hf_folder, load_hf
from llm.checkpoint.hf.build import build_model
from llm.config.load import read_tree, resolve, validate
from llm.core.errors import UserError
from llm.data.tokenizer import Tokenizer, load_tokenizer
from llm.generate.quantize import Quantize, quantize_model
from llm.models.config import ModelConfig
from llm.models.decoder import Decoder
from llm.models.wrappers.base import Wrapper
from llm.parallel.tensor import Ranks, Shares, share_config, sum_over_ranks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Loaded(NamedTuple):
    """run_config: the resolved config of the run as plain data; empty for a Hugging Face folder."""

    model: Decoder | Wrapper
    tokenizer: Tokenizer
    run_config: dict[str, Any]


def load_model(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer: str | Path | None = None,
    quantize: Quantize = "none",
    pack: bool = True,
    ranks: Ranks | None = None,
) -> Loaded:
    """(model in evaluation mode, tokenizer, run config) of a run folder, a checkpoint or a Hugging Face folder.

    tokenizer: folder of the tokenizer, where it does not lie with the model. quantize: eight bits a weight for the
    model's matrices; what that came to is told on stderr. pack: on a CPU in fp32 keep a second copy of large weights,
    made when a product with 4 to 32 rows first needs it, which makes such products up to several times as fast. ranks:
    processes that share the model, each of which gets its part (llm/parallel/tensor.py).
    UserError when anything is missing, damaged, or does not fit together.
    """
    path = Path(path)
    tensors: Mapping[str, torch.Tensor]
    if is_hf_folder(path):
        config, tensors = load_hf(path)
        tree: dict[str, Any] = {}
        found = load_tokenizer(tokenizer or path)
    else:
        step = resolve_checkpoint(path)
        tree = read_run_config(step)
        tensors = load_model_tensors(step) if ranks is None else StoredTensors(step)
        config = model_config(tree, step, tensors["embed.weight"].shape[0] if "embed.weight" in tensors else None)
        found = load_tokenizer(tokenizer or find_tokenizer(step, tree))
    if found.vocab_size > config.required_vocab_size():
        raise UserError(
            f"the tokenizer has {found.vocab_size} tokens, the model in {path} only {config.vocab_size}; "
            "give the tokenizer that it was trained with as tokenizer=FOLDER"
        )
    if ranks is None:
        model = build_model(config, tensors, device=device, dtype=dtype, source=str(path))
    else:
        share = share_config(config, ranks.size)
        model = build_model(share, Shares(config, tensors, ranks), device=device, dtype=dtype, source=str(path))
        sum_over_ranks(model, config, ranks)
    if quantize != "none":
        print(quantize_model(model, quantize), file=sys.stderr)
    let_join(model)
    if pack:
        let_pack(model)
    return Loaded(model, found, tree)


def read_run_config(step: Path) -> dict[str, Any]:
    """The resolved run config stored with a checkpoint, as plain data in the current schema."""
    return resolve(read_tree(step / "config.yaml", "RunConfig"))


def model_config(tree: dict[str, Any], source: Path, vocab_size: int | None = None) -> ModelConfig:
    """The model section of a run config. vocab_size: what to take where the config leaves it to the tokenizer."""
    if not isinstance(tree.get("model"), dict):
        raise UserError(f"{source / 'config.yaml'} has no model section; is this a checkpoint of a language model?")
    section = dict(tree["model"])
    if section.get("vocab_size") is None:
        section["vocab_size"] = vocab_size
    return validate(ModelConfig, section)


def find_tokenizer(step: Path, tree: dict[str, Any]) -> Path:
    """The folder of a run's tokenizer: with the checkpoint, with the run, or with the data that it was trained on."""
    run = step.parent.parent
    places = [step / "tokenizer", run / "tokenizer", *(Path(name) for name in data_folders(tree))]
    for place in places:
        if (place / "tokenizer.json").is_file() or (place / "kind.json").is_file() or (place / "tokenizer").is_dir():
            return place
    tried = ", ".join(str(place) for place in places)
    raise UserError(f"no tokenizer found for {step} (looked in {tried}); give one as tokenizer=FOLDER")


def data_folders(tree: dict[str, Any]) -> list[str]:
    """Folders of prepared data that a run config names."""
    found: list[str] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                if key in ("path", "folder") and isinstance(value, str):
                    found.append(value)
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(tree.get("data"))
    return found


def pick_device(name: str = "auto") -> torch.device:
    """The device of a name: auto is the GPU where there is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device is {name!r}; allowed: auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no CUDA device here; use device=cpu or device=auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
