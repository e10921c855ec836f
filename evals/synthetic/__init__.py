"""Synthetic tasks that ask one ability each: recall, copying, rewriting, learning in context. One module per task.

`python -m evals.synthetic --help` trains small models on them.
"""

from evals.synthetic import autoregression, induction, mqar, needle, regression, remember, rewrite, selective_copying

__all__ = ["autoregression", "induction", "mqar", "needle", "regression", "remember", "rewrite", "selective_copying"]
