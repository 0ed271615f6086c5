"""Federated algorithms as values: records of pure functions over explicit state."""
