"""vLLM as the engine behind the endpoint, through Ray Serve LLM, with our draft and our settings."""
