"""Cross-entropy of an output layer, from hidden states and the head's weight."""

from __future__ import annotations

from torch import Tensor

from kernels import dispatch
from kernels.cross_entropy import chunked, reference  # noqa: F401
from kernels.cross_entropy.reference import token_losses
from kernels.cross_entropy.spec import CROSS_ENTROPY, CrossEntropy, CrossEntropyForm, CrossEntropyQuery

__all__ = [
    "CROSS_ENTROPY",
    "CrossEntropy",
    "CrossEntropyForm",
    "CrossEntropyQuery",
    "linear_cross_entropy",
    "token_losses",
]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    form: CrossEntropyForm = CrossEntropyForm(),  # noqa: B008  (frozen)
    *,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    backend: str | None = None,
) -> CrossEntropy:
    """Loss of hidden [N, D] through the head weight [V, D] and bias [V] against labels [N] int64.

    token_weights [N] multiply each token's share of the total (no gradient flows to them). The head's matrix product
    runs in autocast's dtype where that is on; the softmax in fp32.
    """
    query = CrossEntropyQuery(hidden.device.type, hidden.dtype, form, bias is not None)
    impl = dispatch.resolve("cross_entropy", query, backend=backend)
    return impl.run(hidden, weight, labels, form, bias=bias, token_weights=token_weights)
