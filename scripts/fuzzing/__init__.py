"""What `scripts/fuzz.py` is made of: inputs that mean harm, what takes them in, and who counts."""
