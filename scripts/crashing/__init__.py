"""The trials of scripts/crash.py: where they lie, what is disturbed, and how."""
