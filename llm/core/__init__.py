"""Contracts that every part shares: registry, sequence description, decode state, cost, initialisation, errors."""
