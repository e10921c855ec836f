"""Preparation: raw text -> tokenizer -> token stores, in parallel, restartable, in constant memory."""
