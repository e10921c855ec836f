"""usage: python launch/grow.py RUN OUT n_tokens=N [key=value ...]

Give a trained TokenFormer more parameter tokens: a new run folder OUT with one checkpoint, whose model computes what
the old one does. New tokens have keys of zero, and the stored scale stays; the command compares the logits of both
models on random tokens, and writes nothing if they differ. Optimizer state is carried over, zeros for the new tokens.
RUN is a run folder or one of its checkpoints.

To go on as one run, with the optimizer, the position in the data and the step count that it had:
  manyformer train OUT/config.yaml train.steps=...
To start a run of its own from the grown weights, with a new schedule: take the model section of OUT/config.yaml and
  checkpoint.init_from=OUT

keys:
  n_tokens=             parameter tokens of each pattention linear
  ffn_tokens=           of each token_ffn channel (default: in the ratio of the linears)
  tau=keep              the stored scale; sqrt_n sets it to the root of the new number, as the released code does
  new_keys=zero         random: as at the start of a training, as the released code does
  exact=true            false writes the model although outputs change, as tau=sqrt_n, new_keys=random or a softmax make
  name=                 of the new run (default: its folder's)

examples:
  python launch/grow.py runs/small runs/large n_tokens=1536
  python launch/grow.py runs/small/checkpoints/step-000060000 runs/large n_tokens=1536 ffn_tokens=8192
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
from typing import Any

from pydantic import Field

from launch._cli import Parser, run
from llm.config.base import Config
from llm.config.load import load_config
from llm.core.errors import UserError
from llm.models.growth import NewKeys, Scale

TOLERANCE = 1e-5
"""Largest difference of logits, relative to the largest of them, that rounding in fp32 explains."""


class GrowOptions(Config):
    """The keys of this command."""

    n_tokens: int | None = Field(None, ge=1)
    ffn_tokens: int | None = Field(None, ge=1)
    tau: Scale = "keep"
    new_keys: NewKeys = "zero"
    exact: bool = True
    name: str | None = None


def main(argv: list[str]) -> None:
    """Run the command."""
    parser = Parser(prog="grow")
    parser.add_argument("words", nargs="*")
    flags = [word for word in argv if word.startswith("-")]
    words = parser.parse_args([*flags, "--", *(word for word in argv if not word.startswith("-"))]).words
    paths = [word for word in words if "=" not in word]
    if len(paths) != 2:
        raise UserError(f"grow takes a run and the run folder to write; given {len(paths)} paths (see --help)")
    options = load_config(GrowOptions, [word for word in words if "=" in word])
    grow(Path(paths[0]), Path(paths[1]), options)


def grow(run_path: Path, out: Path, options: GrowOptions) -> None:
    """Grow a run; prints what was done as a JSON line."""
    from llm.checkpoint import (
        Checkpointer,
        TrainState,
        load_meta,
        load_model_tensors,
        load_optim_tensors,
        resolve_checkpoint,
    )
    from llm.checkpoint.restore import load_rng
    from llm.config.yaml_io import dump_yaml
    from llm.data.tokenizer import load_tokenizer
    from llm.generate.load import find_tokenizer, model_config, read_run_config
    from llm.models.growth import grow_optimizer, grow_tensors, grown_config

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; give the name of a new run folder")
    step = resolve_checkpoint(run_path)
    tree = read_run_config(step)
    tensors = load_model_tensors(step)
    old = model_config(tree, step, tensors["embed.weight"].shape[0] if "embed.weight" in tensors else None)
    new = grown_config(old, options.n_tokens, options.ffn_tokens)
    seed = int(tree.get("seed") or 0)
    grown = grow_tensors(new, tensors, tau=options.tau, new_keys=options.new_keys, seed=seed)
    difference = logit_difference(old, tensors, new, grown)
    if options.exact and difference > TOLERANCE:
        raise UserError(
            f"the grown model's logits differ by {difference:.3g} of the largest one, more than {TOLERANCE:g}; "
            "leave tau=keep and new_keys=zero (a softmax never grows exactly), or accept it with exact=false"
        )
    meta = load_meta(step)
    sizes = {"params_before": old.cost().total.params, "params": new.cost().total.params}
    meta["grown_from"] = {"checkpoint": str(step), **options.to_dict(), **sizes}
    tree |= {"name": options.name or out.name, "runs_dir": str(out.parent), "model": new.to_dict()}
    text = dump_yaml(tree)
    optim = grow_optimizer(tensors, grown, load_optim_tensors(step))
    checkpointer = Checkpointer(out / "checkpoints", asynchronous=False, config_yaml=text)
    number, tokens = int(meta.get("step", 0)), int(meta.get("tokens", 0))
    state = TrainState(model=grown, optim=optim, meta=meta, rng=load_rng(step))
    checkpointer.save(state, step=number, tokens=tokens, kind="keep", wait=True)
    (out / "config.yaml").write_text(text, encoding="utf-8")
    try:
        load_tokenizer(find_tokenizer(step, tree)).save(out / "tokenizer")
    except UserError as error:
        print(f"grow: {error}", file=sys.stderr)
    print(json.dumps({"grow": str(step), "run": str(out), **sizes, "logit_difference": difference}))


def logit_difference(old: Any, old_tensors: Any, new: Any, new_tensors: Any) -> float:
    """Largest difference of logits on random tokens, relative to the largest logit."""
    import torch

    from llm.checkpoint.hf.build import build_model
    from llm.core.seq import SeqInfo

    length = min(64, old.max_seq_len)
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(old.required_vocab_size(), (2, length), generator=rng)
    logits = []
    for config, tensors in ((old, old_tensors), (new, new_tensors)):
        model = build_model(config, tensors)
        with torch.no_grad():
            logits.append(model.head(model(ids, SeqInfo.contiguous(2, length)).hidden))
    return float((logits[1] - logits[0]).abs().max() / logits[0].abs().max())


if __name__ == "__main__":
    run(main, prog="grow", doc=__doc__)
