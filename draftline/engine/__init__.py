"""The speculative engine: continuous batching of ragged verify steps."""
