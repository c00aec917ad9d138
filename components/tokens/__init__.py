"""The station ``tokens`` as a KFP component."""
