"""What scripts/release.py is made of: the archives, and an environment that holds nothing but the release."""
