"""usage: python launch/generate.py RUN [--prompt TEXT ...] [--file FILE] [key=value ...]

Continue prompts with a trained model. RUN is a run folder, one of its checkpoints, or a folder of a Hugging Face model.
Under torchrun all processes share the model, each with its part of the heads and hidden units (tensor parallelism):
torchrun --nproc-per-node 2 launch/generate.py RUN ...
Each --prompt is one prompt; --file takes a UTF-8 file as one, and of a .jsonl file the "prompt" of each line; with
neither, stdin is read. "" starts a new text.

  --chat                   a conversation: each line of stdin is answered, until its end
  --system TEXT            with --chat: a message of the system before it
  --chat-template FILE     with --chat: a Jinja template (default: the model's own; plain "User:" and "Assistant:" lines
                           where it has none)

  --speculate DRAFTER      draft tokens and check them in one forward; the output has the same law, and is the same with
                           temperature=0. lookup (what came behind the same words before), lookup-tree:4 (four such
                           places side by side), slice:1/4 (part of a nested model), loops:1 (a looped model with fewer
                           loops), model:PATH (a smaller model)
  --draft-tokens N         tokens drafted at once (default 4); auto chooses by acceptance and cost, auto:N at most N

  --save-state FILE        read the one prompt, write what the model remembers of it (safetensors), and stop
  --load-state FILE        prompts go on from that text, which is not read again; the context must be the same

keys:
  max_new_tokens=256      how much to write
  temperature=0.8         0 takes the likeliest token each time
  top_k=  top_p=1  min_p=0  repetition_penalty=1
  stop='["\\n\\n"]'         texts that end the output (a YAML list)
  seed=                   repeat a result (none: a new one each time, printed at the end)
  ignore_eos=false        go on behind the end of the text
  n=1                     continuations of each prompt (seed, seed + 1, ...)
  stream=                 print as it is written (default: on a terminal, for one continuation)
  echo=true               print the prompt as well
  jsonl=false             one JSON line for each continuation
  lines=false             each line of the file or of stdin is a prompt of its own
  slice=                  of a nested model: share of its hidden units such as 1/4, or a list with one per layer
  widths=                 the same in hidden units
  precision=fp32          or bf16
  quantize=none           int8 or fp8: eight bits a weight for the matrices of the layers (needs torchao)
  pack=true               on a CPU in fp32 keep large weights twice, which makes 4 to 32 tokens at once faster
  device=auto             auto, cpu or cuda
  context=                most tokens of prompt and output (default: the model's max_seq_len)
  max_batch=32            prompts that run together
  tokenizer=              folder of the tokenizer, if it does not lie with the model
  compile=false           compile the steps of decoding, about twice as fast on a CPU after some seconds for each
  compare=                with --speculate: generate once more without, and tell the speed-up (default: if not compiled)
  num_threads=            CPU threads (default: one for small models, where more cost time)

examples:
  python launch/generate.py runs/quickstart --prompt "def " max_new_tokens=100 top_k=40
  python launch/generate.py runs/quickstart --speculate lookup --prompt "import os" temperature=0
  python launch/generate.py runs/quickstart --chat --system "You are brief."
  python launch/generate.py runs/quickstart --file book.txt --save-state book.safetensors
  python launch/generate.py runs/quickstart --load-state book.safetensors --prompt " The end:"
  echo "import os" | python launch/generate.py runs/quickstart temperature=0 stop='["\\n\\n"]'
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
import os
import random
import time
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from launch._cli import Parser, run
from llm.config.load import load_config
from llm.core.errors import UserError
from llm.generate.quantize import Quantize
from llm.generate.sampling import Sampling
from llm.models.nesting import SliceOptions

if TYPE_CHECKING:
    import argparse

    from llm.generate.events import Speculation

SMALL = 100_000_000
"""Parameters times sequences below which the threads of one step would wait for one another longer than they work."""

READING = {"context", "device", "lines", "num_threads", "precision", "pack", "quantize", "slice", "tokenizer", "widths"}
"""Keys that bear on how a prompt is read."""


VALUED = {
    "--prompt",
    "--file",
    "--speculate",
    "--draft-tokens",
    "--save-state",
    "--load-state",
    "--system",
    "--chat-template",
}
"""Flags that a value follows."""

CHAT_CACHE = 256 * 2**20
"""Bytes of pages and states in which a conversation is kept, so that only its newest message is read. Not with compile,
which holds no pages."""

NOT_IN_CHAT = ("n", "stream", "echo", "jsonl", "lines", "compare", "max_batch")
"""Keys that have no effect in a conversation."""


class GenerateOptions(Sampling, SliceOptions):
    """The keys of this command."""

    temperature: float = Field(0.8, ge=0, allow_inf_nan=False)
    n: int = Field(1, ge=1)
    stream: bool | None = None
    echo: bool = True
    jsonl: bool = False
    lines: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    quantize: Quantize = "none"
    pack: bool = True
    device: Literal["auto", "cpu", "cuda"] = "auto"
    context: int | None = Field(None, ge=2)
    max_batch: int = Field(32, ge=1)
    tokenizer: str | None = None
    compile: bool = False
    compare: bool | None = None
    num_threads: int | None = Field(None, ge=1)


def main(argv: list[str]) -> None:
    """Run the command."""
    parser = Parser(prog="generate")
    parser.add_argument("model")
    parser.add_argument("--prompt", action="append", default=[])
    parser.add_argument("--file", action="append", default=[])
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--system")
    parser.add_argument("--chat-template")
    parser.add_argument("--speculate")
    parser.add_argument("--draft-tokens")
    parser.add_argument("--save-state")
    parser.add_argument("--load-state")
    parser.add_argument("options", nargs="*")
    given = parser.parse_args(_options_last(argv))
    options = load_config(GenerateOptions, _only_keys(given.options))
    if given.chat:
        _check_chat(given, options)
    elif ignored := [name for name in ("system", "chat_template") if getattr(given, name) is not None]:
        raise UserError(f"--{ignored[0].replace('_', '-')} has no effect without --chat; add it")
    shared = int(os.environ.get("WORLD_SIZE", "1")) > 1
    first = not shared or os.environ.get("RANK") == "0"
    if shared:
        _check_shared(given, options)
        if not first:
            sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    prompts = [""] if given.chat or not first else _prompts(given.prompt, given.file, options.lines)
    if given.save_state is not None and (len(prompts) != 1 or given.load_state or given.speculate):
        raise UserError(
            f"--save-state reads one prompt and writes nothing else; given: {len(prompts)} prompts"
            + "".join(f", {name}" for name in ("--load-state", "--speculate") if name in argv)
        )
    if given.save_state is not None and (ignored := sorted(options.model_fields_set - READING)):
        raise UserError(f"{ignored[0]} has no effect with --save-state, which writes no text; remove it")

    import torch

    from llm.generate.drafters import Drafter
    from llm.generate.engine import Engine
    from llm.generate.load import DTYPES, load_model, pick_device
    from llm.generate.prefix import Prefix
    from llm.generate.speculation import make_draft_length, make_drafter
    from llm.generate.text import encode_prompt, generate_text
    from llm.models.nesting import set_widths
    from llm.parallel.tensor import join_ranks, same_for_all
    from llm.train.hardware import peak_memory

    compare = given.speculate is not None and (not options.compile if options.compare is None else options.compare)
    device = pick_device(options.device)
    seed = options.seed if options.seed is not None or options.greedy else random.SystemRandom().randrange(2**31)
    ranks = join_ranks(device)
    if ranks is not None:
        prompts, seed = same_for_all(ranks, [prompts, seed], device)
    model, tokenizer, _ = load_model(
        given.model,
        device=device,
        dtype=DTYPES[options.precision],
        tokenizer=options.tokenizer,
        quantize=options.quantize,
        pack=options.pack,
        ranks=ranks,
    )
    set_widths(model, options.of(model.config))
    n_params = sum(p.numel() for p in model.parameters())
    small = n_params * min(options.max_batch, len(prompts) * options.n) < SMALL
    torch.set_num_threads(options.num_threads or (1 if small else torch.get_num_threads()))
    if given.save_state is not None:
        ids = encode_prompt(tokenizer, prompts[0])
        engine = Engine(model, context=options.context)
        Prefix.read(model, ids, capacity=engine.context, chunk=engine.prefill_chunk).save(given.save_state)
        print(f"{len(ids)} tokens read, their state is in {given.save_state}", file=sys.stderr)
        return
    prefix = Prefix.load(given.load_state) if given.load_state is not None else None
    settings = {name: getattr(options, name) for name in Sampling.model_fields}
    samplings = [
        Sampling(**settings | {"seed": None if seed is None else seed + k}) for _ in prompts for k in range(options.n)
    ]
    repeated = [prompt for prompt in prompts for _ in range(options.n)]
    stream = (
        options.stream
        if options.stream is not None
        else sys.stdout.isatty() and len(repeated) == 1 and not options.jsonl
    )
    if stream and (len(repeated) > 1 or options.jsonl):
        raise UserError(
            f"stream=true prints one continuation as text; given: {len(repeated)} continuations, jsonl={options.jsonl}"
        )
    if given.draft_tokens is not None and given.speculate is None:
        raise UserError("--draft-tokens has no effect without --speculate; add one, or remove it")
    drafter: Drafter | None = None
    if given.speculate is not None:
        drafter = make_drafter(given.speculate, model, tokenizer, device=device, dtype=DTYPES[options.precision])

    def new_engine(drafter: Drafter | None) -> Engine:
        engine = Engine(
            model,
            eos_id=tokenizer.eos_id,
            max_batch=options.max_batch,
            context=options.context,
            drafter=drafter,
            draft_length=make_draft_length(given.draft_tokens or "4"),
            prefix=prefix,
            compile=options.compile,
            prefix_cache=CHAT_CACHE if given.chat and not options.compile else 0,
        )
        if options.compile and compare:
            # What is compared is decoding, not the compiler.
            engine.warm_up()
        return engine

    engine = new_engine(drafter)
    if given.chat:
        from launch._chat import converse
        from llm.generate.chat import load_chat

        converse(engine, tokenizer, load_chat(tokenizer, given.chat_template), samplings[0], given.system)
        return
    finishes = ["" for _ in repeated]
    n_tokens = 0
    first_token: float | None = None

    def on_token(request: int) -> None:
        nonlocal n_tokens, first_token
        n_tokens += 1
        first_token = first_token or time.perf_counter()

    def on_text(request: int, text: str, finish: str | None) -> None:
        finishes[request] = finish or ""
        if stream:
            sys.stdout.write(text)
            sys.stdout.flush()

    if stream and options.echo:
        sys.stdout.write(repeated[0])
        sys.stdout.flush()
    began = time.perf_counter()
    texts = generate_text(model, tokenizer, repeated, samplings, on_text=on_text, on_token=on_token, engine=engine)
    ended = time.perf_counter()
    if stream:
        print()
    else:
        _print(options, repeated, texts, finishes, samplings)
    _summary(n_tokens, ended - began, (first_token or ended) - began, finishes, seed, engine.context)
    if drafter is not None:
        plain: float | None = None
        peak = peak_memory(device)
        if compare:
            made, n_tokens, first_token = n_tokens, 0, None
            without = new_engine(None)
            started = time.perf_counter()
            generate_text(model, tokenizer, repeated, samplings, on_token=on_token, engine=without)
            plain = (made / (ended - began)) / (n_tokens / (time.perf_counter() - started))
        _speculation_summary(drafter.name, engine.speculation, peak, plain)


def _speculation_summary(name: str, speculation: Speculation, peak_bytes: int, speed_up: float | None) -> None:
    parts = [
        f"speculation with {name}: {speculation.acceptance:.1%} of {speculation.n_drafted} drafted tokens accepted",
        f"{speculation.tokens_per_forward:.2f} tokens per verification",
        f"peak memory {peak_bytes / 2**20:,.0f} MiB",
    ]
    if speed_up is not None:
        parts.append(f"{speed_up:.2f} times as fast as plain decoding of the same prompts")
    print("; ".join(parts), file=sys.stderr)


def _check_shared(given: argparse.Namespace, options: GenerateOptions) -> None:
    """UserError for what processes that share a model cannot do."""
    flags = [name for name in ("chat", "save_state", "load_state") if getattr(given, name)]
    names = ("compile", "quantize", "slice", "widths")
    keys = [name for name in names if getattr(options, name) != type(options).model_fields[name].default]
    if flags or keys:
        name = f"--{flags[0].replace('_', '-')}" if flags else keys[0]
        raise UserError(f"{name} is for one process, torchrun started several; remove it, or start without torchrun")
    if (given.draft_tokens or "").startswith("auto"):
        raise UserError("--draft-tokens auto goes by the clock, which differs between processes; give a number")


def _check_chat(given: argparse.Namespace, options: GenerateOptions) -> None:
    for name in ("prompt", "file", "save_state", "load_state"):
        if getattr(given, name):
            raise UserError(f"--chat reads its messages from stdin; remove --{name.replace('_', '-')}")
    for name in NOT_IN_CHAT:
        if name in options.model_fields_set:
            raise UserError(f"{name} has no effect with --chat; remove it")


def _options_last(argv: list[str]) -> list[str]:
    """Arguments with bare key=value words behind the flags, where argparse accepts them."""
    flags: list[str] = []
    words: list[str] = []
    rest = iter(argv)
    for word in rest:
        if word in VALUED:
            value = next(rest, None)
            if value is None:
                raise UserError(f"{word} needs a value (see --help)")
            flags.append(f"{word}={value}")
        elif word.startswith("-") and word != "-":
            flags.append(word)
        else:
            words.append(word)
    return [*flags, "--", *words]


def _only_keys(words: list[str]) -> list[str]:
    for word in words:
        if "=" not in word:
            raise UserError(
                f"unexpected argument {word!r}; a prompt is given as --prompt TEXT, options as key=value (see --help)"
            )
    return words


def _prompts(given: list[str], files: list[str], lines: bool) -> list[str]:
    rows = [name for name in files if name.endswith(".jsonl")]
    from_rows = [prompt for name in rows for prompt in _prompts_of_lines(name)]
    texts = [_read(Path(name)) for name in files if name not in rows]
    if not given and not files:
        if sys.stdin.isatty():
            raise UserError("no prompt; give --prompt TEXT, --file FILE, or pipe one to stdin")
        texts = [_decode(sys.stdin.buffer.read(), "stdin")]
    if lines:
        texts = [line for text in texts for line in text.splitlines()]
    prompts = [*given, *from_rows, *texts]
    if not prompts:
        raise UserError("no prompt: the input has no lines")
    return prompts


def _prompts_of_lines(name: str) -> list[str]:
    """The "prompt" of each line of a file of JSON objects; other keys are left alone."""
    prompts = []
    for number, line in enumerate(_read(Path(name)).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{name}, line {number} is no JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise UserError(f'{name}, line {number} has no text under "prompt"; each line is an object that has one')
        prompts.append(row["prompt"])
    return prompts


def _read(path: Path) -> str:
    try:
        return _decode(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"cannot read the prompt file {path}: {error.strerror}") from error


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"the prompt in {name} is not valid UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; "
            "convert it to UTF-8"
        ) from error


def _print(
    options: GenerateOptions, prompts: list[str], texts: list[str], finishes: list[str], samplings: list[Sampling]
) -> None:
    for number, (prompt, text, finish, sampling) in enumerate(zip(prompts, texts, finishes, samplings, strict=True)):
        if options.jsonl:
            print(
                json.dumps(
                    {"prompt": prompt, "text": text, "finish": finish, "seed": sampling.seed}, ensure_ascii=False
                )
            )
            continue
        if len(prompts) > 1:
            print(f"=== {number + 1} of {len(prompts)} ===")
        print((prompt if options.echo else "") + text)


def _summary(n_tokens: int, seconds: float, first: float, finishes: list[str], seed: int | None, context: int) -> None:
    reasons = ", ".join(f"{reason} x{finishes.count(reason)}" for reason in sorted(set(finishes)))
    rate = (
        (n_tokens - len(finishes)) / (seconds - first)
        if seconds > first and n_tokens > len(finishes)
        else n_tokens / max(seconds, 1e-9)
    )
    parts = [
        f"{n_tokens} tokens in {seconds:.2f} s",
        f"{rate:.1f} tokens/s",
        f"first after {first * 1000:.0f} ms",
        f"ended by {reasons}",
    ]
    if seed is not None:
        parts.append(f"seed {seed}")
    print("; ".join(parts), file=sys.stderr)
    if "context" in finishes:
        print(f"stopped at the model's context of {context} tokens (context=N allows another)", file=sys.stderr)


if __name__ == "__main__":
    run(main, prog="generate", doc=__doc__)
