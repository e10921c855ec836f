"""usage: python -m evals.consistency RUN [DATA ...] [key=value ...]

How far the slices of a nested model agree with the whole: loss of each, share of positions at which its likeliest token
is that of the whole, and KL(whole || slice) in nats per token. The agreement is about how often a greedy draft of the
slice would be accepted. RUN and DATA as for launch/evaluate.py; without DATA, the run's own held-out data.

Prints a table and a last line of JSON.

keys:
  slices=             shares to compare, such as [1/8,1/2] (default: the granularities that were trained)
  widths=             one more slice: hidden units of each nested layer, such as [192,384,384]
  context=            window length (default: the model's max_seq_len)
  max_tokens=100k     how many tokens to compare, evenly spread over the data
  batch_tokens=8192   tokens that run together
  split=valid         of prepared data
  device=auto         auto, cpu or cuda
  tokenizer=          folder of the tokenizer, if it does not lie with the model
  num_threads=        CPU threads
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from evals.perplexity import Document
from evals.text import open_text
from llm.blocks.channels.nested import Share
from llm.config.base import Config, Count
from llm.config.load import load_config
from llm.core.errors import UserError
from llm.core.seq import SeqInfo
from llm.models.nesting import SliceOptions, at_widths, whole_widths
from llm.models.wrappers.nested import nested_layers


@dataclass(frozen=True)
class Agreement:
    """widths: hidden units of each nested layer. loss: nats per token of the slice. agreement: share of positions at
    which its likeliest token is the whole model's. kl: KL(whole || slice), nats per token. n_tokens: positions."""

    widths: list[int]
    loss: float
    agreement: float
    kl: float
    n_tokens: int


@torch.inference_mode()
def consistency(
    model: Any, batches: Sequence[tuple[Tensor, Tensor]], slices: Sequence[Sequence[int]]
) -> list[Agreement]:
    """Compare slices of a nested model with the whole, in the order given.

    batches: (tokens [B, T], labels [B, T]) whose rows are documents or parts of one. slices: widths of the layers.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(len(slices), 3, dtype=torch.float64)
    n_tokens = 0
    for tokens, labels in batches:
        tokens, labels = tokens.to(device), labels.to(device)
        seq = SeqInfo.contiguous(*tokens.shape, device=device)
        whole = _log_probabilities(model, tokens, seq, None)
        n_tokens += labels.numel()
        for index, widths in enumerate(slices):
            part = _log_probabilities(model, tokens, seq, widths)
            sums[index, 0] += F.nll_loss(part.flatten(0, 1), labels.flatten(), reduction="sum").double().cpu()
            sums[index, 1] += (part.argmax(-1) == whole.argmax(-1)).sum().cpu()
            sums[index, 2] += F.kl_div(part, whole, reduction="sum", log_target=True).double().cpu()
    means = (sums / max(1, n_tokens)).tolist()
    return [Agreement(list(widths), loss, same, kl, n_tokens) for widths, (loss, same, kl) in zip(slices, means)]


def _log_probabilities(model: Any, tokens: Tensor, seq: SeqInfo, widths: Sequence[int] | None) -> Tensor:
    """[B, T, V] fp32."""
    with at_widths(model, widths):
        return F.log_softmax(model.head(model(tokens, seq).hidden).float(), dim=-1)


def windows(
    documents: Sequence[Document], start_id: int, context: int, max_tokens: int, batch_tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens, labels) [B, context]: the documents one after another, cut into windows, of which at most max_tokens are
    taken, evenly spread."""
    stream = torch.cat([torch.tensor([start_id, *doc.ids.tolist()]) for doc in documents])
    n_rows = (len(stream) - 1) // context
    n_taken = min(n_rows, max_tokens // context)
    if not n_taken:
        raise UserError(
            f"no window of {context} tokens in {len(stream) - 1} tokens of data, of which {max_tokens} are wanted; "
            "lower context or raise max_tokens"
        )
    rows = torch.arange(n_taken) * n_rows // n_taken
    tokens = stream[: n_rows * context].view(n_rows, context)[rows]
    labels = stream[1 : n_rows * context + 1].view(n_rows, context)[rows]
    size = max(1, batch_tokens // context)
    return zip(tokens.split(size), labels.split(size))


class ConsistencyOptions(Config):
    """The keys of this command."""

    slices: list[Share] | None = Field(None, min_length=1)
    widths: list[int] | None = None
    context: int | None = Field(None, ge=2)
    max_tokens: Count = Field(100_000, ge=2)
    batch_tokens: Count = Field(8192, ge=1)
    split: str = "valid"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tokenizer: str | None = None
    num_threads: int | None = Field(None, ge=1)


def main(argv: list[str]) -> None:
    """Run the command."""
    from llm.generate.load import data_folders, load_model, pick_device

    paths = [word for word in argv if "=" not in word or Path(word).exists()]
    options = load_config(ConsistencyOptions, [word for word in argv if word not in paths])
    if not paths:
        raise UserError("no model given; the first argument is a run folder or a checkpoint (see --help)")
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    model, tokenizer, tree = load_model(paths[0], device=pick_device(options.device), tokenizer=options.tokenizer)
    layers = nested_layers(model.config)
    if not layers:
        raise UserError(f"{paths[0]} is no nested model, so it has no slices to compare")
    data = paths[1:] or data_folders(tree)[:1]
    if not data:
        raise UserError(f"{paths[0]} names no data of its own; give a folder of prepared data or text files as DATA")
    shares = options.slices or list(next(iter(layers.values())).granularities)
    chosen = [SliceOptions(slice=share).of(model.config) for share in shares]
    if options.widths is not None:
        chosen.append(SliceOptions(widths=options.widths).of(model.config))
    texts = open_text(data, tokenizer, split=options.split)
    context = options.context or model.config.max_seq_len
    batches = list(windows(texts.documents, tokenizer.start_id, context, options.max_tokens, options.batch_tokens))
    rows = consistency(model, batches, [widths for widths in chosen if widths is not None])
    whole = whole_widths(model.config)
    print(f"{texts.name}: {rows[0].n_tokens:,} tokens in windows of {context}")
    print(f"{'widths':<28} {'loss':>8} {'agreement':>10} {'KL':>8}")
    for row in rows:
        one = row.widths[0] if len(set(row.widths)) == 1 else row.widths
        print(f"{'whole' if row.widths == whole else str(one):<28} {row.loss:8.4f} {row.agreement:10.4f} {row.kl:8.4f}")
    result = {"tool": "consistency", "model": paths[0], "data": texts.name, "context": context}
    print(json.dumps(result | {"slices": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        sys.exit(0)
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"consistency: {error}", file=sys.stderr)
        sys.exit(2)
