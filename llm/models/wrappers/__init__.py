"""Wrappers: what stands around a whole decoder. Importing this package registers every wrapper in it."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
