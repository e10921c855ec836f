"""The model card of an export."""

from __future__ import annotations

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
    table = "\n".join(["| | |", "|---|---|", *(f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items())])
    figures = [
        f"- compared: {parity.n_logits:,} logits of a fixed batch, both models in float32 with these weights",
        f"- largest difference: {parity.max_difference:.3g}, that is {parity.relative:.2g} of the largest logit "
        f"(the export is refused above {parity.tolerance:g})",
        f"- same likeliest next token: {100 * parity.next_token_agreement:.2f}% of positions",
    ]
    if parity.rounding is not None:
        figures.append(
            f"- rounding the weights to {hf['dtype']} moved the logits by up to {parity.rounding:.2g} of the largest"
        )
    load = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    load.append('model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")')
    if has_tokenizer:
        load += [
            'tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")',
            'inputs = tokenizer(tokenizer.eos_token + "Once", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
        ]
    code = "\n".join(load)
    lines = "\n".join(figures)
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


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
