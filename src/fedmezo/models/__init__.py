"""Models: where they come from, what is trained in them, and the bench that evaluates them."""
