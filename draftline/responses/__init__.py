"""The target answers the prompts: deterministic shards of conversations."""
