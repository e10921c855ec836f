"""The decoder, its config, named variants and wrappers."""
