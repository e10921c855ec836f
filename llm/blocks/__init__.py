"""Blocks: what a decoder is built from. Importing this package registers every block in it.

A new block is one file in mixers/, channels/ or linears/; packages installed beside this project add theirs through
the entry point group `manyformer.blocks`.
"""

import importlib
import pkgutil
from importlib.metadata import entry_points

from llm.blocks import channels, linears, mixers, norms, positions, progressive_norm, residuals  # noqa: F401

for _package in (linears, mixers, channels):
    for _module in pkgutil.iter_modules(_package.__path__):
        importlib.import_module(f"{_package.__name__}.{_module.name}")
for _entry_point in entry_points(group="manyformer.blocks"):
    _entry_point.load()
