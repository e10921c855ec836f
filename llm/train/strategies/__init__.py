"""Strategies: how one model is trained over ranks, behind one protocol."""

from llm.train.strategies.base import NamedState, Strategy
from llm.train.strategies.factory import make_strategy

__all__ = ["NamedState", "Strategy", "make_strategy"]
