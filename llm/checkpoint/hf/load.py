"""Import: a local folder in Hugging Face's layout -> our config and tensors. Nothing is unpickled or fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from llm.checkpoint.hf.build import check_tensors
from llm.checkpoint.hf.families import Family, Source, family_of
from llm.checkpoint.hf.weights import Weights, read_json
from llm.config.load import validate
from llm.core.errors import UserError
from llm.core.init import clean_name
from llm.models.config import ModelConfig


def is_hf_folder(path: Path) -> bool:
    """Whether a folder looks like a Hugging Face model and not like a run of ours."""
    return (path / "config.json").is_file() and not (path / "config.yaml").exists()


def load_hf(path: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """(config, our dotted name -> tensor in the dtype of the files) of a Llama, Qwen3, GPT-2 or GPT-NeoX checkpoint, or
    of an export of ours that carries its code (which is not run).

    UserError when the folder lacks something, is damaged, holds pickled weights only, or is of another family, and when
    a tensor is missing, unknown or of a wrong shape.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}; give a local folder with config.json and *.safetensors")
    hf = read_json(folder / "config.json")
    if hf.get("model_type") == "manyformer":
        return _load_own(folder, hf)
    family = family_of(hf)
    try:
        config = validate(ModelConfig, family.to_ours(hf))
    except (TypeError, ArithmeticError) as error:
        raise UserError(f"{folder / 'config.json'}: a value has a wrong type ({error})") from error
    weights = Weights(folder)
    sources = family.sources(hf, config)
    names = _match(folder, family, config, sources, weights)
    return config, _read(folder, sources, weights, names)


def _load_own(folder: Path, hf: dict[str, Any]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Of a folder that `export_remote` wrote, or that transformers saved again."""
    if not isinstance(hf.get("manyformer"), dict):
        raise UserError(f"{folder / 'config.json'} has no section 'manyformer', which holds the model; copy it again")
    config = validate(ModelConfig, hf["manyformer"])
    weights = Weights(folder)
    tensors: dict[str, Tensor] = {}
    for name in weights.names():
        ours = clean_name(name.removeprefix("model."))
        if not name.startswith("model.") or ours in tensors:
            raise UserError(f"{folder}: tensor {name} has no place in an export of ours")
        tensors[ours] = weights[name]
    check_tensors(config.build("meta"), tensors, str(folder))
    return config, tensors


def _match(
    folder: Path, family: Family, config: ModelConfig, sources: dict[str, Source], weights: Weights
) -> dict[str, str]:
    """Their name as the family spells it -> as the files spell it: the outer prefix may be absent."""
    names: dict[str, str] = {}
    for name in weights.names():
        if any(name.endswith(suffix) for suffix in family.ignored):
            continue
        names[name.removeprefix(family.prefix)] = name
    expected = {source.name for source in sources.values()}
    missing = sorted(expected - set(names))
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}; the checkpoint is not complete"
        )
    tied_head = {"lm_head.weight", "embed_out.weight"} if config.head.tied else set()
    unknown = sorted(set(names) - expected - tied_head)
    if unknown:
        raise UserError(
            f"{folder}: {len(unknown)} tensors have no place in a {family.model_type} model, the first is {unknown[0]}"
        )
    return names


def _read(folder: Path, sources: dict[str, Source], weights: Weights, names: dict[str, str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    last: tuple[str, Tensor] | None = None
    for ours, source in sources.items():
        if last is None or last[0] != source.name:
            last = source.name, weights[names[source.name]]
        tensor = last[1]
        if tuple(tensor.shape) != source.shape:
            raise UserError(
                f"{folder}: tensor {names[source.name]} has shape {list(tensor.shape)}, "
                f"config.json asks for {list(source.shape)}"
            )
        if not tensor.is_floating_point():
            raise UserError(
                f"{folder}: tensor {names[source.name]} holds {tensor.dtype}; floating-point weights are expected"
            )
        tensors[ours] = source.take(tensor).contiguous() if source.take is not None else tensor
    return tensors
