"""Rules about the whole code base: what loads what, and what is public."""
