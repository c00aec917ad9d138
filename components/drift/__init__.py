"""Whether the champion drifted while serving."""
