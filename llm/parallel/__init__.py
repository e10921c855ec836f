"""How a model is spread and run: process groups and meshes, plans, activation checkpointing, compilation."""
