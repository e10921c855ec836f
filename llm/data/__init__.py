"""Text in, batches out: tokenizers, preparation into token stores, mixtures, packing and the loader."""
