"""What the scripts that measure share: clocks, training steps, variants of a model and their command lines."""
