"""Export of a model of any blocks: the weights, and the code that transformers needs to run them.

The folder gets its name only after a process that does not see this project has computed the same logits from it, at
once and token by token. No more than one copy of the model and one file of weights are in memory at a time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm.checkpoint.hf.build import build_model, check_tensors
from llm.checkpoint.hf.card import remote_card
from llm.checkpoint.hf.export import (
    DTYPES,
    HF_DTYPES,
    ExportOptions,
    check_out,
    need_transformers,
    special_ids,
    write_json,
)
from llm.checkpoint.hf.parity import Parity, check_tokens, compare, logits_of, stepped_logits_of
from llm.checkpoint.hf.remote.bundle import bundle
from llm.checkpoint.hf.remote.elsewhere import run
from llm.checkpoint.hf.weights import Planned, write_sharded
from llm.core.errors import UserError
from llm.core.init import clean_name, init_specs
from llm.data.tokenizer import Tokenizer
from llm.models.config import ModelConfig

CLASSES = {
    "AutoConfig": "configuration_manyformer.ManyformerConfig",
    "AutoModelForCausalLM": "modeling_manyformer.ManyformerForCausalLM",
}
STEPS = 8
"""Tokens of the check that are read one by one."""


def remote_config(config: ModelConfig) -> dict[str, Any]:
    """config.json without token ids and dtype."""
    return {
        "architectures": ["ManyformerForCausalLM"],
        "model_type": "manyformer",
        "auto_map": CLASSES,
        "vocab_size": config.required_vocab_size(),
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.head.tied,
        "use_cache": True,
        "manyformer": config.replace(variant=None).to_dict(),
    }


def export_remote(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: Tokenizer | None,
    out: str | Path,
    options: ExportOptions | None = None,
    *,
    facts: Mapping[str, Any] | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Parity:
    """Write the folder `out` and prove it; arguments and errors as of `export_hf`. tensors: read one at a time."""
    options = options or ExportOptions()
    out = Path(out)
    files = bundle(config)
    check_tensors(config.build("meta"), tensors, "the model")
    check_out(out, options.overwrite)
    need_transformers()
    dtype = DTYPES[options.dtype]
    temporary = out.with_name(f".{out.name}.partial-{os.getpid()}")
    check = out.with_name(f".{out.name}.check-{os.getpid()}")
    for folder in (temporary, check):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        check.mkdir()
        log(f"writing the weights ({options.dtype}) and {len(files)} files of code")
        write_sharded(temporary, list(planned(config, tensors)), dtype, options.max_shard_bytes)
        for name, text in files.items():
            (temporary / name).write_text(text, encoding="utf-8")
        hf = remote_config(config) | {"dtype": HF_DTYPES[options.dtype], **special_ids(tokenizer)}
        write_json(temporary / "config.json", hf)
        write_json(
            temporary / "generation_config.json", {**special_ids(tokenizer), "do_sample": True, "temperature": 0.8}
        )
        if tokenizer is not None:
            tokenizer.save(temporary)
        log("computing the logits here")
        tokens = check_tokens(config.required_vocab_size(), config.max_seq_len)
        ours, stepped, rounding = _our_logits(config, tensors, tokens, dtype)
        log("comparing with those of a process that does not see this project")
        parity = _parity(temporary, check, tokens, ours, stepped, rounding)
        card = remote_card(options.title or out.name, config, hf, parity, dict(facts or {}), tokenizer is not None)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"cannot write the export to {out}: {error.strerror or error}") from error
    finally:
        for folder in (temporary, check):
            shutil.rmtree(folder, ignore_errors=True)
    return parity


def planned(config: ModelConfig, tensors: Mapping[str, Tensor]) -> Iterator[Planned]:
    """What is written: parameters and persistent buffers under the names that they have in transformers' model."""
    model = config.build("meta")
    inits = {name: (tuple(tensor.shape), init) for name, tensor, init in init_specs(model)}
    for name, tensor in model.state_dict().items():
        ours = clean_name(name)
        if ours == "unembed.weight" and config.head.tied:
            continue

        def make(ours: str = ours) -> Tensor:
            if ours in tensors:
                return tensors[ours]
            shape, init = inits[ours]
            return init(shape, torch.Generator())

        yield Planned(f"model.{name}", tuple(tensor.shape), make)


@torch.no_grad()
def _our_logits(
    config: ModelConfig, tensors: Mapping[str, Tensor], tokens: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, float | None]:
    """(logits from the written weights at once, token by token, largest change by rounding over the largest)."""
    model = build_model(config, tensors)
    logits = logits_of(model, tokens)
    if dtype == torch.float32:
        return logits, stepped_logits_of(model, tokens, STEPS), None
    full = logits
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))
    logits = logits_of(model, tokens)
    return logits, stepped_logits_of(model, tokens, STEPS), float((full - logits).abs().max() / logits.abs().max())


def _parity(folder: Path, check: Path, tokens: Tensor, ours: Tensor, stepped: Tensor, rounding: float | None) -> Parity:
    save_file({"tokens": tokens}, check / "tokens.safetensors")
    job = {"folder": str(folder.resolve()), "tokens": str(check.resolve() / "tokens.safetensors"), "steps": STEPS}
    (result,), _ = run([job | {"logits": str(check.resolve() / "logits.safetensors")}])
    if "error" in result:
        raise UserError(
            f"export refused: transformers cannot run what was written ({result['error']}); nothing was kept"
        )
    theirs = load_file(check / "logits.safetensors")
    parity = compare(ours, theirs["logits"], rounding)
    compare(stepped, theirs["cached"], rounding, "of the model reloaded by transformers, token by token,")
    return parity
