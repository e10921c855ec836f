"""A run, checkpoint or Hugging Face folder as a model of lm-evaluation-harness (0.4.13), under the name `manyformer`.

Texts are tokenised and cut as its `hf` model does it: no token before a context unless add_bos_token is set, the token
that starts documents before an empty one; what is too long loses tokens on the left. How often that was is counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from tqdm import tqdm

from evals.harness.scoring import Ids, Scorer
from llm.config.load import validate
from llm.core.errors import UserError
from llm.generate.engine import Engine
from llm.generate.load import DTYPES, load_model, pick_device
from llm.generate.quantize import Quantize
from llm.generate.sampling import Sampling
from llm.generate.text import TextStream
from llm.parallel.tensor import join_ranks

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
IGNORED = ("do_sample", "until", "max_gen_toks")


@register_model("manyformer")
class ManyformerLM(TemplateLM):
    """checkpoint: a run folder, a checkpoint or a folder of a Hugging Face model. tokenizer: its folder, where it does
    not lie there. max_length: most tokens of a text (default: the model's max_seq_len). batch_size: requests
    that run together, or auto: as many as batch_tokens allows. chunk: tokens of contexts read at once. precision: fp32
    or bf16. quantize: none, int8 or fp8 weights. add_bos_token: begin each context as a document. seed: of sampled
    outputs. num_threads: CPU threads.

    With torchrun each process takes its share of the requests. n_truncated: requests of each kind that were cut;
    n_truncated_tokens: tokens that they lost.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        tokenizer: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str | None = "auto",
        max_batch_size: int | None = None,
        batch_tokens: int = 16384,
        chunk: int = 1024,
        device: str | None = "auto",
        precision: str = "fp32",
        quantize: Quantize = "none",
        add_bos_token: bool = False,
        seed: int = 0,
        num_threads: int | None = None,
    ) -> None:
        super().__init__()
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        if precision not in DTYPES:
            raise UserError(f"precision is {precision!r}; allowed: {', '.join(DTYPES)}")
        self.checkpoint, self.precision, self.quantize, self.seed = str(checkpoint), precision, quantize, seed
        self.add_bos_token, self.max_gen_toks = add_bos_token, max_gen_toks
        self._device = pick_device(device or "auto")
        ranks = join_ranks(self._device)
        if ranks is not None:
            self._rank, self._world_size = ranks.rank, ranks.size
        loaded = load_model(
            checkpoint, device=self._device, dtype=DTYPES[precision], tokenizer=tokenizer, quantize=quantize
        )
        self.model, self.tokenizer, self.run_config = loaded
        self.max_length = max_length or self.model.config.max_seq_len
        if not 2 <= self.max_length <= (self.model.config.max_context or self.max_length):
            raise UserError(
                f"max_length={self.max_length} must lie between 2 and the model's position table of "
                f"{self.model.config.max_seq_len} tokens"
            )
        most = batch_size if batch_size not in (None, "auto") else max_batch_size
        self.max_rows = None if most is None else int(most)
        self.batch_tokens, self.chunk = batch_tokens, chunk
        self.scorer = Scorer(self.model, max_rows=self.max_rows, batch_tokens=batch_tokens, chunk=chunk)
        self.n_truncated: dict[str, int] = {"loglikelihood": 0, "generate_until": 0}
        self.n_truncated_tokens = 0

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by."""
        return self.tokenizer.start_id

    @property
    def tokenizer_name(self) -> str:
        """Tells tokenizers apart in lm-eval's cache of requests."""
        return self.tokenizer.hash

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; special tokens that are spelt out in it are plain text."""
        begin = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return [*([self.tokenizer.start_id] if begin else []), *self.tokenizer.encode(string)]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._fit(context, continuation) for _, context, continuation in requests]
        with self._bar("log-likelihoods", len(pairs), disable_tqdm) as bar:
            found = [(score.logprob, score.greedy) for score in self.scorer(pairs, bar.update)]
        for request, answer in zip(requests, found, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return found

    def _fit(self, context: list[int], continuation: list[int]) -> tuple[Ids, Ids]:
        """A pair of which the model reads at most max_length tokens; the last one is not read."""
        context = context or [self.prefix_token_id]
        if not continuation:
            raise UserError("a continuation has no tokens of its own: the tokenizer joins it with its context")
        if len(continuation) > self.max_length:
            raise UserError(
                f"a continuation has {len(continuation)} tokens, the model reads at most {self.max_length}; raise "
                "max_length if its positions allow it"
            )
        excess = len(context) + len(continuation) - (self.max_length + 1)
        if excess <= 0:
            return context, continuation
        self._count("loglikelihood", excess)
        return context[excess:], continuation

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Whole texts in windows of max_length; each token is scored once."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owner: list[int] = []
        for number, (text,) in enumerate(request.args for request in requests):
            tokens = self.tok_encode(text)
            rolling = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            for context, continuation in map(utils.make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                owner.append(number)
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(owner, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first stop text, the end of text or max_gen_toks."""
        prompts: list[list[int]] = []
        samplings: list[Sampling] = []
        for number, (context, settings) in enumerate(request.args for request in requests):
            sampling = self._sampling(settings, number)
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise UserError(
                    f"max_gen_toks={sampling.max_new_tokens} leaves no room for a prompt: the model's length is "
                    f"{self.max_length}; lower it (gen_kwargs) or raise max_length"
                )
            ids = self.tok_encode(context) or [self.prefix_token_id]
            if len(ids) > room:
                self._count("generate_until", len(ids) - room)
            prompts.append(ids[-room:])
            samplings.append(sampling)
        texts = self._generate(prompts, samplings, disable_tqdm)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _sampling(self, settings: dict[str, Any], number: int) -> Sampling:
        given: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        unknown = set(given) - {*SAMPLING, *IGNORED}
        if unknown:
            raise UserError(
                f"generation_kwargs {sorted(unknown)[0]!r} is not known; known: until, max_gen_toks, do_sample, "
                f"{', '.join(SAMPLING)}"
            )
        chosen = {name: given[name] for name in SAMPLING if given.get(name) is not None}
        if given["do_sample"] and chosen.setdefault("temperature", 1.0) > 0:
            chosen["seed"] = self.seed + number
        else:
            penalty = {name: chosen[name] for name in ("repetition_penalty",) if name in chosen}
            chosen = {"temperature": 0.0, **penalty}
        until = [text for text in given["until"] if text]
        return validate(Sampling, {**chosen, "stop": until, "max_new_tokens": given["max_gen_toks"]})

    def _generate(self, prompts: list[list[int]], samplings: list[Sampling], disable_tqdm: bool) -> list[str]:
        if not prompts:
            return []
        longest = max(len(p) + s.max_new_tokens for p, s in zip(prompts, samplings, strict=True))
        rows = self.max_rows or max(1, self.batch_tokens // longest)
        engine = Engine(
            self.model, eos_id=self.tokenizer.eos_id, max_batch=rows, prefill_chunk=self.chunk, context=self.max_length
        )
        streams = [TextStream(self.tokenizer.pieces, sampling.stop) for sampling in samplings]
        fresh: list[deque[str]] = [deque() for _ in prompts]
        texts = ["" for _ in prompts]

        def stop(number: int, token: int) -> bool:
            fresh[number].append(streams[number].push(token))
            return streams[number].stopped

        with self._bar("continuations", len(prompts), disable_tqdm) as bar:
            for event in engine.stream(prompts, samplings, stop=stop):
                number = event.request
                texts[number] += fresh[number].popleft() if fresh[number] else ""
                if event.finish is not None:
                    if event.finish != "stop":
                        texts[number] += streams[number].close()
                    bar.update(1)
        return texts

    def _count(self, kind: str, n_tokens: int) -> None:
        self.n_truncated[kind] += 1
        self.n_truncated_tokens += n_tokens

    def _bar(self, what: str, total: int, disabled: bool) -> Any:
        return tqdm(total=total, desc=what, disable=disabled or self.rank != 0)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Always empty: a chat template is refused."""
        if chat_template:
            raise UserError("manyformer models take no chat template under lm-eval; leave out --apply_chat_template")
        return ""

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into the results."""
        return {
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": self.precision,
            "quantize": self.quantize,
            "checkpoint": self.checkpoint,
            "max_length": self.max_length,
            "add_bos_token": self.add_bos_token,
            "n_truncated": dict(self.n_truncated),
            "n_truncated_tokens": self.n_truncated_tokens,
        }

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Stacked tensors of all processes."""
        if self.world_size == 1:
            return tensor
        found = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(found, tensor)
        return torch.stack(found)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Objects of all processes, on process `dst`."""
        if self.world_size == 1:
            return [obj]
        found = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, found, dst=dst)
        return found

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()
