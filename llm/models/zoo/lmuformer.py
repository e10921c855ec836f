"""LMUFormer classifiers (Speech Commands v2, permuted sequential MNIST) with their published counts."""

from __future__ import annotations

from typing import Any

from llm.models.zoo.facts import Facts, OtherModel

_PAPER = "Liu et al. 2024, arXiv:2402.04882; counts of the authors' code"


def _classifier(**fields: Any) -> Any:
    from llm.models.classifier import SequenceClassifierConfig

    return SequenceClassifierConfig.model_validate(fields).build("meta")


def speech_commands(**fields: Any) -> dict[str, Any]:
    """128 mel bands by 128 frames, 35 words."""
    return {"d_input": 128, "n_classes": 35, "d_model": 256, "order": 256, "window": 128.0} | fields


PERMUTED_DIGITS: dict[str, Any] = {
    "d_input": 1,
    "n_classes": 10,
    "d_model": 346,
    "order": 468,
    "window": 784.0,
    "n_blocks": 0,
    "stem": {"n_convs": 1, "width": 1, "channels": 3, "bias": True, "relative": False, "norm_first": True},
    "dropout": 0.4,
}

OTHERS: dict[str, OtherModel] = {
    "lmuformer-scv2": OtherModel(
        lambda: _classifier(**speech_commands()), "sequence classifier", Facts(1_621_796, _PAPER)
    ),
    "lmuformer-scv2-slmu": OtherModel(
        lambda: _classifier(**speech_commands(order=512, style="spiking")),
        "spiking sequence classifier",
        Facts(1_689_382, _PAPER),
    ),
    "lmuformer-scv2-slmu-ms": OtherModel(
        lambda: _classifier(**speech_commands(order=512, style="spiking_shortcut")),
        "spiking sequence classifier",
        Facts(1_689_894, _PAPER),
    ),
    "lmuformer-psmnist": OtherModel(
        lambda: _classifier(**PERMUTED_DIGITS),
        "sequence classifier",
        Facts(166_798, _PAPER),
    ),
}
