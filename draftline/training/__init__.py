"""Training of the draft: batches, optimisers, exact checkpoints, the loop."""
