"""Optimizers, their parameter groups and learning-rate schedules."""

from llm.train.optim.build import OptimizerSet, build_optimizer
from llm.train.optim.schedule import lr_factor

__all__ = ["OptimizerSet", "build_optimizer", "lr_factor"]
