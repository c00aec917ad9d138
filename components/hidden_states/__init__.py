"""The station ``hidden-states`` as a KFP component."""
