"""Backends of the noise contract; every one reproduces the same bits."""
