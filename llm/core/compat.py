"""What differs between the supported releases of torch and between environments: the only place for such branches."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import warnings
from typing import TYPE_CHECKING

from llm.core.errors import UserError

if TYPE_CHECKING:
    import torch

OLDEST_TORCH = (2, 11)
NEWEST_TORCH = (2, 13)


def torch_version() -> tuple[int, int]:
    """(major, minor) of the running torch."""
    import torch

    match = re.match(r"(\d+)\.(\d+)", torch.__version__)
    assert match is not None, torch.__version__
    return int(match[1]), int(match[2])


def require_supported_torch() -> None:
    """UserError when torch is too old for this code, a warning when it is newer than any that was tested."""
    import torch

    version = torch_version()
    allowed = f"{OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} to {NEWEST_TORCH[0]}.{NEWEST_TORCH[1]}"
    if version < OLDEST_TORCH:
        raise UserError(f"torch {torch.__version__} is too old (supported: {allowed}); install a newer torch")
    if version > NEWEST_TORCH:
        warnings.warn(f"torch {torch.__version__} is newer than the tested releases ({allowed})", stacklevel=2)


def require_own_kernels() -> None:
    """UserError when `import kernels` finds another package of that name, such as Hugging Face's."""
    import kernels

    if getattr(kernels, "OWNER", None) != "manyformer":
        raise UserError(
            f"`import kernels` finds {getattr(kernels, '__file__', None)}, which is not Manyformer's package; "
            "uninstall it (pip uninstall kernels) or put the Manyformer checkout first on PYTHONPATH"
        )
    try:
        foreign = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    warnings.warn(
        f"the package `kernels` {foreign} of Hugging Face is installed and hidden by Manyformer's; transformers may "
        "fail to import: pip uninstall kernels",
        stacklevel=2,
    )


def mark_any_length(tensor: torch.Tensor, dim: int = 0) -> None:
    """Tell the compiler that a dimension changes from call to call, so that it does not compile once per length.

    Does nothing before the first `torch.compile`, which is what loads the compiler.
    """
    import torch

    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and not torch.compiler.is_compiling():
        dynamo.maybe_mark_dynamic(tensor, dim)


def packs_weights() -> bool:
    """Whether weights can be kept in oneDNN's layout here."""
    import torch

    ops = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and all(
        hasattr(ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    )


def pack_weight(weight: torch.Tensor, n_rows: int) -> torch.Tensor:
    """A copy of a weight [d_out, d_in] in oneDNN's layout for products with about `n_rows` rows."""
    import torch

    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), n_rows)
    return packed


def packed_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b of a packed weight."""
    import torch

    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y
