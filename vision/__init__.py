"""Vision encoders, heads and the bridge to language models, on the core and the trainer of `llm`."""
