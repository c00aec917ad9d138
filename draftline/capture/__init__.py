"""Capture of the target's hidden states: token shard in, hidden-state shard out."""
