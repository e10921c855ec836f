"""Typed, closed configuration: base classes, units, YAML composition with dotted overrides, migrations."""

from llm.config.base import Config, Count, Tagged

__all__ = ["Config", "Count", "Tagged"]
