"""Callbacks of the trainer: everything beside the loop itself.

Order of the hooks: signals 0, garbage collection 1, profiler 5, memory snapshot 6, throughput 10, memory 20,
metrics.jsonl 50, console 60, TensorBoard 70, W&B 71, samples 80, report 95; a callback of your own stands at 100
unless it says otherwise.
"""

from llm.train.callbacks.base import Callback, StepOut
from llm.train.callbacks.defaults import check_logging, default_callbacks
from llm.train.callbacks.signals import Signals

__all__ = ["Callback", "Signals", "StepOut", "check_logging", "default_callbacks"]
