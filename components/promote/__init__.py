"""Promotion of a registered version as a step of its own."""
