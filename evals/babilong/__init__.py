"""BABILong: questions about facts that are scattered in a long text (Kuratov et al. 2024), to ten million tokens."""
