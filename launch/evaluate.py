"""usage: python launch/evaluate.py RUN [DATA ...] [--compressors] [key=value ...]
       python launch/evaluate.py babilong [CONFIG.yaml] run=RUN [key=value ...]
       python launch/evaluate.py harness run=RUN tasks=[...] [key=value ...]
       python launch/evaluate.py retrieval run=RUN [key=value ...]

Loss, perplexity, bits per token and bits per byte of a trained model. RUN is a run folder, one of its checkpoints, or a
folder of a Hugging Face model. DATA is a folder of prepared data (its held-out split) or UTF-8 text files, each a
document; without it, the run's own held-out data. Each document is scored by itself, end-of-text included, every token
once, with a sliding window. --compressors prints gzip -9, bz2 -9 and xz -9 on the same bytes beside the model.

The result is one JSON line on stdout, and in the run's folder: evaluate.json for its own data, evaluate-NAME.json for
other DATA; for a slice with -WIDTH in the name, or -mixed-HASH where the layers differ; with quantize= its value.

keys:
  split=valid         of prepared data
  slice=              of a nested model: share of its hidden units such as 1/4, or a list with one per layer
  widths=             the same in hidden units
  stride=half         tokens by which the window moves: half or full of its length, or a number
  context=            window length (default: the model's max_seq_len)
  precision=          fp32 or bf16 (default: as the run was trained; fp32 for a Hugging Face model)
  quantize=none       int8 or fp8: eight bits a weight for the matrices of the layers (needs torchao)
  batch_tokens=16384  tokens that run together
  max_documents=      only the first ones
  device=auto         auto, cpu or cuda
  tokenizer=          folder of the tokenizer, if it does not lie with the model
  out=                where to write the JSON (default: in the run's folder; not for a Hugging Face model)
  num_threads=        CPU threads

babilong: questions about facts that are scattered in other text (docs/babilong.md). One line per sample in
samples.jsonl, to which the same command adds what is missing; summary.json, table.md, heat maps and report.html beside
it; the summary as one JSON line on stdout. A folder never takes results of other conditions. Its keys:
  run=                RUN as above
  tasks=[qa1,...,qa5] of qa1 to qa20
  lengths=[0k,1k,2k,4k]  tokens; 0k: the facts alone
  form=prompt         prompt (answered in words) or finetuned (context, question, GEN, answer, end of text)
  samples=100         per task, length and window
  seed=0  facts=      folder of real bAbI files (default: simulated facts)
  windows=1           depth windows: each puts the facts into its own part of the text
  reserve=            tokens of a length left to what is not context (default: 300 for prompts, 20 fine-tuned)
  background.source.type=stdlib  or text with 'background.source.paths=[books/]'; background.max_bytes, min_tokens,
                      max_tokens, filter
  prompts.file=       official texts (prompts.py or JSON); prompts.instruction, examples, post_prompt=true,
                      prompts.answer_prefix
  batch=8  chunk=1024 samples that run together, tokens that are read at once
  precision= quantize= device= tokenizer= num_threads=  as above
  out=                folder of results (default: RUN/babilong)
harness: tasks of lm-evaluation-harness (docs/evaluation.md), results in RUN/harness. Its keys:
  run= tasks=         RUN as above; names of tasks
  include_path=       folder of YAML tasks of your own
  limit= num_fewshot= gen_kwargs={}  as of lm-eval
  offline=false       whether fetching anything is refused
  max_length=         most tokens of a text (default: the model's max_seq_len)
  batch_size=auto     requests that run together; auto: as many as batch_tokens=16384 allows
  chunk=1024          tokens of contexts that are read at once
  add_bos_token=false begin each context as a document
  seed=0 precision=fp32 quantize=none device=auto tokenizer= num_threads= out=

retrieval: needles, variable tracking, common words and recall in long prompts (docs/evaluation.md), results in
RUN/retrieval; the same command adds what is missing there. Its keys:
  run=                RUN as above
  tasks=              niah_single_1 to 3, niah_multikey_1 to 3, niah_multivalue, niah_multiquery, variable_tracking,
                      common_words, recall (default: all)
  lengths=[4096]      tokens of prompt and answer
  samples=100 seed=42 of each task and length
  depths=             where the first needle stands, in turn, 0 to 1 (default: drawn)
  essays=             UTF-8 texts as background (default: the standard library's docstrings)
  batch=8 chunk=1024  samples that run together, tokens that are read at once
  precision=fp32 quantize=none device=auto tokenizer= num_threads= out=

examples:
  python launch/evaluate.py runs/quickstart --compressors
  python launch/evaluate.py runs/quickstart my/file.txt stride=full precision=fp32
  python launch/evaluate.py runs/nested slice=[1/8,1/4,1/4,1]
  python launch/evaluate.py babilong run=runs/quickstart tasks=[qa1,qa2] lengths=[0k,1k] samples=20
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import Field

from launch._cli import Parser, run
from llm.config.base import Count
from llm.config.load import load_config
from llm.core.errors import UserError
from llm.generate.quantize import Quantize
from llm.models.nesting import SliceOptions


class EvaluateOptions(SliceOptions):
    """The keys of this command."""

    split: str = "valid"
    stride: Literal["half", "full"] | Count = "half"
    context: int | None = Field(None, ge=2)
    precision: Literal["fp32", "bf16"] | None = None
    quantize: Quantize = "none"
    batch_tokens: Count = Field(16384, ge=1)
    max_documents: int | None = Field(None, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tokenizer: str | None = None
    out: str | None = None
    num_threads: int | None = Field(None, ge=1)


def main(argv: list[str]) -> None:
    """Run the command."""
    if argv[:1] and argv[0] in BENCHMARKS:
        result = BENCHMARKS[argv[0]](argv[1:])
        if result:  # empty in all processes of a launcher but the first
            print(json.dumps(result))
        return
    parser = Parser(prog="evaluate")
    parser.add_argument("--compressors", action="store_true")
    parser.add_argument("words", nargs="*")
    flags = [word for word in argv if word.startswith("-")]
    given = parser.parse_args([*flags, "--", *(word for word in argv if not word.startswith("-"))])
    paths = [word for word in given.words if "=" not in word or Path(word).exists()]
    options = load_config(EvaluateOptions, [word for word in given.words if word not in paths])
    if not paths:
        raise UserError(
            "no model given; the first argument is a run folder, a checkpoint or a Hugging Face folder (see --help)"
        )
    result = evaluate(Path(paths[0]), paths[1:], options, compressors=given.compressors)
    print(json.dumps(result))
    sys.stdout.flush()


def babilong(argv: list[str]) -> dict[str, Any]:
    """BABILong."""
    from evals.babilong.options import BabilongOptions
    from evals.babilong.run import run

    return run(load_config(BabilongOptions, argv))


def harness(argv: list[str]) -> dict[str, Any]:
    """Tasks of lm-evaluation-harness."""
    from evals.harness.run import HarnessOptions, run_harness

    return run_harness(load_config(HarnessOptions, argv))


def retrieval(argv: list[str]) -> dict[str, Any]:
    """Retrieval from long prompts."""
    from evals.retrieval.options import RetrievalOptions
    from evals.retrieval.run import run_retrieval

    return run_retrieval(load_config(RetrievalOptions, argv))


BENCHMARKS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "babilong": babilong, "harness": harness, "retrieval": retrieval,
}  # fmt: skip
"""By the command's first word; a run folder of that name is given as ./NAME."""


