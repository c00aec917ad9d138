"""The station ``evaluation`` as a KFP component."""
