"""Whole runs: what the user asks for, how it is built, run, judged and reported."""
