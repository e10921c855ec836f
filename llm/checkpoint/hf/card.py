"""The model card of an export."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llm.checkpoint.hf.families import Family
from llm.checkpoint.hf.parity import Parity
from llm.models.config import ModelConfig


def model_card(
    title: str,
    family: Family,
    config: ModelConfig,
    hf: dict[str, Any],
    parity: Parity,
    facts: dict[str, Any],
    has_tokenizer: bool,
) -> str:
    """README.md of an export: what the model is, how to load it, how near it is to ours. facts: further rows."""
    rows: dict[str, Any] = {
        "architecture": family.architecture,
        "parameters": f"{config.cost().total.params:,}",
        "layers": config.n_layers,
        "width": config.d_model,
        "heads (query, key-value)": f"{hf['num_attention_heads']}, {hf['num_key_value_heads']}",
        "context": f"{config.max_seq_len:,} tokens",
        "vocabulary": f"{config.required_vocab_size():,}",
        "weights": hf["dtype"],
        **facts,
    }
    table = _table(rows)
    load = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    load.append('model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")')
    if has_tokenizer:
        load += [
            'tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")',
            'inputs = tokenizer(tokenizer.eos_token + "Once", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
        ]
    code = "\n".join(load)
    lines = _figures(parity, hf["dtype"])
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [manyformer]
---
# {title}

A decoder language model trained with Manyformer and exported as a plain `{family.architecture}`.

{table}

## Load it

```python
{code}
```

## Parity with the original

{lines}
"""


def remote_card(
    title: str, config: ModelConfig, hf: dict[str, Any], parity: Parity, facts: dict[str, Any], has_tokenizer: bool
) -> str:
    """README.md of an export that carries its code."""
    blocks = config.blocks()
    rows: dict[str, Any] = {
        "mixers": _kinds([block.mixer for block in blocks]),
        "channels": _kinds([block.channel for block in blocks]),
        "wrappers": _kinds(config.wrappers) or "none",
        "parameters": f"{config.cost().total.params:,}",
        "layers": config.n_layers,
        "width": config.d_model,
        "context in training": f"{config.max_seq_len:,} tokens",
        "vocabulary": f"{config.required_vocab_size():,}",
        "weights": hf["dtype"],
        **facts,
    }
    load = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    load.append('model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER", trust_remote_code=True)')
    if has_tokenizer:
        load += [
            'tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")',
            'inputs = tokenizer(tokenizer.eos_token + "Once", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
        ]
    code = "\n".join(load)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [manyformer, custom_code]
---
# {title}

A decoder language model trained with Manyformer. Its code lies in this folder (Apache-2.0) and needs torch and
transformers alone; `trust_remote_code=True` runs it. With Manyformer installed, `import llm.hf` does without.

{_table(rows)}

## Load it

```python
{code}
```

## Parity with the original

Checked in a process that does not see Manyformer, at once and token by token through the cache.

{_figures(parity, hf["dtype"])}
"""


def _kinds(parts: Sequence[Any]) -> str:
    return ", ".join(dict.fromkeys(part.type for part in parts if part is not None))


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items())])


def _figures(parity: Parity, dtype: str) -> str:
    figures = [
        f"- compared: {parity.n_logits:,} logits of a fixed batch, both models in float32 with these weights",
        f"- largest difference: {parity.max_difference:.3g}, that is {parity.relative:.2g} of the largest logit "
        f"(the export is refused above {parity.tolerance:g})",
        f"- same likeliest next token: {100 * parity.next_token_agreement:.2f}% of positions",
    ]
    if parity.rounding is not None:
        figures.append(
            f"- rounding the weights to {dtype} moved the logits by up to {parity.rounding:.2g} of the largest"
        )
    return "\n".join(figures)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
