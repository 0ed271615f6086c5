"""Federated algorithms as values: four pure functions over explicit state."""
