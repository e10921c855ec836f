"""Models of any block behind the interface of transformers: the classes, and what carries them into an export."""
