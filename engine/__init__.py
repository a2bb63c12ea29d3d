"""Training, generation, evaluation: what the programs at the root call."""
