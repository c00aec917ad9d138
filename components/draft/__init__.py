"""The station ``draft`` as a KFP component."""
