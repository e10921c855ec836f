"""Retrieval from long prompts: needles, variable tracking, common words and associative recall."""
