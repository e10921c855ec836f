"""Token mixers, one file per family."""
