"""The endpoint: an OpenAI-compatible Ray Serve application around the speculative engine."""
