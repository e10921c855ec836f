"""Named models as data: published shapes with their exact parameter counts, and small shapes to measure with.

`model: {variant: llama-3.2-1b, max_seq_len: 4096}` in a run config takes one and lays the other keys over it. Each
module of this package gives VARIANTS {name: model section} and FACTS {name: Facts}, and may give OTHERS {name:
OtherModel}, published models that are no decoders.
`python -m llm.models.zoo` prints the table of docs/zoo.md and says whether every count is the published one.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
from typing import Any

from llm.core.errors import UserError, unknown_name
from llm.models.zoo.facts import Facts, OtherModel

VARIANTS: dict[str, dict[str, Any]] = {}
FACTS: dict[str, Facts] = {}
OTHERS: dict[str, OtherModel] = {}

for _module in sorted(pkgutil.iter_modules(__path__), key=lambda module: (module.name != "dense", module.name)):
    if _module.name != "__main__":
        _family = importlib.import_module(f"{__name__}.{_module.name}")
        VARIANTS.update(getattr(_family, "VARIANTS", {}))
        FACTS.update(getattr(_family, "FACTS", {}))
        OTHERS.update(getattr(_family, "OTHERS", {}))


def variant(name: str) -> dict[str, Any]:
    """The model section of a named variant, the caller's own copy; an unknown name raises UserError."""
    if name not in VARIANTS:
        raise UserError(unknown_name("model variant", name, VARIANTS))
    return copy.deepcopy(VARIANTS[name])
