"""Export: a Llama- or Qwen3-shaped model of ours -> a folder that transformers loads without our code.

The folder gets its name only after the model that transformers reads from it has computed the same logits as ours.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from llm.checkpoint.hf.build import build_model, check_tensors
from llm.checkpoint.hf.card import model_card
from llm.checkpoint.hf.parity import Parity, check_parity
from llm.checkpoint.hf.shape import hf_config
from llm.checkpoint.hf.weights import Planned, write_sharded
from llm.config.base import Config, Count
from llm.core.errors import UserError
from llm.data.tokenizer import Tokenizer
from llm.models.config import ModelConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HF_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class ExportOptions(Config):
    """dtype: of the written weights. max_shard_bytes: most bytes of one file. overwrite: replace an earlier export.
    title: name in the model card."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    max_shard_bytes: Count = Field(5_000_000_000, ge=1)
    overwrite: bool = False
    title: str | None = None


def export_hf(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: Tokenizer | None,
    out: str | Path,
    options: ExportOptions | None = None,
    *,
    facts: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Parity:
    """Write the folder `out` and prove it; returns how near the two models are.

    tensors: dotted name -> full tensor. facts: lines for the model card. log: told what is going on.
    UserError when the model is not of a known shape (nothing is written then), when `out` holds something, when
    transformers is not installed, and when the logits differ (what was written is removed).
    """
    options = options or ExportOptions()
    out = Path(out)
    family, hf = hf_config(config)
    check_tensors(config.build("meta"), tensors, "the model")
    check_out(out, options.overwrite)
    need_transformers()
    dtype = DTYPES[options.dtype]
    hf |= {"dtype": HF_DTYPES[options.dtype], **special_ids(tokenizer)}
    temporary = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        log(f"writing {family.architecture} ({options.dtype})")
        sources = family.sources(hf, config)
        planned = [Planned(s.name, s.shape, lambda ours=ours: tensors[ours]) for ours, s in sources.items()]  # type: ignore[misc]
        write_sharded(temporary, planned, dtype, options.max_shard_bytes)
        write_json(temporary / "config.json", hf)
        write_json(
            temporary / "generation_config.json", {**special_ids(tokenizer), "do_sample": True, "temperature": 0.8}
        )
        if tokenizer is not None:
            tokenizer.save(temporary)
        log("comparing with the model that transformers reads from it")
        rounded = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        ours = build_model(config, rounded)
        full = build_model(config, tensors) if dtype != torch.float32 else None
        parity = check_parity(ours, temporary, full=full)
        card = model_card(
            options.title or out.name, family, config, hf, parity, dict(facts or {}), tokenizer is not None
        )
        (temporary / "README.md").write_text(card, encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"cannot write the export to {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return parity


def check_out(out: Path, overwrite: bool) -> None:
    """UserError unless the folder may be written."""
    if out.is_file():
        raise UserError(f"{out} is a file; give the name of a folder to write")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise UserError(f"{out} is not empty; give another folder, or overwrite=true to replace an earlier export")
        if not (out / "config.json").is_file():
            raise UserError(f"{out} is not empty and is no earlier export (it has no config.json); give another folder")


def need_transformers() -> None:
    """UserError where transformers is not installed."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError("an export is proved by loading it in transformers: pip install 'manyformer[hf]'") from error


def special_ids(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Token ids of a config.json."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return {"bos_token_id": tokenizer.start_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
