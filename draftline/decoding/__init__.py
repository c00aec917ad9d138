"""Pure functions of speculative decoding: the target's law, verification, residual sampling."""
