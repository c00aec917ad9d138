"""Draft models: architecture, losses, vocabulary pruning, checkpoints, and the lean runner."""
