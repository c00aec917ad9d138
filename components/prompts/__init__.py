"""The station ``prompts`` as a KFP component."""
