"""The end of a run: what became of it, whatever it was."""
