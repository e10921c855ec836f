"""Channel mixers (feed-forward families), one file per family."""