def evaluate(path: Path, data: list[str], options: EvaluateOptions, *, compressors: bool = False) -> dict[str, Any]:
    """Evaluate, print the table on stderr, write the JSON file; returns its content."""
    import torch

    from evals.perplexity import compressors_bits_per_byte, evaluate_documents
    from evals.text import open_text
    from llm.generate.load import data_folders, load_model, pick_device
    from llm.generate.quantize import parameter_bytes
    from llm.models.extract import plain_config
    from llm.models.nesting import set_widths, slice_suffix

    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    device = pick_device(options.device)
    model, tokenizer, tree = load_model(path, device=device, tokenizer=options.tokenizer, quantize=options.quantize)
    widths = options.of(model.config)
    set_widths(model, widths)
    paths = data or data_folders(tree)[:1]
    if not paths:
        raise UserError(f"{path} names no data of its own; give a folder of prepared data or text files as DATA")
    longest = model.config.max_context or max(options.context or 0, model.config.max_seq_len)
    context = options.context or min(longest, model.config.max_seq_len)
    if context > longest:
        raise UserError(f"context={context} is more than the {longest} tokens that the model can read; lower it")
    if isinstance(options.stride, int) and not 1 <= options.stride <= context:
        raise UserError(
            f"stride={options.stride} must lie between 1 and the window length {context}, else tokens would be left out"
        )
    texts = open_text(paths, tokenizer, split=options.split, max_documents=options.max_documents)
    precision = options.precision or tree.get("train", {}).get("precision") or "fp32"
    with _progress(texts.name) as advance:
        score = evaluate_documents(
            model, texts.documents, tokenizer.start_id, context=context, stride=options.stride, precision=precision,
            batch_tokens=options.batch_tokens, n_bytes=texts.n_bytes, progress=advance,
        )  # fmt: skip
    result: dict[str, Any] = {"model": str(path), "data": texts.name, **score.to_dict()}
    result |= {"params": sum(p.numel() for p in model.parameters()), "device": str(device), "torch": torch.__version__}
    result |= {"quantize": options.quantize, "parameter_bytes": parameter_bytes(model)}
    if widths is not None:
        result |= {"widths": widths, "params": plain_config(model.config, widths).cost().total.params}
    result["tokens_per_second"] = round(score.n_tokens / max(score.seconds, 1e-9), 1)
    if compressors:
        result["compressors"] = compressors_bits_per_byte(texts.raw)
    print(_table(result), file=sys.stderr)
    own = not data or data == data_folders(tree)[:1]
    name = "evaluate" if own else f"evaluate-{Path(data[0]).stem}"
    bits = f"-{options.quantize}" if options.quantize != "none" else ""
    _write(path, tree, options, result, f"{name}{slice_suffix(widths)}{bits}.json")
    return result


def _table(result: dict[str, Any]) -> str:
    head = (
        f"{result['data']}: {result['n_documents']:,} documents, {result['n_tokens']:,} tokens, "
        f"{result['n_bytes']:,} bytes; "
        f"window {result['context']}, stride {result['stride']}, {result['precision']}, {result['seconds']:.1f} s\n"
        f"loss {result['loss']:.4f} nats/token, perplexity {result['perplexity']:.2f}, "
        f"{result['bits_per_token']:.4f} bits/token"
    )
    rows = {"this model": result["bits_per_byte"], **result.get("compressors", {})}
    return "\n".join([head, *(f"  {name:<12} {value:.4f} bits/byte" for name, value in rows.items())])


def _write(path: Path, tree: dict[str, Any], options: EvaluateOptions, result: dict[str, Any], name: str) -> None:
    """The file `name` in the run's folder, also when one of its checkpoints was named; or the file that out= names."""
    if options.out is None and not tree:
        return
    folder = (
        path.parent.parent if path.parent.name == "checkpoints" else path.parent if path.name == "checkpoints" else path
    )
    target = Path(options.out) if options.out is not None else folder / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from error


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    run(main, prog="evaluate", doc=__doc__)
