"""The target model: finding it, fingerprinting it, and a lean forward over a slot KV cache."""
