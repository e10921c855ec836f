"""Decode states by kind; import them from `llm.core.state`."""
