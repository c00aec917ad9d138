"""The station ``register`` as a KFP component."""
