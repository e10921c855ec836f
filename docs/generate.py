"""usage: generate.py [--check]

Write docs/blocks/*.md, a page for each socket with a section for each registered part, from the registries alone.
--check writes nothing and exits with 1 when a page is not current.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pydantic_core import PydanticUndefined  # noqa: E402

from llm.blocks.base import CHANNELS, LINEARS, MIXERS, NORMS, POSITIONS, RESIDUALS  # noqa: E402
from llm.core.cost import Cost  # noqa: E402
from llm.core.errors import UserError  # noqa: E402
from llm.core.registry import Entry, Registry  # noqa: E402
from llm.models.config import ModelConfig  # noqa: E402
from llm.models.wrappers.base import WRAPPERS  # noqa: E402
from llm.parallel.plan import plan_of  # noqa: E402

WIDTH = 512
CONTEXTS = (1024, 16384)
TITLES: dict[str, tuple[Registry[Any], str]] = {
    "mixers": (MIXERS, "Token mixers"),
    "channels": (CHANNELS, "Channel mixers"),
    "linears": (LINEARS, "Linears"),
    "wrappers": (WRAPPERS, "Wrappers"),
    "norms": (NORMS, "Norms"),
    "positions": (POSITIONS, "Position encodings"),
    "residuals": (RESIDUALS, "Residual styles"),
}
NOTE = f"""Generated from the registries by `python docs/generate.py`; a test holds this page to the code.

Figures are those of the smallest registered config (the one that the contracts test, written out beside them) at a
model width of {WIDTH}; FLOPs are those of the forward pass for one token, state bytes those of one sequence in bf16."""


def figures(kind: str, config: Any) -> dict[str, Cost] | None:
    """Cost by context length of a part in one layer of the reference width; None where it has none of its own."""
    base: dict[str, Any] = {"vocab_size": 1024, "d_model": WIDTH, "max_seq_len": CONTEXTS[-1]}
    block = {"mixer": {"type": "attention", "n_heads": 8}, "channel": "swiglu"}
    model = ModelConfig.model_validate(
        base | {"layers": [{"pattern": [block], "repeat": 2 if kind == "wrappers" else 1}]}
    )
    ctx = model.context(0)
    found: dict[str, Cost] = {}
    for length in CONTEXTS:
        if kind in ("mixers", "channels"):
            cost = config.cost(ctx.dims(), length, "decode")
        elif kind == "linears":
            cost = config.cost(WIDTH, WIDTH, bias=False)
        elif kind == "norms":
            cost = config.cost(WIDTH)
        elif kind == "wrappers":
            cost = model.replace(wrappers=[config]).cost(length, "decode").total
        else:
            return None
        found[f"{length:,}"] = cost
    return found


def fields(config: type[Any]) -> list[str]:
    """A table of the keys of a config class."""
    rows = ["| key | default |", "|---|---|"]
    for name, field in config.model_fields.items():
        if name != "type":
            default = "required" if field.is_required() else field.default
            if default is PydanticUndefined and field.default_factory is not None:
                default = field.default_factory()  # type: ignore[call-arg]
            if hasattr(default, "to_dict"):
                default = default.to_dict()
            rows.append(f"| `{name}` | `{default}` |")
    return rows if len(rows) > 2 else ["No keys."]


def section(kind: str, entry: Entry[Any]) -> list[str]:
    """The part of a page for one entry."""
    config = entry.tiny()
    lines = [f"## `{entry.name}`", "", inspect.cleandoc(entry.config.__doc__ or ""), ""]
    if entry.about is not None:
        lines += [f"- **Computes** {entry.about.equation}", f"- **Use it for** {entry.about.use}"]
        lines += [f"- **Weakness** {entry.about.weakness}"]
    lines += [f"- **Source** {entry.paper} ({entry.status})"]
    if kind in ("mixers", "channels", "linears", "wrappers"):
        plan = plan_of(config)
        split = ", ".join(f"`{name}` {style}" for name, style in (plan.tp or {}).items())
        split = split or "as the linears in it" if plan.tp is not None else plan.tp_refused
        lines.append(f"- **Tensor parallel** {split}")
    for contract, reason in entry.exempt.items():
        lines.append(f"- **Exempt from the contract `{contract}`** {reason}")
    try:
        found = figures(kind, config)
    except UserError as refusal:
        lines.append(f"- **Figures** none at this width: {refusal}")
        found = None
    if found is not None:
        given = {key: value for key, value in config.to_dict().items() if value is not None}
        lines += ["", f"Figures of `{given}`:", ""]
        lines += ["| context | parameters | FLOPs per decoded token | state bytes |", "|---:|---:|---:|---:|"]
        for length, cost in found.items():
            cells = [length, f"{cost.params:,}", f"{cost.flops_per_token:,.0f}", f"{cost.state_bytes_per_seq:,}"]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *fields(entry.config), ""]


def page(kind: str) -> str:
    """One page."""
    registry, title = TITLES[kind]
    lines = [f"# {title}", "", NOTE, ""]
    if kind == "wrappers":
        lines += ["Wrappers' figures are those of a whole model of two attention layers inside.", ""]
    lines += [" · ".join(f"[{entry.name}](#{entry.name})" for entry in registry.entries()), ""]
    for entry in registry.entries():
        lines += section(kind, entry)
    if registry.refusals():
        lines += ["## Not offered", ""]
        lines += [f"- `{name}`: {reason}." for name, reason in registry.refusals().items()]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    """Write or check all pages."""
    stale = []
    for kind in TITLES:
        path = ROOT / "docs" / "blocks" / f"{kind}.md"
        text = page(kind)
        if path.exists() and path.read_text() == text:
            continue
        stale.append(str(path.relative_to(ROOT)))
        if "--check" not in sys.argv:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    print(
        f"{len(stale)} pages {'are not current' if '--check' in sys.argv else 'written'}: {', '.join(stale) or 'none'}"
    )
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
