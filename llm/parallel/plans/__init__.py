"""The plans of all parts, one module per family; each says how its part is split, or why it is not."""
