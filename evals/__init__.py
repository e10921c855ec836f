"""Evaluations of language models: perplexity, long context, retrieval, harness adapters and reports."""
