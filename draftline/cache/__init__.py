"""Ragged safetensors shards: token samples, and the hidden-state cache; see FORMAT.md."""
