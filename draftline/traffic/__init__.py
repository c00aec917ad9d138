"""Live requests as prompts for the next training run: sampled, redacted, and nothing besides. Pure, without I/O."""
