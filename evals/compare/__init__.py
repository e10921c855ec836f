"""The bake-off: candidates trained with the same tokens in the same order, measured, and put into one table."""
