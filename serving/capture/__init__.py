"""Live requests on their way to object storage, as prompts for the next training run."""
