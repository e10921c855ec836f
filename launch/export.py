"""usage: python launch/export.py RUN OUT [key=value ...]
       python launch/export.py import HF_FOLDER RUN [name=NAME]

Write a trained model as a folder for Hugging Face transformers: safetensors, config, generation config, tokenizer and a
model card. A model of Llama's or Qwen3's shape becomes a plain one of theirs; any other takes its code along, which
transformers runs without this project (trust_remote_code=True). The export is refused if the model that transformers
reads from it computes other logits. RUN is a run folder or one of its checkpoints. A nested model is cut to an ordinary
one first, whole or at the width that slice= names; format=run writes a run folder with one checkpoint instead.

`import` goes the other way: a local folder of a Llama, Qwen3, GPT-2 or GPT-NeoX (Pythia) checkpoint, or an export of
any kind, becomes a run folder with one checkpoint, which train (checkpoint.init_from), generate, evaluate and export
take. Only safetensors are read, and no code of the folder is run.

keys:
  dtype=fp32            of the written weights: fp32 or bf16
  max_shard_bytes=5B    most bytes of one file
  overwrite=false       replace an earlier export
  remote_code=auto      take the code along: auto (where the shape is not a plain one), never or always
  title=                name in the model card
  tokenizer=            folder of the tokenizer, if it does not lie with the model
  format=hf             or run: a run folder, which train (checkpoint.init_from), generate and evaluate take
  slice=                of a nested model: share of its hidden units such as 1/4, or a list with one per layer
  widths=               the same in hidden units

examples:
  python launch/export.py runs/quickstart exports/quickstart dtype=bf16
  python launch/export.py runs/nested runs/nested-small format=run slice=1/4
  python launch/export.py import ~/models/Llama-3.2-1B runs/llama-3.2-1b
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from launch._cli import Parser, run
from llm.checkpoint.hf.export import ExportOptions
from llm.config.base import Config
from llm.config.load import load_config
from llm.core.errors import UserError
from llm.models.nesting import SliceOptions, slice_suffix

if TYPE_CHECKING:
    from torch import Tensor


class ExportCommandOptions(ExportOptions, SliceOptions):
    """The keys of this command."""

    format: Literal["hf", "run"] = "hf"
    remote_code: Literal["auto", "never", "always"] = "auto"
    tokenizer: str | None = None

    @model_validator(mode="after")
    def _nothing_ignored(self) -> ExportCommandOptions:
        changed = ["remote_code"] if self.remote_code != "auto" else []
        changed += [name for name, field in ExportOptions.model_fields.items() if getattr(self, name) != field.default]
        if self.format == "run" and changed:
            raise UserError(f"{changed[0]} has no effect with format=run; remove it")
        return self


class ImportOptions(Config):
    """The keys of `import`. name: of the run (default: its folder's)."""

    name: str | None = None
    tokenizer: str | None = None


def main(argv: list[str]) -> None:
    """Run the command."""
    parser = Parser(prog="export")
    parser.add_argument("words", nargs="*")
    flags = [word for word in argv if word.startswith("-")]
    words = parser.parse_args([*flags, "--", *(word for word in argv if not word.startswith("-"))]).words
    paths = [word for word in words if "=" not in word]
    keys = [word for word in words if "=" in word]
    if paths[:1] == ["import"]:
        if len(paths) != 3:
            raise UserError(
                f"import takes the Hugging Face folder and the run folder to write; "
                f"given {len(paths) - 1} paths (see --help)"
            )
        import_hf(Path(paths[1]), Path(paths[2]), load_config(ImportOptions, keys))
        return
    if len(paths) != 2:
        raise UserError(f"export takes a run and the folder to write; given {len(paths)} paths (see --help)")
    export(Path(paths[0]), Path(paths[1]), load_config(ExportCommandOptions, keys))


def export(run_path: Path, out: Path, options: ExportCommandOptions) -> None:
    """Export a run; prints the parity figures, or where the new run is, as a JSON line."""
    from llm.checkpoint import StoredTensors, load_meta, resolve_checkpoint
    from llm.checkpoint.hf.export import export_hf
    from llm.checkpoint.hf.remote.export import export_remote
    from llm.checkpoint.hf.shape import hf_config
    from llm.data.tokenizer import load_tokenizer
    from llm.generate.load import find_tokenizer, model_config, read_run_config
    from llm.models.extract import extract
    from llm.models.nesting import whole_widths

    step = resolve_checkpoint(run_path)
    tree = read_run_config(step)
    tensors: Mapping[str, Tensor] = StoredTensors(step)
    config = model_config(tree, step, tensors["embed.weight"].shape[0] if "embed.weight" in tensors else None)
    widths = options.of(config)
    if whole_widths(config):
        config, tensors = extract(config, tensors, widths)
    tokenizer = load_tokenizer(options.tokenizer or find_tokenizer(step, tree))
    meta = load_meta(step)
    if options.format == "run":
        origin = {"exported_from": str(step), "widths": widths}
        _write_run(out, out.name, config, dict(tensors), tokenizer, origin, data=tree.get("data"))
        print(json.dumps({"export": str(run_path), "run": str(out), "params": config.cost().total.params}))
        return
    facts: dict[str, Any] = {"run": tree.get("name", run_path.name), "checkpoint": step.name}
    if isinstance(meta.get("tokens"), int):
        facts["tokens seen in training"] = f"{meta['tokens']:,}"
    evaluated = step.parent.parent / f"evaluate{slice_suffix(widths)}.json"
    if evaluated.is_file():
        found = json.loads(evaluated.read_text())
        facts["held-out bits per byte"] = f"{found['bits_per_byte']:.4f} ({found['data']})"
    chosen = ExportOptions(**{name: getattr(options, name) for name in ExportOptions.model_fields})
    plain = options.remote_code != "always"
    if options.remote_code == "auto":
        try:
            hf_config(config)
        except UserError as reason:
            plain = False
            print(
                f"not a plain model, its code goes along ({str(reason).removeprefix('cannot export: ')})",
                file=sys.stderr,
            )
    write = export_hf if plain else export_remote
    parity = write(config, tensors, tokenizer, out, chosen, facts=facts, log=lambda line: print(line, file=sys.stderr))
    print(json.dumps({"export": str(out), **parity.to_dict()}))


def import_hf(folder: Path, out: Path, options: ImportOptions) -> None:
    """Import a Hugging Face folder as a run with one checkpoint at step 0."""
    from llm.checkpoint.hf import load_hf
    from llm.data.tokenizer import load_tokenizer

    _check_new(out)
    config, tensors = load_hf(folder)
    tokenizer = load_tokenizer(options.tokenizer or folder)
    if tokenizer.vocab_size > config.required_vocab_size():
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model in {folder} only {config.vocab_size}; "
            "give its own as tokenizer=FOLDER"
        )
    _write_run(out, options.name or out.name, config, tensors, tokenizer, {"imported_from": str(folder)})
    print(json.dumps({"import": str(folder), "run": str(out), "params": config.cost().total.params}))


def _check_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; give the name of a new run folder")


def _write_run(
    out: Path, name: str, config: Any, tensors: Any, tokenizer: Any, meta: dict[str, Any], *, data: Any = None
) -> None:
    """A run folder with one checkpoint at step 0. data: the section of the run config that names the data."""
    from llm.checkpoint import Checkpointer, TrainState
    from llm.config.migrations import VERSION_KEY, current_version
    from llm.config.yaml_io import dump_yaml

    _check_new(out)
    tree = {VERSION_KEY: current_version("RunConfig"), "name": name, "model": config.to_dict()}
    tree |= {} if data is None else {"data": data}
    checkpointer = Checkpointer(out / "checkpoints", asynchronous=False, config_yaml=dump_yaml(tree))
    state = TrainState(model=tensors, meta={"step": 0, "tokens": 0, **meta})
    checkpointer.save(state, step=0, tokens=0, kind="keep", wait=True)
    tokenizer.save(out / "tokenizer")


if __name__ == "__main__":
    run(main, prog="export", doc=__doc__)
