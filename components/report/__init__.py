"""The station ``report`` as a KFP component."""
