"""The station ``gate`` as a KFP component."""
