"""usage: python launch/serve.py RUN [--chat-template FILE] [--api-key-file FILE] [--speculate DRAFTER] [key=value ...]

Serve a trained model over HTTP as OpenAI's interface: /v1/completions and /v1/chat/completions (whole or streamed),
/v1/models, /health, /metrics for Prometheus, and a page to try prompts at /. RUN is a run folder, one of its
checkpoints, or a folder of a Hugging Face model.

The server listens on this machine alone. Another address needs an API key, in the file given by --api-key-file or in
the environment variable MANYFORMER_API_KEY.

  --chat-template FILE     a Jinja template for chats (default: the model's own; plain "User:" and "Assistant:" lines
                           where it has none)
  --speculate DRAFTER      draft tokens and check them in one forward, as for generate: lookup, lookup-tree:4,
                           slice:1/4, loops:1, model:PATH
  --draft-tokens N         tokens drafted at once (default 4); auto, or auto:N

keys:
  host=127.0.0.1  port=8000   where to listen; port=0 takes a free port
  name=                    what clients call the model (default: the folder's name)
  max_batch=32             texts that are generated together
  prefix_cache=0           bytes (such as 500M) of what was read that are kept for prompts which begin alike, and only
                           read the rest
  cache=auto               contiguous or paged keys and values; auto takes pages where prefix_cache needs them
  page_size=16             tokens of a page
  max_waiting=256          texts that may wait for a place; beyond that requests get 429
  max_prompt_tokens=  max_output_tokens=    of one text (default: what the context leaves)
  max_choices=16           texts that one request may ask for
  max_body=1000000         bytes of a request
  max_connections=1000     connections at once
  body_timeout=10          seconds in which a request must have arrived
  request_timeout=600      seconds in which it must be answered
  shutdown_timeout=10      seconds that running requests get when the server is stopped
  slice=  widths=          of a nested model: what part of it to serve, as for generate
  precision=fp32           or bf16
  quantize=none            int8 or fp8: eight bits a weight for the matrices of the layers (needs torchao)
  pack=true                on a CPU in fp32 keep large weights twice, which makes 4 to 32 tokens at once faster
  device=auto              auto, cpu or cuda
  context=                 most tokens of prompt and output (default: the model's max_seq_len)
  tokenizer=               folder of the tokenizer, if it does not lie with the model
  compile=false            compile the decoding step before the first answers, which takes some seconds
  num_threads=             CPU threads (default: one for small models)

examples:
  python launch/serve.py runs/quickstart
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "def "}'
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from typing import Literal

from pydantic import Field

from launch._cli import Parser, run
from llm.config.base import Count
from llm.config.load import load_config
from llm.core.errors import UserError
from llm.generate.quantize import Quantize
from llm.models.nesting import SliceOptions
from llm.serve.config import Limits

SMALL = 100_000_000
"""Parameters times texts below which the threads of one step would wait for one another longer than they work."""


class ServeOptions(Limits, SliceOptions):
    """The keys of this command."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    name: str | None = Field(None, min_length=1)
    max_batch: int = Field(32, ge=1)
    prefix_cache: Count = Field(0, ge=0)
    cache: Literal["auto", "contiguous", "paged"] = "auto"
    page_size: int = Field(16, ge=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    quantize: Quantize = "none"
    pack: bool = True
    device: Literal["auto", "cpu", "cuda"] = "auto"
    context: int | None = Field(None, ge=2)
    tokenizer: str | None = None
    compile: bool = False
    num_threads: int | None = Field(None, ge=1)


def main(argv: list[str]) -> int:
    """Run the command."""
    parser = Parser(prog="serve")
    parser.add_argument("model")
    parser.add_argument("--chat-template")
    parser.add_argument("--api-key-file")
    parser.add_argument("--speculate")
    parser.add_argument("--draft-tokens")
    given, words = parser.parse_known_args(argv)
    if unexpected := [word for word in words if word.startswith("-") or "=" not in word]:
        raise UserError(f"unexpected argument {unexpected[0]!r}; options are given as key=value (see --help)")
    options = load_config(ServeOptions, words)
    if given.draft_tokens is not None and given.speculate is None:
        raise UserError("--draft-tokens has no effect without --speculate; add one, or remove it")

    from llm.serve.server import bind, check_address, is_loopback, read_api_key, require_libraries, serve, url_of

    require_libraries()
    api_key = read_api_key(given.api_key_file)
    check_address(options.host, api_key)

    import torch

    from llm.generate.chat import load_chat
    from llm.generate.engine import Engine
    from llm.generate.load import DTYPES, load_model, pick_device
    from llm.generate.scheduler import Scheduler
    from llm.generate.speculation import make_draft_length, make_drafter
    from llm.models.nesting import set_widths
    from llm.serve.app import create_app
    from llm.serve.metrics import Metrics
    from llm.serve.service import Service
    from llm.serve.worker import Worker

    listener = bind(options.host, options.port)
    device, dtype = pick_device(options.device), DTYPES[options.precision]
    model, tokenizer, _ = load_model(
        given.model,
        device=device,
        dtype=dtype,
        tokenizer=options.tokenizer,
        quantize=options.quantize,
        pack=options.pack,
    )
    set_widths(model, options.of(model.config))
    small = sum(p.numel() for p in model.parameters()) * options.max_batch < SMALL
    torch.set_num_threads(options.num_threads or (1 if small else torch.get_num_threads()))
    drafter = None
    if given.speculate is not None:
        drafter = make_drafter(given.speculate, model, tokenizer, device=device, dtype=dtype)
    engine = Engine(
        model,
        eos_id=tokenizer.eos_id,
        max_batch=options.max_batch,
        context=options.context,
        drafter=drafter,
        draft_length=make_draft_length(given.draft_tokens or "4"),
        compile=options.compile,
        cache=options.cache,
        page_size=options.page_size,
        prefix_cache=options.prefix_cache,
    )
    if engine.saves_states:
        print(f"serve: what prompts begin with is shared in blocks of {engine.saved_every} tokens", file=sys.stderr)
    if options.compile:
        engine.warm_up()
    worker = Worker(Scheduler(engine), tokenizer.pieces, max_open=options.max_batch + options.max_waiting)
    name = options.name or Path(given.model).resolve().name
    service = Service(worker, tokenizer, load_chat(tokenizer, given.chat_template), name, engine.context, options)
    own_names = frozenset({"localhost", "127.0.0.1", "[::1]", options.host.lower()})
    hosts = own_names if is_loopback(options.host) and api_key is None else None
    app = create_app(service, Metrics(worker), api_key=api_key, hosts=hosts)

    def ready(end: object) -> None:
        print(f"serving {name} on {url_of(listener)} (chat: {service.chat.name})", file=sys.stderr, flush=True)

    return 0 if serve(app, service, listener, ready=ready) else 1


if __name__ == "__main__":
    run(main, prog="serve", doc=__doc__)
